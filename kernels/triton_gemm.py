"""The linear layers of a block in Triton, with what stands before and after them, for inference.

`linear` is y = x W^T with a float32 sum, in one pass over memory together with

- the LayerNorm before it. Its weight is folded into W once, by `fold`; the mean and the variance
  of a row are gathered while the product walks along it: LN(x) W^T = (x W^T - mean sum(W)) / std.
  The variance is taken around the mean of the row's first block of B, not around 0: whatever the
  row, their difference is at most sqrt(K / B) standard deviations, so that 1 + K / B roundings of
  float32 is all that can cancel;
- the gate after it: rows i and I + i of W are computed side by side, so that a program holds both
  halves of exact-erf GeGLU;
- the residual that it is added to.

Programs walk down groups of rows before they go on to the next columns: a group's rows and the
weights stay in the L2 cache. Needs sm_80 or newer, and runs on the CPU in Triton's interpreter.

Shapes: T = packed tokens, K = inputs, N = outputs, I = N / 2.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import capability, runs_plainly
from .triton_attention import WGMMA, _product

GROUP = 8  # tiles of rows that share a pass over the columns
FEW = 1024  # tokens: up to here large tiles leave multiprocessors without any


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts its work: rows and columns of a tile, steps along K, warps, stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def tiling(tokens: int, capability: tuple[int, int]) -> Tiling:
    """By arithmetic and by what the kernel needs (`benchmarks/aot.py`), unmeasured.

    The tiles of `dispatch.token_budget`: 128 x 256 where multiprocessors have room for two steps of
    them, 128 x 128 on GeForce cards. Sums of rows take registers that a larger tile would spill.
    """
    if tokens <= FEW:
        return Tiling(64, 64, 64, 4, 3)
    if capability in WGMMA:
        return Tiling(128, 256, 64, 8, 3)
    if capability == (8, 0):
        return Tiling(128, 256, 32, 8, 4)
    return Tiling(128, 128, 64, 8, 3)


@triton.jit
def _linear_kernel(
    x_ptr,  # (T, K)
    weight_ptr,  # (N, K)
    sums_ptr,  # (N,) float32, of the rows of weight; with NORM
    residual_ptr,  # (T, N); with ADD
    out_ptr,  # (T, N), with GATED (T, N / 2)
    tokens,  # T
    eps,
    NORM: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    NARROW: tl.constexpr,  # sums in float16 within a step
    INPUTS: tl.constexpr,  # K
    OUTPUTS: tl.constexpr,  # N
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    across = (OUTPUTS + COLUMNS - 1) // COLUMNS
    high = GROUP * (tl.program_id(0) // (GROUP * across))
    height = tl.minimum((tokens + ROWS - 1) // ROWS - high, GROUP)
    place = tl.program_id(0) % (GROUP * across)
    rows = (high + place % height) * ROWS + tl.arange(0, ROWS)
    column = place // height * COLUMNS
    columns = column + tl.arange(0, COLUMNS)
    # Beyond the end the last row and column are computed again: loads without a mask.
    row = tl.minimum(rows, tokens - 1).to(tl.int64)[:, None]
    source = tl.minimum(columns, OUTPUTS - 1)
    if GATED:
        source = source % 2 * (OUTPUTS // 2) + source // 2
    depths = tl.arange(0, DEPTH)
    x_at = x_ptr + row * INPUTS + depths[None, :]  # (ROWS, DEPTH)
    weight_at = weight_ptr + source[None, :] * INPUTS + depths[:, None]  # (DEPTH, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if NORM:
        block = tl.load(x_at, mask=depths[None, :] < INPUTS, other=0.0)
        near = tl.sum(block.to(tl.float32), 1) / min(DEPTH, INPUTS)
        away = tl.zeros((ROWS,), dtype=tl.float32)
        squares = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, INPUTS, DEPTH):
        if INPUTS % DEPTH == 0:
            x = tl.load(x_at + first)
            weight = tl.load(weight_at + first)
        else:
            inside = first + depths < INPUTS
            x = tl.load(x_at + first, mask=inside[None, :], other=0.0)
            weight = tl.load(weight_at + first, mask=inside[:, None], other=0.0)
        if NARROW:
            total += tl.dot(x, weight, out_dtype=tl.float16).to(tl.float32)
        else:
            total = _product(x, weight, total)
        if NORM:
            distance = x.to(tl.float32) - near[:, None]
            if INPUTS % DEPTH != 0:
                distance = tl.where((first + depths < INPUTS)[None, :], distance, 0.0)
            away += tl.sum(distance, 1)
            squares += tl.sum(distance * distance, 1)
    if NORM:
        away = away / INPUTS
        variance = tl.maximum(squares / INPUTS - away * away, 0.0)
        sums = tl.load(sums_ptr + source)
        total = total - (near + away)[:, None] * sums[None, :]
        total = total * (1.0 / tl.sqrt(variance + eps))[:, None]
    if GATED:
        first, gate = tl.split(tl.reshape(total, (ROWS, COLUMNS // 2, 2)))
        total = first * (0.5 + 0.5 * tl.erf(first * 0.7071067811865476)) * gate
        columns = column // 2 + tl.arange(0, COLUMNS // 2)
    size: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    at = rows.to(tl.int64)[:, None] * size + columns[None, :]
    inside = (rows < tokens)[:, None] & (columns < size)[None, :]
    if ADD:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total, mask=inside)


def _launch_linear(
    x: Tensor,
    weight: Tensor,
    sums: Tensor | None,
    residual: Tensor | None,
    eps: float,
    gated: bool,
    narrow: bool,
) -> Tensor:
    out = _linear_output(x, weight, sums, residual, eps, gated, narrow)
    tokens, outputs = len(x), len(weight)
    cut = tiling(tokens, capability(x.device))
    if out.numel():
        x, weight = x.contiguous(), weight.contiguous()
        grid = (triton.cdiv(tokens, cut.rows) * triton.cdiv(outputs, cut.columns),)
        with torch.cuda.device_of(x):
            _linear_kernel[grid](
                x,
                weight,
                x if sums is None else sums.contiguous(),
                x if residual is None else residual.contiguous(),
                out,
                tokens,
                eps,
                NORM=sums is not None,
                ADD=residual is not None,
                GATED=gated,
                NARROW=narrow,
                INPUTS=x.shape[1],
                OUTPUTS=outputs,
                ROWS=cut.rows,
                COLUMNS=cut.columns,
                DEPTH=cut.depth,
                GROUP=GROUP,
                num_warps=cut.warps,
                num_stages=cut.stages,
            )
    return out


_linear_op = torch.library.custom_op("modernbert::linear", _launch_linear, mutates_args=())


@_linear_op.register_fake
def _linear_output(
    x: Tensor,
    weight: Tensor,
    sums: Tensor | None,
    residual: Tensor | None,
    eps: float,
    gated: bool,
    narrow: bool,
) -> Tensor:
    outputs = weight.shape[0]
    return x.new_empty((x.shape[0], outputs // 2 if gated else outputs))


def linear(
    x: Tensor,
    weight: Tensor,
    *,
    sums: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    narrow: bool = False,
) -> Tensor:
    """x (T, K) times weight (N, K) transposed: (T, N); no gradient.

    Args:
        sums: (N,) float32 from `fold`, with its weight: x is normalised first, with `eps`.
        residual: (T, N), added to the result before it is rounded.
        gated: GeGLU of the result, (T, N / 2): its first half is activated, the second multiplies.
        narrow: float16 sums over a step along K, which GeForce cards compute twice as fast; the
            steps add up in float32. Beyond 65504 they overflow.
    """
    run = _launch_linear if runs_plainly(x) else _linear_op
    return run(x, weight, sums, residual, eps, gated, narrow)


def fold(weight: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """weight (N, K) with the weight (K,) of the norm before it inside, and the sums of its rows.

    Rows are shifted to sum to 0, which changes no product with x less its mean: what is left of
    their sums, (N,) float32, is rounding, and little cancels. Made in float64, rounded once.
    """
    folded = weight.double() * norm.double()
    folded = (folded - folded.mean(1, keepdim=True)).to(weight.dtype)
    return folded, folded.double().sum(1).float()
