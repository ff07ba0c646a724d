"""Retrieval: queries against documents by cosine; nDCG@10 and recall@100.

Collections are folders in the layout of BEIR or of SMART; both are described at their readers.
"""

import ast
import csv
import io
import json
import tokenize
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from .correlation import unit
from .files import find, number, read_lines, read_text
from .models import Subject
from .scores import Skipped
from .task import Measured, Task

SUITE = "retrieval"
DEPTH = 100
QUERY_BLOCK = 64


@dataclass(frozen=True)
class Collection:
    """Documents and queries by id; judgements: query id to document id to relevance."""

    documents: Mapping[str, str]
    queries: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, float]]


def tasks(data: Path) -> Iterator[Task | Skipped]:
    """Every folder of `data` that is a collection; known ones that are absent are named."""
    found = {}
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        for is_layout, read in LAYOUTS:
            if is_layout(folder):
                found[folder.name] = partial(read, folder)
                break
    for name in sorted({"ret_scifact", "ret_cisi", "ret_cacm"} - set(found)):
        yield Skipped(SUITE, name.removeprefix("ret_"), f"there is no {name}/")
    for name, read in found.items():
        yield Task(SUITE, name.removeprefix("ret_"), partial(_run, read))


def _run(read: "partial[Collection]", subject: Subject) -> Measured:
    return search(subject, read())


def search(subject: Subject, collection: Collection) -> Measured:
    """Points over the queries that have a relevant document in the collection."""
    found = rank(subject, collection)
    return Measured(len(found), mean_points(found))


