"""Long documents: does a sentence anywhere in 8,192 tokens move the vector, and is it found?"""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from .correlation import cosines
from .models import Subject
from .retrieval import Collection, search
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
LONG, LONG_DOCUMENTS = 16_000, 100  # characters; articles at most


def tasks(data: Path) -> Iterator[Task | Skipped]:
    """Needles in held-out articles of `data`, and late paragraphs that find their article."""
    for name, run in (("needle", _needle), ("late paragraph", _late_paragraph)):
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


# -- a paragraph finds the article it was taken from -----------------------------------------------


def _late_paragraph(data: Path, subject: Subject) -> Measured:
    articles = (text for text in held_out_articles(data) if len(text) >= LONG)
    return search(subject, late_paragraphs(islice(articles, LONG_DOCUMENTS)))


def late_paragraphs(articles: Iterator[str]) -> Collection:
    """Long articles without a paragraph of 200 to 2,000 characters from their last third, which
    is the query: only what was read to the end can be found well."""
    documents, queries = {}, {}
    for number, article in enumerate(articles):
        paragraphs = [part for part in article.split("\n") if part.strip()]
        late = [
            index
            for index in range(2 * len(paragraphs) // 3, len(paragraphs))
            if 200 <= len(paragraphs[index]) <= 2000
        ]
        if not late:
            continue
        chosen = late[len(late) // 2]
        queries[str(number)] = paragraphs[chosen]
        documents[str(number)] = "\n".join(paragraphs[:chosen] + paragraphs[chosen + 1 :])
    return Collection(documents, queries, {name: {name: 1.0} for name in queries})
