"""Attention for GPUs without flash attention (T4 and other sm_75), and for float32 on any GPU.

Global layers run PyTorch's memory-efficient attention over all sequences at once, without padding;
it uses the tensor cores of sm_75. It knows no window to both sides, so local layers are the strided
blocks of `blocked`, whose dense pieces run through the same kernel. On the CPU the same plan runs
with PyTorch's own products in place of that kernel: its simulation, for tests.

Shapes: T = packed tokens, B = sequences, H = heads, d = head size, K = tokens that are keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import blocked
from .reference import wide
from .varlen import Sequences, attend, sequences


@dataclass(frozen=True)
class Plan:
    """What attention needs to know of a batch: for global layers, and for local ones."""

    sequences: Sequences
    local: blocked.Plan


def plan(
    cu_seqlens: Tensor,
    total: int,
    lengths: tuple[int, ...] | None,
    window: int | None,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> Plan:
    """Prepare sequences of `lengths` tokens, `total` together; None: whatever their lengths."""
    local = blocked.plan(cu_seqlens, total, lengths, window, keys, dtype)
    return Plan(sequences(cu_seqlens, total, lengths, keys), local)


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, local: bool) -> Tensor:
    """Attention within each sequence of a packed stream: (T, H, d) each, gives (T, H, d)."""
    if local or not len(q):
        return blocked.attention(q, k, v, plan.local, local=local)
    return attend(efficient, q, k, v, plan.sequences)


def efficient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    longest_query: int,
    longest_key: int,
) -> Tensor:
    """Each sequence's queries (T, H, d) at its keys and values (K, H, d)."""
    if q.device.type == "cpu":
        return _simulated(q, k, v, cu_queries, cu_keys)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    found = torch.ops.aten._efficient_attention_forward(
        q[None], k[None], v[None], None, cu_queries, cu_keys, longest_query, longest_key,
        0.0, 0, gradients, scale=q.shape[-1] ** -0.5,
    )  # fmt: skip
    return found[0][0]


def _simulated(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> Tensor:
    """The kernel's arithmetic: products of the inputs' dtype summed in float32, weights rounded."""
    outputs = [q[:0]]
    queries, keys = cu_queries.diff().tolist(), cu_keys.diff().tolist()
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    for q_part, k_part, v_part in parts:
        kind = wide(q.dtype)
        scores = (
            torch.einsum("ihd,jhd->hij", q_part.to(kind), k_part.to(kind)) * q.shape[-1] ** -0.5
        )
        peak = scores.amax(-1, keepdim=True) if scores.numel() else scores
        weights = (scores - peak).exp()
        total = weights.sum(-1)  # (H, length): the division comes after the second product
        out = torch.einsum("hij,jhd->ihd", weights.to(q.dtype).to(kind), v_part.to(kind))
        outputs.append((out / total.T[..., None]).to(q.dtype))
    return torch.cat(outputs)
