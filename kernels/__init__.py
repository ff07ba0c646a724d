"""The operations the model calls, and the one place that decides what runs them.

A leaf: imports nothing else of this library. Backends are named by the user or chosen in `dispatch`
from what the device offers; a downloaded file never chooses one. Triton and flash-attn are imported
when a plan needs them, never before.

Shapes: T = packed tokens, B = sequences, H = heads, d = head size, D = hidden size.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import blocked, dispatch, first_token, flash, inference, reference, turing
from .dispatch import BACKENDS, CPU_TOKENS, BackendStatus
from .reference import LARGEST

__all__ = [
    "BACKENDS",
    "CPU_TOKENS",
    "LARGEST",
    "AttentionPlan",
    "BackendStatus",
    "add_layer_norm",
    "attention",
    "available_backends",
    "computes_natively",
    "embed_norm",
    "first_token_attention",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "mean_pool",
    "plan_attention",
    "quantize_rows",
    "rescale",
    "rope",
    "rotary_attention",
    "token_budget",
]

Rotation = tuple[Tensor, Tensor]  # cos and sin, (T, d / 2) float32 each


def available_backends(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> list[BackendStatus]:
    """Every attention backend with its state on `device`; "auto" takes the last usable one.

    `dtype` is float32 by default on a CPU, and the half precision that the device has elsewhere.
    """
    device = torch.device(device)
    if dtype is None:
        native = computes_natively(torch.bfloat16, device)
        half = torch.bfloat16 if native else torch.float16
        dtype = torch.float32 if device.type == "cpu" else half
    return dispatch.table(dispatch.this_machine(device), dispatch.Need(dtype))


@dataclass(frozen=True)
class AttentionPlan:
    """All that attention needs to know of a batch, made once and shared by every layer.

    `inner` is the backend's own plan; None for the reference.
    """

    backend: str
    lengths: tuple[int, ...] | None
    window: int | None
    keys: Tensor | None
    inner: Any


def plan_attention(
    cu_seqlens: Tensor,
    total: int,
    lengths: tuple[int, ...] | None,
    *,
    window: int | None,
    query_only: Tensor | None = None,
    dtype: torch.dtype,
    backend: str = "auto",
    head_size: int = 64,
    dropout: float = 0.0,
    deterministic: bool = False,
) -> AttentionPlan:
    """Prepare attention for packed sequences.

    Args:
        cu_seqlens: (B + 1,) int32, where each sequence starts.
        total: T, the tokens of all sequences.
        lengths: tokens of each sequence on the host; None where a plan must hold for all lengths:
            in a graph, captured (`dispatch.CAPTURABLE`) or compiled (blocked or Triton).
        window: reach of local layers to each side, both ends included; None: no layer is local.
        query_only: (T,) bool, tokens that nobody attends to.
        dtype: of q, k and v.
        backend: "auto" or one of `BACKENDS`.
        head_size: d.
        dropout: of the attention weights; only the reference and the blocked backend have any.
        deterministic: flash-attn's backward pass agrees with itself to the last bit, as all do
            under `torch.use_deterministic_algorithms(True)`.

    Raises `ValueError` for an unknown backend, and for one that cannot run here, with the reason.
    """
    device = cu_seqlens.device
    drops = True if dropout else False  # a branch: a compiled graph needs a constant
    compiling = torch.compiler.is_compiling()
    case = (
        *(device.type, device.index, dtype, torch.is_grad_enabled(), head_size, drops),
        deterministic and not torch.are_deterministic_algorithms_enabled(),
    )
    name = backend
    if backend == "auto":
        name = dispatch.backend_for(*case)
        if compiling and name != "triton":
            name = "blocked"
    elif backend not in BACKENDS:
        raise ValueError(f"attention={backend!r}; choose one of auto, {', '.join(BACKENDS)}")
    elif obstacle := dispatch.obstacle_to(backend, *case):
        raise ValueError(f"attention={backend!r} cannot run here: {obstacle}")
    keys = None if query_only is None else ~query_only
    inner: Any = None
    if name == "blocked":
        inner = blocked.plan(cu_seqlens, total, lengths, window, keys, dtype)
    elif name == "triton":
        from . import triton_attention

        inner = triton_attention.plan(cu_seqlens, total, lengths, window, keys)
    elif name != "reference":
        if compiling:
            raise ValueError(f"attention={name!r} does not compile: use auto, blocked or triton")
        facts = (cu_seqlens, total, lengths, window, keys, dtype)
        if name == "turing":
            inner = turing.plan(*facts)
        else:
            kind = dispatch.flash_kind(dispatch.this_machine(device), dispatch.Need(*case[2:]))
            inner = flash.plan(kind, *facts, deterministic)
    return AttentionPlan(name, lengths, window, keys, inner)


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, local: bool, dropout: float = 0.0
) -> tuple[Tensor, list[Tensor] | None]:
    """Attention within each sequence of a packed stream; `local` sees the plan's window only.

    q, k, v are (T, H, d). Returns (T, H, d) and, from the reference backend, the attention
    weights (H, length, length) of each sequence.
    """
    match plan.backend:
        case "blocked":
            return blocked.attention(q, k, v, plan.inner, local=local, dropout=dropout), None
        case "turing":
            return turing.attention(q, k, v, plan.inner, local=local), None
        case "flash":
            return flash.attention(q, k, v, plan.inner, local=local), None
        case "triton":
            from . import triton_attention

            qkv = torch.stack((q, k, v), 1)
            return triton_attention.attention(qkv, None, None, plan.inner, local=local), None
    assert plan.lengths is not None
    window = plan.window if local else None
    return reference.attention(
        q, k, v, plan.lengths, window=window, keys=plan.keys, dropout=dropout
    )


def rotary_attention(
    qkv: Tensor, rotation: Rotation, plan: AttentionPlan, *, local: bool, dropout: float = 0.0
) -> tuple[Tensor, list[Tensor] | None]:
    """`attention` of packed q, k, v (T, 3, H, d), q and k first turned by their angles.

    qkv is used up. The Triton backend turns them as it loads them, where that is less work.
    """
    if plan.backend == "triton":
        from . import triton_attention

        if local or plan.inner.turn_on_load or not _in_place(qkv):
            return triton_attention.attention(qkv, *rotation, plan.inner, local=local), None
        rope(qkv[:, :2], *rotation)
        return triton_attention.attention(qkv, None, None, plan.inner, local=local), None
    q, k = rope(qkv[:, :2], *rotation).unbind(1)  # (T, H, d) each
    return attention(q, k, qkv[:, 2], plan, local=local, dropout=dropout)


def first_token_attention(
    qkv: Tensor, rotation: Rotation, plan: AttentionPlan, cu_seqlens: Tensor, *, local: bool
) -> Tensor:
    """`rotary_attention` where only the first token of each sequence asks: (B, H, d).

    No sequence may be empty, and there is no dropout. qkv is used up.
    """
    q, k = rope(qkv[:, :2], *rotation).unbind(1)
    q = q[cu_seqlens[:-1].long()]
    window = plan.window if local else None
    return first_token.attention(q, k, qkv[:, 2], cu_seqlens, window, plan.keys)


def _fused(x: Tensor) -> ModuleType | None:
    """Our Triton kernels, where they run on x."""
    if not dispatch.fuses_on(x.device.type, x.device.index, x.dtype):
        return None
    from . import triton_elementwise

    return triton_elementwise


def _in_place(x: Tensor) -> bool:
    """Whether x may be overwritten: no gradient is recorded, and no compiler fuses passes."""
    return not (torch.is_grad_enabled() and x.requires_grad) and not torch.compiler.is_compiling()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (T, ..., H, d) by the angles of cos and sin (T, d / 2); x is used up."""
    if (kernels := _fused(x)) is not None:
        if not _in_place(x) or not x[:1].is_contiguous():
            return kernels.rope(x, cos, sin)
        kernels.rope_(x, cos, sin)
        return x
    return inference.rope_(x, cos, sin) if _in_place(x) else reference.rope(x, cos, sin)


