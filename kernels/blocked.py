"""Attention on any device without flash kernels, and without a single padding token.

Global layers run `scaled_dot_product_attention` per run of equally long sequences. Local layers
cut the packed stream into blocks of rows; each block sees its own rows and the window on either
side through overlapping views of k and v, so no L x L matrix ever exists.

Shapes: T = packed tokens, H = heads, d = head size, N = blocks, R = rows of a block, W = window,
S = R + 2 W keys of a block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 128


@dataclass(frozen=True)
class Plan:
    """What attention needs to know of a batch; it depends on the lengths only.

    Attributes:
        runs: (first token, sequences, tokens of each) of neighbours of equal length.
        keys: (T,) bool, tokens that may be attended to; None for all.
        window: W, clipped to the longest sequence.
        rows: R.
        mask: (N, 1, R, S) additive, 0 or -inf; None when no layer of the model needs it.
        blind: (T,) bool, queries of local layers that see no key at all; None for none.
        short: no sequence is longer than the window, so that local and global are the same.
    """

    runs: tuple[tuple[int, int, int], ...]
    keys: Tensor | None
    window: int
    rows: int
    mask: Tensor | None
    blind: Tensor | None
    short: bool


def plan(
    lengths: tuple[int, ...],
    window: int | None,
    keys: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Plan:
    """Prepare sequences of `lengths` tokens for `attention`; `window` None: no local layer."""
    runs: list[tuple[int, int, int]] = []
    start = 0
    for length in lengths:
        if runs and runs[-1][2] == length:
            first, count, _ = runs[-1]
            runs[-1] = (first, count + 1, length)
        elif length:
            runs.append((start, 1, length))
        start += length
    if window is None:
        return Plan(tuple(runs), keys, 0, 1, None, None, short=False)
    longest = max(lengths, default=0)
    reach = max(min(window, longest - 1), 0)
    rows = max(min(ROWS, start), 1)
    visible = _visible(lengths, reach, rows, keys, device)
    blind = None
    if keys is not None:
        seen = visible.any(-1)
        visible |= ~seen[..., None]  # a softmax over nothing is NaN: their result is dropped later
        blind = ~seen.flatten()[:start]
    mask = torch.zeros(visible.shape, dtype=dtype, device=device)
    mask.masked_fill_(~visible, float("-inf"))
    return Plan(tuple(runs), keys, reach, rows, mask[:, None], blind, short=longest <= window + 1)


def _visible(
    lengths: tuple[int, ...], window: int, rows: int, keys: Tensor | None, device: torch.device
) -> Tensor:
    """(N, R, S) bool: same sequence, within the window, and a key."""
    total = sum(lengths)
    blocks = -(-total // rows)
    sizes = torch.tensor(lengths, dtype=torch.int64)
    owner = torch.arange(len(lengths)).repeat_interleave(sizes).to(device)
    spare = blocks * rows - total
    queries = F.pad(owner, (0, spare), value=-1).view(blocks, rows, 1)
    if keys is not None:
        owner = owner.masked_fill(~keys, -2)
    # Rows after the end belong to sequence -1 and see the padding after the end: never NaN.
    owner = F.pad(F.pad(owner, (0, spare + window), value=-1), (window, 0), value=-2)
    keys_of_block = owner.unfold(0, rows + 2 * window, rows)[:, None, :]
    band = torch.arange(rows + 2 * window) - torch.arange(rows)[:, None]
    return (queries == keys_of_block) & ((band >= 0) & (band <= 2 * window)).to(device)


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, *, local: bool, dropout: float = 0.0
) -> Tensor:
    """Attention within each sequence of a packed stream: (T, H, d) each, gives (T, H, d)."""
    if local or plan.short:
        return _local(q, k, v, plan, dropout)
    return _global(q, k, v, plan, dropout)


def _global(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> Tensor:
    outputs = []
    for start, count, length in plan.runs:
        here = slice(start, start + count * length)
        views = [x[here].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)]
        mask = None
        if plan.keys is not None:
            keys = plan.keys[here].view(count, 1, 1, length)
            blind = ~keys.any(-1, keepdim=True)
            mask = keys | blind
        out = F.scaled_dot_product_attention(*views, attn_mask=mask, dropout_p=dropout)
        if plan.keys is not None:
            out = out.masked_fill(blind, 0.0)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # (count * length, H, d)
    return outputs[0] if len(outputs) == 1 else torch.cat([q[:0], *outputs])


def _local(q: Tensor, k: Tensor, v: Tensor, plan: Plan, dropout: float) -> Tensor:
    total, window, rows = len(q), plan.window, plan.rows
    if not total:
        return q
    assert plan.mask is not None
    spare = plan.mask.shape[0] * rows - total
    if spare:
        q = F.pad(q, (0, 0, 0, 0, 0, spare))
    queries = q.unflatten(0, (-1, rows)).transpose(1, 2)  # (N, H, R, d)
    keys, values = (
        F.pad(x, (0, 0, 0, 0, window, spare + window))
        .unfold(0, rows + 2 * window, rows)
        .transpose(2, 3)  # (N, H, S, d), a view
        for x in (k, v)
    )
    out = F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=plan.mask, dropout_p=dropout
    )
    out = out.transpose(1, 2).flatten(0, 1)[:total]
    return out if plan.blind is None else out.masked_fill(plan.blind[:, None, None], 0.0)
