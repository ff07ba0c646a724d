"""Held-out articles: the documents that training's validation split keeps apart."""

from collections.abc import Iterator
from pathlib import Path

from modernbert.training.readers import is_validation, read_records

FOLDER = "text_wikipedia_en"
FILES = "*.jsonl.gz"
HELD_OUT = 0.01  # share of the documents; training must hold out at least as many


def has_articles(data: Path) -> bool:
    return any((data / FOLDER).glob(FILES))


MISSING = f"there is no {FOLDER}/{FILES}"


def held_out_articles(data: Path, fraction: float = HELD_OUT) -> Iterator[str]:
    """Title and text of the articles whose hash is among the `fraction` held out."""
    for record in read_records(data / FOLDER / FILES):
        document = f"{record['title']}\n{record['text']}"
        if is_validation(document, fraction):
            yield document
