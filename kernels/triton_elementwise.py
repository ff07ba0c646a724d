"""Everything between the matrix products, fused in Triton: one pass over memory each.

Numbers are read and written once in their own dtype; arithmetic is float32. Every operation is a
`torch.library` operator with a backward, so that autograd and `torch.compile` see through it; the
kernels use no atomics, so that two runs agree to the last bit. Runs on sm_75 and newer, and on the
CPU in Triton's interpreter (`TRITON_INTERPRET=1`).

Shapes: T = packed tokens, B = sequences, D = hidden size, I = intermediate size, d = head size,
V = vocabulary, N = predicted tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import runs_plainly

ROWS = 4  # of a program, where rows are long
PARTS = 256  # programs that share the gradient of a norm's weight
CHUNK = 2**27  # logits that exist at a time


def _grid(rows: int, columns: int = 1) -> tuple[int, int]:
    return max(rows, 1), columns  # a grid of nothing is refused


# -- LayerNorm: of a sum, or of rows of a table -----------------------------------------------


@triton.jit
def _norm_forward(
    x_ptr,  # (T, D), or a table (V, D) with GATHER
    ids_ptr,  # (T,), rows of the table
    delta_ptr,  # (T, D), added to x first with ADD
    weight_ptr,  # (D,)
    sum_ptr,  # (T, D), receives x + delta with ADD
    out_ptr,  # (T, D)
    total,  # T
    vocabulary,  # V
    eps,
    ADD: tl.constexpr,
    GATHER: tl.constexpr,
    SIZE: tl.constexpr,  # D
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, D or more
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < total)[:, None] & (columns < SIZE)[None, :]
    at = rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
    if GATHER:
        ids = tl.load(ids_ptr + rows, mask=rows < total, other=0).to(tl.int64)
        known = (ids >= 0) & (ids < vocabulary)
        source = tl.where(known, ids, 0)[:, None] * SIZE + columns[None, :]
        x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(known[:, None], x, float("nan"))  # a bad id is seen, and reads no memory
    else:
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)  # what the backward pass will see
    mean = tl.sum(x, 1) / SIZE
    x = tl.where((columns < SIZE)[None, :], x - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / SIZE + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, x * scale[:, None] * weight[None, :], mask=inside)


@triton.jit
def _norm_backward(
    grad_out_ptr,  # (T, D)
    grad_sum_ptr,  # (T, D), what arrives at x + delta from elsewhere; with ADD
    x_ptr,  # (T, D) the sum, or a table (V, D) with GATHER
    ids_ptr,  # (T,)
    weight_ptr,  # (D,)
    grad_x_ptr,  # (T, D)
    grad_weight_ptr,  # (programs, D) float32, to be summed
    total,
    vocabulary,
    eps,
    ADD: tl.constexpr,
    GATHER: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(tl.program_id(0) * ROWS, total, tl.num_programs(0) * ROWS):
        rows = first + tl.arange(0, ROWS)
        inside = (rows < total)[:, None] & (columns < SIZE)[None, :]
        at = rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
        source = at
        if GATHER:
            ids = tl.load(ids_ptr + rows, mask=rows < total, other=0).to(tl.int64)
            known = (ids >= 0) & (ids < vocabulary)
            source = tl.where(known, ids, 0)[:, None] * SIZE + columns[None, :]
        x = tl.load(x_ptr + source, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / SIZE
        x = tl.where((columns < SIZE)[None, :], x - mean[:, None], 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(x * x, 1) / SIZE + eps)
        x = x * scale[:, None]
        grad = tl.load(grad_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad_weight += tl.sum(grad * x, 0)
        grad = grad * weight[None, :]
        along = tl.sum(grad * x, 1) / SIZE
        level = tl.sum(grad, 1) / SIZE
        grad = (grad - level[:, None] - x * along[:, None]) * scale[:, None]
        if ADD:
            grad += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + at, grad, mask=inside)
    part = grad_weight_ptr + tl.program_id(0).to(tl.int64) * SIZE + columns
    tl.store(part, grad_weight, mask=columns < SIZE)


def _launch_norm(
    x: Tensor, ids: Tensor | None, delta: Tensor | None, weight: Tensor, eps: float, padding: int
) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    size, total = x.shape[-1], len(x) if ids is None else len(ids)
    summed, out = _norm_outputs(x, ids, delta, weight)
    with torch.cuda.device_of(x):
        _norm_forward[_grid(triton.cdiv(total, ROWS))](
            x,
            x if ids is None else ids.contiguous(),
            x if delta is None else delta.contiguous(),
            weight,
            summed,
            out,
            total,
            len(x),
            eps,
            ADD=delta is not None,
            GATHER=ids is not None,
            SIZE=size,
            ROWS=ROWS,
            BLOCK=triton.next_power_of_2(size),
            num_warps=4,
        )
    return summed, out


_norm_op = torch.library.custom_op("modernbert::norm", _launch_norm, mutates_args=())


@_norm_op.register_fake
def _norm_outputs(
    x: Tensor,
    ids: Tensor | None,
    delta: Tensor | None,
    weight: Tensor,
    eps: float = 0.0,
    padding: int = -1,
) -> tuple[Tensor, Tensor]:
    """x + delta (nothing without a delta), and its norm."""
    total = x.shape[0] if ids is None else ids.shape[0]
    summed = x.new_empty(0)
    if delta is not None:
        dtype = torch.promote_types(x.dtype, delta.dtype)
        summed = torch.empty(x.shape, dtype=dtype, device=x.device)
    return summed, x.new_empty((total, x.shape[-1]))


@torch.library.custom_op("modernbert::norm_backward", mutates_args=())
def _norm_gradients(
    grad_sum: Tensor | None,
    grad_out: Tensor,
    x: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    size, total = x.shape[-1], len(grad_out)
    grad_x, grad_weight = _norm_gradient_outputs(grad_sum, grad_out, x, ids, weight)
    parts = min(max(triton.cdiv(total, ROWS), 1), PARTS)
    partial = torch.empty(parts, size, dtype=torch.float32, device=x.device)
    grad_out = grad_out.contiguous()
    with torch.cuda.device_of(x):
        _norm_backward[_grid(parts)](
            grad_out,
            grad_out if grad_sum is None else grad_sum.contiguous(),
            x.contiguous(),
            grad_out if ids is None else ids.contiguous(),
            weight.contiguous(),
            grad_x,
            partial,
            total,
            len(x),
            eps,
            ADD=grad_sum is not None,
            GATHER=ids is not None,
            SIZE=size,
            ROWS=ROWS,
            BLOCK=triton.next_power_of_2(size),
            num_warps=8,
        )
    return grad_x, grad_weight.copy_(partial.sum(0))


@_norm_gradients.register_fake
def _norm_gradient_outputs(
    grad_sum: Tensor | None,
    grad_out: Tensor,
    x: Tensor,
    ids: Tensor | None,
    weight: Tensor,
    eps: float = 0.0,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(grad_out.shape), torch.empty_like(weight)


def _norm_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ids, delta, weight, ctx.eps, ctx.padding = inputs
    ctx.added = delta is not None
    ctx.dtypes = x.dtype, delta.dtype if ctx.added else x.dtype
    ctx.save_for_backward(output[0] if ctx.added else x, ids, weight)


def _norm_autograd(ctx: Any, grad_sum: Tensor, grad_out: Tensor) -> tuple[Any, ...]:
    x, ids, weight = ctx.saved_tensors
    grad, grad_weight = _norm_gradients(
        grad_sum if ctx.added else None, grad_out, x, ids, weight, ctx.eps
    )
    grad_x = grad.to(ctx.dtypes[0])
    if ids is not None:
        grad_x = torch.ops.aten.embedding_dense_backward(
            grad_x, ids, x.shape[0], ctx.padding, False
        )
    return grad_x, None, grad.to(ctx.dtypes[1]) if ctx.added else None, grad_weight, None, None


_norm_op.register_autograd(_norm_autograd, setup_context=_norm_context)


def _norm(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return (_launch_norm if runs_plainly(x) else _norm_op)(x, *others)


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """LayerNorm without bias of each row of x (T, D)."""
    return _norm(x, None, None, weight, eps, -1)[1]


def add_layer_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, (T, D), and its LayerNorm without bias."""
    return _norm(x, None, delta, weight, eps, -1)


