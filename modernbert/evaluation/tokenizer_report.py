"""How tokenizers split: names in code, indentation, rare words; and how many tokens texts take."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from . import word_similarity
from .code_retrieval import standard_library
from .models import Subject
from .scores import Skipped
from .task import Measured, Task
from .texts import MISSING, has_articles, held_out_articles

SUITE = "tokenizer"
EXAMPLES = (
    "init",
    " init",
    "__init__",
    "def __init__(self):",
    "    return init",
    "        return init",
    "\treturn init",
    "antidisestablishmentarianism",
    " supervillain",
    " squishing",
    " Amsterdam",
    " naïve",
)
TEXTS = 200


def tasks(data: Path) -> Iterator[Task | Skipped]:
    """Characters a token of held-out articles and of Python, tokens a word of rare words."""
    if has_articles(data):
        articles = partial(held_out_articles, data)
        yield Task(SUITE, "Wikipedia", partial(_characters_per_token, articles))
    else:
        yield Skipped(SUITE, "Wikipedia", MISSING)
    yield Task(SUITE, "Python code", partial(_characters_per_token, _code))
    path = data / word_similarity.FOLDER / "rw.txt"
    if path.is_file():
        yield Task(SUITE, "rare words", partial(_tokens_per_word, path))
    else:
        yield Skipped(SUITE, "rare words", f"there is no {word_similarity.FOLDER}/{path.name}")


def _code() -> Iterator[str]:
    return (function.code for function in standard_library("test"))


def _characters_per_token(read: Callable[[], Iterable[str]], subject: Subject) -> Measured:
    texts = list(islice(read(), TEXTS))
    tokens = sum(len(subject.pieces(text)) for text in texts)
    return Measured(len(texts), {"characters/token": sum(map(len, texts)) / tokens})


def _tokens_per_word(path: Path, subject: Subject) -> Measured:
    """RareWord's words as they stand in running text, after a space."""
    words = {word for pair in word_similarity.read_pairs(path) for word in pair[:2]}
    sizes = [len(subject.pieces(f" {word}")) for word in sorted(words)]
    single = 100 * sizes.count(1) / len(sizes)
    return Measured(len(sizes), {"tokens/word": sum(sizes) / len(sizes), "single tokens": single})


def splits(subject: Subject) -> dict[str, list[str]]:
    """The pieces of each example."""
    return {text: subject.pieces(text) for text in EXAMPLES}
