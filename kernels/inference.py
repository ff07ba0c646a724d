"""The operations of `reference` for inference, without needless passes over memory.

They overwrite the tensor they are given, which must be the caller's own, and record no gradient.
Shapes as in `reference`.
"""

import torch
from torch import Tensor

from .reference import activate, wide


def rope_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rope` in the memory of x (T, ..., H, d)."""
    if x.dtype != wide(x.dtype):
        return _rounded_once(x, cos, sin)
    shape = (x.shape[0], *(1,) * (x.dim() - 2), cos.shape[-1])
    cos, sin = cos.view(shape).to(x.dtype), sin.view(shape).to(x.dtype)
    first, second = x.chunk(2, -1)
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)
    return x


def _rounded_once(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half precision turns in float32, a part of the tokens at a time."""
    for part, c, s in zip(x.split(1024), cos.split(1024), sin.split(1024), strict=True):
        part.copy_(rope_(part.float(), c, s))
    return x


def glu_(x: Tensor, activation: str = "gelu") -> Tensor:
    """`reference.glu`: (..., 2 I) to (..., I), a view of the first half of x."""
    first, gate = x.chunk(2, -1)
    if activation == "gelu":
        torch.ops.aten.gelu_(first)
        return first.mul_(gate)
    return first.copy_(activate(first, activation)).mul_(gate)
