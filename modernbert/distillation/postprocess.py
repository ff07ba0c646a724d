"""From a teacher's vectors to a table: centring, PCA, whitening, weights, solved pieces.

Pure functions of numpy arrays. V = tokens, D = the teacher's width, d = the table's.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .recipe import Dims

logger = logging.getLogger("modernbert")

TINY = 1e-30


def rank_probabilities(count: int) -> np.ndarray:
    """p (V,) by Zipf's law from the ids alone, as model2vec 0.10: 1 / (id + 2), scaled to sum 1."""
    inverse = 1 / np.arange(2, count + 2)
    return inverse / inverse.sum()


def sif_weights(probabilities: np.ndarray, a: float | None) -> np.ndarray:
    """a / (a + p): the smooth inverse frequency of Arora et al. 2017; ones when `a` is None."""
    if a is None:
        return np.ones(len(probabilities))
    return a / (a + probabilities)


@dataclass(frozen=True)
class Axes:
    """What a PCA does to vectors (n, D): less the mean (D,), times the axes (D, d)."""

    mean: np.ndarray
    axes: np.ndarray

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        return ((vectors - self.mean) @ self.axes).astype(vectors.dtype)


def principal_axes(
    vectors: np.ndarray,
    dims: Dims,
    *,
    weights: np.ndarray | None = None,
    drop: int = 0,
    whiten: float = 0.0,
) -> Axes | None:
    """The principal axes of the rows; None when there is nothing to do.

    Args:
        vectors: the rows (V, D).
        dims: d; "auto" for all D; a fraction below 1 of the variance to keep; None for no PCA (and
            no centring).
        weights: how much each row counts in the mean and the covariance; all alike when None.
        drop: leading components to leave out: what all words share (Mu & Viswanath 2018).
        whiten: scores are divided by variance ** whiten; 0.5 makes all variances one.

    Each component's sign is that which makes its largest score positive. With more dimensions
    than rows or components, as many as there are.
    """
    if dims is None:
        return None
    rows, width = vectors.shape
    if not isinstance(dims, float) and dims != "auto" and int(dims) >= rows:
        logger.warning("PCA to %s dimensions needs more than %d tokens: no PCA", dims, rows)
        return None
    x = vectors.astype(np.float64)
    if weights is None:
        mean = x.mean(axis=0)
        x -= mean
        covariance = x.T @ x / (rows - 1)
    else:
        p = weights / weights.sum()
        mean = p @ x
        x -= mean
        covariance = (x * p[:, None]).T @ x
    variances, components = np.linalg.eigh(covariance)
    variances, components = variances[::-1].clip(min=0), components[:, ::-1]
    variances, components = variances[drop:], components[:, drop:]
    if isinstance(dims, float):
        share = np.cumsum(variances) / variances.sum()
        kept = int(np.searchsorted(share, dims)) + 1
    else:
        kept = width if dims == "auto" else int(dims)
    if kept > len(variances):
        if dims != "auto":
            logger.warning("there are %d components, not %d: all are kept", len(variances), kept)
        kept = len(variances)
    axes = components[:, :kept]
    if whiten:
        floor = variances[0] * 1e-9 if len(variances) else 1.0
        axes = axes / np.maximum(variances[:kept], floor) ** whiten
    scores = x @ axes
    largest = np.abs(scores).argmax(axis=0)
    signs = np.sign(scores[largest, np.arange(kept)])
    return Axes(mean, axes * np.where(signs == 0, 1, signs))


def pca(vectors: np.ndarray, dims: Dims) -> np.ndarray:
    """Scores (V, d) of the rows on their principal axes, all rows counting alike."""
    axes = principal_axes(vectors, dims)
    return vectors if axes is None else axes(vectors)


def rogue_dimensions(vectors: np.ndarray, share: float = 0.25, pairs: int = 4096) -> list[int]:
    """Dimensions that alone make up more than `share` of the cosine of unrelated rows.

    From Timkey & van Schijndel 2021; cosines of `pairs` random pairs of rows.
    """
    generator = np.random.default_rng(0)
    i, j = generator.integers(0, len(vectors), (2, pairs))
    unit = vectors / (np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-32)
    parts = (unit[i] * unit[j]).mean(axis=0)
    total = abs(parts.sum())
    if total < 0.01:
        return []
    return np.flatnonzero(np.abs(parts) > share * total).tolist()


def standardize(vectors: np.ndarray, dimensions: Sequence[int]) -> np.ndarray:
    """The rows with these dimensions scaled to mean 0 and the median spread of the others."""
    if not len(dimensions):
        return vectors
    result = vectors.copy()
    spread = np.median(vectors.std(axis=0))
    for dimension in dimensions:
        column = vectors[:, dimension]
        result[:, dimension] = (column - column.mean()) / (column.std() + 1e-12) * spread
    return result


def solve_rows(
    table: np.ndarray,
    segments: Sequence[Sequence[int]],
    targets: np.ndarray,
    *,
    free: np.ndarray | None = None,
    ridge: float = 1.0,
    mean: bool = False,
    steps: int = 50,
) -> np.ndarray:
    """The table (V, d) with rows changed so that words or texts come out as they should.

    Minimises sum_s |sum of s's rows - target_s|^2 + ridge |E - E0|^2 over the rows E: a sparse
    least-squares problem, solved by conjugate gradients for all dimensions at once. The sum is
    right for the pieces of a word, each of which counts as much in a text as a whole word does;
    the mean for texts.

    Args:
        table: the rows to start from, E0.
        segments: the tokens of each word or text, at least one; those without a free token say
            nothing.
        targets: the vector (n, d) each should have.
        free: which rows may change, (V,) bool; all when None.
        ridge: what holds the rows back.
        mean: of the rows instead of their sum.
        steps: at most; fewer when the error is down to a ten-thousandth.
    """
    from scipy.sparse import csr_array

    lengths = np.array([len(segment) for segment in segments])
    tokens = np.fromiter((t for segment in segments for t in segment), np.int64, lengths.sum())
    values = np.repeat(1 / lengths if mean else np.ones(len(lengths)), lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    sums = csr_array((values.astype(table.dtype), tokens, starts), (len(lengths), len(table)))
    counts = np.bincount(tokens, minlength=len(table))
    columns = np.flatnonzero(counts if free is None else counts * free)
    system = sums[:, columns]
    residual = system.T @ (targets - sums @ table)  # (free rows, d)
    diagonal = (system.power(2).sum(axis=0) + ridge)[:, None]  # preconditions
    change = np.zeros_like(residual)
    direction = residual / diagonal
    size = (residual * direction).sum(axis=0)
    enough = 1e-8 * size
    for _ in range(steps):
        if not (size > enough).any():
            break
        image = system.T @ (system @ direction) + ridge * direction
        step = size / np.maximum((direction * image).sum(axis=0), TINY)
        change += step * direction
        residual -= step * image
        scaled = residual / diagonal
        before, size = size, (residual * scaled).sum(axis=0)
        direction = scaled + size / np.maximum(before, TINY) * direction
    result = table.copy()
    result[columns] += change
    return result
