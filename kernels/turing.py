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
from torch.nn import functional as F

from . import blocked
from .reference import wide


@dataclass(frozen=True)
class Keys:
    """Where some tokens are query-only: the others, which are all that k and v need to hold.

    Attributes:
        index: (K,) int64, places of the keys in the stream. A sequence without any lends its
            first token, so that no softmax is empty.
        cu_seqlens: (B + 1,) int32, where each sequence's keys start.
        longest: keys of the sequence with the most.
        blind: (T,) bool, tokens of sequences without any key: they get zeros.
    """

    index: Tensor
    cu_seqlens: Tensor
    longest: int
    blind: Tensor


@dataclass(frozen=True)
class Plan:
    """What attention needs to know of a batch; `local` None when no layer has a window."""

    cu_seqlens: Tensor
    longest: int
    keys: Keys | None
    local: blocked.Plan


def plan(
    cu_seqlens: Tensor,
    total: int,
    lengths: tuple[int, ...],
    window: int | None,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> Plan:
    """Prepare sequences of `lengths` tokens, `total` together."""
    local = blocked.plan(cu_seqlens, total, lengths, window, keys, dtype)
    chosen = None if keys is None or not total else choose_keys(cu_seqlens, total, keys)
    return Plan(cu_seqlens, max(lengths, default=0), chosen, local)


def choose_keys(cu_seqlens: Tensor, total: int, keys: Tensor) -> Keys:
    """The places of keys, for attention between streams of different lengths."""
    offsets = cu_seqlens.long()
    place = torch.arange(total, device=keys.device)
    owner = torch.bucketize(place, offsets[1:], right=True)
    counts = F.pad(keys.long().cumsum(0), (1, 0))
    blind = (counts[offsets[1:]] == counts[offsets[:-1]])[owner]
    lent = keys | (blind & (place == offsets[owner]))
    counts = F.pad(lent.long().cumsum(0), (1, 0))[offsets]
    return Keys(lent.nonzero().squeeze(1), counts.int(), int(counts.diff().max()), blind)


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, local: bool) -> Tensor:
    """Attention within each sequence of a packed stream: (T, H, d) each, gives (T, H, d)."""
    if local or not len(q):
        return blocked.attention(q, k, v, plan.local, local=local)
    if plan.keys is None:
        return varlen(q, k, v, plan.cu_seqlens, plan.cu_seqlens, plan.longest, plan.longest)
    keys = plan.keys
    k, v = k[keys.index], v[keys.index]
    out = varlen(q, k, v, plan.cu_seqlens, keys.cu_seqlens, plan.longest, keys.longest)
    return out.masked_fill(keys.blind[:, None, None], 0.0)


def varlen(
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
