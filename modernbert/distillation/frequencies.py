"""How often words and tokens occur: from wordfreq, a file, texts, or a masked LM's bias."""

import gzip
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from modernbert.vocabulary import Vocabulary

# Shares of tokens in running text; word lists leave punctuation out.
COMMON_MARKS = {",": 0.04, ".": 0.04}
MARK, UNSEEN = 5e-4, 1e-9
NUMBER = 0.01  # of what all numbers with as many digits have together
INSIDE = 0.05  # how often a piece stands inside a word, as a share of its string being a word

Source = str | os.PathLike[str] | Mapping[str, float] | Iterable[str]


def word_frequencies(source: Source = "wordfreq", *, language: str = "en") -> dict[str, float]:
    """Words, the most frequent first, with their share of a text.

    Args:
        source: "wordfreq", the package, in `language`; a file with a word on each line, most
            frequent first, with or without a count behind it (.gz too); a mapping from words to
            counts; or texts, whose words are counted.

    Raises `ValueError` for a language or file without words, `ImportError` without wordfreq.
    """
    counts: Mapping[str, float]
    if isinstance(source, Mapping):
        counts = source
    elif source == "wordfreq":
        counts = _from_wordfreq(language)
    elif isinstance(source, str | os.PathLike):
        counts = _from_file(Path(source))
    else:
        counts = _from_texts(source)
    total = sum(counts.values())
    if not total > 0:
        raise ValueError("the word list is empty; give words with positive counts")
    return {w: counts[w] / total for w in sorted(counts, key=counts.__getitem__, reverse=True)}


def _from_wordfreq(language: str) -> dict[str, float]:
    try:
        import wordfreq
    except ImportError:
        raise ImportError(
            "word frequencies need the package wordfreq: pip install 'modernbert[distill]'; or "
            "give a file of words as frequencies="
        ) from None
    try:
        return wordfreq.get_frequency_dict(language, wordlist="best")
    except LookupError:
        known = ", ".join(sorted(wordfreq.available_languages()))
        raise ValueError(f"wordfreq has no words of {language!r}; it has {known}") from None


def _from_file(path: Path) -> dict[str, float]:
    if not path.is_file():
        raise ValueError(f"there is no word list {path}; give 'wordfreq' or a file of words")
    opened: Any = gzip.open if path.suffix == ".gz" else open
    counts: dict[str, float] = {}
    with opened(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.strip()
            word, _, count = text.rpartition("\t") if "\t" in text else text.rpartition(" ")
            if word and _is_number(count):
                counts[word.strip()] = float(count)
            elif text:
                counts.setdefault(text, 1 / (number + 1))  # Zipf's law
    return counts


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


def _from_texts(texts: Iterable[str]) -> dict[str, float]:
    clean, split = BertNormalizer(strip_accents=False), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(clean.normalize_str(text)))
    return dict(counts)


def random_texts(frequencies: Mapping[str, float], count: int) -> list[list[str]]:
    """Texts of 4 to 12 words each, drawn at random by frequency; always the same ones."""
    words = [word for word in frequencies if word.isalpha()]
    shares = np.array([frequencies[word] for word in words])
    generator = np.random.default_rng(0)
    lengths = generator.integers(4, 13, count)
    drawn = iter(generator.choice(len(words), lengths.sum(), p=shares / shares.sum()).tolist())
    return [[words[next(drawn)] for _ in range(length)] for length in lengths]


def is_mark(text: str) -> bool:
    """Whether it is punctuation only."""
    return not any(letter.isalnum() for letter in text)


def token_probabilities(vocabulary: Vocabulary, frequencies: Mapping[str, float]) -> np.ndarray:
    """p (V,) of each token, from the frequencies of words.

    A word has its own; a piece inside words a twentieth of what its string has as a word; a mark
    that the list does not have, what is usual in English; a number a hundredth of its wordfreq bin.
    """
    found = np.full(len(vocabulary.tokens), UNSEEN)
    for number, (_, piece) in enumerate(vocabulary.texts()):
        if piece is None:
            continue
        text, starts = piece
        share = frequencies.get(text) or frequencies.get(text.lower()) or 0.0
        if text.isdigit() and len(text) > 1:  # wordfreq has 2026 as 0000
            share = share or NUMBER * frequencies.get("0" * len(text), 0.0)
        if not share and len(text) == 1 and not text.isalnum():
            share = COMMON_MARKS.get(text, MARK)
        found[number] = max(share if starts else share * INSIDE, UNSEEN)
    return found


def head_probabilities(
    bias: np.ndarray, backend: tokenizers.Tokenizer, vocabulary: Vocabulary
) -> np.ndarray:
    """p (V,) from the bias (teacher's V,) of a masked LM's decoder, which holds log frequencies.

    From Kobayashi et al. 2023. A word that the teacher has no token for is as frequent as the
    rarest of its pieces.
    """
    shares = np.exp(bias.astype(np.float64) - bias.max())
    shares /= shares.sum()
    ids = backend.get_vocab(with_added_tokens=True)
    found = np.full(len(vocabulary.tokens), UNSEEN)
    for number, (token, piece) in enumerate(vocabulary.texts()):
        if token in ids and ids[token] < len(shares):
            found[number] = shares[ids[token]]
        elif piece is not None:
            pieces = backend.encode(" " + piece[0], add_special_tokens=False).ids
            found[number] = min((shares[i] for i in pieces if i < len(shares)), default=UNSEEN)
    return found