def glu(x: Tensor, activation: str = "gelu") -> Tensor:
    """Gated linear unit (..., 2 I) to (..., I); x is used up."""
    if activation == "gelu" and x.dim() == 2 and (kernels := _fused(x)) is not None:
        return kernels.geglu(x)
    return inference.glu_(x, activation) if _in_place(x) else reference.glu(x, activation)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis of x (..., D)."""
    if bias is None and x.dim() == 2 and (kernels := _fused(x)) is not None:
        return kernels.layer_norm(x, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x + delta, (T, D), and its LayerNorm."""
    if bias is None and (kernels := _fused(x)) is not None:
        return kernels.add_layer_norm(x, delta, weight, eps)
    x = x + delta
    return x, layer_norm(x, weight, bias, eps)


def embed_norm(
    ids: Tensor,
    table: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    padding: int | None = None,
) -> Tensor:
    """LayerNorm of the rows `ids` (T,) of a table (V, D); the row `padding` has no gradient."""
    if bias is None and (kernels := _fused(table)) is not None:
        return kernels.embed_norm(ids, table, weight, eps, padding)
    return layer_norm(F.embedding(ids, table, padding), weight, bias, eps)


def mean_pool(x: Tensor, cu_seqlens: Tensor, left_out: Tensor | None = None) -> Tensor:
    """Mean of each sequence's tokens, (T, D) to (B, D); summed in float32 at least.

    `left_out` (T,) bool marks tokens that do not count. A sequence without any gives zeros. The
    sum runs over a sequence's own tokens in order: neighbours in the batch do not change it.
    """
    if (kernels := _fused(x)) is not None:
        return kernels.mean_pool(x, cu_seqlens, left_out).to(x.dtype)
    return reference.mean_pool(x, cu_seqlens, left_out)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of x weight^T + bias, (N, V), at labels (N,); and how many are right.

    The loss is float32 at least; rows labelled `ignored` do not count. Where our kernels run, a
    part of the logits exists at a time.
    """
    if (kernels := _fused(x)) is not None:
        if torch.is_autocast_enabled(x.device.type):
            kind = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(kind), weight.to(kind)
            bias = None if bias is None else bias.to(kind)
        return kernels.linear_cross_entropy(x, weight, bias, labels, ignored)
    logits = F.linear(x, weight, bias)
    wide = logits.to(reference.wide(logits.dtype))
    loss = F.cross_entropy(wide, labels, ignore_index=ignored, reduction="sum")
    return loss, (wide.argmax(-1) == labels).sum()


def quantize_rows(
    x: Tensor, dtype: torch.dtype, largest: float | None = None
) -> tuple[Tensor, Tensor]:
    """Codes (T, D) in `dtype`, int8 or float8_e4m3fn, and scales (T, 1) float32: x = codes * scale.

    The largest number of a row gets the code `largest`, by default that of `LARGEST`.
    """
    if largest is None and _fused(x) is not None and dispatch.runs_plainly(x):
        from . import triton_quantize

        return triton_quantize.quantize_rows(x, dtype)
    return reference.quantize_rows(x, dtype, largest)


def rescale(sums: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """sums (T, N) of products of codes, times scales (T, 1) and (1, N), in `dtype`."""
    if dispatch.fuses_on(sums.device.type, sums.device.index, dtype):
        if dispatch.runs_plainly(sums):
            from . import triton_quantize

            return triton_quantize.rescale(sums, rows, columns, dtype)
    return reference.rescale(sums, rows, columns, dtype)


def token_budget(device: torch.device | str) -> int:
    """Tokens of a batch that keep `device` busy without filling its memory; CPU_TOKENS on a CPU."""
    return dispatch.token_budget(dispatch.this_machine(torch.device(device)))


def computes_natively(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` multiplies matrices of `dtype` in hardware, rather than by emulation.

    Half precision on a CPU without AMX or AVX512-BF16 is up to a hundred times slower than
    float32.
    """
    if dtype in (torch.float32, torch.float64):
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or dispatch.capability(device) >= (8, 0)
    if device.type == "cpu":
        if dtype == torch.float16:
            return torch.cpu._is_amx_fp16_supported()
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float16
