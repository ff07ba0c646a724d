"""Classification with a logistic-regression probe on the vectors.

Suite "classification" is MTEB's protocol: ten times, 8 training texts a label (32 for
AmazonCounterfactual) are drawn and the probe fitted on them; the score is the mean accuracy.
Suite "classification-full" fits one probe on the whole training split, each dimension scaled to
unit variance first, so that the length of the vectors does not matter.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from .files import find, need, read_lines, read_rows
from .models import Subject
from .scores import Skipped
from .task import Measured, Task

SUITE, FULL_SUITE = "classification", "classification-full"
SEED = 42
EXPERIMENTS = 10
Labelled = tuple[list[str], list[str]]  # texts, labels


@dataclass(frozen=True)
class Dataset:
    """Where a task lies below the data folder, and how its files are read."""

    folder: str
    train: str
    test: str
    read: Callable[[Path], Labelled]
    samples_per_label: int = 8


def tasks(data: Path, *, full: bool = False) -> Iterator[Task | Skipped]:
    """What `data` has of `DATASETS`."""
    suite, run = (FULL_SUITE, _full) if full else (SUITE, _few)
    for name, dataset in DATASETS.items():
        paths = [find(data / dataset.folder, file) for file in (dataset.train, dataset.test)]
        train, test = paths
        if train is None or test is None:
            missing = dataset.test if train else dataset.train
            yield Skipped(suite, name, f"there is no {dataset.folder}/{missing}")
        else:
            yield Task(suite, name, partial(run, dataset, train, test))


def _few(dataset: Dataset, train: Path, test: Path, subject: Subject) -> Measured:
    train_texts, train_labels = dataset.read(train)
    test_texts, test_labels = dataset.read(test)
    draws = undersample(train_labels, dataset.samples_per_label)
    needed = sorted({row for draw in draws for row in draw})
    vectors = subject.embed([train_texts[row] for row in needed] + test_texts)
    place = {row: index for index, row in enumerate(needed)}
    test_vectors = vectors[len(needed) :]
    accuracies = [
        accuracy(
            fit_probe(vectors[[place[row] for row in draw]], [train_labels[row] for row in draw]),
            test_vectors,
            test_labels,
        )
        for draw in draws
    ]
    spread = float(np.std(accuracies))
    return Measured(len(test_texts), {"accuracy": fmean(accuracies), "deviation": spread})


def _full(dataset: Dataset, train: Path, test: Path, subject: Subject) -> Measured:
    train_texts, train_labels = dataset.read(train)
    test_texts, test_labels = dataset.read(test)
    vectors = subject.embed(train_texts + test_texts)
    size = len(train_texts)
    scaler = need("sklearn.preprocessing", "scikit-learn").StandardScaler().fit(vectors[:size])
    vectors = scaler.transform(vectors)
    probe = fit_probe(vectors[:size], train_labels, max_iter=1000)
    return Measured(len(test_texts), {"accuracy": accuracy(probe, vectors[size:], test_labels)})


def undersample(labels: Sequence[str], count: int) -> list[list[int]]:
    """The rows of each experiment, `count` a label, as MTEB draws them.

    The order is shuffled once more before each experiment, by the same seed; labels with fewer
    rows give all.
    """
    order = list(range(len(labels)))
    draws = []
    for _ in range(EXPERIMENTS):
        np.random.RandomState(SEED).shuffle(order)
        seen: Counter[str] = Counter()
        draw = []
        for row in order:
            if seen[labels[row]] < count:
                draw.append(row)
                seen[labels[row]] += 1
        draws.append(draw)
    return draws


def fit_probe(vectors: np.ndarray, labels: Sequence[str], *, max_iter: int = 100) -> Any:
    """scikit-learn's logistic regression, fitted on vectors (n, d)."""
    linear_model = need("sklearn.linear_model", "scikit-learn")
    exceptions = need("sklearn.exceptions", "scikit-learn")
    probe = linear_model.LogisticRegression(random_state=SEED, max_iter=max_iter)
    with warnings.catch_warnings():
        # 100 iterations are the protocol's, enough or not.
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        return probe.fit(vectors, labels)


def accuracy(probe: Any, vectors: np.ndarray, labels: Sequence[str]) -> float:
    """Points."""
    return 100 * float(np.mean(probe.predict(vectors) == np.asarray(labels)))


# -- files ---------------------------------------------------------------------------------------


def read_csv(path: Path, text: str, label: str, delimiter: str = ",") -> Labelled:
    """A table with a header that names the columns of text and label."""
    rows = read_rows(path, delimiter, quoted=True)
    place, header = next(rows, (str(path), []))
    if missing := [name for name in (text, label) if name not in header]:
        raise ValueError(f"{place}: no column {missing[0]!r}")
    return _labelled(rows, header.index(text), header.index(label))


def read_tsv(path: Path) -> Labelled:
    """Text TAB label, no header, no quoting."""
    return _labelled(read_rows(path, "\t", quoted=False), 0, 1)


def read_trec(path: Path) -> Labelled:
    """TREC's `COARSE:fine text` in latin-1; the coarse label is kept."""
    texts, labels = [], []
    for place, line in read_lines(path, "latin-1"):
        label, space, text = line.strip().partition(" ")
        coarse, colon, _ = label.partition(":")
        if not space or not colon:
            raise ValueError(f"{place} is not `COARSE:fine text`")
        texts.append(text)
        labels.append(coarse)
    return texts, labels


def _labelled(rows: Iterator[tuple[str, list[str]]], text: int, label: int) -> Labelled:
    texts, labels = [], []
    for place, row in rows:
        if len(row) <= max(text, label):
            raise ValueError(f"{place} has {len(row)} fields; {max(text, label) + 1} are needed")
        texts.append(row[text])
        labels.append(row[label])
    return texts, labels


DATASETS = {
    "Banking77": Dataset(
        "cls_banking77",
        "train.csv",
        "test.csv",
        partial(read_csv, text="text", label="category"),
    ),
    "TREC": Dataset("cls_trec", "train_5500.label", "TREC_10.label", read_trec),
    "SST-2": Dataset("cls_sst2", "train.tsv", "test.tsv", read_tsv),
    "AmazonCounterfactual": Dataset(
        "cls_amazon_counterfactual",
        "EN_train.tsv",
        "EN_test.tsv",
        partial(read_csv, text="sentence", label="is_counterfactual", delimiter="\t"),
        samples_per_label=32,
    ),
}
