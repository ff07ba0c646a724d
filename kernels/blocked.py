"""Attention on any device without flash kernels, and without a single padding token.

Global layers run `scaled_dot_product_attention` per run of equally long sequences. Local layers
cut the packed stream into blocks of rows; each block sees its own rows and the window on either
side through overlapping views of k and v, so no L x L matrix ever exists.

Shapes: T = packed tokens, H = heads, d = head size, N = blocks, R = rows of a block, W = window,
S = R + 2 W keys of a block.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import wide

# As many as the queries PyTorch's attention takes at a time: more rows only see more keys that are
# outside of their own windows.
CPU_ROWS, ROWS = 32, 64


@dataclass(frozen=True)
class Plan:
    """What attention needs to know of a batch; it depends on the lengths only.

    Attributes:
        cu_seqlens: (B + 1,), where each sequence starts.
        runs: (first token, sequences, tokens of each) of neighbours of equal length; None inside
            a compiled graph, which must hold for all lengths.
        keys: (T,) bool, tokens that may be attended to; None for all.
        mask: (N, 1, R, S) additive, 0 or -inf; None when no layer of the model needs it.
        blind: (T,) bool, queries of local layers that see no key at all; None for none.
        short: no sequence is longer than the window, so that local and global are the same.
    """

    cu_seqlens: Tensor
    runs: tuple[tuple[int, int, int], ...] | None
    keys: Tensor | None
    mask: Tensor | None
    blind: Tensor | None
    short: bool


def plan(
    cu_seqlens: Tensor,
    total: int,
    lengths: tuple[int, ...] | None,
    window: int | None,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> Plan:
    """Prepare sequences of `lengths` tokens, `total` together; `window` None: no local layer.

    `lengths` None works for any lengths, a little slower.
    """
    runs = None if lengths is None else equal_runs(lengths)
    if window is None:
        return Plan(cu_seqlens, runs, keys, None, None, short=False)
    rows, short = CPU_ROWS if cu_seqlens.device.type == "cpu" else ROWS, False
    if lengths is not None:
        longest = max(lengths, default=0)
        short = longest <= window + 1
        window = max(min(window, longest - 1), 0)
        rows = max(min(rows, total), 1)
    visible = _visible(cu_seqlens, total, window, rows, keys)
    blind = None
    if keys is not None:
        seen = visible.any(-1)
        visible |= ~seen[..., None]  # a softmax over nothing is NaN: their result is dropped later
        blind = ~seen.flatten()[:total]
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    mask = mask.masked_fill(~visible, float("-inf"))[:, None]
    return Plan(cu_seqlens, runs, keys, mask, blind, short)


def equal_runs(lengths: Iterable[int]) -> tuple[tuple[int, int, int], ...]:
    """Neighbours of equal length: (first token, sequences, tokens of each), empty ones left out."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in lengths:
        if runs and runs[-1][2] == length:
            first, count, _ = runs[-1]
            runs[-1] = (first, count + 1, length)
        elif length:
            runs.append((start, 1, length))
        start += length
    return tuple(runs)


