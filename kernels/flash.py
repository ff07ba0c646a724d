"""Flash attention by others, for packed sequences: flash-attn 2, 3 and 4, or PyTorch's own.

All compute `softmax(q k^T / sqrt(d)) v` over `cu_seqlens` with a window (left, right), both ends
included. Which one runs is decided in `dispatch.flash_kind`; nothing is imported before it is
called.

Shapes: T = packed tokens, B = sequences, H = heads, d = head size.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import blocked
from .varlen import Kernel, Sequences, attend, sequences

# What flash-attn calls the arguments of a `Kernel` after q, k and v.
NAMES = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


@dataclass(frozen=True)
class Plan:
    """What attention needs to know of a batch.

    Attributes:
        kind: a key of `dispatch.FLASH`.
        sequences: of the batch.
        window: reach of local layers to each side.
        local: where some tokens are no keys, flash attention would count the window in keys, not in
            places: local layers then run in strided blocks.
        deterministic: two backward passes agree to the last bit.
    """

    kind: str
    sequences: Sequences
    window: int | None
    local: blocked.Plan | None
    deterministic: bool


def plan(
    kind: str,
    cu_seqlens: Tensor,
    total: int,
    lengths: tuple[int, ...] | None,
    window: int | None,
    keys: Tensor | None,
    dtype: torch.dtype,
    deterministic: bool = False,
) -> Plan:
    """Prepare sequences of `lengths` tokens, `total` together; None: whatever their lengths."""
    found = sequences(cu_seqlens, total, lengths, keys)
    local = None
    if found.keys is not None:
        local = blocked.plan(cu_seqlens, total, lengths, window, keys, dtype)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    return Plan(kind, found, window, local, deterministic)


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, local: bool) -> Tensor:
    """Attention within each sequence of a packed stream: (T, H, d) each, gives (T, H, d)."""
    if not len(q):
        return q
    if local and plan.local is not None:
        return blocked.attention(q, k, v, plan.local, local=True)
    window = -1
    if local and plan.window is not None and plan.window < plan.sequences.longest - 1:
        window = plan.window
    options: dict[str, Any] = {"window": window}
    if plan.kind in TOLD:
        options["deterministic"] = plan.deterministic
    return attend(CALLS[plan.kind], q, k, v, plan.sequences, **options)


def _package(module: str) -> Kernel:
    """A call of a flash-attn package: 2, 3 and 4 name their arguments alike."""

    def call(*packed: Any, window: int, deterministic: bool) -> Tensor:
        found = import_module(module).flash_attn_varlen_func(
            *packed[:3],
            **dict(zip(NAMES, packed[3:], strict=True)),
            window_size=(window, window) if window >= 0 or "cute" not in module else (None, None),
            deterministic=deterministic,
        )
        return found[0] if isinstance(found, tuple) else found

    return call


def _varlen(*packed: Any, window: int) -> Tensor:
    """`torch.nn.attention.varlen`, kept from taking cuDNN for the layers without a window."""
    attention = import_module("torch.nn.attention")
    varlen = import_module("torch.nn.attention.varlen")
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        return varlen.varlen_attn(*packed, window_size=(window, window))


def _aten(*packed: Any, window: int) -> Tensor:
    """What `torch.nn.attention.varlen` calls, in versions whose varlen knows no windows."""
    return torch.ops.aten._flash_attention_forward(
        *packed, 0.0, False, False, window_size_left=window, window_size_right=window
    )[0]


CALLS: dict[str, Kernel] = {
    "flash_attn_2": _package("flash_attn"),
    "flash_attn_3": _package("flash_attn_3.flash_attn_interface"),
    "flash_attn_4": _package("flash_attn.cute"),
    "varlen": _varlen,
    "aten": _aten,
}
# Told whether to be deterministic; PyTorch's own ask `torch.use_deterministic_algorithms`.
TOLD = ("flash_attn_2", "flash_attn_3", "flash_attn_4")
