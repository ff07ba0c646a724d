"""What goes around a product of 8-bit codes, one pass over memory each; inference only.

What `reference` computes. Runs on sm_75 and newer (fp8 codes: sm_89), and on the CPU in
Triton's interpreter.

Shapes: T = packed tokens, D = size of a row, N = columns of a product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import LARGEST, SMALLEST

ROUNDS = 12582912.0  # 1.5 * 2^23: float32 has no fractions there, adding it rounds half to even


@triton.jit
def _quantize_kernel(
    x_ptr,  # (T, D)
    codes_ptr,  # (T, D)
    scales_ptr,  # (T,) float32
    stride,  # from row to row of x
    largest,
    smallest,
    rounds,
    INTEGER: tl.constexpr,
    SIZE: tl.constexpr,  # D
    BLOCK: tl.constexpr,  # a power of two, D or more
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < SIZE
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    # 8 bits hold no NaN, and a maximum passes over it: it goes into the scale of the row.
    broken = (x != x) | (tl.abs(x) == float("inf"))
    x = tl.where(broken, 0.0, x)
    scale = tl.math.div_rn(tl.maximum(tl.max(tl.abs(x), 0), smallest), largest)
    codes = tl.math.div_rn(x, scale + tl.zeros((BLOCK,), dtype=tl.float32))
    scale = tl.where(tl.max(broken.to(tl.int32), 0) > 0, float("nan"), scale)
    if INTEGER:
        codes = (codes + rounds) - rounds
    tl.store(codes_ptr + row * SIZE + columns, codes.to(codes_ptr.dtype.element_ty), mask=inside)
    tl.store(scales_ptr + row, scale)


@triton.jit
def _rescale_kernel(
    sums_ptr,  # (T, N) int32 or float32
    rows_ptr,  # (T,) float32
    columns_ptr,  # (N,) float32
    out_ptr,  # (T, N)
    total,  # T
    SIZE: tl.constexpr,  # N
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < total)[:, None] & (columns < SIZE)[None, :]
    at = rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
    y = tl.load(sums_ptr + at, mask=inside, other=0).to(tl.float32)
    y *= tl.load(rows_ptr + rows, mask=rows < total, other=0.0)[:, None]
    y *= tl.load(columns_ptr + columns, mask=columns < SIZE, other=0.0)[None, :]
    tl.store(out_ptr + at, y, mask=inside)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`reference.quantize_rows` of x (T, D)."""
    total, size = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty((total, 1), dtype=torch.float32, device=x.device)
    if total:
        with torch.cuda.device_of(x):
            _quantize_kernel[(total,)](
                x,
                codes,
                scales,
                x.stride(0),
                LARGEST[dtype],
                SMALLEST,
                ROUNDS,
                INTEGER=dtype == torch.int8,
                SIZE=size,
                BLOCK=triton.next_power_of_2(size),
                num_warps=4,
            )
    return codes, scales


def rescale(sums: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.rescale` of sums (T, N)."""
    total, size = sums.shape
    out = torch.empty(sums.shape, dtype=dtype, device=sums.device)
    grid = triton.cdiv(total, 4), triton.cdiv(size, 256)
    if total:
        with torch.cuda.device_of(sums):
            _rescale_kernel[grid](
                sums.contiguous(), rows, columns, out, total, SIZE=size, ROWS=4, BLOCK=256
            )
    return out
