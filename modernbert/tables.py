"""Tables of texts, read as a stream: txt (a text per line), jsonl, csv, tsv, parquet.

They come from strangers: sizes are bounded, and every refusal names the file and the line or row.
"""

import csv
import io
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

READABLE = ("txt", "jsonl", "csv", "tsv", "parquet")
STANDARD = "-"  # the name of standard input and of standard output
BLOCK_ROWS, BLOCK_CHARACTERS = 1024, 2**24
MAX_LINE = 64 * 2**20  # characters of a line or a csv field


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
    if kind not in READABLE:
        raise ValueError(f"format is {kind!r}; choose from {', '.join(READABLE)}")
    if kind == "parquet":
        return _read_parquet(path, column, keep)
    if kind == "txt":
        if keep:
            raise ValueError(f"{path} is a txt file, without columns such as {keep[0]!r} to keep")
        column = "text"
    return _blocks(path, _ROWS[kind], column, keep)


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


def started(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same blocks with the first one read already, so that its errors come now, not later."""
    first = next(blocks, None)
    return blocks if first is None else chain([first], blocks)


def with_results(
    blocks: Iterator[Block], stream: Callable[[Iterator[str]], Iterator[np.ndarray]]
) -> Iterator[tuple[Any, np.ndarray]]:
    """The `keys` of each block with the results (n, ...) of its texts.

    `stream` turns texts into results, one each and in order, and may read ahead as it likes.
    """
    waiting: deque[Block] = deque()

    def texts() -> Iterator[str]:
        for block in blocks:
            if block.texts:
                waiting.append(block)
                yield from block.texts

    results: list[np.ndarray] = []
    for result in stream(texts()):
        results.append(result)
        if len(results) == len(waiting[0].texts):
            yield waiting.popleft().keys, np.stack(results)
            results = []


def _blocks(path: str, rows: Any, column: str, keep: Sequence[str] | None) -> Iterator[Block]:
    block, characters = Block([], []), 0
    for place, row in _decoded(path, rows):
        if column not in row:
            raise ValueError(f"{place}: no column {column!r}; there are {listed(row)}")
        text = row.pop(column)
        if not isinstance(text, str):
            raise ValueError(f"{place}: column {column!r} holds {_kind(text)}, not a text")
        try:
            text.encode()
        except UnicodeEncodeError:  # JSON has escapes for it
            raise ValueError(f"{place}: column {column!r} has half a surrogate pair") from None
        kept = row
        if keep is not None:
            row[column] = text
            if missing := [name for name in keep if name not in row]:
                raise ValueError(f"{place}: no column {missing[0]!r}; there are {listed(row)}")
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
    if path != STANDARD:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            yield file
        return
    file = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="\n")
    try:
        yield file
    finally:
        file.detach()


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
            raise ValueError(f'{place} is {_kind(row)}, not an object such as {{"text": "..."}}')
        yield place, row


def _csv_rows(file: IO[str], name: str, **dialect: Any) -> Iterator[tuple[str, dict[str, Any]]]:
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
                raise ValueError(f"{place}: a column name appears twice in {listed(header)}")
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
    pyarrow, parquet = import_pyarrow()
    if path == STANDARD:
        raise ValueError("Parquet cannot be read from standard input; give the file's name")
    first = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name != column] if keep is None else list(keep)
            for name in (column, *wanted):
                if name not in names:
                    raise ValueError(f"no column {name!r}; there are {listed(names)}")
            for batch in file.iter_batches(BLOCK_ROWS, columns=[*dict.fromkeys((column, *wanted))]):
                texts = batch.column(column).to_pylist()
                for row, text in enumerate(texts):
                    if not isinstance(text, str):
                        raise ValueError(
                            f"row {first + row}: column {column!r} holds {_kind(text)}, not a text"
                        )
                first += len(texts)
                yield Block(texts, batch.select(wanted))
    except (ValueError, OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: {error}") from None


def import_pyarrow() -> tuple[Any, Any]:
    """`pyarrow` and `pyarrow.parquet`; `ImportError` with the remedy."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet needs pyarrow: pip install 'modernbert[parquet]'") from None
    return pyarrow, pyarrow.parquet


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def listed(names: Any) -> str:
    """Names from a file, fit for a message."""
    shown = [repr(str(name)[:40]) for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" * (len(shown) > 12))
