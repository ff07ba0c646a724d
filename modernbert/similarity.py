"""Similarities of vectors, every pair or row by row, as sentence-transformers computes them."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Vectors = Tensor | np.ndarray | Sequence[Tensor] | Sequence[np.ndarray]


def _tensor(vectors: Vectors) -> Tensor:
    """Any form of vectors as a tensor of float32 or wider."""
    if isinstance(vectors, np.ndarray):
        x = torch.from_numpy(np.ascontiguousarray(vectors))
    elif isinstance(vectors, Tensor):
        x = vectors
    else:
        x = torch.stack([_tensor(vector) for vector in vectors])
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


# For each name: the matrix for (n, d) and (m, d), and the row-wise form for two (n, d).
SIMILARITIES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "cosine": (
        lambda a, b: _unit(a) @ _unit(b).T,
        lambda a, b: (_unit(a) * _unit(b)).sum(-1),
    ),
    "dot": (
        lambda a, b: a @ b.T,
        lambda a, b: (a * b).sum(-1),
    ),
    "euclidean": (
        lambda a, b: -torch.cdist(a, b, p=2.0),
        lambda a, b: -torch.linalg.vector_norm(a - b, dim=-1),
    ),
    "manhattan": (
        lambda a, b: -torch.cdist(a, b, p=1.0),
        lambda a, b: -(a - b).abs().sum(-1),
    ),
}


def check_similarity(name: str) -> str:
    """`name`, or `ValueError` when it names no similarity."""
    if name not in SIMILARITIES:
        raise ValueError(f"similarity function {name!r}: choose from {', '.join(SIMILARITIES)}")
    return name


def similarity(name: str, a: Vectors, b: Vectors) -> Tensor:
    """Scores (n, m) of vectors (n, d) and (m, d); higher is more alike, a distance is negated.

    A single vector (d,) counts as one row. Raises `ValueError` for an unknown name.
    """
    left, right = (torch.atleast_2d(_tensor(x)) for x in (a, b))
    return SIMILARITIES[check_similarity(name)][0](left, right)


def similarity_pairwise(name: str, a: Vectors, b: Vectors) -> Tensor:
    """Scores (n,) of the rows of (n, d) and (n, d) one by one, as `similarity` gives them."""
    return SIMILARITIES[check_similarity(name)][1](_tensor(a), _tensor(b))
