"""Learning rate and batch size by tokens, with the published runs as known answers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert.training.schedule import DECAYS, BatchWarmup, learning_rate

BILLION = 1_000_000_000


def test_pretraining_of_base() -> None:
    """3B tokens of linear rise to 8e-4, constant to 1.719T."""

    def rate(tokens: float) -> float:
        total = 1719 * BILLION
        return learning_rate(int(tokens), peak=8e-4, total=total, warmup=3 * BILLION)

    assert rate(0) == pytest.approx(8e-14, rel=1e-6, abs=0)  # alpha_i = 1e-10
    assert rate(0.75 * BILLION) == pytest.approx(2e-4)
    assert rate(1.5 * BILLION) == pytest.approx(4e-4)
    assert rate(3 * BILLION) == rate(900 * BILLION) == rate(2000 * BILLION) == 8e-4


def test_decay_phase_of_base() -> None:
    """The whole phase of 50B falls from 3e-4 by 1 - sqrt(x) to a thousandth."""

    def rate(tokens: int) -> float:
        return learning_rate(tokens, peak=3e-4, total=50 * BILLION, decay=50 * BILLION)

    assert rate(0) == 3e-4 > rate(1)
    assert rate(12_500_000_000) == pytest.approx(3e-4 * (0.001 + 0.999 * 0.5))
    assert rate(18 * BILLION) == pytest.approx(3e-4 * (0.001 + 0.999 * 0.4))
    assert rate(50 * BILLION) == pytest.approx(3e-7)
    assert rate(51 * BILLION) == pytest.approx(3e-7)


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [
        ("1-sqrt", 0.5, 1 - math.sqrt(0.5)),
        ("linear", 0.75, 0.5),
        ("cosine", (1 + math.sqrt(0.5)) / 2, 0.5),
    ],
)
def test_shapes_of_the_fall(shape: str, quarter: float, half: float) -> None:
    rates = [
        learning_rate(n, peak=2.0, total=1000, warmup=100, decay=400, shape=shape, final=0.1)
        for n in (600, 700, 800, 1000)
    ]
    shares = (1.0, quarter, half, 0.0)
    assert rates == pytest.approx([2.0 * (0.1 + 0.9 * share) for share in shares])


@given(
    st.sampled_from(sorted(DECAYS)),
    st.lists(st.integers(0, 10_000), min_size=3, max_size=3),
    st.floats(0, 1),
    st.lists(st.integers(0, 40_000), min_size=2, max_size=2).map(sorted),
)
def test_rises_then_falls_within_bounds(
    shape: str, parts: list[int], final: float, places: list[int]
) -> None:
    warmup, stable, decay = parts
    total = warmup + stable + decay + 1

    def rate(tokens: int) -> float:
        return learning_rate(
            tokens, peak=1.0, total=total, warmup=warmup, decay=decay, shape=shape, final=final
        )

    a, b = (rate(n) for n in places)
    lowest = min(final, 1e-10) if decay else 1e-10
    assert lowest <= a <= 1 and lowest <= b <= 1 + 1e-12
    if places[1] <= warmup:
        assert a <= b
    if places[0] >= warmup:
        assert a >= b - 1e-12
    assert rate(total) == pytest.approx(final if decay else 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": 0}, "total of 0"),
        ({"total": 10, "warmup": 6, "decay": 5}, "warmup 6 and decay 5"),
        ({"total": 10, "warmup": -1}, "warmup -1"),
        ({"total": 10, "decay": -1}, "decay -1"),
        ({"total": 10, "shape": "sqrt"}, "choose 1-sqrt, linear, cosine"),
        ({"total": 10, "final": 1.5}, "final=1.5"),
    ],
)
def test_impossible_schedules(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learning_rate(0, peak=1.0, **options)  # type: ignore[arg-type]


def test_switch_points_of_base() -> None:
    """768 to 4608 sequences over 50B tokens: 3.33B, 10B, 20B, 33.3B, 50B."""
    warmup = BatchWarmup(768, 4608, 50 * BILLION, step=768)
    points = (3_333_333_334, 10 * BILLION, 20 * BILLION, 33_333_333_334, 50 * BILLION)
    assert warmup.thresholds == points
    assert warmup(0) == 768
    for size, point in zip(range(1536, 4609, 768), points, strict=True):
        assert warmup(point - 1) == size - 768
        assert warmup(point) == size
    assert warmup(1719 * BILLION) == 4608


def test_switch_points_of_large() -> None:
    """448 to 4928 sequences over 10B tokens, in 11 sizes; the same counted in micro-batches."""
    warmup = BatchWarmup(448, 4928, 10 * BILLION, step=448)
    shown = [round(point / BILLION, 2) for point in warmup.thresholds]
    assert shown == [0.18, 0.55, 1.09, 1.82, 2.73, 3.82, 5.09, 6.55, 8.18, 10.0]
    assert BatchWarmup(1, 11, 10 * BILLION).thresholds == warmup.thresholds
    assert warmup(9 * BILLION) == 4480 and warmup(10 * BILLION) == 4928


def test_no_warmup() -> None:
    assert BatchWarmup(6, 6, 0)(0) == 6
    assert BatchWarmup(6, 6, 1000)(0) == 6
    assert BatchWarmup(1, 6, 0)(0) == 6


@given(st.integers(1, 20), st.integers(1, 12), st.integers(1, 8), st.integers(1, 10**6))
def test_every_size_lasts_as_many_steps(start: int, sizes: int, step: int, length: int) -> None:
    """Replayed with rows of `length` tokens: the sizes have equal numbers of steps, within one."""
    rows = start + step * sizes
    steps_each = 5
    grown = range(start, rows, step)
    warmup = BatchWarmup(start, rows, steps_each * length * sum(grown), step=step)
    seen, counts = 0, dict.fromkeys((*grown, rows), 0)
    for _ in range(steps_each * sizes + 1):
        size = warmup(seen)
        counts[size] += 1
        seen += size * length
    assert counts == {**dict.fromkeys(grown, steps_each), rows: 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 10), "from 0 to 4"),
        ((5, 4, 10), "from 5 to 4"),
        ((1, 4, -1), "-1 tokens"),
        ((1, 4, 10, 2), "cannot go by 2"),
        ((1, 4, 10, 0), "cannot go by 0"),
    ],
)
def test_impossible_batch_warmups(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchWarmup(*arguments)
