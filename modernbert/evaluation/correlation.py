"""Pairs of texts with a human score: Spearman's correlation with the cosine of their vectors."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .files import need
from .models import Subject
from .task import Measured


class Pair(NamedTuple):
    left: str
    right: str
    score: float


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines (n,) of the rows of two (n, d).

    As scikit-learn's `paired_cosine_distances`, which MTEB uses, they are computed from the
    distance of the unit vectors: a zero vector has 1/2 with every other one.
    """
    return 1 - 0.5 * np.square(unit(a) - unit(b)).sum(1)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows (n, d) scaled to length 1; zero rows stay zero."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank; 0 when all of one side is equal."""
    stats = need("scipy.stats", "scipy")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(stats.spearmanr(x, y).statistic)


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 when all of one side is equal."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def correlate(subject: Subject, pairs: Iterable[Pair]) -> Measured:
    """Points of a model on pairs, unknown words and all."""
    pairs = list(pairs)
    vectors = subject.embed([text for pair in pairs for text in (pair.left, pair.right)])
    found = cosines(vectors[0::2].astype(np.float64), vectors[1::2].astype(np.float64))
    gold = np.array([pair.score for pair in pairs])
    return Measured(
        len(pairs), {"spearman": 100 * spearman(found, gold), "pearson": 100 * pearson(found, gold)}
    )
