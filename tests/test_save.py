"""Saving a model folder: what it writes, and that no crash leaves a mixture behind."""

import errno
import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, load_file

from modernbert.weights import CheckpointError, open_checkpoint, save_folder, swap
from modernbert.weights.checkpoint import DTYPES
from modernbert.weights.save import safetensors_chunks

Snapshot = dict[str, tuple[str, Any]]


def snapshot(folder: Path) -> Snapshot | None:
    """Everything below `folder`, byte for byte; None when it does not exist."""
    if not folder.exists():
        return None
    found: Snapshot = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[relative] = "link", os.readlink(path)
        elif path.is_dir():
            found[relative] = "folder", None
        else:
            found[relative] = "file", path.read_bytes()
    return found


def old_save(folder: Path) -> None:
    """An older save, sharded and with a Dense module, and the user's own files beside it."""
    save_folder(
        folder,
        files={"config.json": b'{"version": "old"}', "1_Pooling/config.json": b"{}"},
        tensors={name: torch.full((8,), 1.0) for name in ("a", "b", "c")},
        max_shard_size=40,
        extra_tensors={"2_Dense/model.safetensors": {"linear.weight": torch.ones(2, 2)}},
    )
    (folder / "README.md").write_text("mine")
    (folder / "runs").mkdir()
    (folder / "runs" / "log.txt").write_text("step 1")
    (folder / "latest").symlink_to("runs/log.txt")


def new_save(folder: Path) -> None:
    save_folder(
        folder,
        files={"config.json": b'{"version": "new"}', "1_Pooling/config.json": b'{"x": 1}'},
        tensors={"a": torch.full((8,), 2.0), "b": torch.full((3,), 2.0)},
        extra_tensors={"2_Dense/model.safetensors": {"linear.weight": torch.zeros(2, 2)}},
    )


# What is written


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_file_format_is_the_library_s(dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.randn(5, 3).mul(10).to(dtype),
        "scalar": torch.tensor(1).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
        "turned": torch.randn(4, 6).mul(10).to(dtype).T,
        "byte": torch.tensor([7], dtype=torch.uint8),
        "ü": torch.ones(2, dtype=torch.float64),
    }
    raw = b"".join(bytes(chunk) for chunk in safetensors_chunks(tensors))
    assert int.from_bytes(raw[:8], "little") % 8 == 0, "the numbers behind are not aligned"
    loaded = load(raw)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_metadata_and_layout(tmp_path: Path) -> None:
    new_save(tmp_path / "m")
    assert sorted(snapshot(tmp_path / "m") or {}) == [
        "1_Pooling",
        "1_Pooling/config.json",
        "2_Dense",
        "2_Dense/model.safetensors",
        "config.json",
        "model.safetensors",
    ]
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert os.listdir(tmp_path) == ["m"]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    max_shard_size=st.integers(1, 100) | st.sampled_from(["1KB", "5GB", "0.02KB"]),
)
def test_save_and_open_is_identity(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], max_shard_size: int | str
) -> None:
    folder = tmp_path_factory.mktemp("save") / "m"
    tensors = {f"t{number}": torch.randn(size) for number, size in enumerate(sizes)}
    save_folder(
        folder, files={"config.json": b"{}"}, tensors=tensors, max_shard_size=max_shard_size
    )
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.get(name), tensor)
    for shard in folder.glob("model-*"):
        held = load_file(shard)
        assert (
            len(held) == 1
            or isinstance(max_shard_size, str)
            or (sum(tensor.nbytes for tensor in held.values()) <= max_shard_size)
        )


def test_mapped_tensors_can_be_saved_where_they_came_from(tmp_path: Path) -> None:
    tensors = {name: torch.randn(8) for name in "abc"}
    save_folder(tmp_path / "m", files={"config.json": b"{}"}, tensors=tensors)
    checkpoint = open_checkpoint(tmp_path / "m")
    mapped = {name: checkpoint.get(name) for name in checkpoint.tensors}
    save_folder(tmp_path / "m", files={"config.json": b"{}"}, tensors=mapped, max_shard_size=40)
    assert len(list((tmp_path / "m").glob("model-*"))) == 3
    again = open_checkpoint(tmp_path / "m")
    for name, tensor in tensors.items():
        assert torch.equal(again.get(name), tensor)
        assert torch.equal(mapped[name], tensor)


