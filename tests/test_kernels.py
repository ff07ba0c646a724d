"""Every fast operation against the plain one in float64: forward, gradients, memory, hard cases."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from modernbert import kernels
from modernbert.kernels import reference

HEAD = 8
USABLE = [status.name for status in kernels.available_backends() if status.usable]
FAST = [name for name in USABLE if name != "reference"]
HALVES = [torch.bfloat16, torch.float16]
Results = dict[str, Tensor]


def starts(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int()


def inputs(total: int, heads: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q, k, v and the gradient that arrives at the output: (T, H, d) each."""
    return [torch.randn(total, heads, HEAD, dtype=torch.float64).to(dtype) for _ in range(4)]


def attend(
    backend: str,
    tensors: list[Tensor],
    lengths: list[int],
    window: int | None,
    query_only: Tensor | None = None,
    *,
    local: bool = True,
    lengths_known: bool = True,
    dropout: float = 0.0,
) -> Results:
    """Output and gradients of one attention."""
    q, k, v = (x.detach().clone().requires_grad_() for x in tensors[:3])
    plan = kernels.plan_attention(
        starts(lengths),
        sum(lengths),
        tuple(lengths) if lengths_known else None,
        window=window,
        query_only=query_only,
        dtype=q.dtype,
        backend=backend,
    )
    out, _ = kernels.attention(q, k, v, plan, local=local, dropout=dropout)
    out.backward(tensors[3])
    gradients = {"q": q.grad, "k": k.grad, "v": v.grad}
    # An empty stream need not reach all of them.
    return {"out": out.detach()} | {
        name: torch.zeros_like(q) if x is None else x for name, x in gradients.items()
    }


def close(actual: Results, expected: Results, tolerance: float) -> None:
    assert actual.keys() == expected.keys() == {"out", "q", "k", "v"}
    for name, x in expected.items():
        assert actual[name].shape == x.shape and actual[name].dtype == x.dtype
        assert actual[name].isfinite().all(), name
        if x.numel():
            scale = max(1.0, float(x.abs().max()))
            assert float((actual[name] - x).abs().max()) <= tolerance * scale, name


LENGTHS = st.one_of(
    st.lists(st.integers(0, 700), max_size=2),
    st.lists(st.integers(0, 4), min_size=1, max_size=70),
    st.builds(lambda length, count: [length] * count, st.integers(1, 150), st.integers(1, 5)),
    st.builds(
        lambda long, short, place: [*short[:place], long, *short[place:]],
        st.integers(129, 700),
        st.lists(st.integers(0, 30), min_size=5, max_size=20),
        st.integers(0, 20),
    ),
)
WINDOWS = st.one_of(st.integers(0, 3), st.integers(2, 128), st.just(1000))


def draw_query_only(kind: str, lengths: list[int]) -> Tensor | None:
    """(T,) bool: nobody, a random half, the last third of each text, whole texts, everybody."""
    if kind == "none":
        return None
    parts = {
        "random": lambda i, n: torch.rand(n) < 0.5,
        "tail": lambda i, n: torch.arange(n) >= n - n // 3,
        "whole": lambda i, n: torch.full((n,), i % 2 == 0),
        "all": lambda i, n: torch.full((n,), True),
    }
    empty = torch.zeros(0, dtype=torch.bool)
    return torch.cat([empty, *(parts[kind](i, n) for i, n in enumerate(lengths))])


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=80)
@given(
    lengths=LENGTHS,
    window=WINDOWS,
    heads=st.integers(1, 4),
    query_only=st.sampled_from(["none", "none", "random", "tail", "whole", "all"]),
    local=st.booleans(),
    lengths_known=st.booleans(),
)
def test_equals_the_reference(
    backend: str,
    lengths: list[int],
    window: int,
    heads: int,
    query_only: str,
    local: bool,
    lengths_known: bool,
) -> None:
    tensors = inputs(sum(lengths), heads)
    marked = draw_query_only(query_only, lengths)
    expected = attend("reference", tensors, lengths, window, marked, local=local)
    actual = attend(
        backend, tensors, lengths, window, marked, local=local, lengths_known=lengths_known
    )
    close(actual, expected, 1e-12)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("lengths", [[31], [32], [33], [63, 1], [64], [65], [1] * 75, [257]])
