"""What is encoded: the paper's four workloads, a sweep over lengths, and lengths of real texts.

Source: Warner et al. 2024, arXiv 2412.13663, section 4.2 and table 10.
"""

import csv
import gzip
import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

SEED = 42
PAPER_DOCS = 8192
# The paper's text says that lengths are clamped at 16; only 32, as in its notebooks, gives the
# token total that its table 10 prints for the short documents.
SHORTEST = 32
POOL = 20_000  # texts of a real set from which the sample is drawn


@dataclass(frozen=True)
class Workload:
    """Texts to encode, as token counts; `kind` is "fixed", "variable" or "real"."""

    name: str
    kind: str
    lengths: tuple[int, ...]
    texts: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def sequences(self) -> list[Tensor]:
        """Token ids of each text, (length,) int64: random and seeded, as in the paper."""
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(100, 16_000, (self.tokens,), generator=generator)
        return list(ids.split(list(self.lengths)))


@dataclass(frozen=True)
class Skipped:
    """A workload that cannot run here, and why."""

    name: str
    reason: str


def fixed(length: int, docs: int) -> Workload:
    """`docs` texts of `length` tokens each."""
    return Workload(f"fixed {length}", "fixed", (length,) * docs)


def variable(mean: int, std: int, longest: int, docs: int) -> Workload:
    """Lengths from N(mean, std), cut off to integers; fewer documents are the paper's first."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.normal(float(mean), float(std), (max(docs, PAPER_DOCS),), generator=generator)
    lengths = drawn[:docs].int().clamp(SHORTEST, longest).tolist()
    return Workload(f"variable {longest}", "variable", tuple(lengths))


def paper(docs: int) -> list[Workload]:
    """The four workloads with about as many tokens each: `docs` counts the texts of N(256, 64)."""
    return [
        fixed(512, max(docs // 2, 1)),
        variable(256, 64, 512, docs),
        fixed(8192, max(docs // 16, 1)),
        variable(4096, 1024, 8192, max(docs // 8, 1)),
    ]


def sweep(lengths: tuple[int, ...], docs: int) -> list[Workload]:
    """Fixed lengths, for speed by length; about as many tokens each as in `paper`."""
    return [fixed(length, max(docs * 256 // length, 1)) for length in lengths]


def real(folder: Path | None, docs: int, longest: int = 8192) -> list[Workload | Skipped]:
    """Texts of STS-B, SciFact and Wikipedia with their true token counts, seeded samples."""
    return [_real(name, source, folder, docs, longest) for name, source in SOURCES.items()]


def _real(
    name: str, source: "Source", folder: Path | None, docs: int, longest: int
) -> Workload | Skipped:
    if folder is None:
        return Skipped(name, "no folder of real texts; name one with --data")
    path = folder / source.path
    for needed in (tokenizer_file(folder), path):
        if not needed.exists():
            return Skipped(name, f"{needed.relative_to(folder)} is not in {folder.name}/")
    texts = list(islice(filter(str.strip, source.read(path)), POOL))
    random.Random(SEED).shuffle(texts)
    lengths = count_tokens(texts[:docs], folder, longest)
    return Workload(name, "real", lengths, tuple(texts[:docs]))


def even_texts(folder: Path | None, docs: int, tokens: int) -> Workload | Skipped:
    """Wikipedia articles cut to `tokens` tokens, [CLS] and [SEP] included, with their text."""
    name = f"Wikipedia, {tokens} tokens"
    source = SOURCES[WIKIPEDIA]
    if folder is None or not (folder / source.path).exists():
        return Skipped(name, "no Wikipedia articles; name their folder with --data")
    tokenizer = _tokenizer(folder)
    texts: list[str] = []
    for article in _articles(folder / source.path):
        encoding = tokenizer.encode(article[: 16 * tokens], add_special_tokens=False)
        if len(encoding.ids) >= tokens:
            texts.append(article[: encoding.offsets[tokens - 3][1]])
        if len(texts) == docs:
            break
    return Workload(name, "real", count_tokens(texts, folder, tokens), tuple(texts))


def tokenizer_file(folder: Path) -> Path:
    """ModernBERT's tokenizer in the folder of real data."""
    return folder / "tokenizer_modernbert" / "tokenizer.json"


def count_tokens(texts: list[str], folder: Path, longest: int) -> tuple[int, ...]:
    """Tokens of each text, [CLS] and [SEP] included, at most `longest`."""
    encodings = _tokenizer(folder).encode_batch(texts)
    return tuple(min(len(encoding.ids), longest) for encoding in encodings)


def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tokenizer_file(folder)))


def _sentences(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            yield row["sentence1"]
            yield row["sentence2"]


def _abstracts(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive, archive.open("corpus_train.csv") as raw:
        for row in csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline="")):
            # The column holds the text form of an array of sentences.
            yield row["title"] + " " + row["abstract"].strip("[]")


def _articles(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _paragraphs(path: Path) -> Iterator[str]:
    for article in _articles(path):
        yield from article.split("\n\n")


@dataclass(frozen=True)
class Source:
    path: str
    read: Callable[[Path], Iterator[str]]


WIKIPEDIA = "Wikipedia paragraphs"
SOURCES = {
    "STS-B sentences": Source("sts_benchmark/stsbenchmark.tsv.gz", _sentences),
    "SciFact abstracts": Source("ret_scifact/scifact.zip", _abstracts),
    WIKIPEDIA: Source("text_wikipedia_en/enwiki_core_AA_0.jsonl.gz", _paragraphs),
}