def test_tied_tensors_are_saved_once(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    halves = torch.randn(10)
    save_folder(
        tmp_path / "m",
        files={},
        tensors={
            "first": weight,
            "tied": weight,
            "parameter": torch.nn.Parameter(weight),
            "low": halves[:5],
            "high": halves[5:],
            "none": halves[3:3],
        },
    )
    loaded = load_file(tmp_path / "m" / "model.safetensors")
    assert sorted(loaded) == ["first", "high", "low", "none"]
    assert torch.equal(loaded["high"], halves[5:])
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 1000


WHOLE = torch.randn(4, 4)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": WHOLE, "b": WHOLE[1:]}, "share a part"),
        ({"a": WHOLE, "b": WHOLE.view(-1)}, "share a part"),
        ({"a": WHOLE, "b": WHOLE.T}, "share a part"),
        ({"a": WHOLE[:3], "b": torch.ones(2), "c": WHOLE[2:]}, "share a part"),
        ({"a": torch.ones(2, device="meta")}, "meta"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "complex64"),
        ({}, "no tensors"),
    ],
)
def test_tensors_that_cannot_be_saved(
    tmp_path: Path, tensors: dict[str, torch.Tensor], message: str
) -> None:
    old_save(tmp_path / "m")
    old = snapshot(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        save_folder(tmp_path / "m", files={}, tensors=tensors)
    assert snapshot(tmp_path / "m") == old
    assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize("size", [0, -5, "5 potatoes", "5"])
def test_shard_sizes_that_make_no_sense(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(ValueError):
        save_folder(tmp_path / "m", files={}, tensors={"a": torch.ones(1)}, max_shard_size=size)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "/x", "a/b/c", "", "a\\b", "C:x", "x\0y", "a/../b"])
def test_file_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError):
        save_folder(tmp_path / "m", files={name: b""})
    with pytest.raises(CheckpointError):
        save_folder(tmp_path / "m", files={}, extra_tensors={name: {"a": torch.ones(1)}})
    assert os.listdir(tmp_path) == []


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_follow_the_umask(tmp_path: Path, mask: int) -> None:
    with umask(mask):
        new_save(tmp_path / "m")
    for path in [tmp_path / "m", *(tmp_path / "m").rglob("*")]:
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~mask, path


def test_a_private_folder_stays_private(tmp_path: Path) -> None:
    with umask(0o022):
        old_save(tmp_path / "m")
        for private in ("", "1_Pooling", "runs"):
            (tmp_path / "m" / private).chmod(0o700)
        new_save(tmp_path / "m")
    for private in ("", "1_Pooling", "runs"):
        assert stat.S_IMODE((tmp_path / "m" / private).stat().st_mode) == 0o700


# What stays


def test_what_the_user_keeps_in_the_folder_stays(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    old_save(folder)
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "x").write_bytes(b"\0")
    (folder / ".git" / "empty").mkdir()
    (folder / "1_Pooling" / "notes.txt").write_text("mine")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "other.safetensors").write_bytes(b"mine")
    (folder / "runs" / "model.safetensors").write_bytes(b"mine")
    (folder / "broken").symlink_to("nowhere")
    (folder / "run.sh").write_text("#!")
    (folder / "run.sh").chmod(0o755)
    inode = (folder / "README.md").stat().st_ino
    new_save(folder)

    kept = snapshot(folder) or {}
    assert kept["README.md"] == ("file", b"mine")
    assert kept["runs/log.txt"] == ("file", b"step 1")
    assert kept["latest"] == ("link", "runs/log.txt")
    assert kept["broken"] == ("link", "nowhere")
    assert kept[".git/objects/x"] == ("file", b"\0")
    assert kept[".git/empty"] == ("folder", None)
    assert kept["1_Pooling/notes.txt"] == ("file", b"mine")
    assert kept["1_Pooling/config.json"] == ("file", b'{"x": 1}')
    assert kept["pytorch_model.bin"] == ("file", b"pickle")
    assert kept["other.safetensors"] == ("file", b"mine")
    assert kept["runs/model.safetensors"] == ("file", b"mine")
    assert (folder / "run.sh").stat().st_mode & 0o111
    assert (folder / "README.md").stat().st_ino == inode
    assert not [name for name in kept if "-of-" in name or name.endswith(".index.json")]
    assert open_checkpoint(folder).get("a").tolist() == [2.0] * 8


