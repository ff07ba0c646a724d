"""Plain PyTorch definitions of every operation: the oracle of the tests, in any float dtype.

Shapes: T = packed tokens, H = heads, d = head size. Nothing here is fast, everything is explicit.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # code of the largest number of a row
SMALLEST = 1e-12  # a row of zeros has no scale


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums and exponentials: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis: (x - mean) / sqrt(var + eps) * weight + bias."""
    y = x.to(wide(x.dtype))
    y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return (y if bias is None else y + bias).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (T, ..., H, d) by the angles of cos and sin (T, d / 2).

    NeoX layout: element i pairs with element i + d / 2. Source: Su et al. 2021, RoFormer, eq. 34.
    """
    shape = (len(x), *(1,) * (x.dim() - 2), cos.shape[-1])
    cos, sin = cos.view(shape), sin.view(shape)
    first, second = x.to(wide(x.dtype)).chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    return rotated.to(x.dtype)


def activate(x: Tensor, name: str) -> Tensor:
    """The activation of a config: 'gelu' is the exact erf form, x * Phi(x)."""
    match name:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh" | "gelu_pytorch_tanh" | "gelu_new":
            return F.gelu(x, approximate="tanh")
        case "silu" | "swish":
            return F.silu(x)
        case "relu":
            return F.relu(x)
    raise ValueError(f"unknown activation {name!r}")


def glu(x: Tensor, activation: str = "gelu") -> Tensor:
    """Gated linear unit (..., 2 I) -> (..., I): the first half is activated, the second gates.

    Source: Shazeer 2020, GLU Variants Improve Transformer (GeGLU for 'gelu').
    """
    first, gate = x.chunk(2, -1)
    return activate(first, activation) * gate


def visible(length: int, window: int | None, keys: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query of one sequence sees: (length, length) bool.

    `window` is the reach to each side, both ends included; None sees everything. `keys` (length,)
    is False for tokens that nobody attends to.
    """
    place = torch.arange(length, device=device)
    mask = torch.ones(length, length, dtype=torch.bool, device=device)
    if window is not None:
        mask = (place[:, None] - place).abs() <= window
    return mask if keys is None else mask & keys


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: tuple[int, ...],
    *,
    window: int | None = None,
    keys: Tensor | None = None,
    dropout: float = 0.0,
) -> tuple[Tensor, list[Tensor]]:
    """softmax(q k^T / sqrt(d)) v within each sequence of a packed stream.

    q, k, v are (T, H, d); `keys` (T,) bool marks the tokens that may be attended to. A query
    that sees no key gives zeros. Returns the output (T, H, d) and, per sequence, the attention
    weights (H, length, length). Source: Vaswani et al. 2017, section 3.2.1.
    """
    outputs, maps, start = [q[:0]], [], 0
    for length in lengths:
        here = slice(start, start + length)
        start += length
        mask = visible(length, window, None if keys is None else keys[here], q.device)
        scores = torch.einsum("ihd,jhd->hij", q[here], k[here]) * q.shape[-1] ** -0.5
        scores = scores.to(wide(q.dtype)).masked_fill(~mask, float("-inf"))
        blind = ~mask.any(-1, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0).to(q.dtype)
        weights = F.dropout(weights, dropout, training=dropout > 0)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[here]))
        maps.append(weights)
    return torch.cat(outputs), maps


def mean_pool(x: Tensor, cu_seqlens: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Mean of each sequence's tokens, (T, D) to (B, D); summed in float32, in float64 on a CPU.

    `left_out` (T,) bool marks tokens that do not count. A sequence without any gives zeros. The
    sum runs over a sequence's own tokens in order: neighbours in the batch do not change it.
    """
    # Added one by one in float32, 8,192 rows lose digits.
    y = x.to(torch.float64 if x.device.type == "cpu" else wide(x.dtype))
    offsets = cu_seqlens.long()
    counts = offsets.diff()
    if left_out is not None:
        y = y.masked_fill(left_out[:, None], 0.0)
        kept = F.pad((~left_out).long().cumsum(0), (1, 0))
        counts = kept[offsets[1:]] - kept[offsets[:-1]]
    sums = torch.segment_reduce(y, "sum", offsets=offsets, axis=0, initial=0.0)
    return (sums / counts.clamp(min=1)[:, None]).to(x.dtype)


def quantize_rows(
    x: Tensor, dtype: torch.dtype, largest: float | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (T, D) in `dtype`, int8 or float8_e4m3fn, and scales (T, 1) float32: x = codes * scale.

    The largest number of a row gets the code `largest`.
    """
    x = x.to(wide(x.dtype))
    largest = LARGEST[dtype] if largest is None else largest
    scales = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) / largest
    codes = x / scales
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scales.float()


def rescale(sums: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """sums (T, N) of products of codes, times scales (T, 1) and (1, N), in `dtype`."""
    return (sums * rows * columns).to(dtype)