@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, 128])
def test_around_the_block_size(backend: str, lengths: list[int], window: int) -> None:
    tensors = inputs(sum(lengths), 1)
    expected = attend("reference", tensors, lengths, window)
    close(attend(backend, tensors, lengths, window), expected, 1e-12)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_the_definition(backend: str) -> None:
    """Against loops: token i sees token j of its text if and only if |i - j| <= window."""
    lengths, window = [5, 1, 0, 9], 2
    tensors = inputs(sum(lengths), 2)
    q, k, v, _ = tensors
    expected = torch.zeros_like(v)
    for text, start in enumerate(starts(lengths)[:-1].tolist()):
        for i in range(lengths[text]):
            seen = [j for j in range(lengths[text]) if abs(i - j) <= window]
            for head in range(2):
                scores = [
                    float(q[start + i, head] @ k[start + j, head]) / math.sqrt(HEAD) for j in seen
                ]
                total = sum(math.exp(s) for s in scores)
                for s, j in zip(scores, seen, strict=True):
                    expected[start + i, head] += math.exp(s) / total * v[start + j, head]
    actual = attend(backend, tensors, lengths, window)["out"]
    torch.testing.assert_close(actual, expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("local", [True, False])
def test_queries_that_see_no_key_give_zeros(backend: str, local: bool) -> None:
    lengths, window = [50, 7, 200], 3
    query_only = torch.ones(sum(lengths), dtype=torch.bool)
    query_only[[0, 60, 61]] = False  # the second text has no key at all
    found = attend(backend, inputs(sum(lengths), 2), lengths, window, query_only, local=local)
    assert all(x.isfinite().all() for x in found.values())
    sees = torch.zeros(sum(lengths), dtype=torch.bool)
    sees[:4] = sees[57:65] = True  # in reach of a key
    if not local:
        sees[:50] = sees[57:] = True
    assert (found["out"][~sees] == 0).all() and (found["q"][~sees] == 0).all()
    assert (found["out"][sees] != 0).all()
    assert (found["k"][query_only] == 0).all() and (found["v"][query_only] == 0).all()


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_tokens_at_all(backend: str) -> None:
    for lengths in ([], [0], [0, 0]):
        for local in (True, False):
            found = attend(backend, inputs(0, 3), lengths, 4, local=local)
            assert {x.shape for x in found.values()} == {(0, 3, HEAD)}


# Lengths with every kind of raggedness; windows that cut, and that do not.
HALF_CASES = [([300, 1, 77, 0, 128], 64), ([700], 5), ([40] * 6, 64), ([33, 500, 33], 1)]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize(("lengths", "window"), HALF_CASES)
def test_rounding_is_no_worse_than_plain_pytorch(
    backend: str, dtype: torch.dtype, local: bool, lengths: list[int], window: int
) -> None:
    """|fast - f64| <= 2 |plain - f64| in the root mean square, plus half an ulp.

    The mean, because one entry's luck would decide over the maximum of thousands. The half ulp is
    the rounding of the result itself: without it an exact answer could fail a lucky plain one.
    """
    tensors = inputs(sum(lengths), 2, dtype)
    exact = attend("reference", [x.double() for x in tensors], lengths, window, local=local)
    plain = attend("reference", tensors, lengths, window, local=local)
    fast = attend(backend, tensors, lengths, window, local=local)
    for name, x in exact.items():
        allowed = 2 * (plain[name] - x).norm() + torch.finfo(dtype).eps / 2 * x.norm()
        assert fast[name].dtype == dtype
        assert (fast[name] - x).norm() <= allowed, name


@pytest.mark.parametrize("backend", FAST)
def test_neighbours_in_the_batch_change_nothing(backend: str) -> None:
    """Cross-document attention, the classic mistake of packed input."""
    lengths = [100, 64, 1, 300]
    tensors = inputs(sum(lengths), 2)
    for local in (True, False):
        together = attend(backend, tensors, lengths, 64, local=local)
        parts = [x.split(lengths) for x in tensors]
        for i, length in enumerate(lengths):
            alone = attend(backend, [x[i] for x in parts], [length], 64, local=local)
            for name, x in alone.items():
                torch.testing.assert_close(together[name].split(lengths)[i], x, atol=1e-13, rtol=0)


def scores_computed(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Entries of the query-key matrix of each call of scaled_dot_product_attention."""
    plain, seen = F.scaled_dot_product_attention, []

    def recorded(q: Tensor, k: Tensor, *args: Tensor, **options: object) -> Tensor:
        seen.append(math.prod(q.shape[:-1]) * k.shape[-2])
        return plain(q, k, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", recorded)
    run()
    return seen


@pytest.mark.parametrize("lengths", [[4096], [3000, 5, 1091]])
def test_local_attention_has_no_square_matrix(
    lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    total, window = sum(lengths), 64
    tensors = inputs(total, 1, torch.float32)
    watched = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    with watched as profiler:
        scores = scores_computed(lambda: attend("blocked", tensors, lengths, window), monkeypatch)
    assert scores and sum(scores) <= total * (32 + 2 * window)
    events = profiler.events()
    assert events is not None
    largest = max(event.self_cpu_memory_usage for event in events)
    assert 0 < largest < total**2  # bytes: less than a mask of one byte an entry


def test_one_plan_serves_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is data that attention reads and never changes."""
    lengths = [30, 200]
    plan = kernels.plan_attention(
        starts(lengths), 230, tuple(lengths), window=16, dtype=torch.float64, backend="blocked"
    )
    q, k, v, _ = inputs(230, 2)
    first = [kernels.attention(q, k, v, plan, local=local)[0] for local in (True, False)]
    again = [kernels.attention(q, k, v, plan, local=local)[0] for local in (True, False)]
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(*first)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("local", [True, False])
def test_dropout_is_unbiased(backend: str, local: bool) -> None:
    """The mean over many copies of one text is the text's output without dropout."""
    length, copies, window = 9, 400, 2
    tensors = inputs(length, 1)
    exact = attend(backend, tensors, [length], window, local=local)["out"]
    many = [x.repeat(copies, 1, 1) for x in tensors]
    found = attend(backend, many, [length] * copies, window, local=local, dropout=0.3)["out"]
    found = found.unflatten(0, (copies, length))
    standard_error = found.std(0) / copies**0.5
    assert (standard_error > 0).all()
    assert ((found.mean(0) - exact).abs() < 5 * standard_error).all()


def test_attention_maps_of_the_reference() -> None:
    lengths, window = [6, 3], 1
    q, k, v, _ = inputs(9, 2)
    query_only = torch.tensor([False] * 5 + [True] * 4)
    plan = kernels.plan_attention(
        starts(lengths),
        9,
        tuple(lengths),
        window=window,
        query_only=query_only,
        dtype=q.dtype,
        backend="reference",
    )
    out, maps = kernels.attention(q, k, v, plan, local=True)
    assert maps is not None
    assert [x.shape for x in maps] == [(2, 6, 6), (2, 3, 3)]
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 6).double())
    assert (maps[0][:, :, 5] == 0).all()
    assert (maps[1] == 0).all()
    assert (maps[0].triu(2) == 0).all() and (maps[0].tril(-2) == 0).all()
    torch.testing.assert_close(out[:6], torch.einsum("hij,jhd->ihd", maps[0], v[:6]))


