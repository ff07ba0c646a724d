"""Upload a model folder to the Hugging Face Hub."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi


def push_folder(
    save: Callable[[Path], None],
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload model",
    create_pr: bool = False,
) -> str:
    """Create the repository if it is missing and upload what `save(folder)` writes, in one commit.

    Args:
        save: writes the model into the folder it is given.
        repo_id: "user/name" on the Hub.
        revision: the branch to commit to; the main one by default.
        private: whether a new repository is private; the user's default otherwise.
        token: an access token, or None for the stored one.
        commit_message: the commit's title.
        create_pr: open a pull request instead of committing.

    Returns the URL of the commit. Raises `huggingface_hub`'s own errors.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save(folder)
        # Only now: a model that cannot be saved leaves no empty repository behind.
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
    return str(commit.commit_url)
