"""Files of vectors, written as a stream and complete or absent: npy, jsonl, parquet."""

import json
import os
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

import numpy as np

from modernbert.tables import STANDARD, import_pyarrow, listed

WRITABLE = ("npy", "jsonl", "parquet")
ROW_GROUP = 8192
VECTORS = "embedding"


class VectorWriter:
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

    def _write(self, keys: Any, vectors: np.ndarray) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Write what can only be written last."""

    def abandon(self) -> None:
        """Let go of a file that is about to be removed."""


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
        if not isinstance(keys, list):  # a RecordBatch without columns has no rows either
            keys = keys.to_pylist() if keys.num_columns else [{}] * len(vectors)
        for row, vector in zip(keys, vectors, strict=True):
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
        self.pyarrow, self.parquet = import_pyarrow()
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
                f"the columns change from {listed(schema.names)} to {listed(batch.schema.names)} "
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
            except (ValueError, TypeError, OverflowError, pa.ArrowException) as error:
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

    def abandon(self) -> None:
        if self.writer is not None:
            # Left alone it would write its footer later, to a file that is closed by then.
            with suppress(OSError, ValueError):
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
        try:
            yield writer
            writer.finish()
        except BaseException:
            writer.abandon()
            raise


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
    try:
        with open(partial, "xb") as file:
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