def embed_norm(
    ids: Tensor, table: Tensor, weight: Tensor, eps: float, padding: int | None = None
) -> Tensor:
    """LayerNorm without bias of the rows `ids` (T,) of a table (V, D): (T, D).

    An id outside the table gives NaN. The row `padding` has no gradient.
    """
    return _norm(table, ids, None, weight, eps, -1 if padding is None else padding)[1]


# -- GeGLU ------------------------------------------------------------------------------------


@triton.jit
def _geglu_forward(
    x_ptr,  # (T, 2 I)
    out_ptr,  # (T, I)
    total,
    SIZE: tl.constexpr,  # I
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < total)[:, None] & (columns < SIZE)[None, :]
    row = rows.to(tl.int64)[:, None] * SIZE
    x = tl.load(x_ptr + 2 * row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + 2 * row + SIZE + columns[None, :], mask=inside, other=0.0)
    below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    tl.store(out_ptr + row + columns[None, :], x * below * gate.to(tl.float32), mask=inside)


@triton.jit
def _geglu_backward(
    grad_ptr,  # (T, I)
    x_ptr,  # (T, 2 I)
    grad_x_ptr,  # (T, 2 I)
    total,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < total)[:, None] & (columns < SIZE)[None, :]
    row = rows.to(tl.int64)[:, None] * SIZE
    first = 2 * row + columns[None, :]
    x = tl.load(x_ptr + first, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + first + SIZE, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    below = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    slope = below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    tl.store(grad_x_ptr + first, grad * gate * slope, mask=inside)
    tl.store(grad_x_ptr + first + SIZE, grad * x * below, mask=inside)


def _geglu_grid(total: int, size: int) -> tuple[tuple[int, int], dict[str, int]]:
    """128 divides every published intermediate size but one."""
    rows, block = 8, 128
    grid = _grid(triton.cdiv(total, rows), triton.cdiv(size, block))
    return grid, {"SIZE": size, "ROWS": rows, "BLOCK": block, "num_warps": 4}


def _launch_geglu(x: Tensor) -> Tensor:
    x = x.contiguous()
    out = _geglu_output(x)
    grid, options = _geglu_grid(*out.shape)
    with torch.cuda.device_of(x):
        _geglu_forward[grid](x, out, len(x), **options)
    return out


_geglu_op = torch.library.custom_op("modernbert::geglu", _launch_geglu, mutates_args=())


@_geglu_op.register_fake
def _geglu_output(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1] // 2))


@torch.library.custom_op("modernbert::geglu_backward", mutates_args=())
def _geglu_gradient(grad: Tensor, x: Tensor) -> Tensor:
    x = x.contiguous()
    grad_x = torch.empty_like(x)
    grid, options = _geglu_grid(*grad.shape)
    with torch.cuda.device_of(x):
        _geglu_backward[grid](grad.contiguous(), x, grad_x, len(x), **options)
    return grad_x


@_geglu_gradient.register_fake
def _(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _geglu_autograd(ctx: Any, grad: Tensor) -> Tensor:
    return _geglu_gradient(grad, *ctx.saved_tensors)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


_geglu_op.register_autograd(_geglu_autograd, setup_context=_keep_inputs)


def geglu(x: Tensor) -> Tensor:
    """gelu(a) * b of x = [a, b], (T, 2 I) to (T, I); gelu is the exact erf form."""
    return (_launch_geglu if runs_plainly(x) else _geglu_op)(x)


# -- RoPE -------------------------------------------------------------------------------------


@triton.jit
def _rope_kernel(
    x_ptr,  # (T, vectors, d)
    cos_ptr,  # (T, d / 2)
    sin_ptr,  # (T, d / 2)
    out_ptr,  # (T, vectors, d); may be x
    total,
    x_stride,  # from token to token
    out_stride,
    vectors,
    BACK: tl.constexpr,  # turn by the negative angle
    HALF: tl.constexpr,  # d / 2
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pairs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # pair i of vector v is v * HALF + i
    inside = (rows < total)[:, None] & (pairs < vectors * HALF)[None, :]
    place = (pairs // HALF * (2 * HALF) + pairs % HALF)[None, :]
    row = rows.to(tl.int64)[:, None]
    first = tl.load(x_ptr + row * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + row * x_stride + HALF + place, mask=inside, other=0.0)
    second = second.to(tl.float32)
    angle = row * HALF + (pairs % HALF)[None, :]
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    out = out_ptr + row * out_stride + place
    tl.store(out, first * cos - second * sin, mask=inside)
    tl.store(out + HALF, second * cos + first * sin, mask=inside)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, back: bool) -> None:
    """x and out are (T, ..., d), each token's vectors in one piece."""
    half = cos.shape[-1]
    vectors = x[0].numel() // (2 * half) if len(x) else 0
    rows, block = 4, 256
    with torch.cuda.device_of(x):
        _rope_kernel[_grid(triton.cdiv(len(x), rows), max(triton.cdiv(vectors * half, block), 1))](
            x,
            cos.contiguous(),
            sin.contiguous(),
            out,
            len(x),
            x.stride(0),
            out.stride(0),
            vectors,
            BACK=back,
            HALF=half,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
        )


def _one_piece(x: Tensor) -> bool:
    """Whether each token's vectors lie one after another, whatever lies between tokens."""
    return x[:1].is_contiguous()


def _launch_rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    assert _one_piece(x)
    _turn(x, cos, sin, x, back=False)


_rope_op_ = torch.library.custom_op("modernbert::rope_", _launch_rope_, mutates_args=("x",))


@_rope_op_.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate x (T, ..., d) in place by the angles of cos and sin (T, d / 2); no gradient.

    x may be the first two of packed q, k, v: `qkv[:, :2]`.
    """
    (_launch_rope_ if runs_plainly(x) else _rope_op_)(x, cos, sin)


@torch.library.custom_op("modernbert::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x = x if _one_piece(x) else x.contiguous()
    out = x.new_empty(x.shape)
    _turn(x, cos, sin, out, back)
    return out


@_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rope_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.back = inputs[3]


def _rope_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return _rope(grad, *ctx.saved_tensors, not ctx.back), None, None, None


_rope.register_autograd(_rope_autograd, setup_context=_rope_context)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (T, ..., d) rotated by the angles of cos and sin (T, d / 2)."""
    return _rope(x, cos, sin, False)


# -- mean of each sequence, scaled to length 1 ------------------------------------------------


@triton.jit
def _pool_forward(
    x_ptr,  # (T, D)
    starts_ptr,  # (B + 1,)
    left_out_ptr,  # (T,) uint8, tokens that do not count; with SOME
    out_ptr,  # (B, D) float32
    facts_ptr,  # (B, 2) float32: tokens that count, length of their mean
    SOME: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    text = tl.program_id(0)
    start = tl.load(starts_ptr + text)
    end = tl.load(starts_ptr + text + 1)
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    count = 0.0
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        counts = rows < end
        if SOME:
            counts = counts & (tl.load(left_out_ptr + rows, mask=counts, other=1) == 0)
        at = rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
        mask = counts[:, None] & (columns < SIZE)[None, :]
        total += tl.sum(tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32), 0)
        count += tl.sum(counts.to(tl.float32), 0)
    mean = total / tl.maximum(count, 1.0)
    length = tl.sqrt(tl.sum(mean * mean, 0))
    if NORMALIZE:
        mean = mean / tl.maximum(length, 1e-12)
    tl.store(out_ptr + text.to(tl.int64) * SIZE + columns, mean, mask=columns < SIZE)
    tl.store(facts_ptr + 2 * text, count)
    tl.store(facts_ptr + 2 * text + 1, length)


@triton.jit
def _pool_backward(
    grad_ptr,  # (B, D) float32
    out_ptr,  # (B, D) float32
    facts_ptr,  # (B, 2) float32
    starts_ptr,  # (B + 1,)
    left_out_ptr,  # (T,) uint8
    grad_x_ptr,  # (T, D)
    SOME: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    text = tl.program_id(0)
    start = tl.load(starts_ptr + text)
    end = tl.load(starts_ptr + text + 1)
    columns = tl.arange(0, BLOCK)
    here = text.to(tl.int64) * SIZE + columns
    grad = tl.load(grad_ptr + here, mask=columns < SIZE, other=0.0)
    if NORMALIZE:
        length = tl.load(facts_ptr + 2 * text + 1)
        out = tl.load(out_ptr + here, mask=columns < SIZE, other=0.0)
        along = tl.where(length > 1e-12, tl.sum(grad * out, 0), 0.0)
        grad = (grad - out * along) / tl.maximum(length, 1e-12)
    grad = grad / tl.maximum(tl.load(facts_ptr + 2 * text), 1.0)
    for first in range(start, end, ROWS):
        rows = first + tl.arange(0, ROWS)
        counts = rows < end
        if SOME:
            counts = counts & (tl.load(left_out_ptr + rows, mask=counts, other=1) == 0)
        at = rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
        mask = (rows < end)[:, None] & (columns < SIZE)[None, :]
        tl.store(grad_x_ptr + at, tl.where(counts[:, None], grad[None, :], 0.0), mask=mask)


def _pool_options(size: int, left_out: Tensor | None, normalize: bool) -> dict[str, Any]:
    return {
        "SOME": left_out is not None,
        "NORMALIZE": normalize,
        "SIZE": size,
        "ROWS": 8,
        "BLOCK": triton.next_power_of_2(size),
        "num_warps": 8,
    }


@torch.library.custom_op("modernbert::mean_pool", mutates_args=())
def _pool(
    x: Tensor, cu_seqlens: Tensor, left_out: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    out, facts = _pool_outputs(x, cu_seqlens, left_out, normalize)
    if len(out):
        with torch.cuda.device_of(x):
            _pool_forward[_grid(len(out))](
                x,
                cu_seqlens.contiguous(),
                x if left_out is None else left_out.contiguous().view(torch.uint8),
                out,
                facts,
                **_pool_options(x.shape[1], left_out, normalize),
            )
    return out, facts


@_pool.register_fake
def _pool_outputs(
    x: Tensor, cu_seqlens: Tensor, left_out: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor]:
    texts = cu_seqlens.shape[0] - 1
    out = torch.empty((texts, x.shape[1]), dtype=torch.float32, device=x.device)
    return out, out.new_empty((texts, 2))


@torch.library.custom_op("modernbert::mean_pool_backward", mutates_args=())
def _pool_gradient(
    grad: Tensor,
    out: Tensor,
    facts: Tensor,
    cu_seqlens: Tensor,
    left_out: Tensor | None,
    normalize: bool,
    total: int,
    dtype: torch.dtype,
) -> Tensor:
    grad_x = torch.empty((total, out.shape[1]), dtype=dtype, device=out.device)
    if len(out):
        with torch.cuda.device_of(out):
            _pool_backward[_grid(len(out))](
                grad.contiguous(),
                out,
                facts,
                cu_seqlens.contiguous(),
                out if left_out is None else left_out.contiguous().view(torch.uint8),
                grad_x,
                **_pool_options(out.shape[1], left_out, normalize),
            )
    return grad_x


@_pool_gradient.register_fake
def _(
    grad: Tensor,
    out: Tensor,
    facts: Tensor,
    cu_seqlens: Tensor,
    left_out: Tensor | None,
    normalize: bool,
    total: int,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty((total, out.shape[1]), dtype=dtype, device=out.device)


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, cu_seqlens, left_out, ctx.normalize = inputs
    ctx.total, ctx.dtype = x.shape[0], x.dtype
    ctx.save_for_backward(*output, cu_seqlens, left_out)


def _pool_autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
    saved = (*ctx.saved_tensors, ctx.normalize, ctx.total, ctx.dtype)
    return _pool_gradient(grad, *saved), None, None, None


_pool.register_autograd(_pool_autograd, setup_context=_pool_context)


def mean_pool(
    x: Tensor, cu_seqlens: Tensor, left_out: Tensor | None = None, *, normalize: bool = False
) -> Tensor:
    """Mean of each sequence's tokens, (T, D) to (B, D) float32, scaled to length 1 if asked.

    `left_out` (T,) bool marks tokens that do not count; a sequence without any gives zeros.
    """
    return _pool(x, cu_seqlens, left_out, normalize)[0]


# -- cross-entropy of a linear layer, without all of its logits -------------------------------


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (rows, V), overwritten by its gradient with GRADIENT
    labels_ptr,  # (rows,)
    loss_ptr,  # (rows,) float32
    right_ptr,  # (rows,) int32: 1 where no logit is above the label's
    ignored,
    SIZE: tl.constexpr,  # V
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    counts = label != ignored
    columns = tl.arange(0, BLOCK)
    line = logits_ptr + row * SIZE
    highest = float("-inf")
    total = 0.0
    for first in range(0, SIZE, BLOCK):
        inside = first + columns < SIZE
        x = tl.load(line + first + columns, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(x - higher), 0)
        highest = higher
    known = (label >= 0) & (label < SIZE)
    wanted = tl.load(line + tl.where(known, label, 0)).to(tl.float32)
    wanted = tl.where(known, wanted, float("nan"))  # a bad label is seen, and reads no memory
    loss = tl.log(total) - (wanted - highest)
    tl.store(loss_ptr + row, tl.where(counts, loss, 0.0))
    tl.store(right_ptr + row, (counts & (wanted >= highest)).to(tl.int32))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read its logits
        for first in range(0, SIZE, BLOCK):
            inside = first + columns < SIZE
            x = tl.load(line + first + columns, mask=inside, other=0.0).to(tl.float32)
            share = tl.exp(x - highest) / total
            share = tl.where(first + columns == label, share - 1.0, share)
            tl.store(line + first + columns, tl.where(counts, share, 0.0), mask=inside)


def _chunk_rows(vocabulary: int) -> int:
    return max(CHUNK // vocabulary, 1)


@torch.library.custom_op("modernbert::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignored: int,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, right predictions, and the gradients of x, weight and bias, all in float32."""
    loss, right, grad_x, grad_weight, grad_bias = _linear_cross_entropy_outputs(
        x, weight, bias, labels, ignored, gradients
    )
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    rights = torch.empty(len(x), dtype=torch.int32, device=x.device)
    grad_weight.zero_(), grad_bias.zero_()
    rows = _chunk_rows(len(weight))
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        logits = torch.nn.functional.linear(x[part], weight, bias)  # (rows, V)
        with torch.cuda.device_of(x):
            _cross_entropy_kernel[_grid(len(logits))](
                logits,
                labels[part],
                losses[part],
                rights[part],
                ignored,
                SIZE=len(weight),
                GRADIENT=gradients,
                BLOCK=min(triton.next_power_of_2(len(weight)), 4096),
                num_warps=8,
            )
        if gradients:
            grad_x[part] = logits @ weight
            grad_weight += logits.mT @ x[part]
            if bias is not None:
                grad_bias += logits.sum(0, dtype=torch.float32)
    return loss.copy_(losses.sum()), right.copy_(rights.sum()), grad_x, grad_weight, grad_bias


@_linear_cross_entropy.register_fake
def _linear_cross_entropy_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignored: int,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    shapes = [t.shape if gradients and t is not None else (0,) for t in (x, weight, bias)]
    grad_x, grad_weight, grad_bias = (loss.new_empty(shape) for shape in shapes)
    return loss, torch.empty_like(loss, dtype=torch.int64), grad_x, grad_weight, grad_bias


def _cross_entropy_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]
    ctx.save_for_backward(*output[2:])


def _cross_entropy_autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    gradients = [
        None if dtype is None else (x * grad).to(dtype)
        for x, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    ]
    return *gradients, None, None, None


_linear_cross_entropy.register_autograd(
    _cross_entropy_autograd, setup_context=_cross_entropy_context
)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy of the logits x weight^T + bias, and how many predictions are right.

    x is (N, D), weight (V, D), labels (N,) int64; rows labelled `ignored` do not count. Of the
    logits, (N, V), a part exists at a time; the gradients are made on the way, while they are
    there. The loss is float32. Source: Hsu et al. 2024, Liger Kernel, section 3.2.
    """
    tensors = [x, weight] if bias is None else [x, weight, bias]
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    found = _linear_cross_entropy(x, weight, bias, labels.contiguous(), ignored, gradients)
    return found[0], found[1]
