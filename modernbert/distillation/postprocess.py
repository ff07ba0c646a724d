"""From a teacher's vectors to a table: centring, PCA, whitening, weights, solved pieces.

Pure functions of numpy arrays. V = tokens, D = the teacher's width, d = the table's.
"""

import logging
from collections.abc import Sequence

import numpy as np

from .recipe import Dims

logger = logging.getLogger("modernbert")


def rank_probabilities(count: int) -> np.ndarray:
    """p (V,) by Zipf's law from the ids alone, as model2vec 0.10: 1 / (id + 2), scaled to sum 1."""
    inverse = 1 / np.arange(2, count + 2)
    return inverse / inverse.sum()


def sif_weights(probabilities: np.ndarray, a: float | None) -> np.ndarray:
    """a / (a + p): the smooth inverse frequency of Arora et al. 2017; ones when `a` is None."""
    if a is None:
        return np.ones(len(probabilities))
    return a / (a + probabilities)


def pca(
    vectors: np.ndarray,
    dims: Dims,
    *,
    weights: np.ndarray | None = None,
    drop: int = 0,
    whiten: float = 0.0,
) -> np.ndarray:
    """Scores (V, d) of the rows on their principal components.

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
        return vectors
    rows, width = vectors.shape
    if not isinstance(dims, float) and dims != "auto" and int(dims) >= rows:
        logger.warning("PCA to %s dimensions needs more than %d tokens: no PCA", dims, rows)
        return vectors
    x = vectors.astype(np.float64)
    if weights is None:
        x -= x.mean(axis=0)
        covariance = x.T @ x / (rows - 1)
    else:
        p = weights / weights.sum()
        x -= p @ x
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
    scores = x @ components[:, :kept]
    if whiten:
        floor = variances[0] * 1e-9 if len(variances) else 1.0
        scores /= np.maximum(variances[:kept], floor) ** whiten
    largest = np.abs(scores).argmax(axis=0)
    signs = np.sign(scores[largest, np.arange(kept)])
    return (scores * np.where(signs == 0, 1, signs)).astype(vectors.dtype)


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


def solve_pieces(
    table: np.ndarray,
    segments: Sequence[Sequence[int]],
    targets: np.ndarray,
    free: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    ridge: float = 0.3,
) -> np.ndarray:
    """The table (V, d) with the rows `free` changed so that words come out as they should.

    Minimises, over the free rows E, sum_w f_w |sum of w's rows - target_w|^2 + ridge |E - E0|^2, a
    sparse least-squares problem, solved one dimension after the other. The sum and not the mean,
    since a text's vector is the mean over its tokens: each piece counts as much as a whole word.

    Args:
        table: the rows to start from, E0 among them.
        segments: the tokens of each word; words without a free token say nothing.
        targets: the vector (n, d) each word should have.
        free: which rows may change, (V,) bool.
        weights: f, (n,); all 1 when None.
        ridge: what holds the rows back.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.linalg import lsqr

    lengths = np.array([len(segment) for segment in segments])
    tokens = np.fromiter((t for segment in segments for t in segment), np.int64, lengths.sum())
    words = np.repeat(np.arange(len(segments)), lengths)
    scale = np.ones(len(segments)) if weights is None else np.sqrt(weights)
    shape = (len(segments), len(table))
    sums = csr_array((scale[words], (words, tokens)), shape=shape)
    columns = np.flatnonzero(free)
    system = sums[:, columns]
    used = np.flatnonzero(np.diff(system.indptr))
    system = system[used]
    missing = scale[used, None] * targets[used] - sums[used] @ table  # (words, d)
    result = table.copy()
    for dimension in range(table.shape[1]):
        solution = lsqr(system, missing[:, dimension], damp=ridge**0.5, atol=1e-4, btol=1e-4)
        result[columns, dimension] += solution[0]
    return result
