"""Records from files of text, read as a stream: jsonl, txt (both also gzipped) and Parquet."""

import glob
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import IO, Any

# The names with an underscore are shared within the package: one reader of lines for all of it.
from modernbert.tables import _jsonl_rows, _txt_rows, format_of, import_pyarrow

READABLE = ("jsonl", "txt", "parquet")
BATCH_ROWS = 1024
GZIP = ".gz"


def read_records(pattern: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of all files that match a glob pattern, in the order of their names.

    A record is an object of a .jsonl file, a row of a .parquet file, or {"text": line} for a line
    of a .txt file that is not blank; .jsonl and .txt may end in .gz. Raises `ValueError` with the
    file and the line or row for what cannot be read, and when nothing matches.
    """
    for path in find_files(pattern):
        for _, record in read_file(path):
            yield record


def find_files(pattern: str | os.PathLike[str]) -> list[str]:
    """The files that a glob pattern ("**" for any folders) matches, sorted; `ValueError` if none.

    The name of a file that exists stands for itself, whatever characters it has.
    """
    name = os.path.expanduser(pattern)
    if os.path.isfile(name):
        return [name]
    found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
    if not found:
        raise ValueError(f"no file matches {name}; check the path, which starts at {os.getcwd()}")
    return found


def read_file(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of one file as `read_records` gives them, each after its place for messages."""
    kind = format_of(path.removesuffix(GZIP), READABLE)
    if kind == "parquet":
        yield from _parquet_rows(path)
        return
    with _opened(path) as file:
        for place, record in (_jsonl_rows if kind == "jsonl" else _txt_rows)(file, path):
            if kind == "jsonl" or record["text"].strip():
                yield place, record


def is_validation(key: str, fraction: float) -> bool:
    """Whether the document of this key, such as its text, is among the `fraction` held out.

    It is the document's hash that decides, so that no document moves when others come or go, and
    a larger fraction holds all that a smaller one does.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"the validation fraction is {fraction}; give a number from 0 to 1")
    digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


@contextmanager
def _opened(path: str) -> Iterator[IO[str]]:
    with open(path, "rb") as raw:
        binary: Any = gzip.open(raw) if path.endswith(GZIP) else raw
        # Only \n ends a line: a \r or \u2028 inside a text is part of it.
        with io.TextIOWrapper(binary, encoding="utf-8-sig", newline="\n") as file:
            try:
                yield file
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 ({error.reason}); convert it, for example with iconv"
                ) from None
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path} is broken ({error}); copy or download it again") from None


def _parquet_rows(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    pyarrow, parquet = import_pyarrow()
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH_ROWS):
                for record in batch.to_pylist():
                    yield f"{path}, row {row}", record
                    row += 1
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}, at row {row}: {error}") from None
