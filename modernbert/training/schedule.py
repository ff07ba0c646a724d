"""Learning rate and batch size as functions of the tokens seen: no state to save or to resume."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

# The share of the peak that is left when the fraction x of the decay is over.
DECAYS: dict[str, Callable[[float], float]] = {
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
WARMUP_START = 1e-10  # a rate of exactly 0 would divide by 0 in some optimizers


def learning_rate(
    tokens_seen: int,
    *,
    peak: float,
    total: int,
    warmup: int = 0,
    decay: int = 0,
    shape: str = "1-sqrt",
    final: float = 0.001,
) -> float:
    """Warmup-stable-decay: linear rise, constant, fall over the last `decay` tokens.

    Args:
        tokens_seen: since the phase began, before the step that uses the rate.
        peak: the constant rate.
        total: tokens of the phase; beyond them the rate stays at its last value.
        warmup, decay: tokens of the rise and of the fall; 0 for none.
        shape: of the fall, a name in `DECAYS`.
        final: share of the peak where the fall ends.

    Source: Warner et al. 2024, arXiv 2412.13663, appendix A; 1-sqrt: Hägele et al. 2024,
    arXiv 2405.18392. Raises `ValueError` for rises and falls longer than the phase.
    """
    if shape not in DECAYS:
        raise ValueError(f"unknown decay shape {shape!r}; choose {', '.join(DECAYS)}")
    if total <= 0 or warmup < 0 or decay < 0 or warmup + decay > total:
        raise ValueError(
            f"warmup {warmup} and decay {decay} must be at least 0 and together at most the "
            f"phase's total of {total} tokens"
        )
    if not 0 <= final <= 1:
        raise ValueError(f"final={final} is a share of the peak: it must lie in 0 to 1")
    if tokens_seen < warmup:
        return peak * (WARMUP_START + (1 - WARMUP_START) * tokens_seen / warmup)
    if decay and tokens_seen > total - decay:
        fallen = min(1.0, (tokens_seen - (total - decay)) / decay)
        return peak * (final + (1 - final) * DECAYS[shape](fallen))
    return peak


@dataclass(frozen=True)
class BatchWarmup:
    """Batch size that grows from `start` to `rows` by `step`, over the first `tokens` tokens.

    Each size lasts as many steps as any other, so that a size's share of the tokens is
    proportional to it. `BatchWarmup(768, 4608, 50_000_000_000, step=768)` is ModernBERT-base's.

    Attributes:
        thresholds: tokens seen at which the second, third, ... size begins.

    Raises `ValueError` unless 1 <= start <= rows and `step` divides the difference.
    """

    start: int
    rows: int
    tokens: int
    step: int = 1
    thresholds: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.start <= self.rows:
            raise ValueError(
                f"batch warmup from {self.start} to {self.rows} rows: must grow from 1"
            )
        if self.step < 1 or (self.rows - self.start) % self.step:
            raise ValueError(
                f"batch warmup from {self.start} to {self.rows} rows cannot go by {self.step}: "
                "the step must divide the difference"
            )
        if self.tokens < 0:
            raise ValueError(f"batch warmup over {self.tokens} tokens: must be at least 0")
        sizes = range(self.start, self.rows, self.step)
        ends = (-(-self.tokens * seen // sum(sizes)) for seen in accumulate(sizes))  # rounded up
        object.__setattr__(self, "thresholds", tuple(ends))

    def __call__(self, tokens_seen: int) -> int:
        """Rows of the step that begins after `tokens_seen` tokens."""
        return self.start + self.step * bisect_right(self.thresholds, tokens_seen)
