"""Texts, words and pairs for modernbert-mini, and its tokenizer, from raw public collections.

Reads the folders of `--data` (formats in the recipe's README) and the Python sources installed
beside this interpreter, and writes to `--out`:

    wikipedia.jsonl.gz   {"text"}: whole documents, for masked language modelling;
    other.jsonl.gz       books, technical documents and Python sources
    words.jsonl.gz       {"text"}: frequent words, for distillation
    texts.jsonl.gz       {"text"}: sentences, paragraphs and phrases, for distillation
    pairs.jsonl.gz       {"anchor", "positive"}: what belongs together, for contrastive training
    triplets.jsonl.gz    {"anchor", "positive", "negative"}
    tokenizer/           byte-level BPE with ModernBERT's special tokens and whitespace runs
    sources.json         every file that was read, with its sha256

Nothing here reads an evaluation set.
"""

import ast
import csv
import gzip
import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
import numpy as np
import tokenizers
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tqdm import tqdm

from modernbert.evaluation.code_retrieval import in_test_split

SEED = 17
VOCABULARY = 16_384
WORDS, CODE_FILES = 40_000, 4_000
# Words that the tokenizer's sample repeats: as single tokens they can be learnt one by one.
WHOLE_WORDS, REPEATED = 10_000, 400
# Articles that give phrases and paragraphs, too; the others give single sentences.
WHOLE_ARTICLES = 2_182
PACKAGES = ("numpy", "scipy", "sklearn", "torch", "transformers", "matplotlib", "sympy", "click")
ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "st", "vs", "etc", "jr", "sr", "no", "e.g", "i.e", "cf"}
SPECIAL = ("<|endoftext|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
PLACEHOLDERS = ("|||IP_ADDRESS|||", "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||")


FOLDER = click.Path(file_okay=False, path_type=Path)


class Sources:
    """Opens the files of the data folder and remembers what was read."""

    def __init__(self, data: Path):
        self.data = data
        self.read: dict[str, str] = {}

    def open(self, name: str) -> Iterator[str]:
        """Lines of a file under the data folder, unzipped."""
        path = self.data / name
        self.read[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8", newline="\n") as lines:
            yield from lines

    def records(self, pattern: str) -> Iterator[dict]:
        """Objects of the JSONL files under the data folder that match."""
        for path in sorted(self.data.glob(pattern)):
            for line in self.open(str(path.relative_to(self.data))):
                yield json.loads(line)


def sentences(paragraph: str) -> Iterator[str]:
    """Cut at '.', '!' or '?' before a capital, except after initials and abbreviations."""
    start = 0
    for i in range(1, len(paragraph) - 2):
        if paragraph[i] in ".!?" and paragraph[i + 1] == " ":
            after = paragraph[i + 2]
            word = paragraph[paragraph.rfind(" ", 0, i) + 1 : i].lower().strip("(\"'")
            if len(word) > 1 and word not in ABBREVIATIONS and (after.isupper() or after in "\"'"):
                yield paragraph[start : i + 1].strip()
                start = i + 2
    yield paragraph[start:].strip()


def paragraphs(text: str) -> Iterator[str]:
    """Lines that are not empty, without the white space around them."""
    for line in text.split("\n"):
        line = line.strip()
        if line:
            yield line


def unwrapped(text: str) -> Iterator[str]:
    """Paragraphs of hard-wrapped text: blocks between empty lines, each on one line."""
    for block in text.replace("\r", "").split("\n\n"):
        joined = " ".join(block.split())
        if joined:
            yield joined


def sized(texts: Iterable[str], low: int, high: int) -> Iterator[str]:
    """Those of `low` to `high` words."""
    for text in texts:
        if low <= text.count(" ") + 1 <= high:
            yield text


def python_files() -> list[Path]:
    """Sources of the standard library and of installed packages, in a fixed order.

    The modules that the evaluation of code retrieval reads are left out.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    site = Path(sysconfig.get_paths()["purelib"])
    files = [p for p in sorted(library.rglob("*.py")) if "site-packages" not in p.parts]
    for package in PACKAGES:
        files += sorted((site / package).rglob("*.py"))
    wanted = [p for p in files if 500 < p.stat().st_size < 100_000 and "test" not in str(p).lower()]
    picked = np.random.Generator(np.random.PCG64(SEED)).permutation(len(wanted))[:CODE_FILES]
    return [wanted[i] for i in sorted(picked) if not is_held_out(wanted[i])]


def functions(source: str) -> Iterator[tuple[str, str]]:
    """(first paragraph of the docstring, function without it) of each documented function."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    lines = source.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if not text or len(node.body) < 2:
                continue
            docstring = node.body[0]
            head = lines[node.lineno - 1 : docstring.lineno - 1]
            body = lines[docstring.end_lineno : node.end_lineno]
            first = " ".join(text.split("\n\n")[0].split())
            if 4 <= first.count(" ") + 1 <= 60 and len(body) >= 2:
                yield first, "\n".join(head + body)[:1500]


def is_held_out(path: Path) -> bool:
    """Whether the evaluation of code retrieval reads a source file."""
    library = Path(sysconfig.get_paths()["stdlib"])
    inside = path.is_relative_to(library) and "site-packages" not in path.parts
    return inside and in_test_split(path.relative_to(library).with_suffix("").parts[0])


def snli(sources: Sources) -> Iterator[tuple[str, str, str]]:
    """(premise, hypothesis, label) of the pairs of SNLI's dev and test files."""
    for part in ("dev", "test"):
        columns = [sources.open(f"pairs_snli/{name}.{part}") for name in ("s1", "s2", "labels")]
        for first, second, label in zip(*columns, strict=True):
            yield first.strip(), second.strip(), label.strip()


def wikisplit(sources: Sources) -> Iterator[tuple[str, str]]:
    """(long sentence, the same in two sentences), spaces before punctuation removed."""
    for part in ("tune", "validation", "test"):
        rows = csv.reader(
            sources.open(f"pairs_wikisplit/{part}.tsv.gz"), delimiter="\t", quoting=csv.QUOTE_NONE
        )
        for row in rows:
            yield plain(row[0]), plain(row[1].replace("<::::>", " "))


def plain(text: str) -> str:
    """Undo the tokenisation of WikiSplit."""
    for before, after in ((" ,", ","), (" .", "."), (" 's", "'s"), ("( ", "("), (" )", ")")):
        text = text.replace(before, after)
    return " ".join(text.replace("''", '"').split())


def collect_pairs(sources: Sources, wikipedia: list[dict], code: list[Path]) -> Iterator[dict]:
    """Texts that belong together, from every collection of pairs."""
    for record in wikipedia:
        lead = next(sized(paragraphs(record["text"]), 12, 200), None)
        if lead:
            yield {"anchor": record["title"], "positive": lead}
    for record in sources.records("pairs_boolq/*.jsonl.gz"):
        yield {"anchor": record["question"], "positive": record["passage"]}
    for record in sources.records("pairs_medquad/*.jsonl.gz"):
        answer = " ".join(record["answer"].split()[:160])
        if len(answer) > 60:
            yield {"anchor": record["question"], "positive": answer}
    for record in sources.records("pairs_scitldr/*.jsonl.gz"):
        for target in record["target"]:
            yield {"anchor": target, "positive": " ".join(record["source"])}
        if len(record["source"]) > 3:  # a claim of the abstract and the rest of it
            yield {"anchor": record["source"][-1], "positive": " ".join(record["source"][:-1])}
    for record in sources.records("pairs_pyapidocs/*.jsonl.gz"):
        yield {"anchor": record["intent"], "positive": record["snippet"]}
    comments, lines = (sources.open(f"pairs_django/all.{kind}") for kind in ("anno", "code"))
    for comment, line in zip(comments, lines, strict=True):
        if comment.count(" ") > 3:
            yield {"anchor": comment.strip(), "positive": line.strip()}
    for long, split in wikisplit(sources):
        yield {"anchor": long, "positive": split}
    for path in code:
        for docstring, body in functions(path.read_text("utf-8", errors="ignore")):
            yield {"anchor": docstring, "positive": body}


def collect_triplets(sources: Sources) -> Iterator[dict]:
    """Premise, an entailed sentence and a contradicting one."""
    by_premise: dict[str, dict[str, str]] = {}
    for premise, hypothesis, label in snli(sources):
        by_premise.setdefault(premise, {})[label] = hypothesis
    for premise, found in by_premise.items():
        if {"entailment", "contradiction"} <= found.keys():
            positive, negative = found["entailment"], found["contradiction"]
            yield {"anchor": premise, "positive": positive, "negative": negative}


def words() -> list[str]:
    """Frequent English words, the most frequent first."""
    import wordfreq

    return [word for word in wordfreq.top_n_list("en", WORDS) if word.isalpha()]


def collect_words(rng: np.random.Generator) -> Iterator[str]:
    """Words whose vector the student learns; a third of them also as at the start of a sentence."""
    for word in words():
        yield word
        if rng.random() < 0.3:
            yield word.capitalize()


def collect_texts(
    rng: np.random.Generator,
    sources: Sources,
    wikipedia: list[dict],
    books: list[dict],
    pairs: list[dict],
) -> Iterator[str]:
    """Longer texts whose vector the student learns, in no particular order."""
    more = np.random.Generator(np.random.PCG64(SEED + 1))
    for index, record in enumerate(wikipedia):
        yield record["title"]
        if index >= WHOLE_ARTICLES:
            first, *others = record["text"].split("\n")
            yield next(sentences(first))
            for paragraph in others:
                for sentence in sized(sentences(paragraph), 3, 40):
                    if more.random() < 0.15:
                        yield sentence
            continue
        for paragraph in paragraphs(record["text"]):
            split = list(sentences(paragraph))
            for sentence in sized(split, 1, 60):
                draw = rng.random()
                if draw < 0.09:
                    yield sentence
                elif draw < 0.12:  # phrases as they stand in sentences
                    tokens = sentence.split()
                    size = int(rng.integers(1, 6))
                    start = int(rng.integers(0, max(1, len(tokens) - size)))
                    phrase = " ".join(tokens[start : start + size]).strip('.,;:()"')
                    if phrase:
                        yield phrase
            if len(split) > 2 and rng.random() < 0.01:
                yield " ".join(paragraph.split()[:150])
    for record in books:
        for paragraph in unwrapped(record["text"]):
            for sentence in sized(sentences(paragraph), 3, 50):
                if rng.random() < 0.02:
                    yield sentence
    for premise, hypothesis, _ in snli(sources):
        yield premise
        yield hypothesis
    for pair in pairs:
        draw = rng.random()
        if draw < 0.3:
            yield pair["anchor"]
        elif draw < 0.34:
            yield " ".join(pair["positive"].split()[:150])


def write(path: Path, records: Iterable[dict]) -> int:
    """A gzipped JSONL file whose bytes depend on the records alone; its number of records."""
    count = 0
    part = path.with_suffix(".part")
    with open(part, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as out:
        for record in tqdm(records, desc=path.name, unit=" records", mininterval=2):
            out.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            count += 1
    part.replace(path)
    return count


def train_tokenizer(texts: Iterable[str], folder: Path) -> None:
    """Byte-level, cased BPE with ModernBERT's normaliser, special tokens and whitespace runs."""
    runs = [" " * n for n in range(24, 1, -1)]
    added = len(SPECIAL) + len(PLACEHOLDERS) + len(runs)
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - added,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=True) for token in (*PLACEHOLDERS, *runs)])
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, lstrip=token == "[MASK]") for token in SPECIAL]
    )
    ids = {name: tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:0 [SEP]:0",
        special_tokens=list(ids.items()),
    )
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("unk", "cls", "sep", "pad", "mask")}
    config = {
        **names,
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", names)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def sample_for_tokenizer(documents: Iterable[str]) -> Iterator[str]:
    """A third of the documents, and frequent words as in running text, many times."""
    for index, document in enumerate(documents):
        if index % 3 == 0:
            yield document
    for word in words()[:WHOLE_WORDS]:
        for _ in range(REPEATED):
            yield f" {word}"


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, out: Path) -> None:
    """Write the training files of modernbert-mini to --out."""
    out.mkdir(parents=True, exist_ok=True)
    sources = Sources(data)
    wikipedia = list(sources.records("text_wikipedia_en/*.jsonl.gz"))
    books = list(sources.records("text_books/*.jsonl.gz"))
    code = python_files()
    articles = [{"text": f"{r['title']}\n{r['text']}"} for r in wikipedia]
    other = [{"text": "\n".join(unwrapped(r["text"]))} for r in books]
    other += [{"text": r["text"]} for r in sources.records("text_techdocs/*.jsonl.gz")]
    # Every fourth source: more would make a third of the tokens code.
    other += [{"text": path.read_text("utf-8", errors="ignore")} for path in code[::4]]
    pairs = list(collect_pairs(sources, wikipedia, code))
    counts = {
        "wikipedia": write(out / "wikipedia.jsonl.gz", articles),
        "other": write(out / "other.jsonl.gz", other),
        "pairs": write(out / "pairs.jsonl.gz", pairs),
        "triplets": write(out / "triplets.jsonl.gz", collect_triplets(sources)),
    }
    rng = np.random.Generator(np.random.PCG64(SEED))
    collections = {"words": collect_words(rng)}
    collections["texts"] = collect_texts(rng, sources, wikipedia, books, pairs)
    for name, texts in collections.items():
        records = ({"text": text} for text in dict.fromkeys(texts))
        counts[name] = write(out / f"{name}.jsonl.gz", records)
    documents = (record["text"] for record in articles + other)
    train_tokenizer(sample_for_tokenizer(documents), out / "tokenizer")
    listing = {"counts": counts, "sources": sources.read}
    (out / "sources.json").write_text(json.dumps(listing, indent=2, sort_keys=True) + "\n")
    click.echo(json.dumps(counts))


if __name__ == "__main__":
    main()
