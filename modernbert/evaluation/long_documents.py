"""Long documents: does a sentence anywhere in 8,192 tokens move the vector, and is it found?"""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from .correlation import cosines
from .models import Subject
from .retrieval import Collection, mean_points, rank
from .scores import Skipped
from .task import Measured, Task
from .texts import MISSING, has_articles, held_out_articles

SUITE = "long"
TOKENS = 8192
DOCUMENTS = 4
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLES = (
    "The blue safe in the old lighthouse opens with the code 4917.",
    "Maria's grandmother baked plum cake with cardamom every first Sunday in October.",
    "The spacecraft's second antenna failed eleven days after it left orbit around Saturn.",
    "A violin made of cherry wood was sold to a collector in Lisbon for nine hundred euros.",
)
ROUNDING = 1e-6  # of a cosine: float32 in another order of addition moves it by less
PARTS, PART = 4, 8000  # of a document; characters of each
BURIED_DOCUMENTS = 50


def tasks(data: Path) -> Iterator[Task | Skipped]:
    """Needles in held-out articles of `data`, and paragraphs that find the document they left."""
    for name, run in (("needle", _needle), ("buried paragraph", _buried)):
        if has_articles(data):
            yield Task(SUITE, name, partial(run, data))
        else:
            yield Skipped(SUITE, name, MISSING)


# -- a needle moves the vector ---------------------------------------------------------------------


def _needle(data: Path, subject: Subject) -> Measured:
    stacks = islice(haystacks(held_out_articles(data), subject), DOCUMENTS)
    return needle_test(subject, list(stacks))


def haystacks(articles: Iterator[str], subject: Subject) -> Iterator[list[str]]:
    """Documents as lists of paragraphs, each about `TOKENS` tokens less the room for a needle."""
    room = TOKENS - 2 - max(len(subject.pieces(needle)) for needle in NEEDLES) - len(NEEDLES)
    stack: list[str] = []
    size = 0
    for article in articles:
        for paragraph in article.split("\n"):
            tokens = len(subject.pieces(paragraph)) + 1  # the line break
            if size + tokens > room:
                yield stack
                stack, size = [], 0
            if paragraph.strip() and tokens <= room:
                stack.append(paragraph)
                size += tokens


def needle_test(subject: Subject, documents: list[list[str]]) -> Measured:
    """Plant each document's needle at each depth, and compare with the document without it.

    Points: "towards", how often the vector comes closer to the needle's; "moved", how often it is
    another one; and "shift", 100 (1 - cosine) of the move on average.
    """
    if not documents:
        raise ValueError(f"the articles are too short for a document of {TOKENS:,} tokens")
    texts, needles, planted = [], [], []
    for index, document in enumerate(documents):
        needle = NEEDLES[index % len(NEEDLES)]
        for depth in DEPTHS:
            place = round(depth * len(document))
            texts.append("\n".join(document))
            needles.append(needle)
            planted.append("\n".join([*document[:place], needle, *document[place:]]))
    without, wanted, found = (
        subject.embed(column).astype(np.float64) for column in (texts, needles, planted)
    )
    shift = 1 - cosines(without, found)
    closer = cosines(found, wanted) - cosines(without, wanted)
    points = {
        "towards": 100 * float(np.mean(closer > ROUNDING)),
        "moved": 100 * float(np.mean(shift > ROUNDING)),
        "shift": 100 * float(np.mean(shift)),
    }
    by_depth = (closer > ROUNDING).reshape(-1, len(DEPTHS)).mean(0)
    points |= {f"towards at {d:.0%}": 100 * float(v) for d, v in zip(DEPTHS, by_depth, strict=True)}
    return Measured(len(planted), points)


# -- a paragraph finds the document it was taken from ----------------------------------------------


def _buried(data: Path, subject: Subject) -> Measured:
    collection = buried_paragraphs(held_out_articles(data))
    found = rank(subject, collection)
    points = mean_points(found)
    for part in range(1, PARTS + 1):
        of_part = {query: metrics for query, metrics in found.items() if query[-1] == str(part)}
        points[f"nDCG@10 of part {part}"] = mean_points(of_part)["nDCG@10"]
    return Measured(len(found), points)


def buried_paragraphs(articles: Iterable[str]) -> Collection:
    """Documents made of passages of four articles each, about 8,192 tokens in all.

    Of each passage a paragraph of 200 to 2,000 characters is taken out; it is a query, which the
    whole document answers. So who reads only the first part finds a quarter. Query "7.2" was taken
    from the second part of document "7".
    """
    documents: dict[str, str] = {}
    queries: dict[str, str] = {}
    parts: list[str] = []
    for passage in _passages(list(articles)):
        paragraph, rest = _taken_out(passage)
        if not paragraph:
            continue
        parts.append(rest)
        queries[f"{len(documents)}.{len(parts)}"] = paragraph
        if len(parts) == PARTS:
            documents[str(len(documents))] = "\n".join(parts)
            parts = []
        if len(documents) == BURIED_DOCUMENTS:
            break
    return Collection(documents, queries, {q: {q.partition(".")[0]: 1.0} for q in queries})


def _passages(articles: list[str]) -> Iterator[str]:
    """First the first `PART` characters of each article, then the second, ..."""
    for start in range(0, max(map(len, articles), default=0), PART):
        for article in articles:
            if len(article) >= start + PART:
                yield article[start : start + PART]


def _taken_out(text: str) -> tuple[str, str]:
    """A paragraph from the second half of a text, and the rest; "" where none is of fair size."""
    paragraphs = [part for part in text.split("\n") if part.strip()]
    for index in range(len(paragraphs) // 2, len(paragraphs) - 1):
        if 200 <= len(paragraphs[index]) <= 2000:
            return paragraphs[index], "\n".join(paragraphs[:index] + paragraphs[index + 1 :])
    return "", text
