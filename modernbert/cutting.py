"""Where a text may be cut so that its token ids are those of the two parts, one after the other.

Tokenising a text to keep its first 512 ids costs as much as tokenising all of it. So long texts are
cut first, at places where a proof says that no id changes. Three stages see more than one character
at a time, and none may look across a cut:

1. Added tokens. None has the two characters beside the cut side by side. Those that eat the spaces
   on their left ([MASK]) find them all, since no cut follows a space; those that eat spaces on
   their right, or match whole words only, rule out every cut.
2. The normalizer. It never joins the character after the cut to the one before.
3. Words, of which each is tokenised alone. `Cutter.find` cuts where the pipeline starts a word
   whatever is around it, `Cutter.settle` inside a word at a place that no merge can cross.

Of a pipeline that is not listed here nothing is known, and its texts are not cut.
"""

import json
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

PIECE = 1 << 13  # characters of a long text that are counted as one
PIECES = 32  # that are counted at once
MAX_TOKEN = 1 << 12  # characters of a token; the longest of ModernBERT has 512

# The word patterns of GPT-2 and of Llama 3. Neither is slow on any text, and neither matches a
# space behind another character.
KNOWN_REGEXES = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Gemma has no words and makes spaces letters.
SPACE_IS_LETTER = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPACE_SPLIT = {"pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def steps(component: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, in the words of tokenizer.json."""
    return [] if component is None else list(_flat(json.loads(component.__getstate__())))


def _flat(state: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if state["type"] != "Sequence":
        yield state
        return
    for parts in state.values():
        for part in parts if isinstance(parts, list) else ():
            yield from _flat(part)


def _word_starts(normal: list[dict[str, Any]], words: list[dict[str, Any]]) -> str:
    """The characters that start a word behind any character that is no space."""
    known = ("NFC", "Lowercase", "BertNormalizer")
    if any(step["type"] not in known and step != SPACE_IS_LETTER for step in normal):
        return ""
    if SPACE_IS_LETTER in normal:
        return " " if words in ([], [{"type": "Split", **SPACE_SPLIT}]) else ""
    match words:
        case [{"type": "BertPreTokenizer"}]:
            return " \n"
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": prefix}]:
            return " " if prefix else " \n"  # a part that starts with a space gets no other
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False},
        ] if regex in KNOWN_REGEXES:
            return " "
    return ""


def _pairs(content: str) -> set[tuple[str, str]]:
    """Its neighbouring characters; those outside ASCII count as one, as NFC may exchange them."""
    return set(pairwise(character if character.isascii() else "" for character in content))


def _is_inert(character: str) -> bool:
    """Whether NFC never joins or reorders the character with the one before it.

    What composes are marks (M*) and letters without case (Lo), such as parts of Hangul syllables.
    A character that this Python does not know yet (Cn) is none of those below.
    """
    kind = unicodedata.category(character)
    return (
        kind[0] in "NPSZ" or kind in ("Lu", "Ll", "Cc", "Cf") or "\u3400" <= character <= "\u9fff"
    )


def _words(encoding: tokenizers.Encoding) -> int:
    return 1 + max((number for number in encoding.word_ids if number is not None), default=-1)


