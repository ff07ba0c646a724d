"""Tables of texts in, tables of vectors out, both as streams: the files of `modernbert embed`.

Read: txt (a text per line), jsonl, csv, tsv, parquet. Written: npy, jsonl, parquet. What is read
comes from strangers: sizes are bounded, and every refusal names the file and the line or row.
"""

import csv
import json
import os
import secrets
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import numpy as np

READABLE = ("txt", "jsonl", "csv", "tsv", "parquet")
WRITABLE = ("npy", "jsonl", "parquet")
STANDARD = "-"  # the name of standard input and of standard output
BLOCK_ROWS, BLOCK_CHARACTERS = 1024, 2**24
ROW_GROUP = 8192
MAX_LINE = 64 * 2**20  # characters of a line or a csv field
VECTORS = "embedding"


@dataclass(frozen=True)
class Block:
    """Some rows of a table: their texts, and the columns kept beside them.

    `keys` is a list of dicts, or a `pyarrow.RecordBatch` that keeps the types of a Parquet file.
    """

    texts: list[str]
    keys: Any


def read_table(
    path: str, *, format: str | None = None, column: str = "text", keep: Sequence[str] | None = None
) -> Iterator[Block]:
    """The rows of one file ("-" is standard input), block by block.

    `format` is one of `READABLE`, by default what the suffix says (txt for standard input).
    `column` holds the texts; `keep` names the columns kept beside them, by default all others.

    Raises `ValueError` with the file and the line or row for what is not such a table, `OSError`
    for what cannot be opened, `ImportError` for Parquet without pyarrow.
    """
    kind = format or ("txt" if path == STANDARD else format_of(path, READABLE))
    if kind == "parquet":
        return _read_parquet(path, column, keep)
    rows = _ROWS[kind]
    if kind == "txt" and keep:
        raise ValueError(f"{path}: a txt file has no columns to keep, {', '.join(keep)} among them")
    return _blocks(path, rows, column, keep)


def format_of(path: str, known: Sequence[str]) -> str:
    """The format that the suffix of a path names; `ValueError` when it is none of `known`."""
    suffix = Path(path).suffix.removeprefix(".").lower()
    suffix = {"ndjson": "jsonl", "text": "txt", "pq": "parquet"}.get(suffix, suffix)
    if suffix not in known:
        raise ValueError(
            f"{path}: the format is not clear from the suffix; end the name with one of "
            f"{', '.join('.' + name for name in known)}, or name the format"
        )
    return suffix


def _blocks(path: str, rows: Any, column: str, keep: Sequence[str] | None) -> Iterator[Block]:
    block, characters = Block([], []), 0
    for place, row in _decoded(path, rows):
        if column not in row and rows is not _txt_rows:
            raise ValueError(f"{place}: no column {column!r}; there are {_names(row)}")
        text = row.pop(column, None) if rows is not _txt_rows else row.pop("text")
        if not isinstance(text, str):
            raise ValueError(f"{place}: column {column!r} holds {_kind(text)}, not a text")
        kept = row
        if keep is not None:
            row[column] = text
            if missing := [name for name in keep if name not in row]:
                raise ValueError(f"{place}: no column {missing[0]!r}; there are {_names(row)}")
            kept = {name: row[name] for name in keep}
        block.texts.append(text)
        block.keys.append(kept)
        characters += len(text)
        if len(block.texts) == BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
            yield block
            block, characters = Block([], []), 0
    if block.texts:
        yield block


def _decoded(path: str, rows: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    name = "standard input" if path == STANDARD else path
    with _open(path) as file:
        try:
            yield from rows(file, name)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name} is not UTF-8 ({error.reason}); convert it, for example with iconv"
            ) from None


@contextmanager
def _open(path: str) -> Iterator[IO[str]]:
    # Only \n ends a line: a \r or \u2028 inside a text is part of it.
    source: Any = sys.stdin.fileno() if path == STANDARD else path
    with open(
        source, encoding="utf-8-sig", newline="\n", closefd=path != STANDARD
    ) as file:
        yield file


def _lines(file: IO[str], name: str) -> Iterator[tuple[str, str]]:
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise ValueError(f"{name}, line {number} has more than {MAX_LINE:,} characters")
        yield f"{name}, line {number}", line


