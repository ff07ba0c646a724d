"""Timed passes that alternate, and what is said about their ratio."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

ALWAYS = 2  # of the others are timed however slow they are
PROBE_SHARE = 3  # first passes may take one third of the time
USEFUL_ROUNDS = 3  # fewer say little: rather fewer implementations


@dataclass(frozen=True)
class Contestant:
    """One implementation with its batches ready.

    Attributes:
        name: as it stands in tables.
        run: makes one pass over the workload.
        way: how its batches are made: the fastest of each way is measured before others are.
    """

    name: str
    run: Callable[[], object]
    way: str = ""


@dataclass
class Timing:
    """Seconds of the passes of one contestant.

    Attributes:
        first: the first pass, which warms up; it counts only when no other could follow.
        seconds: of the alternating passes.
        partner: of our pass beside each of them.
        note: why there are few passes, or none.
    """

    first: float | None = None
    seconds: list[float] = field(default_factory=list)
    partner: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float | None:
        """Seconds of a usual pass."""
        return statistics.median(self.seconds) if self.seconds else self.first


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of a ratio over `pairs` neighbouring passes."""

    median: float
    low: float
    first_quartile: float
    third_quartile: float
    high: float
    pairs: int


def spread(slower: Sequence[float], faster: Sequence[float]) -> Spread:
    """Of slower / faster, pair by pair."""
    ratios = [a / b for a, b in zip(slower, faster, strict=True)]
    median = statistics.median(ratios)
    first, third = median, median
    if len(ratios) > 1:
        first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return Spread(median, min(ratios), first, third, max(ratios), len(ratios))


def timed(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Seconds of one pass, the device's work included."""
    synchronize(device)
    start = clock()
    run()
    synchronize(device)
    return clock() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    ours: Contestant,
    others: Sequence[Contestant],
    *,
    rounds: int,
    allowance: float,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time `ours` and `others` side by side: every pass of another stands beside one of ours.

    A pair is A B in one round and B A in the next, so that a machine that slows down does not
    favour either. `others` come with the likely fastest first. When not all fit into `allowance`
    seconds, the slowest are left out with a note, the fastest of each way last; our first pass and
    those of two others are made in any case.
    """
    start = clock()
    timings = {ours.name: Timing(first=timed(ours.run, device, clock))}
    active: list[Contestant] = []
    for other in others:
        timing = timings[other.name] = Timing()
        if len(active) >= ALWAYS and clock() - start > allowance / PROBE_SHARE:
            timing.note = "not measured: the time allowed was used up"
            continue
        timing.first = attempt(other, timing, device, clock)
        if timing.first is not None:
            active.append(other)
    active.sort(key=lambda other: timings[other.name].first or 0.0)
    left = allowance - (clock() - start)
    fastest = {other.way: other for other in reversed(active)}.values()
    for enough, needed in ((min(rounds, USEFUL_ROUNDS), fastest), (1, ())):
        for other in reversed(active[ALWAYS:]):
            if other not in needed and left < enough * _cost(ours, active, timings):
                active.remove(other)
                timings[other.name].note = "one unwarmed pass: too slow for the time allowed"
    if left < _cost(ours, active, timings):
        for other in active:
            first, partner = timings[other.name].first, timings[ours.name].first
            assert first is not None and partner is not None
            timings[other.name].seconds, timings[other.name].partner = [first], [partner]
            timings[other.name].note = "a single unwarmed pair: too slow for the time allowed"
        return timings
    for turn in range(rounds):
        begun = clock()
        for other in list(active):
            timing = timings[other.name]
            before = timed(ours.run, device, clock) if turn % 2 == 0 else None
            seconds = attempt(other, timing, device, clock)
            if seconds is None:
                active.remove(other)
                continue
            partner = timed(ours.run, device, clock) if before is None else before
            timing.seconds.append(seconds)
            timing.partner.append(partner)
            timings[ours.name].seconds.append(partner)
        if not active:
            timings[ours.name].seconds.append(timed(ours.run, device, clock))
        if 2 * clock() - start - begun > allowance:  # another round would end after it
            break
    return timings


def _cost(ours: Contestant, others: Sequence[Contestant], timings: dict[str, Timing]) -> float:
    """Seconds of one round, judged by the first passes."""
    return sum(timings[c.name].first or 0.0 for other in others for c in (ours, other))


def attempt(
    other: Contestant, timing: Timing, device: torch.device, clock: Callable[[], float]
) -> float | None:
    """Seconds of one pass; None, and a note, when it fails: the rest goes on without it."""
    try:
        return timed(other.run, device, clock)
    except Exception as error:
        timing.note = describe(error)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def describe(error: Exception) -> str:
    """A foreign library's failure in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    first = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first[:200]}"