def _visible(cu_seqlens: Tensor, total: int, window: int, rows: int, keys: Tensor | None) -> Tensor:
    """(N, R, S) bool: same sequence, within the window, and a key."""
    device = cu_seqlens.device
    place = torch.arange(total, device=device, dtype=cu_seqlens.dtype)
    owner = torch.bucketize(place, cu_seqlens[1:], right=True)
    blocks = max(-(-total // rows), 1)  # an empty stream is one block of padding
    spare = blocks * rows - total
    queries = F.pad(owner, (0, spare), value=-1).view(blocks, rows, 1)
    if keys is not None:
        owner = owner.masked_fill(~keys, -2)
    # Rows after the end belong to sequence -1 and see the padding after the end: never NaN.
    owner = F.pad(F.pad(owner, (0, spare + window), value=-1), (window, 0), value=-2)
    keys_of_block = owner.unfold(0, rows + 2 * window, rows)[:, None, :]
    reach = torch.arange(rows + 2 * window, device=device)
    band = reach - torch.arange(rows, device=device)[:, None]
    return (queries == keys_of_block) & (band >= 0) & (band <= 2 * window)


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, local: bool, dropout: float = 0.0
) -> Tensor:
    """Attention within each sequence of a packed stream: (T, H, d) each, gives (T, H, d)."""
    if not q.shape[0]:
        return q
    if local or plan.short:
        return _local(q, k, v, plan, dropout)
    return _global(q, k, v, plan, dropout)


def _global(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> Tensor:
    if plan.runs is None:
        assert not dropout, "a compiled graph has no attention dropout"
        return _global_op(q, k, v, plan.cu_seqlens, plan.keys)
    return _by_runs(q, k, v, plan.runs, plan.keys, dropout)


def _by_runs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    runs: tuple[tuple[int, int, int], ...],
    keys: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    outputs = []
    for start, count, length in runs:
        here = slice(start, start + count * length)
        q_run, k_run, v_run = (
            x[here].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)
        )
        mask = blind = None
        if keys is not None:
            mask = keys[here].view(count, 1, 1, length)
            blind = ~mask.any(-1, keepdim=True)
            mask = mask | blind
        out = F.scaled_dot_product_attention(q_run, k_run, v_run, attn_mask=mask, dropout_p=dropout)
        if blind is not None:
            out = out.masked_fill(blind, 0.0)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (count * length, H, d)
    return outputs[0] if len(outputs) == 1 else torch.cat([q[:0], *outputs])


@torch.library.custom_op("modernbert::global_attention", mutates_args=())
def _global_op(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, keys: Tensor | None) -> Tensor:
    """Global attention as one node of a compiled graph, whatever the lengths of the batch."""
    out = _by_runs(q, k, v, equal_runs(cu_seqlens.diff().tolist()), keys)
    return out.contiguous()


@_global_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, keys: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("modernbert::global_attention_backward", mutates_args=())
def _global_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Written out, since autograd does not record what runs inside an operator."""
    scale, start = q.shape[-1] ** -0.5, 0
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    for length in cu_seqlens.diff().tolist():
        here = slice(start, start + length)
        start += length
        queries, columns, values, upstream = (
            x[here].transpose(0, 1).to(wide(x.dtype)) for x in (q, k, v, grad)
        )  # (H, length, d) each
        scores = queries @ columns.mT * scale  # (H, length, length)
        if keys is not None:
            scores = scores.masked_fill(~keys[here], float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0.0)  # NaN where a query sees no key
        of_weights = upstream @ values.mT
        slope = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
        found = slope @ columns, slope.mT @ queries, weights.mT @ upstream
        for gradient, part in zip(gradients, found, strict=True):
            gradient[here] = part.transpose(0, 1)
    return gradients[0], gradients[1], gradients[2]


@_global_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _remember(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_global_backward(grad, *ctx.saved_tensors), None, None)


_global_op.register_autograd(_gradients, setup_context=_remember)


def _local(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> Tensor:
    assert plan.mask is not None
    total = q.shape[0]
    blocks, _, rows, reach = plan.mask.shape
    window, spare = (reach - rows) // 2, blocks * rows - total
    if torch.compiler.is_compiling() or spare:  # a graph must hold for any remainder
        q = F.pad(q, (0, 0, 0, 0, 0, spare))
    queries = q.unflatten(0, (blocks, rows)).transpose(1, 2)
    keys, values = (
        F.pad(x, (0, 0, 0, 0, window, spare + window)).unfold(0, reach, rows).transpose(2, 3)
        for x in (k, v)
    )  # (N, H, S, d) each, a view; queries are (N, H, R, d)
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=plan.mask, dropout_p=dropout
    )
    out = out.transpose(1, 2).flatten(0, 1)[:total]
    return out if plan.blind is None else out.masked_fill(plan.blind[:, None, None], 0.0)
