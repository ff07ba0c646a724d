"""A model folder, from the Hub or from disk, read without trusting it and without torch."""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

EMBEDDED = Path(__file__).with_name("embedded")
EMBEDDED_NAME = "modernbert-mini"

MAX_JSON_BYTES = 2 * 2**20  # a config or index has some kilobytes, 30,000 labels have 2 MB
MAX_JSON_DEPTH = 64
MAX_FILE_BYTES = 64 * 2**20  # the largest tokenizer.json in use (mmBERT) has 34 MB

# What a model needs, of the root and of module folders such as `1_Pooling`. Pickles are never
# fetched, nor the copies of the weights that repositories keep in onnx/ and openvino/.
METADATA_PATTERNS = ["*.json", "*.txt"]
WEIGHT_PATTERNS = ["*.safetensors"]
IGNORED_PATTERNS = ["[!0-9]*/*", "*/*/*"]


class CheckpointError(ValueError):
    """A model folder that is refused; the message names the file, what is wrong and what to do."""


def quoted(text: object) -> str:
    """Text from an untrusted file, fit for a one-line message."""
    shown = str(text)
    return repr(shown if len(shown) <= 120 else shown[:117] + "...")


def relative_parts(relative: str) -> list[str]:
    """The parts of a path that stays inside its folder on every system, else `CheckpointError`."""
    parts = relative.split("/")
    for part in parts:
        is_plain = part.isprintable() and "\\" not in part and ":" not in part
        if not is_plain or part in ("", ".", "..") or len(part) > 255:
            raise CheckpointError(
                f"the path {quoted(relative)} could leave the model folder; "
                "use plain names joined by '/'"
            )
    return parts


def parse_json(raw: bytes, source: str) -> Any:
    """JSON of bounded size and depth, without repeated keys; `source` names it in errors."""
    if len(raw) > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{source} has {len(raw):,} bytes of JSON, more than the {MAX_JSON_BYTES:,} allowed; "
            "such a file is no part of a ModernBERT checkpoint"
        )
    try:
        value = json.loads(
            raw.decode("utf-8-sig"), object_pairs_hook=_unique_keys, parse_constant=_no_constant
        )
        too_deep = _is_deeper(value, MAX_JSON_DEPTH)
    except RecursionError:
        too_deep = True
    except ValueError as error:
        raise CheckpointError(
            f"{source} is not valid JSON ({error}); download or write it again"
        ) from None
    if too_deep:
        raise CheckpointError(
            f"{source} nests JSON deeper than {MAX_JSON_DEPTH} levels; "
            "such a file is no part of a ModernBERT checkpoint"
        )
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {quoted(repeated)} appears twice in one object")
    return unique


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _is_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        below: list[Any] = []
        for parent in level:
            if type(parent) is dict:
                below.extend(parent.values())
            elif type(parent) is list:
                below.extend(parent)
        if not below:
            return False
        level = below
    return True


class ModelFolder:
    """A local folder with a model's files.

    `name` is what the user gave, `folder` the folder on disk, `revision` the commit hash when the
    folder is a snapshot in the Hub's cache, else None.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        real = folder.resolve()
        is_snapshot = real.parent.name == "snapshots" and _is_commit(real.name)
        self.revision = real.name if is_snapshot else None
        # The cache links each file of a snapshot to a blob beside the snapshots.
        self._roots = [real, real.parent.parent / "blobs"] if is_snapshot else [real]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def path(self, relative: str) -> Path | None:
        """The regular file at `relative` ("1_Pooling/config.json"), or None when there is none.

        Raises `CheckpointError` for a path or link that leaves the folder, and for anything else
        than a regular file.
        """
        path = self.folder.joinpath(*relative_parts(relative))
        try:
            if not path.exists() and not path.is_symlink():
                return None
            real = path.resolve(strict=True)
            is_file = stat.S_ISREG(real.stat().st_mode)
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before 3.13
            raise CheckpointError(
                f"{path} cannot be read ({error}); download or copy it again"
            ) from None
        if not any(real.is_relative_to(root) for root in self._roots):
            raise CheckpointError(
                f"{path} is a link to {real}, outside the model folder; "
                "replace the link by a copy of the file"
            )
        if not is_file:
            raise CheckpointError(f"{path} is not a regular file; remove it and restore the file")
        return path

    def read_bytes(self, relative: str) -> bytes | None:
        """The file's bytes, None when absent; `CheckpointError` above 64 MiB."""
        return self._read(relative, MAX_FILE_BYTES)

    def read_json(self, relative: str) -> Any | None:
        """The parsed JSON file, None when absent.

        Raises `CheckpointError` when it is broken, not UTF-8, above 2 MiB, deeper than 64 levels or
        repeats a key.
        """
        raw = self._read(relative, MAX_JSON_BYTES)
        return None if raw is None else parse_json(raw, str(self.folder / relative))

    def _read(self, relative: str, limit: int) -> bytes | None:
        path = self.path(relative)
        if path is None:
            return None
        try:
            size = path.stat().st_size
            if size > limit:
                raise CheckpointError(
                    f"{path} has {size:,} bytes, more than the {limit:,} allowed for such a file; "
                    "check that it belongs to the model"
                )
            return path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _is_commit(text: str) -> bool:
    return len(text) == 40 and all(digit in "0123456789abcdef" for digit in text)