def _txt_rows(file: IO[str], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _lines(file, name):
        yield place, {"text": line.removesuffix("\n").removesuffix("\r")}


def _jsonl_rows(file: IO[str], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, line in _lines(file, name):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except RecursionError:
            raise ValueError(f"{place} nests JSON too deep") from None
        except ValueError as error:
            raise ValueError(f"{place} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{place} is {_kind(row)}, not an object such as {{\"text\": \"...\"}}")
        yield place, row


def _csv_rows(
    file: IO[str], name: str, **dialect: Any
) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(MAX_LINE)
    reader = csv.reader((line for _, line in _lines(file, name)), strict=True, **dialect)
    header: list[str] = []
    while True:
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{name}, line {reader.line_num} is broken: {error}") from None
        if values is None:
            return
        place = f"{name}, line {reader.line_num}"
        if not values:
            continue
        if not header:
            header = values
            if len(set(header)) < len(header):
                raise ValueError(f"{place}: a column name appears twice in {_names(header)}")
            continue
        if len(values) != len(header):
            raise ValueError(
                f"{place} has {len(values)} fields, the header {len(header)}; quote fields that "
                "hold the separator"
            )
        yield place, dict(zip(header, values, strict=True))


def _tsv_rows(file: IO[str], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    # By its definition (IANA text/tab-separated-values) a quote is a character like any other.
    return _csv_rows(file, name, delimiter="\t", quoting=csv.QUOTE_NONE)


_ROWS = {"txt": _txt_rows, "jsonl": _jsonl_rows, "csv": _csv_rows, "tsv": _tsv_rows}


def _read_parquet(path: str, column: str, keep: Sequence[str] | None) -> Iterator[Block]:
    pyarrow, parquet = _pyarrow()
    if path == STANDARD:
        raise ValueError("Parquet cannot be read from standard input; give the file's name")
    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        wanted = [name for name in names if name != column] if keep is None else list(keep)
        for name in (column, *wanted):
            if name not in names:
                raise ValueError(f"{path}: no column {name!r}; there are {_names(names)}")
        first = 0
        for batch in file.iter_batches(BLOCK_ROWS, columns=[*dict.fromkeys((column, *wanted))]):
            texts = batch.column(column).to_pylist()
            for row, text in enumerate(texts):
                if not isinstance(text, str):
                    raise ValueError(
                        f"{path}, row {first + row}: column {column!r} holds {_kind(text)}, not a text"
                    )
            first += len(texts)
            yield Block(texts, batch.select(wanted))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'modernbert[parquet]'") from None
    return pyarrow, pyarrow.parquet


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _names(names: Any) -> str:
    shown = [repr(str(name)[:40]) for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" * (len(shown) > 12))


class VectorWriter(ABC):
    """Writes rows of vectors, with the columns kept beside them, to an open file.

    Args:
        file: open for writing in binary mode, and seekable for npy.
        like: (0, d), the width and dtype of the vectors.
        metadata: facts about the vectors, kept in the footer of a Parquet file.
    """

    def __init__(self, file: IO[bytes], like: np.ndarray, metadata: Mapping[str, str]) -> None:
        self.file, self.like, self.metadata = file, like, metadata
        self.rows = 0

    def write(self, keys: Any, vectors: np.ndarray) -> None:
        """Append vectors (n, d) and the `Block.keys` of their rows."""
        self._write(keys, np.ascontiguousarray(vectors, dtype=self.like.dtype))
        self.rows += len(vectors)

    @abstractmethod
    def _write(self, keys: Any, vectors: np.ndarray) -> None: ...

    def finish(self) -> None:
        """Write what can only be written last."""


class NpyWriter(VectorWriter):
    """One array (n, d), without the columns beside it; its header is written again at the end."""

    def __init__(self, file: IO[bytes], like: np.ndarray, metadata: Mapping[str, str]) -> None:
        super().__init__(file, like, metadata)
        self._header(0)
        self.start = file.tell()

    def _header(self, rows: int) -> None:
        header = np.lib.format.header_data_from_array_1_0(self.like)
        header["shape"] = (rows, self.like.shape[1])
        np.lib.format.write_array_header_1_0(self.file, header)

    def _write(self, keys: Any, vectors: np.ndarray) -> None:
        self.file.write(vectors.data)

    def finish(self) -> None:
        self.file.seek(0)
        self._header(self.rows)
        assert self.file.tell() == self.start  # numpy leaves room for the number of rows to grow


class JsonlWriter(VectorWriter):
    """One object per row: the columns, and the vector under "embedding"."""

    def _write(self, keys: Any, vectors: np.ndarray) -> None:
        rows = keys if isinstance(keys, list) else keys.to_pylist()
        for row, vector in zip(rows, vectors, strict=True):
            if VECTORS in row:
                raise _taken()
            # As text float32 has up to 9 digits, where Python's own floats would print 17.
            numbers = ", ".join(vector.astype(str))
            before = json.dumps(row, ensure_ascii=False, default=_json_value)[:-1]
            line = f'{before}{", " if row else ""}"{VECTORS}": [{numbers}]}}\n'
            # A lone surrogate, which JSON allows and UTF-8 does not, is written as its escape.
            self.file.write(line.encode("utf-8", errors="backslashreplace"))


class ParquetWriter(VectorWriter):
    """The columns with their types, and "embedding" as a list of fixed size."""

    def __init__(self, file: IO[bytes], like: np.ndarray, metadata: Mapping[str, str]) -> None:
        super().__init__(file, like, metadata)
        self.pyarrow, self.parquet = _pyarrow()
        self.writer: Any = None
        self.waiting: list[Any] = []

    def _write(self, keys: Any, vectors: np.ndarray) -> None:
        batch = self._batch(keys, vectors)
        if self.writer is None:
            metadata = {f"modernbert.{name}": value for name, value in self.metadata.items()}
            # The schema of the source's index or of pandas would not describe this table.
            schema = batch.schema.with_metadata(metadata)
            self.writer = self.parquet.ParquetWriter(self.file, schema)
        schema = self.writer.schema
        if batch.schema.names != schema.names or batch.schema.types != schema.types:
            raise ValueError(
                f"the columns change from {_names(schema.names)} to {_names(batch.schema.names)} "
                "or in type; give files with the same columns, or choose some with --keep"
            )
        self.waiting.append(batch.replace_schema_metadata(schema.metadata))
        if sum(len(batch) for batch in self.waiting) >= ROW_GROUP:
            self._flush()

    def _batch(self, keys: Any, vectors: np.ndarray) -> Any:
        pa = self.pyarrow
        batch = self._keys(keys) if isinstance(keys, list) else keys
        if VECTORS in batch.schema.names:
            raise _taken()
        flat = pa.array(vectors.reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        arrays = [*batch.columns, column]
        return pa.RecordBatch.from_arrays(arrays, names=[*batch.schema.names, VECTORS])

    def _keys(self, rows: list[dict[str, Any]]) -> Any:
        """Columns of rows; their types are settled by the first block."""
        pa = self.pyarrow
        known = {} if self.writer is None else {f.name: f.type for f in self.writer.schema}
        known.pop(VECTORS, None)
        names = list(dict.fromkeys([*known, *(name for row in rows for name in row)]))
        arrays = []
        for name in names:
            try:
                array = pa.array([row.get(name) for row in rows], known.get(name))
            except (pa.ArrowException, TypeError, OverflowError) as error:
                wanted = f"{known[name]} as before" if name in known else "of one type"
                raise ValueError(
                    f"column {name!r} is not {wanted} ({error}); write jsonl, or leave it out "
                    "by choosing others with --keep"
                ) from None
            # A column without any value so far is taken for text.
            arrays.append(array.cast(pa.string()) if pa.types.is_null(array.type) else array)
        if not names:
            return pa.RecordBatch.from_arrays([], names=[])
        return pa.RecordBatch.from_arrays(arrays, names=names)

    def _flush(self) -> None:
        if self.waiting:
            self.writer.write_table(self.pyarrow.Table.from_batches(self.waiting))
            self.waiting = []

    def finish(self) -> None:
        if self.writer is None:  # no rows at all: an empty table still has its vectors' type
            self._write([], self.like)
        self._flush()
        self.writer.close()


WRITERS = {"npy": NpyWriter, "jsonl": JsonlWriter, "parquet": ParquetWriter}


@contextmanager
def vector_writer(
    path: str, format: str, *, like: np.ndarray, metadata: Mapping[str, str], force: bool = False
) -> Iterator[VectorWriter]:
    """Write vectors to `path`, which appears complete when the block ends, or not at all.

    `path` "-" writes jsonl to standard output as it comes. Raises `ValueError` for a file that
    exists, unless `force`.
    """
    if path == STANDARD:
        if format != "jsonl":
            raise ValueError(f"{format} cannot be written to standard output; jsonl can")
        writer: VectorWriter = JsonlWriter(sys.stdout.buffer, like, metadata)
        yield writer
        sys.stdout.buffer.flush()
        return
    with _replaced_file(path, force) as file:
        writer = WRITERS[format](file, like, metadata)
        yield writer
        writer.finish()


def check_output(path: str, force: bool) -> None:
    """Raise `ValueError` where `vector_writer` would, before any work is done."""
    if path == STANDARD:
        return
    target = Path(path)
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise ValueError(f"{path} exists and is not a regular file; choose another output")
    if target.exists() and not force:
        raise ValueError(f"{path} exists; pass --force to replace it, or choose another output")
    if not target.resolve().parent.is_dir():
        raise ValueError(f"there is no folder {target.resolve().parent}; make it first")


@contextmanager
def _replaced_file(path: str, force: bool) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` once it is whole and on disk."""
    check_output(path, force)
    target = Path(path).resolve()  # a link stays, the file behind it is replaced
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    with open(partial, "xb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            check_output(path, force)
            os.replace(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    if os.name != "nt":
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _taken() -> ValueError:
    return ValueError(
        f"the input has a column {VECTORS!r} already; choose the columns to keep with --keep"
    )


def _json_value(value: Any) -> str:
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise ValueError(
        f"a column holds {type(value).__name__}, which JSON has no form for; write Parquet, or "
        "choose the columns to keep with --keep"
    )