def test_without_hard_links_files_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    old_save(tmp_path / "m")
    new_save(tmp_path / "m")
    assert (tmp_path / "m" / "runs" / "log.txt").read_text() == "step 1"


def test_saving_files_alone_keeps_the_weights(tmp_path: Path) -> None:
    old_save(tmp_path / "m")
    old = snapshot(tmp_path / "m") or {}
    save_folder(tmp_path / "m", files={"tokenizer.json": b"{}"})
    assert snapshot(tmp_path / "m") == {**old, "tokenizer.json": ("file", b"{}")}


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    old_save(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    new_save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert open_checkpoint(tmp_path / "real").get("a").tolist() == [2.0] * 8


def test_parents_are_made(tmp_path: Path) -> None:
    new_save(tmp_path / "a" / "b" / "m")
    assert open_checkpoint(tmp_path / "a" / "b" / "m").config == {"version": "new"}


# What cannot be written


@pytest.mark.parametrize("name", ["", "  ", "x\0y"])
def test_empty_folder_name(name: str) -> None:
    with pytest.raises(CheckpointError, match="give it a name"):
        save_folder(name, files={})


def test_places_that_cannot_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file is a file"):
        new_save(tmp_path / "file")
    with pytest.raises(CheckpointError, match="file is a file"):
        new_save(tmp_path / "file" / "m")
    with pytest.raises(CheckpointError, match="shorter name"):
        new_save(tmp_path / ("x" * 300))
    with pytest.raises(CheckpointError, match="mount point"):
        new_save(Path("/"))
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for name in (".", ".."):
        with pytest.raises(CheckpointError, match="current directory"):
            new_save(Path(name))
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "here"]


def test_a_file_where_a_module_folder_is_needed(tmp_path: Path) -> None:
    old_save(tmp_path / "m")
    old = snapshot(tmp_path / "m")
    with pytest.raises(CheckpointError, match="both a file and a folder"):
        save_folder(tmp_path / "m", files={"runs": b"a file now"})
    assert snapshot(tmp_path / "m") == old
    assert os.listdir(tmp_path) == ["m"]


def test_a_pipe_in_the_folder_does_not_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    old_save(tmp_path / "m")
    os.mkfifo(tmp_path / "m" / "pipe")
    with pytest.raises(CheckpointError, match="named pipe"):
        new_save(tmp_path / "m")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do anything")
@pytest.mark.parametrize("where", ["m", "."])
def test_without_permission(tmp_path: Path, where: str) -> None:
    old_save(tmp_path / "m")
    old = snapshot(tmp_path / "m")
    (tmp_path / where).chmod(0o555)
    try:
        with pytest.raises(CheckpointError, match="read-only|may write to"):
            new_save(tmp_path / "m")
    finally:
        (tmp_path / where).chmod(0o755)
    assert snapshot(tmp_path / "m") == old


@pytest.mark.parametrize(
    ("code", "remedy"),
    [(errno.EACCES, "may write to"), (errno.EROFS, "may write to"), (errno.EDQUOT, "quota")],
)
def test_the_disk_s_reasons_come_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, remedy: str
) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    old_save(tmp_path / "m")
    old = snapshot(tmp_path / "m")
    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(CheckpointError, match=remedy) as caught:
        new_save(tmp_path / "m")
    assert os.strerror(code) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert snapshot(tmp_path / "m") == old
    assert os.listdir(tmp_path) == ["m"]


# Crashes

CALLS = ("open", "write", "fsync", "mkdir", "link", "symlink", "rename", "unlink", "rmdir")


class Killed(BaseException):
    """The process ends here: nothing that would run after it may have an effect."""


class Faults:
    """Counts the calls that reach the disk and lets call number `at` fail."""

    def __init__(self, at: int = 0, how: str = "none") -> None:
        self.at, self.how, self.count, self.dead = at, how, 0, False

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.dead:
                raise Killed
            self.count += 1
            if self.count != self.at or self.how == "none":
                return real(*args, **options)
            if self.how in ("before", "exit"):
                self.die()
            if self.how in ("ENOSPC", "EIO"):
                code = getattr(errno, self.how)
                raise OSError(code, os.strerror(code))
            try:
                if name == "write":  # killed in the middle
                    real(args[0], bytes(args[1])[: len(args[1]) // 2])
                else:
                    real(*args, **options)
            finally:
                self.die()

        return call

    def die(self) -> None:
        if self.how == "exit":
            os._exit(9)
        self.dead = True
        raise Killed

    @contextmanager
    def installed(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self.wrap(name, getattr(os, name)))
            patch.setattr(swap, "_exchange", self.wrap("exchange", swap._exchange))
            yield


def number_of_calls(folder: Path, prepare: Callable[[Path], None]) -> int:
    prepare(folder)
    faults = Faults()
    with faults.installed():
        new_save(folder)
    return faults.count


def prepare_nothing(folder: Path) -> None:
    pass


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder.parent) if name != folder.name]


