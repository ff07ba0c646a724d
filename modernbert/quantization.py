"""Vectors in fewer bits: int8 and uint8 by stored ranges, binary and ubinary by sign.

The codes are those of sentence-transformers' `quantize_embeddings`, with one difference: ranges
are measured once and stored, never taken from the batch at hand, so that codes of different calls
can be compared.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


@dataclass(frozen=True)
class Calibration:
    """The range of every dimension of a model's vectors.

    Attributes:
        ranges: (2, d) float32, the smallest and the largest value of each dimension.
        normalized: whether they were measured on vectors scaled to length 1 by `encode`.
    """

    ranges: np.ndarray
    normalized: bool = False

    @classmethod
    def measure(cls, batches: Iterable[np.ndarray], *, normalized: bool = False) -> "Calibration":
        """Measure the ranges over arrays (n, d), in one pass and constant memory."""
        ranges: np.ndarray | None = None
        count = 0
        for batch in batches:
            ends = np.stack((batch.min(axis=0), batch.max(axis=0))).astype(np.float32)
            if ranges is not None:
                ends[0] = np.minimum(ends[0], ranges[0])
                ends[1] = np.maximum(ends[1], ranges[1])
            ranges, count = ends, count + len(batch)
        if ranges is None or count < 2:
            raise ValueError(
                f"calibration needs at least 2 vectors (better 100 and more), got {count}"
            )
        if not np.isfinite(ranges).all():
            raise ValueError("the vectors to calibrate on contain NaN or infinity")
        return cls(ranges, normalized)

    def fitting(self, dimension: int, normalized: bool) -> np.ndarray:
        """The ranges (2, dimension) for such vectors; `ValueError` if measured on others."""
        width = self.ranges.shape[1]
        # A prefix of a vector keeps its ranges, unless the vector is scaled after the cut.
        if normalized != self.normalized or dimension > width or (normalized and dimension < width):
            raise ValueError(
                f"the calibration holds ranges of {width} dimensions with normalize_embeddings="
                f"{self.normalized}, this call asks for {dimension} with {normalized}; "
                "run calibrate() with the same truncate_dim and normalize_embeddings"
            )
        return self.ranges[:, :dimension]

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back bit by bit."""
        minimum, maximum = self.ranges.tolist()
        return {"normalize_embeddings": self.normalized, "minimum": minimum, "maximum": maximum}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any], *, source: str) -> "Calibration":
        """Read `to_json`'s object; raises `ValueError` that begins with `source`."""
        try:
            ranges = np.array([raw["minimum"], raw["maximum"]], dtype=np.float32)
            normalized = raw["normalize_embeddings"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: not the ranges of a calibration ({error})") from None
        if ranges.ndim != 2 or not np.isfinite(ranges).all() or (ranges[0] > ranges[1]).any():
            raise ValueError(f"{source}: minimum and maximum are not two lists of finite numbers")
        if not isinstance(normalized, bool):
            raise ValueError(
                f"{source}: normalize_embeddings is {normalized!r}; expected a boolean"
            )
        return cls(ranges, normalized)


def quantize(vectors: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """Float vectors (n, d) as codes.

    int8 and uint8: (n, d), 256 equal steps of the range (2, d) of each dimension, values outside
    clipped. binary (int8) and ubinary (uint8): (n, ceil(d / 8)), one bit per dimension, 1 where
    the value is above 0, first dimension in the highest bit. float32: the vectors themselves.
    """
    if precision == "float32":
        return vectors
    if precision in ("binary", "ubinary"):
        packed = np.packbits(vectors > 0, axis=-1)
        return (packed ^ 0x80).view(np.int8) if precision == "binary" else packed
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; choose from {', '.join(PRECISIONS)}")
    if ranges is None:
        raise ValueError(f"precision {precision!r} needs the range of every dimension")
    steps = (ranges[1] - ranges[0]) / 255
    steps = np.where(steps == 0, 1, steps)
    codes = np.clip(np.floor((vectors - ranges[0]) / steps), 0, 255)
    return (codes - 128).astype(np.int8) if precision == "int8" else codes.astype(np.uint8)