class Cutter:
    """The places to cut for one tokenizer.

    `settles` says whether `settle` can find any; `numbers_words` whether the words of two parts are
    together those of the text, so that they can be counted.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._model: Any = backend.model
        self._letters = ByteLevel(add_prefix_space=False, use_regex=False)
        self._vocabulary = backend.get_vocab(with_added_tokens=False)
        self._longest = max(map(len, self._vocabulary), default=0)
        added = list(backend.get_added_tokens_decoder().values())
        self._raw = {pair for t in added if not t.normalized for pair in _pairs(t.content)}
        self._normal = {
            pair for t in added if t.normalized for pair in _pairs(self._normalized(t.content))
        }
        normal, words = steps(backend.normalizer), steps(backend.pre_tokenizer)
        odd = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
        plain_bpe = isinstance(self._model, BPE) and not any(getattr(self._model, n) for n in odd)
        self.numbers_words = SPACE_IS_LETTER not in normal
        # When spaces are letters, the text is one word. But whatever merges is a token: if none has
        # a space behind something else, spaces stand apart.
        apart = self.numbers_words or (
            plain_bpe
            and "▁" in self._vocabulary
            and not any("▁" in token.lstrip("▁") for token in self._vocabulary)
        )
        greedy = any(token.rstrip or token.single_word for token in added)
        self._starts = _word_starts(normal, words) if apart and not greedy else ""
        self.settles = (
            plain_bpe
            and self._starts == " \n"
            and not self._model.unk_token
            and all(step["type"] == "NFC" for step in normal)
            and self._longest <= MAX_TOKEN
        )

    def find(self, text: str, at: int) -> int:
        """A place at or after `at` (> 0) where `text` may be cut, or its end when none is found."""
        step = 1
        while at < len(text):
            place = len(text)
            for start in self._starts:
                found = text.find(start, at, place)
                place = found if found >= 0 else place
            if place == len(text) or self._is_free(text, place):
                return place
            # In a run of spaces no place is free; doubling steps cross it.
            at, step = place + step, 2 * step
        return len(text)

    def settle(self, text: str, start: int, encoding: tokenizers.Encoding) -> tuple[int, int]:
        """(n, cut): the first n ids of `encoding` are those of text[start:cut], and the ids of
        text[cut:] follow whatever it holds. (0, start) when that cannot be said of any n > 0.

        `encoding` is that of the beginning of text[start:]. Let its n-th token, t, end at the cut.
        Until a merge crosses the cut, both sides merge as they would alone. So the first that
        crosses joins an end of t to a token y that text[cut:] begins with, and would do so in "ty"
        alone. If every such "ty" merges to t and y, no merge ever crosses.
        """
        if not self.settles:
            return 0, start
        offsets, tokens = encoding.offsets, encoding.tokens
        for n in range(len(tokens) - 1, max(len(tokens) - 64, 0), -1):
            cut = start + offsets[n - 1][1]
            if (
                start + offsets[n][0] == cut  # a token may end within a character
                and all(map(_is_inert, text[cut - 1 : cut + 2]))
                and "'" not in text[max(cut - 2, 0) : cut + 1]  # "'re" is a word, "'r" are two
                and self._is_free(text, cut)
                and self._is_final(tokens[n - 1], text, cut)
            ):
                return n, cut
        return 0, start

    def count(self, text: str, words: bool = False) -> int:
        """The number of tokens, or of words, of `text`, counted in pieces."""
        # The fast way numbers no words.
        encode = self._backend.encode_batch if words else self._backend.encode_batch_fast
        total = start = stop = 0
        pieces: list[str] = []
        while start < len(text):
            if stop < start + PIECE:
                stop = self.find(text, start + PIECE)
            # What follows such a cut tells whether a word ends there.
            if stop - start > 2 * PIECE and not words:
                window = text[start : start + PIECE]
                encoding = self._backend.encode(window, add_special_tokens=False)
                n, cut = self.settle(text, start, encoding)
                if n:
                    total += n
                    start = cut
                    continue
            pieces.append(text[start:stop])
            start = stop
            if len(pieces) == PIECES or start == len(text):
                for encoding in encode(pieces, add_special_tokens=False):
                    total += _words(encoding) if words else len(encoding)
                pieces = []
        return total

    def _is_free(self, text: str, cut: int) -> bool:
        """Whether a cut parts no added token and follows no space."""
        before, after = text[cut - 1], text[cut]
        if before.isspace() or before == "▁" or _pairs(before + after) <= self._raw:
            return False
        if not self._normal:
            return True
        before, after = self._normalized(before)[-1:], self._normalized(after)[:1]
        return bool(before and after) and not _pairs(before + after) <= self._normal

    def _is_final(self, token: str, text: str, cut: int) -> bool:
        """Whether no text[cut:] token can merge with anything of `token`, which ends at the cut."""
        reach = min(cut + 4 * self._longest, len(text))  # normalising leaves half or more of it
        if reach < len(text) and not _is_inert(text[reach]):
            return False  # what normalising makes of text[cut:reach] depends on what follows
        pieces = self._letters.pre_tokenize_str(self._normalized(text[cut:reach]))
        rest = "".join(piece for piece, _ in pieces)
        heads = (rest[:n] for n in range(1, min(len(rest), self._longest) + 1))
        return all(
            [part.value for part in self._model.tokenize(token + head)] == [token, head]
            for head in heads
            if head in self._vocabulary
        )

    def _normalized(self, text: str) -> str:
        normalizer = self._backend.normalizer
        return normalizer.normalize_str(text) if normalizer else text