def embedded_folder() -> Path:
    """The folder of modernbert-mini, the checkpoint that ships with the package.

    Raises `CheckpointError` when it is not installed.
    """
    if not (EMBEDDED / "config.json").is_file():
        raise CheckpointError(
            f"{EMBEDDED} holds no config.json: {EMBEDDED_NAME}, the checkpoint that ships with the "
            "package, is not installed; reinstall the package, or give a Hub id or a folder, such "
            "as 'nomic-ai/modernbert-embed-base'"
        )
    return EMBEDDED


def name_of(name: str | os.PathLike[str] | None) -> str:
    """What to call the model that `locate` finds."""
    return EMBEDDED_NAME if name is None else os.fspath(name)


def open_folder(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> ModelFolder:
    """The JSON and text files of a Hub repository or local folder; no weights are downloaded.

    Without a name, of the checkpoint that ships with the package. Errors are those of `locate`.
    """
    folder = locate(
        name,
        METADATA_PATTERNS,
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
    )
    return ModelFolder(name_of(name), folder)


def locate(
    name: str | os.PathLike[str] | None,
    patterns: list[str],
    *,
    revision: str | None,
    local_files_only: bool,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> Path:
    """The local folder called `name`, or the cached snapshot of the Hub repository `name`.

    None is the embedded folder. Raises `CheckpointError` for a path that is no folder. Exceptions
    of `huggingface_hub` keep their class and gain one sentence that says what to do.
    """
    text = os.fspath(embedded_folder() if name is None else name)
    path = Path(text).expanduser()
    if text and path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{text} is a local folder, and revision={quoted(revision)} chooses among commits "
                "on the Hub; drop the revision or give the Hub id"
            )
        return path
    if text and path.exists():
        raise CheckpointError(f"{text} is a file; give the folder that holds it")
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or "\\" in text or not text:
        raise CheckpointError(
            f"there is no folder {quoted(text)}; give an existing folder or a Hub id such as "
            "'answerdotai/ModernBERT-base'"
        )

    from huggingface_hub import errors, snapshot_download

    try:
        return Path(
            snapshot_download(
                text,
                revision=revision,
                local_files_only=local_files_only,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=patterns,
                ignore_patterns=IGNORED_PATTERNS,
            )
        )
    except (
        errors.HfHubHTTPError,
        errors.HFValidationError,
        errors.LocalEntryNotFoundError,
    ) as error:
        # `add_note` needs Python 3.11, and what prints one line would drop the note.
        error.args = (f"{error}\n{_advice(error, text)}",)
        raise


def _advice(error: Exception, name: str) -> str:
    from huggingface_hub import errors

    advice: dict[type, str] = {
        errors.GatedRepoError: f"Accept the conditions at https://huggingface.co/{name}, then run "
        "`hf auth login` or pass token=.",
        errors.RepositoryNotFoundError: f"Check the spelling of {name!r} (no local folder has that "
        "name either); for a private repository run `hf auth login` or pass token=.",
        errors.RevisionNotFoundError: f"See https://huggingface.co/{name}/commits/main for the "
        "revisions there are.",
        errors.LocalEntryNotFoundError: f"Run `hf download {name}` once with network access and "
        "the same cache folder, or give the path of a local copy.",
        errors.HFValidationError: "Give an existing folder or a Hub id such as "
        "'answerdotai/ModernBERT-base'.",
        errors.HfHubHTTPError: "Try again later, or give the path of a local copy.",
    }
    return next(advice[kind] for kind in type(error).__mro__ if kind in advice)
