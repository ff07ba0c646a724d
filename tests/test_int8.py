"""8-bit linear layers: arithmetic, what they ask of a GPU, accuracy, and what they refuse."""

import copy
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modernbert import ModernBertConfig, ModernBertModel, SentenceEncoder
from modernbert.int8 import (
    Fp8Linear,
    IntLinear,
    Linear8,
    OneDnnLinear,
    is_quantized,
    quantize_linears,
)
from modernbert.kernels import dispatch, reference
from modernbert.packing import pack

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
if find_spec("triton"):  # while conftest has it interpreted
    from modernbert.kernels import triton_quantize

FP8 = torch.float8_e4m3fn
# The layer, and the GPU that the CPU is taken for: fp8 scaled by row, and by matrix.
LAYERS: dict[str, tuple[type[Linear8], str]] = {
    "cpu": (OneDnnLinear, ""),
    "int8": (IntLinear, "sm_75"),
    "fp8": (Fp8Linear, "sm_90"),
    "fp8, scaled afterwards": (Fp8Linear, "sm_120"),
}


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm` with what a GPU demands, in exact arithmetic."""
    assert a.dtype == b.dtype == torch.int8 and a.is_contiguous() and b.T.is_contiguous()
    assert len(a) > 16 and a.shape[1] % 8 == 0 and b.shape[1] % 8 == 0
    return (a.double() @ b.double()).to(torch.int32)


def scaled_mm(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *,
    out_dtype: torch.dtype, use_fast_accum: bool,
) -> Tensor:  # fmt: skip
    """`torch._scaled_mm` with what a GPU demands, in exact arithmetic."""
    assert a.dtype == b.dtype == FP8 and a.is_contiguous() and b.T.is_contiguous()
    assert a.shape[1] % 16 == 0 and b.shape[1] % 16 == 0 and use_fast_accum
    assert scale_a.dtype == scale_b.dtype == torch.float32
    if scale_a.dim():
        assert scale_a.shape == (len(a), 1) and scale_b.shape == (1, b.shape[1])
        assert scale_a.is_contiguous() and scale_b.is_contiguous()
        assert dispatch.pretended() == (9, 0) and out_dtype in dispatch.HALVES
    else:
        assert scale_a == scale_b == 1 and out_dtype == torch.float32
    return (a.double() @ b.double() * scale_a.double() * scale_b.double()).to(out_dtype)


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch, "_int_mm", int_mm)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    yield


def codes(x: Tensor, dtype: torch.dtype, largest: float) -> tuple[Tensor, Tensor]:
    """The definition again, in float64: codes and scales of rows."""
    scale = x.double().abs().amax(1, keepdim=True).clamp_min(1e-12) / largest
    rounded = (x.double() / scale).round() if dtype == torch.int8 else (x.double() / scale).to(FP8)
    return rounded.double(), scale


@pytest.mark.parametrize("name", LAYERS)
@settings(max_examples=15)
@given(
    tokens=st.sampled_from([0, 1, 16, 17, 33]),
    inner=st.sampled_from([16, 36, 64]),
    outer=st.sampled_from([1, 7, 48]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_layer_is_the_exact_product_of_its_codes(
    name: str, tokens: int, inner: int, outer: int, bias: bool, dtype: torch.dtype
) -> None:
    kind, pretence = LAYERS[name]
    layer = nn.Linear(inner, outer, bias=bias)
    # Tokens and channels of very different size: each has a scale of its own.
    x = (torch.randn(tokens, inner) * 10.0 ** torch.randint(-4, 4, (tokens, 1))).to(dtype)
    layer.weight.data *= 10.0 ** torch.randint(-3, 3, (outer, 1))
    largest = 448.0 if kind is Fp8Linear else 127.0
    narrow = kind is OneDnnLinear and not torch.cpu._is_vnni_supported()
    x_codes, x_scale = codes(x, kind.dtype, largest)
    w_codes, w_scale = codes(layer.weight.data, kind.dtype, 63.0 if narrow else largest)
    expected = x_codes @ w_codes.T * x_scale * w_scale.T + (layer.bias.data if bias else 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODERNBERT_PRETEND", pretence)
        got = kind(layer)(x)
    assert got.dtype == dtype and got.shape == (tokens, outer)
    allowed = (3e-5 + 2 * torch.finfo(dtype).eps) * expected.abs() + 1e-6
    off = (got.double() - expected).abs() > allowed
    # A number halfway between two codes may fall to the other side in float32.
    assert not off.numel() or off.double().mean() <= 0.02


@pytest.mark.parametrize("name", LAYERS)
def test_zeros_give_zeros_and_nan_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, pretence = LAYERS[name]
    monkeypatch.setenv("MODERNBERT_PRETEND", pretence)
    layer = nn.Linear(16, 8, bias=False)
    layer.weight.data[3] = 0
    x = torch.randn(5, 16, dtype=torch.bfloat16)
    x[1], x[2, 5], x[4, 7] = 0, float("nan"), float("inf")
    y = kind(layer)(x)
    assert y.dtype == torch.bfloat16
    assert (y[1] == 0).all() and (y[[0, 3], 3] == 0).all()
    assert y[2].isnan().all() and y[[0, 3]].isfinite().all()
    assert not y[4].isfinite().any()


# -- our kernels around the product -----------------------------------------------------------


@needs_triton
@settings(max_examples=12)
@given(
    tokens=st.sampled_from([0, 1, 5, 37]),
    size=st.sampled_from([1, 16, 100, 257]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kind=st.sampled_from([torch.int8, FP8]),
)
def test_quantizing_in_one_pass(
    tokens: int, size: int, dtype: torch.dtype, kind: torch.dtype
) -> None:
    x = (torch.randn(tokens, size) * 10.0 ** torch.randint(-3, 3, (tokens, 1))).to(dtype)
    wider = torch.empty(tokens, 2 * size, dtype=dtype)
    wider[:, :size] = x  # rows apart, as those of a part of a tensor
    x[1:2] = wider[1:2, :size] = 0
    x[2:3] = wider[2:3, :size] = float("nan")
    found, scales = triton_quantize.quantize_rows(wider[:, :size], kind)
    expected, right = reference.quantize_rows(x, kind)
    assert found.dtype == kind and found.shape == x.shape and scales.shape == (tokens, 1)
    torch.testing.assert_close(scales, right, rtol=0, atol=0, equal_nan=True)
    sound = [row for row in range(tokens) if row != 2]
    ours, theirs = found.float()[sound], expected.float()[sound]
    if kind == FP8:  # the interpreter forgets the carry where rounding reaches a power of two
        ours = torch.where(ours == theirs / 2, theirs, ours)
    assert torch.equal(ours, theirs)


@needs_triton
@pytest.mark.parametrize("sums", [torch.int32, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rescaling_in_one_pass(sums: torch.dtype, dtype: torch.dtype) -> None:
    for tokens, size in ((1, 1), (0, 5), (9, 300)):
        products = torch.randint(-(10**6), 10**6, (tokens, size)).to(sums)
        rows, columns = torch.rand(tokens, 1) * 1e-4, torch.rand(1, size)
        expected = reference.rescale(products, rows, columns, dtype)
        found = triton_quantize.rescale(products, rows, columns, dtype)
        assert found.dtype == dtype and torch.equal(found, expected)


@needs_triton
def test_inference_goes_through_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_75")
    layer, x = IntLinear(nn.Linear(32, 24)), torch.randn(20, 32)
    plain = layer(x)  # with gradients enabled: operators that a compiler could fuse
    seen = []
    for name in ("quantize_rows", "rescale"):
        inner = getattr(triton_quantize, name)
        monkeypatch.setattr(
            triton_quantize, name, lambda *a, n=name, f=inner: seen.append(n) or f(*a)
        )
    with torch.no_grad():
        assert torch.equal(layer(x), plain)
    assert seen == ["quantize_rows", "rescale"]


# -- models -----------------------------------------------------------------------------------


def small(**changes: object) -> ModernBertModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 192, "pad_token_id": 0}
    depth = {"num_hidden_layers": 4, "num_attention_heads": 2, "initializer_range": 0.1}
    return ModernBertModel(ModernBertConfig(**{**sizes, **depth, **changes})).eval()


@pytest.mark.parametrize("name", LAYERS)
def test_the_model_stays_within_its_bound(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, pretence = LAYERS[name]
    monkeypatch.setenv("MODERNBERT_PRETEND", pretence)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # slow, and see `forgets the carry`
    model = small()
    fast = copy.deepcopy(model)
    quantize_linears(fast, "fp8" if kind is Fp8Linear else "int8")
    assert is_quantized(fast) and not is_quantized(model)
    assert sum(type(m) is kind for m in fast.modules()) == 4 * 4
    batch = pack([torch.randint(5, 200, (n,)) for n in (1, 17, 64, 150)])
    with torch.no_grad():
        cosines = torch.cosine_similarity(
            model(batch).last_hidden_state, fast(batch).last_hidden_state
        )
    mean, least = (0.99, 0.97) if kind is Fp8Linear else (0.995, 0.98)
    assert cosines.mean() > mean and cosines.min() > least


def test_a_gpu_and_its_emulation_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp8 scaled by row or afterwards is the same but for the rounding of the result."""
    batch = pack([torch.randint(5, 200, (n,)) for n in (3, 40)])
    results = []
    for pretence in ("sm_90", "sm_120"):
        monkeypatch.setenv("MODERNBERT_PRETEND", pretence)
        monkeypatch.setattr(dispatch, "_installed", lambda name: None)
        dispatch._machine.cache_clear()
        model = small()
        quantize_linears(model, "fp8")
        with torch.no_grad():
            results.append(model.bfloat16()(batch).last_hidden_state.double())
    dispatch._machine.cache_clear()
    assert torch.cosine_similarity(*results).min() > 0.999


def test_what_cannot_be_is_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    quantize_linears(model)
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(ValueError, match="cannot run here: needs an NVIDIA GPU, this is meta"):
        with torch.device("meta"):
            quantize_linears(small())
    with pytest.raises(ValueError, match="quantize='fp8' cannot run here: needs an NVIDIA GPU"):
        quantize_linears(small(), "fp8")
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_80")
    with pytest.raises(ValueError, match="needs sm_89 or newer, this is sm_80"):
        quantize_linears(small(), "fp8")
    with pytest.raises(ValueError, match="quantize='int4'; choose from int8, fp8"):
        quantize_linears(small(), "int4")
    with pytest.raises(ValueError, match="quantize='int4'"):
        SentenceEncoder.from_pretrained(tmp_path, quantize="int4")