def test_backends_by_name() -> None:
    names = [status.name for status in kernels.available_backends()]
    assert tuple(names) == kernels.BACKENDS
    assert USABLE == ["reference", "blocked"]
    assert all(status.reason for status in kernels.available_backends())
    options = {"window": 2, "dtype": torch.float32}
    auto = kernels.plan_attention(starts([2]), 2, (2,), **options)  # type: ignore[arg-type]
    assert auto.backend == "blocked"
    with pytest.raises(
        ValueError, match="attention='fast'; choose one of auto, reference, blocked"
    ):
        kernels.plan_attention(starts([2]), 2, (2,), backend="fast", **options)  # type: ignore[arg-type]


# -- rope -------------------------------------------------------------------------------------


def angles(positions: Tensor, theta: float, size: int) -> Tensor:
    """(T, d / 2) float64."""
    frequencies = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return positions.double()[:, None] * frequencies


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """What the model calls without gradients, which overwrites its input: compared on the way
    with what it calls when it trains."""
    recorded = kernels.rope(x.clone().requires_grad_(), cos, sin).detach()
    found = kernels.rope(x.clone(), cos, sin)
    torch.testing.assert_close(found, recorded, atol=1e-6, rtol=torch.finfo(x.dtype).eps)
    return found


@given(st.sampled_from([2, 4, 6, 64]), st.sampled_from([1e4, 160000.0]), st.integers(0, 20000))
def test_rope_is_a_rotation_in_the_complex_plane(size: int, theta: float, first: int) -> None:
    positions = torch.arange(first, first + 5)
    x = torch.randn(5, 2, 3, size, dtype=torch.float64)
    angle = angles(positions, theta, size)
    numbers = (
        torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None, None]
    )
    expected = torch.cat((numbers.real, numbers.imag), -1)
    actual = rope(x, angle.cos(), angle.sin())
    torch.testing.assert_close(actual, expected, atol=1e-13, rtol=0)


