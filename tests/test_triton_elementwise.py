"""The fused Triton kernels against float64, forward and gradients, in the interpreter or on a GPU.

Memory that PyTorch hands out unwritten is filled with NaN, so that a lane which a kernel forgets to
write shows.
"""

from collections.abc import Callable, Iterator

import pytest
import seeded  # noqa: F401
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from modernbert.kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from modernbert.kernels import triton_elementwise as fused  # noqa: E402

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TOKENS = st.one_of(st.sampled_from([0, 1, 3, 4, 5, 8, 9]), st.integers(0, 40))


Operation = Callable[..., Tensor | tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # fills empty() with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale + shift).to(dtype).to(DEVICE)


def run(operation: Operation, tensors: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of an operation on float tensors."""
    inputs = [x.detach().clone().requires_grad_() for x in tensors]
    found = operation(*inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    total = [(out * up.to(out)).sum() for out, up in zip(outputs, upstream, strict=True)]
    torch.stack([part.double() for part in total]).sum().backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]
    return [out.detach() for out in outputs] + gradients


def check(fast: Operation, plain: Operation, tensors: list[Tensor], upstream: list[Tensor]) -> None:
    """|fast - f64| <= 2 |plain - f64| in the root mean square, plus two roundings."""
    exact = run(plain, [x.double() for x in tensors], [x.double() for x in upstream])
    usual = run(plain, tensors, upstream)
    found = run(fast, tensors, upstream)
    assert len(exact) == len(usual) == len(found)
    for i, (truth, by_torch, ours) in enumerate(zip(exact, usual, found, strict=True)):
        assert ours.shape == truth.shape and ours.dtype == by_torch.dtype, i
        assert ours.isfinite().all(), i
        rounding = torch.finfo(ours.dtype).eps  # of the result and of one step before it
        allowed = 2 * (by_torch - truth).norm() + rounding * truth.norm()
        assert (ours - truth).norm() <= allowed, i


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, None, 1e-5)


@settings(max_examples=30)
@given(tokens=TOKENS, size=st.sampled_from([1, 2, 31, 32, 33, 96]), dtype=DTYPES)
@example(tokens=9, size=768, dtype=torch.bfloat16)
def test_layer_norm(tokens: int, size: int, dtype: torch.dtype) -> None:
    x = draw(tokens, size, dtype=dtype, scale=3, shift=1)
    weight = draw(size, dtype=dtype, scale=0.3, shift=1)
    check(
        lambda x, w: fused.layer_norm(x, w, 1e-5),
        plain_norm,
        [x, weight],
        [draw(tokens, size, dtype=dtype)],
    )


@settings(max_examples=30)
@given(tokens=TOKENS, size=st.sampled_from([2, 31, 32, 33, 96]), dtype=DTYPES)
@example(tokens=9, size=768, dtype=torch.bfloat16)
def test_add_layer_norm(tokens: int, size: int, dtype: torch.dtype) -> None:
    def plain(x: Tensor, delta: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x + delta, plain_norm(x + delta, weight)

    x, delta = (draw(tokens, size, dtype=dtype, scale=2) for _ in range(2))
    weight = draw(size, dtype=dtype, scale=0.3, shift=1)
    upstream = [draw(tokens, size, dtype=dtype) for _ in range(2)]
    check(lambda x, d, w: fused.add_layer_norm(x, d, w, 1e-5), plain, [x, delta, weight], upstream)


def test_a_float32_stream_takes_half_precision_updates() -> None:
    """As in training under autocast: the sum keeps the wider dtype, each gradient its own."""
    x, delta = draw(9, 32, dtype=torch.float32), draw(9, 32, dtype=torch.bfloat16)
    weight = draw(32, dtype=torch.float32)
    x.requires_grad_(), delta.requires_grad_()
    total, out = fused.add_layer_norm(x, delta, weight, 1e-5)
    assert total.dtype == out.dtype == torch.float32
    torch.testing.assert_close(total, x + delta, atol=0, rtol=0)
    (out.sum() + total.sum()).backward()
    assert x.grad is not None and delta.grad is not None
    assert x.grad.dtype == torch.float32 and delta.grad.dtype == torch.bfloat16


@settings(max_examples=25)
@given(tokens=TOKENS, size=st.sampled_from([2, 32, 33]), dtype=DTYPES, padded=st.booleans())
def test_embed_norm(tokens: int, size: int, dtype: torch.dtype, padded: bool) -> None:
    ids = torch.randint(0, 7, (tokens,), device=DEVICE)  # ids repeat: their gradients add up
    padding = 2 if padded else None

    def plain(table: Tensor, weight: Tensor) -> Tensor:
        return plain_norm(F.embedding(ids, table, padding), weight)

    check(
        lambda table, weight: fused.embed_norm(ids, table, weight, 1e-5, padding),
        plain,
        [draw(7, size, dtype=dtype), draw(size, dtype=dtype, shift=1)],
        [draw(tokens, size, dtype=dtype)],
    )


@pytest.mark.parametrize("bad", [-1, 7, 2**40])
def test_an_id_outside_the_vocabulary_gives_nan_and_reads_no_memory(bad: int) -> None:
    ids = torch.tensor([3, bad, 6], device=DEVICE)
    table, weight = draw(7, 32, dtype=torch.float32), draw(32, dtype=torch.float32)
    out = fused.embed_norm(ids, table, weight, 1e-5)
    assert out[1].isnan().all()
    expected = plain_norm(table[[3, 6]], weight)
    torch.testing.assert_close(out[[0, 2]], expected, atol=1e-5, rtol=1e-5)


@settings(max_examples=30)
@given(tokens=TOKENS, size=st.sampled_from([1, 127, 128, 129]), dtype=DTYPES)
def test_geglu(tokens: int, size: int, dtype: torch.dtype) -> None:
    x = draw(tokens, 2 * size, dtype=dtype, scale=2)
    check(fused.geglu, reference.glu, [x], [draw(tokens, size, dtype=dtype)])


def test_geglu_is_the_exact_one() -> None:
    x = torch.linspace(-6, 6, 128, device=DEVICE)
    out = fused.geglu(torch.cat((x, torch.ones_like(x)))[None])[0]
    torch.testing.assert_close(out, F.gelu(x), atol=1e-6, rtol=0)
    assert (out - F.gelu(x, approximate="tanh")).abs().max() > 1e-4


def angles(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    places = torch.randint(0, 9000, (tokens, 1), device=DEVICE)
    steps = 10_000.0 ** -(torch.arange(half, device=DEVICE) / half)
    return (places * steps).cos(), (places * steps).sin()


@settings(max_examples=30)
@given(
    tokens=TOKENS,
    heads=st.integers(1, 3),
    half=st.sampled_from([1, 8, 32]),
    dtype=DTYPES,
)
def test_rope(tokens: int, heads: int, half: int, dtype: torch.dtype) -> None:
    cos, sin = angles(tokens, half)
    qkv = draw(tokens, 3, heads, 2 * half, dtype=dtype)
    check(
        lambda x: fused.rope(x[:, :2], cos, sin),
        lambda x: reference.rope(x[:, :2], cos, sin),
        [qkv],
        [draw(tokens, 2, heads, 2 * half, dtype=dtype)],
    )
    expected = torch.cat((reference.rope(qkv[:, :2], cos, sin), qkv[:, 2:]), 1)
    fused.rope_(qkv[:, :2], cos, sin)
    torch.testing.assert_close(qkv, expected, atol=1e-6, rtol=torch.finfo(dtype).eps)
    assert torch.equal(qkv[:, 2], expected[:, 2])


LENGTHS = st.one_of(
    st.lists(st.integers(0, 20), max_size=6),
    st.sampled_from([[8], [7, 9], [1], [0, 0, 1, 0], [40, 1, 1, 1, 1], [16] * 3]),
)


def starts(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int().to(DEVICE)


@settings(max_examples=30)
@given(lengths=LENGTHS, dtype=DTYPES, some=st.booleans(), normalize=st.booleans())
def test_mean_pool(lengths: list[int], dtype: torch.dtype, some: bool, normalize: bool) -> None:
    left_out = torch.rand(sum(lengths), device=DEVICE) < 0.4 if some else None

    def plain(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = reference.mean_pool(wide, starts(lengths), left_out)
        return F.normalize(mean, dim=-1) if normalize else mean

    check(
        lambda x: fused.mean_pool(x, starts(lengths), left_out, normalize=normalize),
        plain,
        [draw(sum(lengths), 33, dtype=dtype, shift=0.5)],
        [draw(len(lengths), 33, dtype=torch.float32)],
    )


def test_the_mean_does_not_see_its_neighbours() -> None:
    lengths = [17, 1, 30, 0, 12]
    x = draw(sum(lengths), 48, dtype=torch.bfloat16)
    together = fused.mean_pool(x, starts(lengths))
    for i, part in enumerate(x.split(lengths)):
        assert torch.equal(fused.mean_pool(part, starts([lengths[i]]))[0], together[i])


@settings(max_examples=25)
@given(
    rows=st.integers(1, 12),
    vocabulary=st.sampled_from([33, 63, 64, 65, 300]),
    chunk=st.sampled_from([1, 4, 100]),
    dtype=DTYPES,
    with_bias=st.booleans(),
)
def test_linear_cross_entropy(
    rows: int, vocabulary: int, chunk: int, dtype: torch.dtype, with_bias: bool
) -> None:
    labels = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    labels[torch.rand(rows, device=DEVICE) < 0.3] = -100
    labels[0] = vocabulary - 1

    def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = F.linear(x, weight, bias)
        wide = logits.to(torch.promote_types(x.dtype, torch.float32))
        return F.cross_entropy(wide, labels, reduction="sum")

    def fast(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        loss, right = fused.linear_cross_entropy(x, weight, bias, labels)
        assert right == (F.linear(x, weight, bias).argmax(-1) == labels).sum()
        return loss

    tensors = [draw(rows, 16, dtype=dtype), draw(vocabulary, 16, dtype=dtype)]
    if with_bias:
        tensors.append(draw(vocabulary, dtype=dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "_chunk_rows", lambda _: chunk)
        check(fast, plain, tensors, [torch.ones((), device=DEVICE)])


def test_cross_entropy_holds_a_part_of_the_logits_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = []
    plain = F.linear

    def recorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        sizes.append(len(x) * len(weight))
        return plain(x, weight, bias)

    monkeypatch.setattr(F, "linear", recorded)
    monkeypatch.setattr(fused, "CHUNK", 4 * 50)
    x, weight = draw(11, 8, dtype=torch.float32), draw(50, 8, dtype=torch.float32)
    fused.linear_cross_entropy(x, weight, None, torch.zeros(11, dtype=torch.int64, device=DEVICE))
    assert sizes == [200, 200, 150]


def test_without_a_label_there_is_no_loss() -> None:
    x, weight = draw(3, 8, dtype=torch.float32), draw(5, 8, dtype=torch.float32)
    x.requires_grad_()
    labels = torch.full((3,), -100, device=DEVICE)
    loss, right = fused.linear_cross_entropy(x, weight, None, labels)
    loss.backward()
    assert loss == 0 and right == 0 and x.grad is not None and (x.grad == 0).all()
    bad = fused.linear_cross_entropy(x, weight, None, torch.full((3,), 5, device=DEVICE))
    assert bad[0].isnan()  # a label outside the vocabulary is seen, and reads no memory


# Operators with small arguments: name, tensors that need gradients, the others.
def operators() -> dict[str, tuple[object, tuple[object, ...]]]:
    def leaf(*shape: int) -> Tensor:
        return draw(*shape, dtype=torch.float32).requires_grad_()

    ops = torch.ops.modernbert
    cos, sin = angles(5, 4)
    labels = torch.tensor([1, -100, 3, 0, 2], device=DEVICE)
    cu_seqlens = starts([2, 3])
    ids = torch.tensor([1, 0, 6, 6, 2], device=DEVICE)
    return {
        "norm": (ops.norm.default, (leaf(5, 8), None, None, leaf(8), 1e-5, -1)),
        "add": (ops.norm.default, (leaf(5, 8), None, leaf(5, 8), leaf(8), 1e-5, -1)),
        "embed": (ops.norm.default, (leaf(7, 8), ids, None, leaf(8), 1e-5, 1)),
        "geglu": (ops.geglu.default, (leaf(5, 8),)),
        "rope": (ops.rope.default, (leaf(5, 2, 8), cos, sin, False)),
        "rope in place": (ops.rope_.default, (leaf(5, 2, 8).detach(), cos, sin)),
        "pool": (ops.mean_pool.default, (leaf(5, 8), cu_seqlens, labels < 0, True)),
    }


@pytest.mark.parametrize("name", ["norm", "add", "embed", "geglu", "rope", "rope in place", "pool"])
def test_the_operators_obey_their_contracts(name: str) -> None:
    """Fake shapes, aliasing and gradients are what they declare: torch.compile relies on it."""
    torch.use_deterministic_algorithms(False)  # the check compares unwritten memory, too
    torch.library.opcheck(*operators()[name])


def test_the_loss_compiles() -> None:
    x, weight = draw(5, 8, dtype=torch.float32), draw(6, 8, dtype=torch.float32)
    labels = torch.tensor([1, -100, 3, 0, 2], device=DEVICE)
    x.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return fused.linear_cross_entropy(x, weight, None, labels)[0] * 2

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.autograd.backward(compiled(x))
    found, x.grad = x.grad, None
    expected = loss(x)
    expected.backward()
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(found, x.grad)


def test_two_runs_agree_to_the_last_bit() -> None:
    x, weight = draw(33, 48, dtype=torch.bfloat16), draw(48, dtype=torch.bfloat16)
    upstream = [draw(33, 48, dtype=torch.bfloat16)]
    runs = [run(lambda x, w: fused.layer_norm(x, w, 1e-5), [x, weight], upstream) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
