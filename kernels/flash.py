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

from . import blocked, turing


@dataclass(frozen=True)
class Plan:
    """What attention needs to know of a batch.

    Attributes:
        kind: a key of `dispatch.FLASH`.
        cu_seqlens: (B + 1,) int32.
        longest: tokens of the longest sequence.
        window: reach of local layers to each side.
        keys: the keys among the tokens; None where all are.
        local: where some are not, flash attention would count the window in keys, not in places:
            local layers then run in strided blocks.
    """

    kind: str
    cu_seqlens: Tensor
    longest: int
    window: int | None
    keys: turing.Keys | None
    local: blocked.Plan | None


def plan(
    kind: str,
    cu_seqlens: Tensor,
    total: int,
    lengths: tuple[int, ...],
    window: int | None,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> Plan:
    """Prepare sequences of `lengths` tokens, `total` together."""
    longest = max(lengths, default=0)
    if keys is None or not total:
        return Plan(kind, cu_seqlens, longest, window, None, None)
    local = blocked.plan(cu_seqlens, total, lengths, window, keys, dtype)
    chosen = turing.choose_keys(cu_seqlens, total, keys)
    return Plan(kind, cu_seqlens, longest, window, chosen, local)


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, local: bool) -> Tensor:
    """Attention within each sequence of a packed stream: (T, H, d) each, gives (T, H, d)."""
    if not len(q):
        return q
    if local and plan.local is not None:
        return blocked.attention(q, k, v, plan.local, local=True)
    window = -1
    if local and plan.window is not None and plan.window < plan.longest - 1:
        window = plan.window
    if plan.keys is None:
        ends, longest = plan.cu_seqlens, plan.longest
        return CALLS[plan.kind](q, k, v, ends, ends, longest, longest, window)
    keys = plan.keys
    out = CALLS[plan.kind](
        q,
        k[keys.index],
        v[keys.index],
        plan.cu_seqlens,
        keys.cu_seqlens,
        plan.longest,
        keys.longest,
        window,
    )
    return out.masked_fill(keys.blind[:, None, None], 0.0)


def _package(module: str) -> Any:
    """A call of a flash-attn package: 2, 3 and 4 name their arguments alike."""

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_queries: Tensor,
        cu_keys: Tensor,
        longest_query: int,
        longest_key: int,
        window: int,
    ) -> Tensor:
        found = import_module(module).flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q=cu_queries,
            cu_seqlens_k=cu_keys,
            max_seqlen_q=longest_query,
            max_seqlen_k=longest_key,
            window_size=(window, window) if window >= 0 or "cute" not in module else (None, None),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return found[0] if isinstance(found, tuple) else found

    return call


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    longest_query: int,
    longest_key: int,
    window: int,
) -> Tensor:
    """`torch.nn.attention.varlen`, kept from taking cuDNN for the layers without a window."""
    attention = import_module("torch.nn.attention")
    varlen = import_module("torch.nn.attention.varlen")
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        return varlen.varlen_attn(
            q,
            k,
            v,
            cu_queries,
            cu_keys,
            longest_query,
            longest_key,
            window_size=(window, window),
        )


def _aten(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    longest_query: int,
    longest_key: int,
    window: int,
) -> Tensor:
    """What `torch.nn.attention.varlen` calls, in versions whose varlen knows no windows."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_queries, cu_keys, longest_query, longest_key, 0.0, False, False,
        window_size_left=window, window_size_right=window,
    )[0]  # fmt: skip


CALLS = {
    "flash_attn_2": _package("flash_attn"),
    "flash_attn_3": _package("flash_attn_3.flash_attn_interface"),
    "flash_attn_4": _package("flash_attn.cute"),
    "varlen": _varlen,
    "aten": _aten,
}
