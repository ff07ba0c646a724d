"""Our Triton attention against float64, forward and gradients, in the interpreter or on a GPU."""

from collections.abc import Iterator

import pytest
import seeded  # noqa: F401
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from modernbert.kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from modernbert.kernels import triton_attention as ours  # noqa: E402

TILE, HEAD = 16, 32
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills empty() with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    set_tiles(monkeypatch, split=False)


def set_tiles(monkeypatch: pytest.MonkeyPatch, *, split: bool) -> None:
    cut = ours.Tiling(TILE, TILE, 4, 2, split)
    monkeypatch.setattr(ours, "tiling", lambda *_: cut)
    monkeypatch.setattr(ours, "tiling_backward", lambda *_: cut)


def starts(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int().to(DEVICE)


def angles(lengths: list[int]) -> tuple[Tensor, Tensor]:
    places = torch.cat([torch.zeros(0), *(torch.arange(n) for n in lengths)])[:, None]
    steps = 100.0 ** -(torch.arange(HEAD // 2) / (HEAD // 2))
    return (places * steps).cos().to(DEVICE), (places * steps).sin().to(DEVICE)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


def by_definition(
    qkv: Tensor,
    upstream: Tensor,
    lengths: list[int],
    window: int | None,
    keys: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None,
) -> list[Tensor]:
    """Output and the gradient of q, k, v by `reference`."""
    leaf = qkv.clone().requires_grad_()
    x = leaf
    if rotation is not None:
        x = torch.cat((reference.rope(x[:, :2], *rotation), x[:, 2:]), 1)
    out, _ = reference.attention(*x.unbind(1), tuple(lengths), window=window, keys=keys)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    return [out.detach(), gradient]


def by_kernel(
    qkv: Tensor,
    upstream: Tensor,
    lengths: list[int],
    window: int | None,
    keys: Tensor | None,
    rotation: tuple[Tensor, Tensor] | None,
    *,
    lengths_known: bool = True,
) -> list[Tensor]:
    leaf = qkv.clone().requires_grad_()
    known = tuple(lengths) if lengths_known else None
    plan = ours.plan(starts(lengths), sum(lengths), known, window, keys)
    out = ours.attention(leaf, *(rotation or (None, None)), plan, local=window is not None)
    (gradient,) = torch.autograd.grad(out, leaf, upstream)
    return [out.detach(), gradient]


def check(
    lengths: list[int],
    window: int | None,
    *,
    heads: int = 1,
    dtype: torch.dtype = torch.float32,
    hidden: str = "none",
    rope: bool = True,
    lengths_known: bool = True,
) -> None:
    """|fast - f64| <= 2 |plain - f64| in the root mean square, plus a rounding."""
    total = sum(lengths)
    qkv, upstream = draw(total, 3, heads, HEAD, dtype=dtype), draw(total, heads, HEAD, dtype=dtype)
    rotation = angles(lengths) if rope else None
    keys = None
    if hidden != "none":
        keys = torch.rand(total, device=DEVICE) < 0.6
        if hidden == "tail":
            ends = starts(lengths)[1:].tolist()
            places = torch.arange(total, device=DEVICE)
            keys = torch.stack([places != end - 1 for end in [*ends, 0]]).all(0)
        if hidden == "all":
            keys = torch.zeros(total, dtype=torch.bool, device=DEVICE)
    case = (lengths, window, keys, rotation)
    exact = by_definition(qkv.double(), upstream.double(), *case)
    plain = by_definition(qkv, upstream, *case)
    found = by_kernel(qkv, upstream, *case, lengths_known=lengths_known)
    for name, truth, usual, fast in zip(("out", "gradient"), exact, plain, found, strict=True):
        assert fast.shape == truth.shape and fast.dtype == dtype
        assert fast.isfinite().all(), name
        # The gradients of q and k are differences, which may cancel to nothing: their rounding is
        # that of the largest of q, k and v. But each is held to its own plain error.
        parts = [(truth, usual, fast)]
        if name == "gradient":
            parts = list(zip(*(x.unbind(1) for x in (truth, usual, fast)), strict=True))
        for x, y, z in parts:
            allowed = 2 * (y - x).norm() + torch.finfo(dtype).eps * truth.norm()
            assert (z - x).norm() <= allowed, name


LENGTHS = st.one_of(
    st.lists(st.sampled_from([0, 1, 2, TILE - 1, TILE, TILE + 1]), max_size=4),
    st.builds(lambda n, count: [n] * count, st.integers(1, 20), st.integers(1, 3)),
    st.sampled_from([[1, 3, 50, 2, 1], [33, 1, 1, 0, 0], [0, 0, 5]]),
)
WINDOWS = st.sampled_from([None, None, 0, 1, 5, TILE - 1, TILE, TILE + 1, 30, 1000])


@settings(max_examples=24, phases=(Phase.explicit, Phase.generate))  # shrinking takes minutes
@given(
    lengths=LENGTHS,
    window=WINDOWS,
    heads=st.integers(1, 2),
    dtype=DTYPES,
    hidden=st.sampled_from(["none", "none", "random", "tail", "all"]),
    rope=st.booleans(),
    split=st.booleans(),
    lengths_known=st.booleans(),
)
@example([33, 1, 0, 0], 5, 2, torch.bfloat16, "none", True, True, True)
@example([50, 1, 7], None, 1, torch.float16, "random", True, True, True)
def test_equals_the_reference(
    lengths: list[int],
    window: int | None,
    heads: int,
    dtype: torch.dtype,
    hidden: str,
    rope: bool,
    split: bool,
    lengths_known: bool,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        set_tiles(patch, split=split)
        check(
            lengths,
            window,
            heads=heads,
            dtype=dtype,
            hidden=hidden,
            rope=rope,
            lengths_known=lengths_known,
        )


@pytest.mark.parametrize("window", [64, None])
def test_the_tiles_that_ship(window: int | None) -> None:
    """The sizes of the real launch, which the other tests make smaller."""
    check([65, 3], window, dtype=torch.float16)


def test_queries_that_see_no_key_give_zeros(small_tiles: None) -> None:
    lengths = [20, 7]
    keys = torch.zeros(27, dtype=torch.bool, device=DEVICE)
    keys[3] = True
    qkv, upstream = (draw(27, *s, dtype=torch.float32) for s in ((3, 1, HEAD), (1, HEAD)))
    for window, sees in ((4, slice(0, 8)), (None, slice(0, 20))):
        out, gradient = by_kernel(qkv, upstream, lengths, window, keys, None)
        blind = torch.ones(27, dtype=torch.bool, device=DEVICE)
        blind[sees] = False
        assert (out[blind] == 0).all() and (out[~blind] != 0).all()
        assert (gradient[:, 0][blind] == 0).all()
        assert (gradient[:, 1:][~keys] == 0).all()


def test_neighbours_in_the_batch_change_nothing(small_tiles: None) -> None:
    """Bit for bit: also NaN stays in its own text."""
    lengths = [17, 16, 1]
    qkv, upstream = (draw(34, *s, dtype=torch.bfloat16) for s in ((3, 1, HEAD), (1, HEAD)))
    qkv[:17] = float("nan")
    out, gradient = by_kernel(qkv, upstream, lengths, 5, None, None)
    alone = by_kernel(qkv[17:33], upstream[17:33], [16], 5, None, None)
    assert torch.equal(out[17:33], alone[0]) and torch.equal(gradient[17:33], alone[1])
    assert out[:17].isnan().all() and out[33:].isfinite().all()


def test_two_runs_agree_to_the_last_bit(small_tiles: None) -> None:
    qkv, upstream = (draw(40, *s, dtype=torch.float16) for s in ((3, 1, HEAD), (1, HEAD)))
    runs = [by_kernel(qkv, upstream, [39, 1], None, None, angles([39, 1])) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_views_of_a_wider_tensor_are_read_in_place(small_tiles: None) -> None:
    wide = draw(20, 4, 2, HEAD, dtype=torch.float32)
    plan = ours.plan(starts([20]), 20, (20,), 3, None)
    view = ours.attention(wide[:, :3], None, None, plan, local=True)
    copied = ours.attention(wide[:, :3].contiguous(), None, None, plan, local=True)
    assert torch.equal(view, copied)


# -- the list of tiles ------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    lengths=st.lists(st.one_of(st.integers(0, 3), st.integers(0, 300)), max_size=30),
    rows=st.sampled_from([16, 64, 128]),
    window=st.sampled_from([None, 0, 64, 500]),
)
def test_tiles_cover_every_token_once_longest_first(
    lengths: list[int], rows: int, window: int | None
) -> None:
    cu_seqlens = starts(lengths)
    found = ours.tiles(cu_seqlens, sum(lengths), tuple(lengths), rows, window)
    assert found.dtype == torch.int32
    covered, work = [], []
    for start, end, first in found.tolist():
        assert start <= first < end  # no empty program
        last = min(first + rows, end)
        covered += range(first, last)
        reach = (start, end)
        if window is not None:
            reach = max(start, first - window), min(end, first + rows + window)
        work.append(reach[1] - reach[0])
    assert sorted(covered) == list(range(sum(lengths)))
    assert work == sorted(work, reverse=True)
    # Without the lengths the same tiles come first, then tiles of nothing.
    unknown = ours.tiles(cu_seqlens, sum(lengths), None, rows, window)
    assert torch.equal(unknown[: len(found)], found)
    assert (unknown[len(found) :] == 0).all()
    assert len(unknown) <= sum(lengths) // rows + len(lengths)


@pytest.mark.parametrize("window", [None, 3])
def test_the_operator_obeys_its_contract(small_tiles: None, window: int | None) -> None:
    torch.use_deterministic_algorithms(False)  # the check compares unwritten memory, too
    lengths = [5, 3]
    cos, sin = angles(lengths)
    plan = ours.plan(starts(lengths), 8, tuple(lengths), window, None)
    tiles = plan.full if window is None else plan.local
    qkv = draw(8, 3, 1, HEAD, dtype=torch.float32).requires_grad_()
    reach = -1 if window is None else window
    arguments = (qkv, cos, sin, None, tiles, TILE, reach, True)
    torch.library.opcheck(torch.ops.modernbert.attention.default, arguments)