@pytest.fixture
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of saves need not wait for the disk; that all is synced has its own test."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(params=["one step", "two renames"])
def swapping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to put the new folder in place; the second is for disks without the first."""
    if request.param == "two renames":
        monkeypatch.setattr(swap, "_exchange", lambda one, other: False)
    return request.param


def test_linux_and_macos_swap_in_one_step(tmp_path: Path) -> None:
    if sys.platform == "win32":
        pytest.skip("Windows has no such call")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    assert swap._exchange(tmp_path / "a", tmp_path / "b")
    assert (os.listdir(tmp_path / "a"), os.listdir(tmp_path / "b")) == ([], ["x"])
    assert not swap._exchange(tmp_path / "a", tmp_path / "absent")


@pytest.mark.parametrize("how", ["before", "after"])
@pytest.mark.parametrize("prepare", [old_save, prepare_nothing])
def test_killed_at_every_call(
    tmp_path: Path, quick_disk: None, swapping: str, prepare: Callable[[Path], None], how: str
) -> None:
    """Killed at call 1, 2, 3...: the old folder or the new one, and the next save succeeds."""
    calls = number_of_calls(tmp_path / "counted" / "m", prepare)
    prepare(tmp_path / "old" / "m")
    old, new = snapshot(tmp_path / "old" / "m"), snapshot(tmp_path / "counted" / "m")
    assert calls > (50 if old else 25)
    seen = []
    for at in range(1, calls + 1):
        folder = tmp_path / str(at) / "m"
        folder.parent.mkdir()
        prepare(folder)
        with Faults(at, how).installed(), pytest.raises(Killed):
            new_save(folder)
        found = snapshot(folder)
        if found is None and old is not None:
            assert swapping == "two renames"
            [aside] = folder.parent.glob(".m.saving-*.old")
            assert snapshot(aside) == old
        else:
            assert found in (old, new), f"a mixture after call {at}"
        seen.append(found)
        assert all(name.startswith(".m.saving-") for name in leftovers(folder))

        save_folder(folder, files={"extra.json": b"{}"})
        extra: Snapshot = {"extra.json": ("file", b"{}")}
        assert snapshot(folder) == {**(found or old or {}), **extra}
        assert leftovers(folder) == []
        new_save(folder)
        assert snapshot(folder) == {**(new or {}), **extra}
    # The change is at one point: old until then, new from there.
    assert seen[0] == old and seen[-1] == new
    assert [found == new for found in seen] == sorted(found == new for found in seen)
    if old is not None:
        assert seen.count(None) == (0 if swapping == "one step" else 1)


@pytest.mark.parametrize("how", ["ENOSPC", "EIO"])
def test_an_error_at_every_call(tmp_path: Path, quick_disk: None, swapping: str, how: str) -> None:
    """The disk refuses call 1, 2, 3...: a clear error and nothing left behind, or success."""
    calls = number_of_calls(tmp_path / "counted" / "m", old_save)
    old_save(tmp_path / "old" / "m")
    old, new = snapshot(tmp_path / "old" / "m"), snapshot(tmp_path / "counted" / "m")
    refused = 0
    for at in range(1, calls + 1):
        folder = tmp_path / str(at) / "m"
        old_save(folder)
        with Faults(at, how).installed():
            try:
                new_save(folder)
            except CheckpointError as error:
                refused += 1
                assert "\n" not in str(error) and str(folder) in str(error)
                assert how != "ENOSPC" or "free some space" in str(error)
                assert snapshot(folder) in (old, new), f"a mixture after call {at}"
            else:
                assert snapshot(folder) == new
        new_save(folder)
        assert snapshot(folder) == new
        assert leftovers(folder) == []
    assert refused > calls / 3


EXIT = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
os.fsync = lambda handle: None
sys.path.insert(0, sys.argv[1])
from test_save import Faults, new_save, old_save

def child(work):
    process = os.fork()
    if process == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

root, at = Path(sys.argv[2]), 0
while True:
    at += 3
    folder = root / str(at) / "m"
    old_save(folder)
    with Faults(at, "exit").installed():
        code = child(lambda: new_save(folder))
    if code == 0:
        break
    assert code == 9, code
print(at)
"""


