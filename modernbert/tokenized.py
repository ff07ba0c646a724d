"""What a tokenizer returns: ids, where each comes from, and how many were cut."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import tokenizers

from .cutting import Cutter

T = TypeVar("T")


@dataclass(eq=False)
class Part:
    """A text, or one of the two of a pair, tokenised without special tokens.

    The first `size` ids of `encoding` are those of text[start:stop]; ids[low:high] are kept.
    `words` are what the text was joined from, `cutter` counts what is outside start:stop.
    """

    text: str
    words: Sequence[str] | None
    start: int
    stop: int
    encoding: tokenizers.Encoding
    size: int
    cutter: Cutter | None
    low: int = 0
    high: int = 0

    def keep(self, count: int, side: str) -> None:
        self.low, self.high = (0, count) if side == "right" else (self.size - count, self.size)

    @property
    def ids(self) -> list[int]:
        return self.encoding.ids[self.low : self.high]

    @cached_property
    def total(self) -> int:
        """The number of tokens of the whole text."""
        if self.cutter is None:
            return self.size
        rest = (self.text[: self.start], self.text[self.stop :])
        return self.size + sum(map(self.cutter.count, rest))

    @cached_property
    def places(self) -> list[tuple[int | None, tuple[int, int]]]:
        """(word, (start, end)) of each kept token, as `TokenizedBatch` has them."""
        starts, skipped = None, 0
        if self.words is not None:
            starts = list(accumulate((len(word) + 1 for word in self.words[:-1]), initial=0))
        elif self.cutter is not None:
            skipped = self.cutter.count(self.text[: self.start], words=True)
        kept, places = slice(self.low, self.high), []
        offsets, numbers = self.encoding.offsets[kept], self.encoding.word_ids[kept]
        for (first, last), number in zip(offsets, numbers, strict=True):
            first, last = first + self.start, last + self.start
            while first < last and self.text[first].isspace():
                first += 1
            if self.words is None or starts is None:
                number = None if number is None else number + skipped
            else:
                # The space between two words, when it is a token, belongs to the second.
                number = bisect_right(starts, first + 1 if first < last else last) - 1
                length = len(self.words[number])
                first, last = (min(max(i - starts[number], 0), length) for i in (first, last))
            places.append((number, (first, last)))
        return places


def shares(row: Sequence[Part], room: int | None, strategy: str, index: int) -> list[int]:
    """How many tokens of each part fit into `room`, as `truncate_encodings` of tokenizers shares.

    A part that was cut before tokenising has more than `room` tokens.
    """
    sizes = [part.size for part in row]
    if room is None or sum(sizes) <= room:
        return sizes
    if len(row) == 1:
        return [room]
    first, second = sizes
    if strategy != "longest_first":
        other = second if strategy == "only_first" else first
        if other >= room:
            raise ValueError(
                f"texts[{index}]: truncation={strategy!r} leaves nothing of the text that it may "
                f"cut, as the other fills all {room} places; raise max_length or use "
                "truncation='longest_first'"
            )
        return [room - other, other] if strategy == "only_first" else [other, room - other]
    half = room // 2
    if min(sizes) <= half:
        return [first, room - first] if first < second else [room - second, second]
    if room % 2 and row[0].total > row[1].total:
        return [half + 1, half]
    return [half, room - half]


def weave(frame: Sequence[Sequence[T]], parts: Iterable[Sequence[T]]) -> list[T]:
    """Special tokens around and between the parts."""
    woven = list(frame[0])
    for part, special in zip(parts, frame[1:], strict=True):
        woven += part
        woven += special
    return woven


@dataclass(frozen=True, eq=False)
class TokenizedBatch:
    """The token ids of each text, and on demand where they come from and how many were cut.

    All lists have one entry a text, which has one entry a token where nothing else is said.
    Special tokens have the offsets (0, 0), and None for a word and a sequence.
    """

    input_ids: list[list[int]]
    _rows: list[tuple[Part, ...]] = field(repr=False)
    _frame: list[list[int]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def was_truncated(self) -> list[bool]:
        """Whether tokens of the text were cut; costs nothing, unlike their number."""
        return [any(part.high - part.low < part.size for part in row) for row in self._rows]

    @cached_property
    def truncated(self) -> list[int]:
        """How many tokens of the text (or pair) were cut.

        The number is exact. Of a text that was cut before tokenising, the rest is tokenised when
        this is first read: piece by piece, on all cores, and without keeping anything.
        """
        return [sum(part.total - (part.high - part.low) for part in row) for row in self._rows]

    @cached_property
    def offsets(self) -> list[list[tuple[int, int]]]:
        """(start, end) of the token's characters in its text, or in its word for split texts.

        The spaces that a token begins with are left out; one of spaces only is empty, at its end.
        """
        return self._spread((0, 0), lambda _, part: [place for _, place in part.places])

    @cached_property
    def word_ids(self) -> list[list[int | None]]:
        """The number of the token's word, of those given, else of those the tokenizer makes."""
        return self._spread(None, lambda _, part: [word for word, _ in part.places])

    @cached_property
    def sequence_ids(self) -> list[list[int | None]]:
        """0 for tokens of the text, 1 for tokens of the pair's second."""
        return self._spread(None, lambda side, part: [side] * (part.high - part.low))

    def _spread(self, filler: Any, values: Callable[[int, Part], list[Any]]) -> list[list[Any]]:
        frame = [[filler] * len(special) for special in self._frame]
        return [
            weave(frame, [values(side, part) for side, part in enumerate(row)])
            for row in self._rows
        ]
