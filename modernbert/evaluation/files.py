"""Reading evaluation files, compressed or not, and the libraries that are optional."""

import csv
import gzip
import importlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def need(module: str, package: str) -> Any:
    """An optional library; `ImportError` with the remedy where it is absent."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(
            f"this evaluation needs {package}: pip install 'modernbert[evaluate]'"
        ) from None


def find(folder: Path, *names: str) -> Path | None:
    """The first of `names` in a folder, as it is or as .gz, whatever its case; None if absent."""
    if not folder.is_dir():
        return None
    present = {path.name.lower(): path for path in sorted(folder.iterdir())}
    for name in names:
        for known in (name.lower(), f"{name.lower()}.gz"):
            if known in present:
                return present[known]
    return None


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A whole file, unpacked when its name ends in .gz; line ends are kept as they are.

    Raises `ValueError` for text in another encoding.
    """
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {encoding}: {error.reason}") from None


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """(place, line) of each line, without its end; the place names file and line in errors."""
    text = read_text(path, encoding).removeprefix("\ufeff")
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        yield f"{path}, line {number}", line.removesuffix("\r")


def read_rows(path: Path, delimiter: str, *, quoted: bool) -> Iterator[tuple[str, list[str]]]:
    """(place, fields) of each row of a csv or tsv; with `quoted`, fields may stand in quotes."""
    text = io.StringIO(read_text(path).removeprefix("\ufeff"), newline="")
    dialect: dict[str, Any] = {"quoting": csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE}
    reader = csv.reader(text, delimiter=delimiter, **dialect)
    for row in reader:
        if row:
            yield f"{path}, line {reader.line_num}", row


def number(text: str, place: str) -> float:
    """A number from a file; `ValueError` with the place."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{place}: {text[:40]!r} is no number") from None
