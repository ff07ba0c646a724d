"""What the machine itself can do: matrix products per second, bytes copied per second."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .measure import timed

# Tokens, inputs, outputs: the shapes of the model's own linears, and a square one.
SHAPES = {
    "cpu": ((4096, 768, 2304), (4096, 768, 768), (2048, 2048, 2048)),
    "cuda": ((32768, 768, 2304), (32768, 1024, 5248), (8192, 8192, 8192)),
}
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes


@dataclass(frozen=True)
class Ceiling:
    """The best of several tries; `shape` is the matrix product it was reached with."""

    matmul_flops: float
    shape: tuple[int, int, int]
    copy_bytes: float


def measure_ceiling(dtype: torch.dtype, device: torch.device, seconds: float = 6.0) -> Ceiling:
    """Measure for about `seconds`: half of it matrix products, the rest copies."""
    shapes = SHAPES.get(device.type, SHAPES["cpu"])
    each = seconds / 2 / len(shapes)
    rates = {shape: _matmul(shape, dtype, device, each) for shape in shapes}
    shape = max(rates, key=lambda s: rates[s])
    return Ceiling(rates[shape], shape, _copy(device, seconds / 2))


def best(ceilings: list[Ceiling]) -> Ceiling:
    """The highest of each figure: a disturbed machine is slower, never faster."""
    top = max(ceilings, key=lambda c: c.matmul_flops)
    return Ceiling(top.matmul_flops, top.shape, max(c.copy_bytes for c in ceilings))


def _matmul(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, seconds: float
) -> float:
    rows, inner, columns = shape
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    weight = weight.t()
    fastest = _fastest(lambda: torch.mm(x, weight, out=out), device, seconds)
    return 2 * rows * inner * columns / fastest


def _copy(device: torch.device, seconds: float) -> float:
    size = COPIED.get(device.type, COPIED["cpu"])
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device, seconds)  # read and written


def _fastest(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    run()
    end = time.perf_counter() + seconds
    fastest = timed(run, device, time.perf_counter)
    while time.perf_counter() < end:
        fastest = min(fastest, timed(run, device, time.perf_counter))
    return fastest
