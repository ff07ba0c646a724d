from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modernbert.weights import push, push_folder


class FakeApi:
    """Records what would reach the Hub."""

    calls: list[tuple[str, Any]]

    def __init__(self, token: str | None):
        FakeApi.calls = [("token", token)]

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("create", (repo_id, options)))
        return SimpleNamespace(repo_id=f"user/{repo_id}")

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        files = {p.name: p.read_bytes() for p in Path(options.pop("folder_path")).iterdir()}
        self.calls.append(("upload", (options, files)))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture(autouse=True)
def _hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(push, "HfApi", FakeApi)


def test_uploads_what_was_saved_in_one_commit() -> None:
    def save(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_bytes(b"{}")

    url = push_folder(save, "name", private=True, token="secret", revision="next")
    assert url == "https://hub/commit/1"
    (_, token), (_, (name, options)), (_, (upload, files)) = FakeApi.calls
    assert (token, name) == ("secret", "name")
    assert options == {"private": True, "exist_ok": True}
    assert upload["repo_id"] == "user/name" and upload["revision"] == "next"
    assert files == {"config.json": b"{}"}


def test_a_model_that_cannot_be_saved_creates_no_repository() -> None:
    def save(folder: Path) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        push_folder(save, "name")
    assert [call[0] for call in FakeApi.calls] == ["token"]