def test_rope_scores_depend_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 64, dtype=torch.float64)

    def score(i: int, j: int) -> Tensor:
        rotated = [
            rope(x, angle.cos(), angle.sin())
            for x, angle in ((q, angles(torch.tensor([i]), 1e4, 64)),
                             (k, angles(torch.tensor([j]), 1e4, 64)))
        ]  # fmt: skip
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(score(3, 10), score(1003, 1010), atol=1e-10, rtol=0)
    assert (score(3, 10) - score(3, 11)).abs() > 1e-3


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tokens", [50, 2100])
def test_rope_rounds_halves_once(dtype: torch.dtype, tokens: int) -> None:
    x = torch.randn(tokens, 2, 64).to(dtype)
    angle = angles(torch.arange(tokens), 1e4, 64)
    exact = rope(x.double(), angle.cos(), angle.sin())
    actual = rope(x, angle.cos().float(), angle.sin().float())
    assert actual.dtype == dtype
    half_an_ulp = torch.finfo(dtype).eps / 2 * exact.abs()
    assert ((actual - exact).abs() <= half_an_ulp + 1e-6).all()


# -- norms, activations, pooling --------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("function", [kernels.layer_norm, reference.layer_norm])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES], ids=str)
def test_layer_norm(function: Callable[..., Tensor], with_bias: bool, dtype: torch.dtype) -> None:
    x = (torch.randn(7, 48, dtype=torch.float64) * 3 + 5).to(dtype)
    weight = (torch.rand(48, dtype=torch.float64) + 0.5).to(dtype)
    bias = torch.randn(48, dtype=torch.float64).to(dtype) if with_bias else None
    y = x.double()
    centred = y - y.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()
    expected = expected + (bias.double() if bias is not None else 0)
    actual = function(x, weight, bias, 1e-3)
    assert actual.dtype == dtype
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "relu"])
def test_glu_without_gradients_gives_the_same_in_place(name: str) -> None:
    x = torch.randn(9, 14)
    expected = reference.glu(x, name)
    actual = kernels.glu(x, name)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert actual.data_ptr() == x.data_ptr()
    kept = torch.randn(9, 14, requires_grad=True)
    before = kept.detach().clone()
    kernels.glu(kept, name).sum().backward()
    assert torch.equal(kept, before) and kept.grad is not None