def mean_points(found: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Points by metric: 100 times the mean over queries of what `rank` gives."""
    metrics = next(iter(found.values()))
    return {metric: 100 * fmean(q[metric] for q in found.values()) for metric in metrics}


def rank(subject: Subject, collection: Collection) -> dict[str, dict[str, float]]:
    """What `judge` says of each query that has a relevant document in the collection."""
    documents, queries = collection.documents, collection.queries
    judged = {
        query: {d: rel for d, rel in collection.judgements[query].items() if d in documents}
        for query in queries
        if query in collection.judgements
    }
    judged = {q: rels for q, rels in judged.items() if any(rel > 0 for rel in rels.values())}
    if not judged:
        raise ValueError("no query of the collection has a relevant document in it")
    names, asked = list(documents), list(judged)
    matrix = unit(subject.embed(list(documents.values()), "document"))  # (documents, d)
    vectors = unit(subject.embed([queries[query] for query in asked], "query"))  # (queries, d)
    found = {}
    for start in range(0, len(asked), QUERY_BLOCK):
        scores = vectors[start : start + QUERY_BLOCK] @ matrix.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :DEPTH]
        for query, row in zip(asked[start : start + QUERY_BLOCK], best, strict=True):
            gains = np.array([judged[query].get(names[index], 0.0) for index in row])
            found[query] = judge(gains, list(judged[query].values()))
    return found


def judge(gains: np.ndarray, relevances: list[float]) -> dict[str, float]:
    """Metrics, 0 to 1, of one ranking.

    `gains` (up to 100,) are the relevances of what was found, best first; `relevances` are those of
    all judged documents. nDCG as trec_eval computes it: relevance / log2(1 + rank).
    """
    relevant = sum(rel > 0 for rel in relevances)
    ideal = _dcg(np.sort(relevances)[::-1][:10])
    hits = np.flatnonzero(gains[:10] > 0)
    return {
        "nDCG@10": _dcg(gains[:10]) / ideal,
        "recall@100": float((gains[:DEPTH] > 0).sum()) / relevant,
        "MRR@10": 1 / (1 + float(hits[0])) if len(hits) else 0.0,
    }


def _dcg(gains: np.ndarray) -> float:
    gains = np.maximum(gains, 0)
    return float((gains / np.log2(np.arange(len(gains)) + 2)).sum())


# -- BEIR: corpus.jsonl, queries.jsonl, qrels/test.tsv ---------------------------------------------


def _is_beir(folder: Path) -> bool:
    return bool(find(folder, "corpus.jsonl") and find(folder / "qrels", "test.tsv"))


def read_beir(folder: Path) -> Collection:
    """corpus.jsonl (_id, title, text) and queries.jsonl (_id, text), plain or .gz; qrels/test.tsv
    (query-id, corpus-id, score, with a header). A document is its title, a space, its text."""
    corpus = find(folder, "corpus.jsonl")
    queries = find(folder, "queries.jsonl")
    qrels = find(folder / "qrels", "test.tsv")
    if corpus is None or queries is None or qrels is None:
        raise ValueError(f"{folder} has no queries.jsonl beside its corpus.jsonl")
    documents = {
        row["_id"]: f"{row.get('title') or ''} {row['text']}".strip() for row in _jsonl(corpus)
    }
    return Collection(documents, {r["_id"]: r["text"] for r in _jsonl(queries)}, _qrels(qrels))


def _jsonl(path: Path) -> Iterator[dict[str, str]]:
    for place, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place} is not JSON: {error}") from None
        if not isinstance(row, dict) or not {"_id", "text"} <= row.keys():
            raise ValueError(f'{place} is no object with "_id" and "text"')
        yield row


def _qrels(path: Path) -> dict[str, dict[str, float]]:
    """Query id first, relevance last, document id before it; the first line is a header."""
    judgements: dict[str, dict[str, float]] = defaultdict(dict)
    for index, (place, line) in enumerate(read_lines(path)):
        fields = line.split("\t")
        if index == 0 or not line.strip():
            continue
        if len(fields) < 3:
            raise ValueError(f"{place} is not query-id, corpus-id, score, separated by tabs")
        judgements[fields[0]][fields[-2]] = number(fields[-1], place)
    return judgements


# -- SciFact as published: scifact.zip holds the corpus, beside BEIR's queries and qrels -----------


def _is_scifact(folder: Path) -> bool:
    return bool(find(folder, "scifact.zip") and find(folder, "beir_test_qrels.tsv"))


def read_scifact(folder: Path) -> Collection:
    """scifact.zip/corpus_train.csv, beir_test_queries.jsonl and beir_test_qrels.tsv."""
    with zipfile.ZipFile(folder / "scifact.zip") as archive:
        text = archive.read("corpus_train.csv").decode()
    documents = {
        row["doc_id"]: f"{row['title']} {' '.join(array_texts(row['abstract']))}".strip()
        for row in csv.DictReader(io.StringIO(text, newline=""))
    }
    queries = {row["_id"]: row["text"] for row in _jsonl(folder / "beir_test_queries.jsonl")}
    return Collection(documents, queries, _qrels(folder / "beir_test_qrels.tsv"))


def array_texts(printed: str) -> list[str]:
    """The strings in the printed form of a numpy array of strings."""
    tokens = tokenize.generate_tokens(io.StringIO(printed).readline)
    return [str(ast.literal_eval(t.string)) for t in tokens if t.type == tokenize.STRING]


# -- SMART: .I id, .T title, .W words; judgements `query document ...` ----------------------------


def _smart_files(folder: Path) -> tuple[Path | None, Path | None, Path | None]:
    stem = folder.name.rpartition("_")[2]
    return (
        find(folder, f"{stem}.all"),
        find(folder, f"{stem}.qry", "query.text"),
        find(folder, f"{stem}.rel", "qrels.text"),
    )


def _is_smart(folder: Path) -> bool:
    return all(_smart_files(folder))


def read_smart(folder: Path) -> Collection:
    """NAME.ALL, NAME.QRY or query.text, NAME.REL or qrels.text in a folder ..._NAME.

    A document or query is its title (.T) and words (.W); every pair in the judgements is relevant.
    """
    documents, queries, relations = _smart_files(folder)
    if documents is None or queries is None or relations is None:
        raise ValueError(f"{folder} is no SMART collection")
    judgements: dict[str, dict[str, float]] = defaultdict(dict)
    for place, line in read_lines(relations):
        fields = line.split()
        if not fields:
            continue
        if len(fields) < 2:
            raise ValueError(f"{place} is not `query document ...`")
        judgements[str(int(fields[0]))][str(int(fields[1]))] = 1.0
    return Collection(_smart_texts(documents), _smart_texts(queries), judgements)


def _smart_texts(path: Path) -> dict[str, str]:
    texts: dict[str, list[str]] = {}
    name, field = "", ""
    for line in read_text(path).split("\n"):
        mark = line.rstrip()
        if mark.startswith(".I "):
            name, field = str(int(mark[3:])), ""
            texts[name] = []
        elif len(mark) == 2 and mark[0] == "." and mark[1].isupper():
            field = mark[1]
        elif name and field in ("T", "W"):
            texts[name] += line.split()
    return {name: " ".join(words) for name, words in texts.items()}


LAYOUTS = ((_is_beir, read_beir), (_is_scifact, read_scifact), (_is_smart, read_smart))
