"""Our attention over packed sequences in Triton: forward and backward, window or full, no padding.

The work is one flat list of tiles, (sequence, its end, first row), made once per batch from the
lengths and shared by all layers and by both passes, longest first; no program is empty. Keys are
walked in blocks, and only the blocks that a window or an end cuts are masked. q and k turn by their
RoPE angle as they are loaded, and their gradients turn back as they are stored. The softmax runs in
base 2 with the scale folded in. There are no atomics: two runs agree to the last bit.

Heads are kept as two halves, the elements that RoPE pairs: q k^T is the sum of two products.

Shapes: T = packed tokens, B = sequences, N = tiles, H = heads, d = head size.
Source: Dao 2023, FlashAttention-2, algorithms 1 and 2.
"""

from dataclasses import dataclass
from math import e, log2
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import capability, runs_plainly

HEAD_SIZES = (32, 64, 128)  # a product over half a head needs at least 16 elements
WGMMA = ((9, 0), (10, 0), (10, 3))  # tensor cores that read shared memory
TURN_ON_LOAD = 1024  # of longer sequences, keys would turn too often: once per tile of queries


@dataclass(frozen=True)
class Tiling:
    """How a kernel cuts its work: rows it keeps, columns it walks by, warps, stages of the loop.

    `split` takes the blocks that need no mask into a loop of their own.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    split: bool


def tiling(local: bool, turns: bool, capability: tuple[int, int]) -> Tiling:
    """The forward kernel's; by arithmetic and by what it needs (`benchmarks/aot.py`), unmeasured.

    A window of 64 to each side meets three blocks of 64 keys, of which it cuts two: one masked
    loop, whose loads can all start at once, over three loops of one block each. sm_90 multiplies
    from shared memory; before, operands are in registers, and blocks must be smaller to fit. Angles
    that turn on load (`turns`) take as much room as the keys.
    """
    if capability in WGMMA:
        return Tiling(64, 64, 4, 2, split=False) if local else Tiling(128, 128, 8, 2, split=True)
    if local:
        return Tiling(64, 32, 4, 2, split=False)
    return Tiling(128, 64, 8, 2, split=True) if turns else Tiling(128, 64, 4, 3, split=True)


def tiling_backward(local: bool, by_key: bool, capability: tuple[int, int]) -> Tiling:
    """Of the kernels for the gradient of q, or of k and v (`by_key`).

    Their rows are the forward kernel's, whose list of tiles they share.
    """
    large = capability in WGMMA
    if local:
        return Tiling(64, 64 if large else 16 if by_key else 32, 4, 2, split=False)
    return Tiling(128, (64 if large else 32) // (2 if by_key else 1), 8, 2, split=True)


@dataclass(frozen=True)
class Plan:
    """The tiles of one batch, (N, 3) int32: start and end of the sequence, first row of the tile.

    Attributes:
        local, full: for the layers with and without a window; None when the model has none.
        rows: of a tile in `local` and in `full`.
        window: reach of local layers to each side.
        keys: (T,) bool, tokens that may be attended to; None for all.
        turn_on_load: RoPE inside of the kernel also in full layers.
    """

    local: Tensor | None
    full: Tensor
    rows: tuple[int, int]
    window: int | None
    keys: Tensor | None
    turn_on_load: bool


def plan(
    cu_seqlens: Tensor,
    total: int,
    lengths: tuple[int, ...] | None,
    window: int | None,
    keys: Tensor | None,
) -> Plan:
    """Prepare sequences of `lengths` tokens, `total` together; None: whatever their lengths."""
    found = capability(cu_seqlens.device)
    rows = tiling(True, True, found).rows, tiling(False, True, found).rows
    local = None
    if window is not None:
        local = tiles(cu_seqlens, total, lengths, rows[0], window)
    full = tiles(cu_seqlens, total, lengths, rows[1], None)
    short = lengths is None or max(lengths, default=0) <= TURN_ON_LOAD
    return Plan(local, full, rows, window, keys, short)


def tiles(
    cu_seqlens: Tensor, total: int, lengths: tuple[int, ...] | None, rows: int, window: int | None
) -> Tensor:
    """(N, 3) int32, the tiles of `rows` rows with the most keys first; made on the device.

    Without `lengths` the list has room for any, and ends in tiles of nothing.
    """
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    each = (ends - starts + rows - 1) // rows
    last = each.cumsum(0)
    if lengths is None:
        count = total // rows + starts.shape[0]
    else:
        count = sum(-(-length // rows) for length in lengths)
    index = torch.arange(count, device=starts.device)
    owner = torch.searchsorted(last, index, right=True)
    inside = owner < starts.shape[0]
    owner = owner.clamp(max=starts.shape[0] - 1)
    start, end = (torch.where(inside, x[owner], 0) for x in (starts, ends))
    first = torch.where(inside, start + (index - last[owner] + each[owner]) * rows, 0)
    work = end - start
    if window is not None:
        work = torch.minimum(end, first + rows + window) - torch.maximum(start, first - window)
    order = torch.where(inside, work, -1).argsort(descending=True, stable=True)
    return torch.stack((start, end, first), 1)[order].int()


# -- kernels ----------------------------------------------------------------------------------

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _product(a, b, c=None):
    """a b + c with a float32 sum; the interpreter would multiply bfloat16 as integers."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _span(first, start, end, WINDOW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What rows [first, first + ROWS) see: [low, high), and in it whole blocks that all see."""
    low, high, all_low, all_high = start, end, start, end
    if WINDOW >= 0:
        low = tl.maximum(start, first - WINDOW)
        high = tl.minimum(end, first + ROWS + WINDOW)
        all_low = tl.maximum(start, first + ROWS - 1 - WINDOW)
        all_high = tl.minimum(end, first + WINDOW + 1)
    skipped = tl.maximum(all_low - low, 0)
    full_low = tl.minimum(low + (skipped + COLUMNS - 1) // COLUMNS * COLUMNS, high)
    full_high = full_low + tl.maximum(all_high - full_low, 0) // COLUMNS * COLUMNS
    return low, full_low, full_high, high


@triton.jit
def _halves(
    ptr,  # of one head of token 0
    cos_ptr,  # (T, HALF)
    sin_ptr,
    tokens,
    stride,  # from token to token
    inside,
    ROPE: tl.constexpr,
    MASKED: tl.constexpr,
    HALF: tl.constexpr,
):
    """Both halves of one head of some tokens, turned by their angles; 0 outside."""
    token = tokens.to(tl.int64)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    at = ptr + token * stride + pair
    if MASKED:
        first = tl.load(at, mask=inside[:, None], other=0.0)
        second = tl.load(at + HALF, mask=inside[:, None], other=0.0)
    else:
        first, second = tl.load(at), tl.load(at + HALF)
    if ROPE:
        if MASKED:
            cos = tl.load(cos_ptr + token * HALF + pair, mask=inside[:, None], other=0.0)
            sin = tl.load(sin_ptr + token * HALF + pair, mask=inside[:, None], other=0.0)
        else:
            cos = tl.load(cos_ptr + token * HALF + pair)
            sin = tl.load(sin_ptr + token * HALF + pair)
        x, y = first.to(tl.float32), second.to(tl.float32)
        first = (x * cos - y * sin).to(first.dtype)
        second = (y * cos + x * sin).to(second.dtype)
    return first, second


@triton.jit
def _store_halves(
    ptr,
    cos_ptr,
    sin_ptr,
    tokens,
    stride,
    inside,
    first,
    second,
    ROPE: tl.constexpr,
    HALF: tl.constexpr,
):
    """The gradient of what `_halves` loads, turned back."""
    token = tokens.to(tl.int64)[:, None]
    pair = tl.arange(0, HALF)[None, :]
    at = ptr + token * stride + pair
    if ROPE:
        cos = tl.load(cos_ptr + token * HALF + pair, mask=inside[:, None], other=0.0)
        sin = tl.load(sin_ptr + token * HALF + pair, mask=inside[:, None], other=0.0)
        x, y = first, second
        first = x * cos + y * sin
        second = y * cos - x * sin
    tl.store(at, first, mask=inside[:, None])
    tl.store(at + HALF, second, mask=inside[:, None])


@triton.jit
def _whole(ptr, tokens, stride, inside, MASKED: tl.constexpr, SIZE: tl.constexpr):
    """One head of some tokens, (tokens, SIZE); 0 outside."""
    at = ptr + tokens.to(tl.int64)[:, None] * stride + tl.arange(0, SIZE)[None, :]
    if MASKED:
        x = tl.load(at, mask=inside[:, None], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _hide(
    scores,  # (rows, columns), or with TURNED (columns, rows): rows are queries
    rows,
    columns,
    keys_ptr,
    end,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    TURNED: tl.constexpr,
):
    """-inf where a query may not look: past the end, beyond the window, at a query-only token."""
    shown = columns < end
    if KEYS:
        shown = shown & (tl.load(keys_ptr + columns, mask=shown, other=0) != 0)
    if MASKED or KEYS:
        if TURNED:
            visible = shown[:, None]
            distance = columns[:, None] - rows[None, :]
        else:
            visible = shown[None, :]
            distance = rows[:, None] - columns[None, :]
        if MASKED and WINDOW >= 0:
            visible = visible & (distance <= WINDOW) & (distance >= -WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def _forward_blocks(
    out,
    total,
    highest,
    q1,
    q2,
    rows,
    low,
    high,
    end,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    stride,
    scale,
    WINDOW: tl.constexpr,
    ROPE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    for first in range(low, high, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < end
        k1, k2 = _halves(k_ptr, cos_ptr, sin_ptr, columns, stride, inside, ROPE, MASKED, HALF)
        scores = _product(q1, tl.trans(k1))
        scores = _product(q2, tl.trans(k2), scores)
        scores = _hide(scores, rows, columns, keys_ptr, end, WINDOW, KEYS, MASKED, False)
        higher = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - higher[:, None])
        fade = tl.exp2(highest - higher)
        total = total * fade + tl.sum(weights, 1)
        v = _whole(v_ptr, columns, stride, inside, MASKED, 2 * HALF)
        out = _product(weights.to(v.dtype), v, out * fade[:, None])
        highest = higher
    return out, total, highest


@triton.jit
def _forward(
    qkv_ptr,  # (T, 3, H, d)
    cos_ptr,  # (T, d / 2) float32; with ROPE
    sin_ptr,
    keys_ptr,  # (T,) uint8; with KEYS
    tiles_ptr,  # (N, 3)
    out_ptr,  # (T, H, d)
    lse_ptr,  # (H, T) float32, log2 of the sum of the exponentials, inf for none; with LSE
    tokens,  # T
    heads,  # H
    stride,  # of a token of qkv
    scale,  # d^-0.5 log2(e)
    WINDOW: tl.constexpr,  # -1 for none
    ROPE: tl.constexpr,
    KEYS: tl.constexpr,
    LSE: tl.constexpr,
    SPLIT: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tiles_ptr + tl.program_id(0) // heads * 3
    head = tl.program_id(0) % heads
    start, end, first = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    q_ptr = qkv_ptr + head * 2 * HALF
    k_ptr = q_ptr + heads * 2 * HALF
    v_ptr = k_ptr + heads * 2 * HALF
    rows = first + tl.arange(0, ROWS)
    inside = rows < end
    q1, q2 = _halves(q_ptr, cos_ptr, sin_ptr, rows, stride, inside, ROPE, True, HALF)
    out = tl.zeros((ROWS, 2 * HALF), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    highest = tl.full((ROWS,), -1e30, dtype=tl.float32)  # finite: no inf - inf where all is hidden
    low, full_low, full_high, high = _span(first, start, end, WINDOW, ROWS, COLUMNS)
    if SPLIT:
        if WINDOW >= 0:
            out, total, highest = _forward_blocks(
                out, total, highest, q1, q2, rows, low, full_low, end, k_ptr, v_ptr, cos_ptr,
                sin_ptr, keys_ptr, stride, scale, WINDOW, ROPE, KEYS, True, HALF, COLUMNS,
            )  # fmt: skip
        out, total, highest = _forward_blocks(
            out, total, highest, q1, q2, rows, full_low, full_high, end, k_ptr, v_ptr, cos_ptr,
            sin_ptr, keys_ptr, stride, scale, WINDOW, ROPE, KEYS, False, HALF, COLUMNS,
        )  # fmt: skip
        low = full_high
    out, total, highest = _forward_blocks(
        out, total, highest, q1, q2, rows, low, high, end, k_ptr, v_ptr, cos_ptr,
        sin_ptr, keys_ptr, stride, scale, WINDOW, ROPE, KEYS, True, HALF, COLUMNS,
    )  # fmt: skip
    blind = total == 0.0
    out = out / tl.where(blind, 1.0, total)[:, None]
    at = rows.to(tl.int64)[:, None] * (heads * 2 * HALF) + head * 2 * HALF
    tl.store(out_ptr + at + tl.arange(0, 2 * HALF)[None, :], out, mask=inside[:, None])
    if LSE:
        lse = tl.where(blind, float("inf"), highest + tl.log2(tl.where(blind, 1.0, total)))
        tl.store(lse_ptr + head.to(tl.int64) * tokens + rows, lse, mask=inside)


@triton.jit
def _query_blocks(
    grad1,
    grad2,
    q1,
    q2,
    upstream,
    lse,
    along,
    rows,
    low,
    high,
    end,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    stride,
    scale,
    WINDOW: tl.constexpr,
    ROPE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    for first in range(low, high, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < end
        k1, k2 = _halves(k_ptr, cos_ptr, sin_ptr, columns, stride, inside, ROPE, MASKED, HALF)
        scores = _product(q1, tl.trans(k1))
        scores = _product(q2, tl.trans(k2), scores)
        scores = _hide(scores, rows, columns, keys_ptr, end, WINDOW, KEYS, MASKED, False)
        weights = tl.exp2(scores * scale - lse[:, None])
        v = _whole(v_ptr, columns, stride, inside, MASKED, 2 * HALF)
        slope = _product(upstream, tl.trans(v))
        slope = (weights * (slope - along[:, None])).to(k1.dtype)
        grad1 = _product(slope, k1, grad1)
        grad2 = _product(slope, k2, grad2)
    return grad1, grad2


@triton.jit
def _backward_queries(
    qkv_ptr,  # (T, 3, H, d)
    cos_ptr,
    sin_ptr,
    keys_ptr,
    tiles_ptr,
    out_ptr,  # (T, H, d)
    upstream_ptr,  # (T, H, d), the gradient of out
    lse_ptr,  # (H, T)
    along_ptr,  # (H, T) float32, receives the sum of out * upstream
    grad_ptr,  # (T, 3, H, d), receives the gradient of q
    tokens,
    heads,
    stride,
    scale,
    natural,  # d^-0.5
    WINDOW: tl.constexpr,
    ROPE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tiles_ptr + tl.program_id(0) // heads * 3
    head = tl.program_id(0) % heads
    start, end, first = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    q_ptr = qkv_ptr + head * 2 * HALF
    k_ptr = q_ptr + heads * 2 * HALF
    v_ptr = k_ptr + heads * 2 * HALF
    rows = first + tl.arange(0, ROWS)
    inside = rows < end
    q1, q2 = _halves(q_ptr, cos_ptr, sin_ptr, rows, stride, inside, ROPE, True, HALF)
    line = heads * 2 * HALF
    upstream = _whole(upstream_ptr + head * 2 * HALF, rows, line, inside, True, 2 * HALF)
    out = _whole(out_ptr + head * 2 * HALF, rows, line, inside, True, 2 * HALF)
    along = tl.sum(out.to(tl.float32) * upstream.to(tl.float32), 1)
    of_head = head.to(tl.int64) * tokens
    tl.store(along_ptr + of_head + rows, along, mask=inside)
    lse = tl.load(lse_ptr + of_head + rows, mask=inside, other=float("inf"))
    grad1 = tl.zeros((ROWS, HALF), dtype=tl.float32)
    grad2 = tl.zeros((ROWS, HALF), dtype=tl.float32)
    low, full_low, full_high, high = _span(first, start, end, WINDOW, ROWS, COLUMNS)
    if SPLIT:
        if WINDOW >= 0:
            grad1, grad2 = _query_blocks(
                grad1, grad2, q1, q2, upstream, lse, along, rows, low, full_low, end, k_ptr, v_ptr,
                cos_ptr, sin_ptr, keys_ptr, stride, scale, WINDOW, ROPE, KEYS, True, HALF, COLUMNS,
            )  # fmt: skip
        grad1, grad2 = _query_blocks(
            grad1, grad2, q1, q2, upstream, lse, along, rows, full_low, full_high, end, k_ptr,
            v_ptr, cos_ptr, sin_ptr, keys_ptr, stride, scale, WINDOW, ROPE, KEYS, False, HALF,
            COLUMNS,
        )  # fmt: skip
        low = full_high
    grad1, grad2 = _query_blocks(
        grad1, grad2, q1, q2, upstream, lse, along, rows, low, high, end, k_ptr, v_ptr,
        cos_ptr, sin_ptr, keys_ptr, stride, scale, WINDOW, ROPE, KEYS, True, HALF, COLUMNS,
    )  # fmt: skip
    _store_halves(
        grad_ptr + head * 2 * HALF, cos_ptr, sin_ptr, rows, 3 * line, inside,
        grad1 * natural, grad2 * natural, ROPE, HALF,
    )  # fmt: skip


@triton.jit
def _key_blocks(
    grad_k1,
    grad_k2,
    grad_v,
    k1,
    k2,
    v,
    columns,
    low,
    high,
    end,
    q_ptr,
    upstream_ptr,
    lse_ptr,
    along_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    stride,
    line,
    scale,
    WINDOW: tl.constexpr,
    ROPE: tl.constexpr,
    KEYS: tl.constexpr,
    MASKED: tl.constexpr,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    for first in range(low, high, COLUMNS):
        rows = first + tl.arange(0, COLUMNS)
        inside = rows < end
        q1, q2 = _halves(q_ptr, cos_ptr, sin_ptr, rows, stride, inside, ROPE, MASKED, HALF)
        scores = _product(k1, tl.trans(q1))  # (keys, queries)
        scores = _product(k2, tl.trans(q2), scores)
        scores = _hide(scores, rows, columns, keys_ptr, end, WINDOW, KEYS, MASKED, True)
        if MASKED:
            lse = tl.load(lse_ptr + rows, mask=inside, other=float("inf"))
            along = tl.load(along_ptr + rows, mask=inside, other=0.0)
        else:
            lse, along = tl.load(lse_ptr + rows), tl.load(along_ptr + rows)
        weights = tl.exp2(scores * scale - lse[None, :])
        upstream = _whole(upstream_ptr, rows, line, inside, MASKED, 2 * HALF)
        grad_v = _product(weights.to(v.dtype), upstream, grad_v)
        slope = _product(v, tl.trans(upstream))
        slope = (weights * (slope - along[None, :])).to(q1.dtype)
        grad_k1 = _product(slope, q1, grad_k1)
        grad_k2 = _product(slope, q2, grad_k2)
    return grad_k1, grad_k2, grad_v


@triton.jit
def _backward_keys(
    qkv_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    tiles_ptr,
    upstream_ptr,
    lse_ptr,
    along_ptr,
    grad_ptr,  # (T, 3, H, d), receives the gradients of k and v
    tokens,
    heads,
    stride,
    scale,
    natural,
    WINDOW: tl.constexpr,
    ROPE: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tiles_ptr + tl.program_id(0) // heads * 3
    head = tl.program_id(0) % heads
    start, end, first = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if first >= end:
        return
    q_ptr = qkv_ptr + head * 2 * HALF
    k_ptr = q_ptr + heads * 2 * HALF
    v_ptr = k_ptr + heads * 2 * HALF
    upstream_ptr += head * 2 * HALF
    lse_ptr += head.to(tl.int64) * tokens
    along_ptr += head.to(tl.int64) * tokens
    line = heads * 2 * HALF
    columns = first + tl.arange(0, ROWS)
    inside = columns < end
    k1, k2 = _halves(k_ptr, cos_ptr, sin_ptr, columns, stride, inside, ROPE, True, HALF)
    v = _whole(v_ptr, columns, stride, inside, True, 2 * HALF)
    grad_k1 = tl.zeros((ROWS, HALF), dtype=tl.float32)
    grad_k2 = tl.zeros((ROWS, HALF), dtype=tl.float32)
    grad_v = tl.zeros((ROWS, 2 * HALF), dtype=tl.float32)
    # The window is the same to both sides: a key is seen from where a query in its place looks.
    low, full_low, full_high, high = _span(first, start, end, WINDOW, ROWS, COLUMNS)
    if SPLIT:
        if WINDOW >= 0:
            grad_k1, grad_k2, grad_v = _key_blocks(
                grad_k1, grad_k2, grad_v, k1, k2, v, columns, low, full_low, end, q_ptr,
                upstream_ptr, lse_ptr, along_ptr, cos_ptr, sin_ptr, keys_ptr, stride, line, scale,
                WINDOW, ROPE, KEYS, True, HALF, COLUMNS,
            )  # fmt: skip
        grad_k1, grad_k2, grad_v = _key_blocks(
            grad_k1, grad_k2, grad_v, k1, k2, v, columns, full_low, full_high, end, q_ptr,
            upstream_ptr, lse_ptr, along_ptr, cos_ptr, sin_ptr, keys_ptr, stride, line, scale,
            WINDOW, ROPE, KEYS, False, HALF, COLUMNS,
        )  # fmt: skip
        low = full_high
    grad_k1, grad_k2, grad_v = _key_blocks(
        grad_k1, grad_k2, grad_v, k1, k2, v, columns, low, high, end, q_ptr,
        upstream_ptr, lse_ptr, along_ptr, cos_ptr, sin_ptr, keys_ptr, stride, line, scale,
        WINDOW, ROPE, KEYS, True, HALF, COLUMNS,
    )  # fmt: skip
    _store_halves(
        grad_ptr + (heads + head) * 2 * HALF, cos_ptr, sin_ptr, columns, 3 * line, inside,
        grad_k1 * natural, grad_k2 * natural, ROPE, HALF,
    )  # fmt: skip
    at = columns.to(tl.int64)[:, None] * 3 * line + (2 * heads + head) * 2 * HALF
    tl.store(grad_ptr + at + tl.arange(0, 2 * HALF)[None, :], grad_v, mask=inside[:, None])


# -- operators --------------------------------------------------------------------------------


def _constants(
    cos: Tensor | None, keys: Tensor | None, window: int, rows: int, size: int, cut: Tiling
) -> dict[str, Any]:
    return {
        "WINDOW": window,
        "ROPE": cos is not None,
        "KEYS": keys is not None,
        "SPLIT": cut.split,
        "HALF": size // 2,
        "ROWS": rows,
        "COLUMNS": cut.columns,
        "num_warps": cut.warps,
        "num_stages": cut.stages,
    }


def _pointers(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, keys: Tensor | None, tiles: Tensor
) -> tuple[Tensor, ...]:
    """Stand-ins where there is nothing: the kernel does not look."""
    cos, sin = (qkv if x is None else x.contiguous() for x in (cos, sin))
    keys = qkv if keys is None else keys.contiguous().view(torch.uint8)
    return qkv, cos, sin, keys, tiles.contiguous()


def _one_piece(qkv: Tensor) -> Tensor:
    """Each token's q, k and v must lie one after another, whatever lies between tokens."""
    return qkv if qkv[:1].is_contiguous() else qkv.contiguous()


def _launch_attention(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor | None,
    tiles: Tensor,
    rows: int,
    window: int,
    gradients: bool,
) -> tuple[Tensor, Tensor]:
    qkv = _one_piece(qkv)
    total, _, heads, size = qkv.shape
    out, lse = _attention_outputs(qkv, cos, sin, keys, tiles, rows, window, gradients)
    cut = tiling(window >= 0, cos is not None, capability(qkv.device))
    if len(tiles):
        with torch.cuda.device_of(qkv):
            _forward[(len(tiles) * heads,)](
                *_pointers(qkv, cos, sin, keys, tiles),
                out,
                lse if gradients else out,
                total,
                heads,
                qkv.stride(0),
                size**-0.5 * log2(e),
                LSE=gradients,
                **_constants(cos, keys, window, rows, size, cut),
            )
    return out, lse


_attention = torch.library.custom_op("modernbert::attention", _launch_attention, mutates_args=())


@_attention.register_fake
def _attention_outputs(
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor | None,
    tiles: Tensor,
    rows: int,
    window: int,
    gradients: bool,
) -> tuple[Tensor, Tensor]:
    total, _, heads, size = qkv.shape
    lse_shape = (heads, total) if gradients else (0,)
    lse = torch.empty(lse_shape, dtype=torch.float32, device=qkv.device)
    return qkv.new_empty((total, heads, size)), lse


@torch.library.custom_op("modernbert::attention_backward", mutates_args=())
def _attention_gradient(
    upstream: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor | None,
    tiles: Tensor,
    rows: int,
    window: int,
) -> Tensor:
    qkv = _one_piece(qkv)
    total, _, heads, size = qkv.shape
    grad = qkv.new_empty(qkv.shape)
    along, upstream = torch.empty_like(lse), upstream.contiguous()
    found = capability(qkv.device)
    constants = [
        _constants(cos, keys, window, rows, size, tiling_backward(window >= 0, by_key, found))
        for by_key in (False, True)
    ]
    pointers = _pointers(qkv, cos, sin, keys, tiles)
    natural = size**-0.5
    scalars = total, heads, qkv.stride(0), natural * log2(e), natural
    if len(tiles):
        grid = (len(tiles) * heads,)
        with torch.cuda.device_of(qkv):
            _backward_queries[grid](
                *pointers, out, upstream, lse, along, grad, *scalars, **constants[0]
            )
            _backward_keys[grid](*pointers, upstream, lse, along, grad, *scalars, **constants[1])
    return grad


@_attention_gradient.register_fake
def _(
    upstream: Tensor,
    out: Tensor,
    lse: Tensor,
    qkv: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    keys: Tensor | None,
    tiles: Tensor,
    rows: int,
    window: int,
) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, cos, sin, keys, tiles, ctx.rows, ctx.window, gradients = inputs
    assert gradients, "the forward pass did not keep what the backward pass needs"
    ctx.save_for_backward(*output, qkv, cos, sin, keys, tiles)


def _autograd(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
    grad = _attention_gradient(upstream, *ctx.saved_tensors, ctx.rows, ctx.window)
    return grad, *[None] * 7


_attention.register_autograd(_autograd, setup_context=_context)


def attention(
    qkv: Tensor, cos: Tensor | None, sin: Tensor | None, plan: Plan, *, local: bool
) -> Tensor:
    """Attention of packed q, k, v (T, 3, H, d) within each sequence: (T, H, d).

    With cos and sin (T, d / 2) float32, q and k turn by their angles first.
    """
    tiles, rows = (plan.local, plan.rows[0]) if local else (plan.full, plan.rows[1])
    assert tiles is not None, "a plan without a window has no local layers"
    window = -1
    if local and plan.window is not None:
        window = plan.window
    gradients = torch.is_grad_enabled() and qkv.requires_grad
    run = _launch_attention if runs_plainly(qkv) else _attention
    return run(qkv, cos, sin, plan.keys, tiles, rows, window, gradients)[0]
