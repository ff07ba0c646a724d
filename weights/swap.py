"""Replace a whole folder so that whoever reads it, at any time, sees all of the old or the new.

The new content is written into a sibling folder, synced to disk, and then exchanged with the old
one: in a single step on Linux (renameat2) and macOS (renamex_np). Where the system or the disk has
no such step (Windows, some network disks), two renames do it. A process killed between the two
leaves no folder under the name, and the old one whole beside it, as `.NAME.saving-XXXX.old`; the
next save puts it back first. All leftovers of killed processes bear the prefix `.NAME.saving-` and
are removed by the next save to the same folder.
"""

import ctypes
import errno
import logging
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .folder import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("modernbert")

_REMEDIES = {
    errno.ENOSPC: "free some space or save to another disk",
    errno.EDQUOT: "free some of your quota or save to another disk",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder you may write to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EBUSY: "save into a sub-folder of it",
    errno.EEXIST: "choose names that are not both a file and a folder",
}


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Create `path` with the user's umask, write the chunks and sync them to disk."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    file = os.open(path, flags, 0o666)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(file, rest) :]
        os.fsync(file)
    finally:
        os.close(file)


@contextmanager
def replaced_folder(
    folder: str | os.PathLike[str], *, stale: Callable[[str], bool]
) -> Iterator[Path]:
    """Yield an empty folder to fill, then put it in the place of `folder`.

    What the old folder holds beside is carried over: every file (hard-linked, else copied), link
    and sub-folder that was not written anew, save those whose relative path is `stale`.

    On any error the old folder stays as it was. Raises `CheckpointError` for a name that cannot be
    a folder, without permission, without space.
    """
    try:
        target = _target(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target.parent) as locked:
            _clean_up(target, locked)
            fresh = _make_sibling(target)
            try:
                yield fresh
                if target.is_dir():
                    _carry_over(target, fresh, stale)
                for current, _, _ in os.walk(fresh, topdown=False):
                    _sync(current)
                _swap(fresh, target)
                _sync(target.parent)
            finally:
                _remove(fresh)  # after an exchange this is the old content
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0, "check the disk and try again")
        raise CheckpointError(
            f"cannot save to {os.fspath(folder)}: {error.strerror or error}; {remedy}. The folder "
            "holds the old content or the new, whole"
        ) from error


def _target(folder: str | os.PathLike[str]) -> Path:
    text = os.fspath(folder)
    if not text.strip() or "\0" in text:
        raise CheckpointError(f"cannot save to a folder called {text!r}; give it a name")
    target = Path(os.path.realpath(os.path.expanduser(text)))
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"cannot save to {target}: {path} is a file; choose another name")
    if os.path.ismount(target) or Path.cwd().is_relative_to(target):
        raise CheckpointError(
            f"cannot save to {target}: the current directory or a mount point cannot be replaced "
            "in one step; save into a sub-folder of it"
        )
    if target.exists() and not os.access(target, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot save to {target}: it is read-only; change its permissions")
    return target


def _prefix(target: Path) -> str:
    return f".{target.name}.saving-"


def _make_sibling(target: Path) -> Path:
    fresh = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}")
    os.mkdir(fresh)  # unlike tempfile.mkdtemp, this leaves the mode to the umask
    if target.is_dir():
        shutil.copystat(target, fresh)  # a private folder stays private
    return fresh


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the folder's advisory lock, so that saves into it queue; yields False without one."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open folders
        yield False
        return
    try:
        yield _try_lock(handle, folder)
    finally:
        os.close(handle)


def _try_lock(handle: int, folder: Path) -> bool:
    if fcntl is None:
        return False
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another save into %s", folder)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:  # some network disks have no locks
        logger.debug("%s cannot be locked: %s", folder, error)
        return False
    return True


def _clean_up(target: Path, locked: bool) -> None:
    """Finish or remove what killed saves left behind."""
    leftovers = [path for path in target.parent.iterdir() if path.name.startswith(_prefix(target))]
    for path in leftovers:
        if path.name.endswith(".old") and not target.exists():
            os.rename(path, target)
        elif locked:
            _remove(path)
        else:
            logger.warning("%s is left from an interrupted save and may be deleted", path)


def _carry_over(old: Path, new: Path, stale: Callable[[str], bool], inside: str = "") -> None:
    with os.scandir(old) as entries:
        for entry in entries:
            source, destination = old / entry.name, new / entry.name
            relative = inside + entry.name
            if entry.is_dir(follow_symlinks=False):
                if not destination.is_dir():
                    os.mkdir(destination)
                _carry_over(source, destination, stale, f"{relative}/")
                shutil.copystat(source, destination)
            elif stale(relative) or os.path.lexists(destination):
                continue
            elif entry.is_symlink():
                os.symlink(os.readlink(source), destination)
            else:
                _link_or_copy(source, destination)


def _link_or_copy(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:  # no hard links on this disk, or not for another user's file
        shutil.copy2(source, destination)
        _sync(destination)


def _sync(path: str | Path) -> None:
    if os.name == "nt" and os.path.isdir(path):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(fresh: Path, target: Path) -> None:
    if not target.exists():
        os.rename(fresh, target)
    elif not _exchange(fresh, target):
        logger.info("%s is replaced by two renames: this disk cannot swap folders", target)
        aside = fresh.with_name(f"{fresh.name}.old")
        os.rename(target, aside)
        try:
            os.rename(fresh, target)
        except BaseException:
            os.rename(aside, target)
            raise
        os.rename(aside, fresh)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where that cannot be done, with nothing changed."""
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    here = -100  # AT_FDCWD
    swap = ctypes.c_uint(2)  # RENAME_EXCHANGE and RENAME_SWAP alike
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        return libc.renameat2(here, names[0], here, names[1], swap) == 0
    if hasattr(libc, "renamex_np"):
        return libc.renamex_np(*names, swap) == 0
    return False


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("%s could not be removed completely and may be deleted", folder)