def test_processes_that_really_exit(tmp_path: Path, quick_disk: None) -> None:
    """The same with `os._exit` in forked processes, where not even `finally` runs."""
    old_save(tmp_path / "old")
    new_save(tmp_path / "new")
    new = snapshot(tmp_path / "new") or {}
    user = {"README.md", "latest", "runs", "runs/log.txt"}
    old = snapshot(tmp_path / "old") or {}
    both = {**new, **{name: old[name] for name in user}}
    ran = subprocess.run(
        [sys.executable, "-c", EXIT, str(Path(__file__).parent), str(tmp_path / "forked")],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    last = int(ran.stdout)
    assert last > 50
    found = [snapshot(tmp_path / "forked" / str(at) / "m") for at in range(3, last + 1, 3)]
    assert all(each in (old, both) for each in found)
    assert found[0] == old and found[-1] == both
    for at in range(3, last + 1, 3):
        folder = tmp_path / "forked" / str(at) / "m"
        new_save(folder)
        assert snapshot(folder) == both
        assert leftovers(folder) == []


def test_everything_is_on_disk_before_the_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_save(tmp_path / "m")
    synced: list[tuple[int, int]] = []
    sync, exchange = os.fsync, swap._exchange

    def recording_sync(handle: int) -> None:
        found = os.fstat(handle)
        synced.append((found.st_dev, found.st_ino))
        sync(handle)

    def checking_exchange(one: Path, other: Path) -> bool:
        written = ["", "config.json", "model.safetensors", "1_Pooling", "1_Pooling/config.json"]
        written += ["2_Dense", "2_Dense/model.safetensors", "runs"]
        for name in written:
            found = (one / name).stat()
            assert (found.st_dev, found.st_ino) in synced, name
        synced.clear()
        return exchange(one, other)

    monkeypatch.setattr(os, "fsync", recording_sync)
    monkeypatch.setattr(swap, "_exchange", checking_exchange)
    new_save(tmp_path / "m")
    parent = tmp_path.stat()
    assert synced == [(parent.st_dev, parent.st_ino)]


def test_leftovers_of_other_folders_are_left_alone(tmp_path: Path) -> None:
    for name in (".other.saving-00", ".m.saving-00", ".m.saving-11.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    new_save(tmp_path / "n")
    assert len(leftovers(tmp_path / "n")) == 3
    old_save(tmp_path / "m2")
    (tmp_path / ".m.saving-11.old" / "x").unlink()
    new_save(tmp_path / "m")
    assert sorted(leftovers(tmp_path / "m")) == [".other.saving-00", "m2", "n"]


def test_without_a_lock_leftovers_are_named_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(swap, "fcntl", None)
    (tmp_path / ".m.saving-00").mkdir()
    new_save(tmp_path / "m")
    assert leftovers(tmp_path / "m") == [".m.saving-00"]
    assert ".m.saving-00" in caplog.text


def test_saves_at_the_same_time_queue(tmp_path: Path) -> None:
    """Eight ranks that all save to one folder: each succeeds, and the name is never vacant."""
    folder = tmp_path / "m"
    failures: list[BaseException] = []
    done = threading.Event()

    def save(value: int) -> None:
        try:
            for _ in range(4):
                save_folder(
                    folder,
                    files={"config.json": json.dumps({"value": value}).encode()},
                    tensors={name: torch.full((9,), float(value)) for name in "abcd"},
                    max_shard_size=40,
                )
        except BaseException as error:
            failures.append(error)

    save(0)
    threads = [threading.Thread(target=save, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()

    def read() -> None:
        while not done.is_set():
            if not folder.is_dir():
                failures.append(AssertionError("the folder was absent for a moment"))

    reader = threading.Thread(target=read)
    reader.start()
    for thread in threads:
        thread.join()
    done.set()
    reader.join()
    assert failures == []
    value = open_checkpoint(folder).config["value"]
    assert open_checkpoint(folder).get("d").tolist() == [float(value)] * 9
    assert leftovers(folder) == []
