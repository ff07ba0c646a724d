"""Text to token ids on the `tokenizers` library: in parallel, exact, and open about what it cut."""

import json
import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tokenizers

from .cutting import KNOWN_REGEXES, Cutter, steps

if TYPE_CHECKING:
    from modernbert.weights import ModelFolder

logger = logging.getLogger("modernbert")
T = TypeVar("T")

MAX_BYTES = 64 * 2**20  # of a tokenizer.json; the largest in use (mmBERT) has 34 MB
MAX_ENTRIES = 4_000_000  # that one has 2 million
CHARACTERS_PER_TOKEN = 8  # more than nearly all text has, so that the first attempt is enough

STRATEGIES = ("longest_first", "only_first", "only_second")
# What the special tokens are called when no file says which they are.
USUAL_NAMES = {
    "bos": ("[CLS]", "<s>", "<bos>"),
    "eos": ("[SEP]", "</s>", "<eos>"),
    "unk": ("[UNK]", "<unk>"),
    "sep": ("[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "mask": ("[MASK]", "<mask>"),
}


@dataclass(eq=False)
class _Part:
    """One text, or one text of a pair, tokenised without special tokens.

    `encoding` is that of text[start:]'s beginning. Its first `size` ids are those of
    text[start:stop], of which ids[low:high] are kept. `words` are what the text was joined from.
    """

    text: str
    start: int
    stop: int
    encoding: tokenizers.Encoding
    size: int
    words: Sequence[str] | None
    low: int = 0
    high: int = 0

    @property
    def is_whole(self) -> bool:
        return self.start == 0 and self.stop == len(self.text)

    def keep(self, count: int, side: str) -> None:
        self.low, self.high = (0, count) if side == "right" else (self.size - count, self.size)

    def spans(self) -> list[tuple[int, int]]:
        """(start, end) in the text of each kept token, without the spaces it starts with."""
        spans = []
        for first, last in self.encoding.offsets[self.low : self.high]:
            first, last = first + self.start, last + self.start
            while first < last and self.text[first].isspace():
                first += 1
            spans.append((first, last))
        return spans


def _weave(groups: Sequence[Sequence[T]], parts: Iterable[Sequence[T]]) -> list[T]:
    """Special tokens, first part, special tokens[, second part, special tokens]."""
    woven = list(groups[0])
    for part, group in zip(parts, groups[1:], strict=True):
        woven += part
        woven += group
    return woven


@dataclass(frozen=True, eq=False)
class TokenizedBatch:
    """The token ids of each text, and on demand where they come from and what was cut."""

    input_ids: list[list[int]]
    _rows: list[list[_Part]] = field(repr=False)
    _frame: list[list[int]] = field(repr=False)
    _cutter: Cutter | None = field(repr=False)
