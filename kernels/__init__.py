"""The operations the model calls, and the one place that decides what runs them.

A leaf: imports nothing else of this library. Backends are named by the user or chosen here from
what the device offers; a downloaded file never chooses one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import blocked, inference, reference
from .reference import mean_pool

__all__ = [
    "BACKENDS",
    "AttentionPlan",
    "BackendStatus",
    "attention",
    "available_backends",
    "computes_natively",
    "glu",
    "layer_norm",
    "mean_pool",
    "plan_attention",
    "rope",
]

BACKENDS = ("reference", "blocked")


@dataclass(frozen=True)
class BackendStatus:
    """Whether an attention backend can run on this machine, and why or why not."""

    name: str
    usable: bool
    reason: str


def available_backends() -> list[BackendStatus]:
    """Every attention backend with its state; `attention="auto"` takes the last usable one."""
    return [
        BackendStatus("reference", True, "plain PyTorch, any device and dtype; for comparison"),
        BackendStatus("blocked", True, "scaled_dot_product_attention, any device and dtype"),
    ]


@dataclass(frozen=True)
class AttentionPlan:
    """All that attention needs to know of a batch, made once and shared by every layer."""

    backend: str
    lengths: tuple[int, ...] | None
    window: int | None
    keys: Tensor | None
    blocked: blocked.Plan | None


def plan_attention(
    cu_seqlens: Tensor,
    total: int,
    lengths: tuple[int, ...] | None,
    *,
    window: int | None,
    query_only: Tensor | None = None,
    dtype: torch.dtype,
    backend: str = "auto",
) -> AttentionPlan:
    """Prepare attention for packed sequences.

    Args:
        cu_seqlens: (B + 1,) int32, where each sequence starts.
        total: T, the tokens of all sequences.
        lengths: tokens of each sequence on the host; None inside a compiled graph, which must
            hold for all lengths (the blocked backend only).
        window: reach of local layers to each side, both ends included; None: no layer is local.
        query_only: (T,) bool, tokens that nobody attends to.
        dtype: of q, k and v.
        backend: "auto" or one of `BACKENDS`.

    Raises `ValueError` for an unknown backend.
    """
    name = "blocked" if backend == "auto" else backend
    if name not in BACKENDS:
        raise ValueError(f"attention={backend!r}; choose one of auto, {', '.join(BACKENDS)}")
    keys = None if query_only is None else ~query_only
    inner = None
    if name == "blocked":
        inner = blocked.plan(cu_seqlens, total, lengths, window, keys, dtype)
    return AttentionPlan(name, lengths, window, keys, inner)


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, local: bool, dropout: float = 0.0
) -> tuple[Tensor, list[Tensor] | None]:
    """Attention within each sequence of a packed stream; `local` sees the plan's window only.

    q, k, v are (T, H, d). Returns (T, H, d) and, from the reference backend, the attention
    weights (H, length, length) of each sequence.
    """
    if plan.blocked is not None:
        return blocked.attention(q, k, v, plan.blocked, local=local, dropout=dropout), None
    assert plan.lengths is not None
    window = plan.window if local else None
    return reference.attention(
        q, k, v, plan.lengths, window=window, keys=plan.keys, dropout=dropout
    )


def _in_place(x: Tensor) -> bool:
    """Whether x may be overwritten: no gradient is recorded, and no compiler fuses passes."""
    return not (torch.is_grad_enabled() and x.requires_grad) and not torch.compiler.is_compiling()


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (T, ..., H, d) by the angles of cos and sin (T, d / 2); x is used up."""
    return inference.rope_(x, cos, sin) if _in_place(x) else reference.rope(x, cos, sin)


def glu(x: Tensor, activation: str = "gelu") -> Tensor:
    """Gated linear unit (..., 2 I) to (..., I); x is used up."""
    return inference.glu_(x, activation) if _in_place(x) else reference.glu(x, activation)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis of x (..., D)."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def computes_natively(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `device` multiplies matrices of `dtype` in hardware, rather than by emulation.

    Half precision on a CPU without AMX or AVX512-BF16 is up to a hundred times slower than
    float32.
    """
    if dtype in (torch.float32, torch.float64):
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        if dtype == torch.float16:
            return torch.cpu._is_amx_fp16_supported()
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return dtype == torch.float16
