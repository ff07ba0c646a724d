"""A tokenizer taken apart, so that its tokens can be edited, and put together again.

Works for byte-level BPE, BPE and Unigram with "▁" for the space, WordPiece and WordLevel. What is
added becomes one token wherever it stands in a text. In BPE that costs no other word anything:
`ignore_merges` looks a whole word up before any merge. WordPiece and Unigram take the longest or
likeliest pieces, so a new token could also begin a longer word; `whole_words` rules that out.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers
from tokenizers.normalizers import Lowercase

from .cutting import SPACE_IS_LETTER, steps

UNKNOWN, PADDING = "[UNK]", "[PAD]"
ABOVE = 1e-6  # of a new Unigram token's score over that of the pieces it replaces


def _byte_symbols() -> dict[str, int]:
    """The character that byte-level tokenizers write for each byte, from GPT-2's encoder.py."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {
        **{chr(byte): byte for byte in plain},
        **{chr(256 + n): byte for n, byte in enumerate(other)},
    }


BYTES = _byte_symbols()


class Vocabulary:
    """The tokens of a tokenizer, to be edited; `build` makes the new tokenizer.

    The new tokenizer puts no special tokens around a text and neither cuts nor pads.

    Attributes:
        kind: BPE, WordPiece, Unigram or WordLevel.
        marker: what a token that begins a word starts with: "Ġ", "▁" or "".
        forms: spellings that share a token, by token, the most frequent first; only of tokens
            whose spelling is not their own text: {"Ġparis": ["Paris"]}.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        state = json.loads(tokenizer.to_str())
        self._model: dict[str, Any] = state["model"]
        self.kind: str = self._model["type"]
        listed = self._model.pop("vocab")
        if self.kind == "Unigram":
            self._scores = {token: float(score) for token, score in listed}
            self._unknown = _unigram_unknown(self._model, listed)
        else:
            # The values count for Unigram only; everything else needs the order.
            self._scores = dict.fromkeys(sorted(listed, key=listed.__getitem__), 0.0)
            self._unknown = self._model.get("unk_token")
        self._merges: list[list[str]] = self._model.pop("merges", [])
        self._added: list[dict[str, Any]] = state["added_tokens"]
        # Normalizer and pre-tokenizer without the weight of a model.
        empty = {"type": "WordLevel", "vocab": {}, "unk_token": UNKNOWN}
        frame: dict[str, Any] = {"model": empty, "added_tokens": [], "post_processor": None}
        frame |= {"truncation": None, "padding": None}
        self._shell = tokenizers.Tokenizer.from_str(json.dumps(state | frame))
        self.marker = self._find_marker()
        self.forms: dict[str, list[str]] = {}

    @classmethod
    def of_words(cls, *, lowercase: bool = True) -> "Vocabulary":
        """An empty vocabulary of whole words, which are cut as BERT does."""
        names = {PADDING: 0, UNKNOWN: 1}
        empty = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token=UNKNOWN))
        empty.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=False)
        empty.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        empty.add_special_tokens([*names])
        return cls(empty)

    def _find_marker(self) -> str:
        names = {step["type"] for step in steps(self._shell.pre_tokenizer)}
        if "ByteLevel" in names:
            return "Ġ"
        normal = steps(self._shell.normalizer)
        prepends = {"type": "Prepend", "prepend": "▁"} in normal
        return "▁" if "Metaspace" in names or SPACE_IS_LETTER in normal or prepends else ""

    # -- reading ----------------------------------------------------------------------------

    @property
    def tokens(self) -> list[str]:
        """Every token, in the order of the ids that `build` gives."""
        beyond = [entry["content"] for entry in self._added]
        return list(dict.fromkeys([*self._scores, *beyond]))

    @property
    def special_tokens(self) -> set[str]:
        """Tokens that stand for no text, such as [PAD]."""
        special = {entry["content"] for entry in self._added if entry["special"]}
        return special | ({self._unknown} if self._unknown else set())

    @property
    def phrases(self) -> set[str]:
        """Tokens that are matched in the text as they stand, before words are looked at."""
        return {entry["content"] for entry in self._added if not entry["special"]}

    def text(self, token: str) -> tuple[str, bool] | None:
        """The text of a token and whether it begins a word; None when it stands for no text."""
        if token in self.special_tokens or not token:
            return None
        return self._text(token)

    def texts(self) -> Iterator[tuple[str, tuple[str, bool] | None]]:
        """(token, `text(token)`) of every token in the order of ids."""
        special = self.special_tokens
        phrases = self.phrases
        for token in self.tokens:
            if token in phrases:
                yield token, (token, True)
            else:
                yield token, None if token in special else self._text(token)

    def _text(self, token: str) -> tuple[str, bool] | None:
        body, starts = token, True
        if self.kind == "WordPiece":
            prefix = self._model["continuing_subword_prefix"]
            if token.startswith(prefix) and token != prefix:
                body, starts = token[len(prefix) :], False
        elif self.marker:
            starts = token.startswith(self.marker)
            body = token.removeprefix(self.marker)
            if self.marker == "Ġ":
                try:
                    body = bytes(map(BYTES.__getitem__, body)).decode()
                except (KeyError, UnicodeDecodeError):  # a part of a character
                    return None
            elif _is_byte(token):
                return None
        return (body, starts) if body else None

    def normal(self, text: str) -> str:
        """The text after the normalizer."""
        normalizer = self._shell.normalizer
        return text if normalizer is None else str(normalizer.normalize_str(text))

    def words(self, text: str) -> list[str]:
        """The words of a text as the model below sees them ("Ġhyrule")."""
        splitter = self._shell.pre_tokenizer
        text = self.normal(text)
        if splitter is None:
            return [text] if text else []
        return [word for word, _ in splitter.pre_tokenize_str(text)]

    def find(self, word: str) -> list[str]:
        """The tokens of a word or phrase that the vocabulary has: one, or one for each place."""
        spellings = self._spellings(word)
        phrases = {token.removeprefix(self.marker) for token in spellings} & self.phrases
        return [token for token in spellings if token in self._scores] + sorted(phrases)

    def _spellings(self, word: str) -> list[str]:
        """What a word is to the model behind a space, at the start and behind a parenthesis.

        A phrase (several words to the model) has itself, normalised, as its only spelling.
        """
        alone = self.words(word)
        phrase = self.normal(word).strip(" ▁")
        if not alone or not phrase:
            return []
        if len(alone) > 1:
            return [phrase]
        body = alone[0].removeprefix(self.marker)
        both = (self.marker + body, body)
        found = {alone[0]: None}
        for before in (" ", "("):
            *_, last = self.words(before + word)
            if last in both:
                found[last] = None
        return sorted(found, reverse=True, key=lambda token: token.startswith(self.marker))

    # -- editing ----------------------------------------------------------------------------

    def drop_added(self) -> None:
        """Drop what was added to the model's own tokens ([CLS], [MASK], runs of spaces, ...).

        Only the tokens for unknown text and for padding stay.
        """
        kept = {self._unknown, UNKNOWN, PADDING, "<unk>", "<pad>"}
        gone = {entry["content"] for entry in self._added} - kept
        self._added = [entry for entry in self._added if entry["content"] not in gone]
        self._delete(gone)

    def prefix_space(self) -> None:
        """Let byte-level tokenizers treat the start of a text as if a space stood before it."""
        parts = steps(self._shell.pre_tokenizer)
        if not any(part["type"] == "ByteLevel" for part in parts):
            return
        for part in parts:
            if part["type"] == "ByteLevel":
                part["add_prefix_space"] = True
        self._reshape(pre_tokenizer={"type": "Sequence", "pretokenizers": parts})

    def align(self) -> None:
        """Give a word the same token behind a space, a bracket, a newline and at the start.

        Words are cut at spaces and around punctuation, as BERT does, and each gets the marker.
        """
        if not self.marker:
            return
        if self.marker == "Ġ":
            mark: Any = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
        else:
            mark = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
            self._drop_normalizers("Prepend", "Replace")
        self._shell.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.BertPreTokenizer(), mark]
        )

    def _drop_normalizers(self, *kinds: str) -> None:
        kept = [
            step
            for step in steps(self._shell.normalizer)
            if step["type"] not in kinds or step.get("content") not in (None, "▁")
        ]
        self._reshape(normalizer={"type": "Sequence", "normalizers": kept} if kept else None)

    def _reshape(self, **parts: Any) -> None:
        state = json.loads(self._shell.to_str()) | parts
        self._shell = tokenizers.Tokenizer.from_str(json.dumps(state))

    def fold_case(self) -> None:
        """Lower-case every text, and let the spellings of a word share one token.

        `forms` remembers them in the order of their old ids, which in BPE and WordPiece is nearly
        that of their frequency. Pieces inside a word that no lower-cased text needs are dropped.
        """
        if self.normal("A") == "A":
            step = Lowercase()
            before = self._shell.normalizer
            self._shell.normalizer = (
                step if before is None else normalizers.Sequence([before, step])
            )
        lower = Lowercase().normalize_str
        scores: dict[str, float] = {}
        groups: dict[str, list[str]] = {}
        for token, piece in self.texts():
            if token not in self._scores:
                continue
            folded = token
            if piece is not None and lower(piece[0]) != piece[0]:
                text, starts = piece
                spellings = self._spellings(text) if starts else []
                if not spellings or len(self.words(text)) != 1:
                    continue
                folded = spellings[0]
            scores.setdefault(folded, self._scores[token])
            if piece is not None:
                groups.setdefault(folded, []).extend(self.forms.get(token, [piece[0]]))
        self._replace_tokens(scores)
        own = {token: [piece[0]] for token, piece in self.texts() if piece is not None}
        self.forms = {token: texts for token, texts in groups.items() if texts != own.get(token)}

    def prune(self) -> None:
        """Drop the tokens that no text can reach; single characters and bytes stay."""
        special, phrases = self.special_tokens, self.phrases
        gone = set()
        for token, piece in self.texts():
            if piece is None or token in special or token in phrases or self._is_letter(token):
                continue
            if len(self.words(piece[0])) != 1 or self.normal(piece[0]) != piece[0]:
                gone.add(token)
        self._delete(gone)

    def _is_letter(self, token: str) -> bool:
        body = token.removeprefix(self.marker)
        if self.kind == "WordPiece":
            body = token.removeprefix(self._model["continuing_subword_prefix"])
        return len(body) <= 1 or _is_byte(token)

    def add(
        self, words: Iterable[str], *, whole_words: bool = False, loose: bool = False
    ) -> dict[str, str]:
        """Add words and phrases; {word: its token} of all that are not empty to the normalizer.

        With `whole_words`, tokens of WordPiece and Unigram are matched only where no letter stands
        beside them, as phrases always are, and no other word changes. `loose` phrases are those of
        model2vec: they match inside words, too, and take the spaces around them.
        """
        if self.kind == "BPE":
            self._model["ignore_merges"] = True
        scorer = self.build() if self.kind == "Unigram" else None
        whole = whole_words and self.kind in ("WordPiece", "Unigram")
        phrases = self.phrases
        found: dict[str, str] = {}
        for word in words:
            spellings = self._spellings(word)
            if not spellings:
                continue
            known = next((t for t in spellings if t in self._scores or t in phrases), None)
            if known is None and (whole or not self._is_word(word)):
                known = spellings[0].removeprefix(self.marker)
                if known not in phrases:
                    phrases.add(known)
                    self._added.append(_phrase(known, loose))
            found[word] = known or spellings[0]
            if self._is_word(word) and not whole:
                for token in spellings:
                    if token not in self._scores:
                        self._scores[token] = self._score(scorer, word)
        return found

    def _is_word(self, text: str) -> bool:
        return len(self.words(text)) == 1

    def _score(self, scorer: tokenizers.Tokenizer | None, word: str) -> float:
        if scorer is None:
            return 0.0
        lowest = min(self._scores.values()) - 10  # what the model counts for an unknown letter
        pieces = scorer.encode(word, add_special_tokens=False).tokens
        return sum(self._scores.get(piece, lowest) for piece in pieces) + ABOVE

    def remove(self, tokens: Iterable[str]) -> list[str]:
        """Remove tokens; those that were not removed, because other words are spelled with them.

        Raises `ValueError` for a token that the vocabulary does not have.
        """
        wanted = list(dict.fromkeys(tokens))
        known = set(self.tokens)
        if absent := [token for token in wanted if token not in known]:
            raise ValueError(
                f"the vocabulary has no token {', '.join(map(repr, absent[:5]))}"
                f"{', ...' if len(absent) > 5 else ''}; see `tokens` for those it has"
            )
        letters = self.kind != "WordLevel"
        kept = [t for t in wanted if t in self.special_tokens or (letters and self._is_letter(t))]
        gone = set(wanted) - set(kept)
        self._added = [entry for entry in self._added if entry["content"] not in gone]
        self._delete(gone)
        return kept

    def _delete(self, gone: set[str]) -> None:
        self._replace_tokens({t: score for t, score in self._scores.items() if t not in gone})

    def _replace_tokens(self, scores: dict[str, float]) -> None:
        merges = [[a, b] for a, b in self._merges if {a, b, a + b} <= scores.keys()]
        if len(merges) < len(self._merges):
            # Longer tokens were made of the removed ones; whole words are found without merges.
            self._model["ignore_merges"] = True
            self._merges = merges
        self._scores = scores
        self.forms = {token: forms for token, forms in self.forms.items() if token in scores}

    def build(self) -> tokenizers.Tokenizer:
        """The tokenizer with the tokens as they are now; ids follow `tokens`."""
        state = json.loads(self._shell.to_str())
        ids = {token: number for number, token in enumerate(self.tokens)}
        model = dict(self._model)
        if self.kind == "Unigram":
            model["vocab"] = [[token, score] for token, score in self._scores.items()]
            model["unk_id"] = None if self._unknown is None else ids[self._unknown]
        else:
            model["vocab"] = {token: ids[token] for token in self._scores}
        if self.kind == "BPE":
            model["merges"] = self._merges
        added = [entry | {"id": ids[entry["content"]]} for entry in self._added]
        state |= {"model": model, "added_tokens": sorted(added, key=lambda entry: entry["id"])}
        return tokenizers.Tokenizer.from_str(json.dumps(state))


def _unigram_unknown(model: dict[str, Any], listed: list[list[Any]]) -> str | None:
    number = model.get("unk_id")
    return None if number is None else listed[number][0]


def _is_byte(token: str) -> bool:
    """Whether it is one of the tokens such as <0x0A> that spell unknown characters."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _phrase(content: str, loose: bool) -> dict[str, Any]:
    flags = {"single_word": not loose, "lstrip": loose, "rstrip": loose}
    return {"content": content, "normalized": True, "special": False, **flags}