def test_glu_activates_the_first_half_with_exact_gelu() -> None:
    x = torch.linspace(-6, 6, 401, dtype=torch.float64)
    gate = torch.randn(401, dtype=torch.float64)
    phi = x.new_tensor([(1 + math.erf(value / math.sqrt(2))) / 2 for value in x.tolist()])
    torch.testing.assert_close(
        kernels.glu(torch.stack((x, gate), -1)), (x * phi * gate)[:, None], atol=1e-14, rtol=0
    )
    tanh = kernels.glu(torch.stack((x, gate), -1), "gelu_tanh")[:, 0]
    assert (tanh - x * phi * gate).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("names", "formula"),
    [
        (["gelu"], lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2),
        (
            ["gelu_tanh", "gelu_pytorch_tanh", "gelu_new"],
            lambda x: x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        ),
        (["silu", "swish"], lambda x: x / (1 + math.exp(-x))),
        (["relu"], lambda x: max(x, 0.0)),
    ],
)
def test_activations(names: list[str], formula: Callable[[float], float]) -> None:
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    expected = torch.tensor([formula(value) for value in x.tolist()], dtype=torch.float64)
    for name in names:
        torch.testing.assert_close(reference.activate(x, name), expected, atol=1e-14, rtol=1e-12)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="unknown activation 'mish'"):
        kernels.glu(torch.ones(2), "mish")


@given(st.lists(st.integers(0, 20), max_size=6), st.booleans())
def test_mean_pool_and_its_gradient(lengths: list[int], some_left_out: bool) -> None:
    x = torch.randn(sum(lengths), 5, dtype=torch.float64, requires_grad=True)
    left_out = torch.rand(sum(lengths)) < 0.4 if some_left_out else None
    kept = torch.ones(sum(lengths), dtype=torch.bool) if left_out is None else ~left_out
    pooled = kernels.mean_pool(x, starts(lengths), left_out)
    assert pooled.shape == (len(lengths), 5)
    rows = [
        part[keep].mean(0) if keep.any() else x.new_zeros(5)
        for part, keep in zip(x.split(lengths), kept.split(lengths), strict=True)
    ]
    expected = torch.stack(rows) if rows else x.new_zeros(0, 5)
    torch.testing.assert_close(pooled, expected, atol=1e-14, rtol=1e-12)
    if kept.any():
        weights = torch.randn_like(expected)
        actual_grad = torch.autograd.grad((pooled * weights).sum(), x)
        expected_grad = torch.autograd.grad((expected * weights).sum(), x)
        torch.testing.assert_close(actual_grad, expected_grad, atol=1e-14, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_mean_pool_does_not_see_its_neighbours(dtype: torch.dtype) -> None:
    """Bit for bit: a text's mean is the same alone and in any company."""
    lengths = [17, 1, 600, 33, 0, 128]
    x = torch.randn(sum(lengths), 96).to(dtype)
    together = kernels.mean_pool(x, starts(lengths))
    assert together.dtype == dtype
    for i, part in enumerate(x.split(lengths)):
        assert torch.equal(kernels.mean_pool(part, starts([lengths[i]]))[0], together[i])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mean_pool_sums_halves_in_float32(dtype: torch.dtype) -> None:
    x = torch.full((8192, 3), 10.0, dtype=dtype)  # the sum is beyond float16's range
    assert torch.equal(kernels.mean_pool(x, starts([8192]))[0], x[0])


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_full_precision_is_native_everywhere(device: str) -> None:
    for dtype in (torch.float32, torch.float64):
        assert kernels.computes_natively(dtype, torch.device(device))
