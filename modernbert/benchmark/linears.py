"""The linear layers of a block alone: ours with all around them, cuBLAS with passes, cuBLAS bare.

The last computes less, the product only: it is the ceiling. Where our kernels do not run there is
nothing to compare, and no rows.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from modernbert import kernels
from modernbert.config import ModernBertConfig
from modernbert.doctor import Check
from modernbert.kernels import dispatch

from .measure import timed
from .peers import Setting

PASSES = 7
CHECKED = 300  # tokens
EPS = 1e-5


@dataclass(frozen=True)
class Linear:
    """One linear layer: with its norm, or with the residual that it is added to."""

    name: str
    inputs: int
    outputs: int
    norm: bool = False
    gated: bool = False


@dataclass(frozen=True)
class Operands:
    """x (T, inputs), weight (outputs, inputs), and norm (inputs,) or residual (T, outputs)."""

    x: Tensor
    weight: Tensor
    norm: Tensor | None
    residual: Tensor | None


def linears(config: ModernBertConfig) -> list[Linear]:
    """Those of a block, in order."""
    size, inner = config.hidden_size, config.intermediate_size
    return [
        Linear("norm, Wqkv", size, 3 * size, norm=True),
        Linear("Wo, residual", size, size),
        Linear("norm, Wi, GeGLU", size, 2 * inner, norm=True, gated=True),
        Linear("MLP Wo, residual", inner, size),
    ]


def runs(setting: Setting) -> bool:
    """Whether our linear layers run on the setting's device in its dtype."""
    device, dtype = setting.device, setting.dtype
    obstacle = dispatch.obstacle_to("triton", device.type, device.index, dtype)
    return not obstacle and dtype in dispatch.HALVES


def measure_linears(setting: Setting, tokens: int) -> list[dict[str, Any]]:
    """Seconds of each linear layer, by way."""
    rows = []
    for linear in linears(setting.config) if runs(setting) else []:
        given = _draw(linear, tokens, setting)
        ours = _prepared(linear, given)
        ways = {
            "ours": ours,
            "cublas_and_passes": lambda: _apart(linear, given),  # noqa: B023
            "cublas_bare": lambda: F.linear(given.x, given.weight),  # noqa: B023
        }
        row: dict[str, Any] = {"linear": linear.name, "tokens": tokens}
        row["flops"] = 2 * tokens * linear.inputs * linear.outputs
        with torch.inference_mode():
            for way, run in ways.items():
                run()  # compiles
                times = (timed(run, setting.device, time.perf_counter) for _ in range(PASSES))
                row[way] = median(times)
        rows.append(row)
    return rows


def self_check(setting: Setting) -> Iterator[dict[str, Any]]:
    """Each of ours against float64, as `doctor` checks attention."""
    where = "fused linears", str(setting.device), str(setting.dtype).removeprefix("torch.")
    for linear in linears(setting.config) if runs(setting) else []:
        given = _draw(linear, CHECKED, setting)
        wide = (None if t is None else t.double() for t in vars(given).values())
        with torch.inference_mode():
            exact = _apart(linear, Operands(*wide))  # type: ignore[arg-type]
            plain, ours = _apart(linear, given), _prepared(linear, given)()
        errors = [(found.double() - exact).abs().max().item() for found in (ours, plain)]
        rounding = exact.abs().max().item() * torch.finfo(setting.dtype).eps / 2
        check = Check(*where, linear.name, errors[0], 2 * errors[1] + rounding)
        yield {**vars(check), "passed": check.passed}


def linear_rows(report: dict[str, Any]) -> list[list[str]]:
    """The measurements as rows of a table; only a head when there are none."""
    head = ["linear layer alone", "tokens", "ours, ms", "TFLOP/s", "cuBLAS and passes, ms"]
    rows = [[*head, "cuBLAS alone, ms"]]
    for found in report.get("linears", []):
        rate = found["flops"] / found["ours"] / 1e12
        cells = [found["linear"], str(found["tokens"]), f"{1e3 * found['ours']:.3f}", f"{rate:.1f}"]
        others = (f"{1e3 * found[way]:.3f}" for way in ("cublas_and_passes", "cublas_bare"))
        rows.append([*cells, *others])
    return rows


def _draw(linear: Linear, tokens: int, setting: Setting) -> Operands:
    """Unit-scale numbers, the same each time."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
        x = torch.randn(shape, generator=generator) * scale + shift
        return x.to(setting.device, setting.dtype)

    return Operands(
        draw(tokens, linear.inputs, shift=1.0),
        draw(linear.outputs, linear.inputs, scale=linear.inputs**-0.5),
        draw(linear.inputs, scale=0.3, shift=1.0) if linear.norm else None,
        None if linear.norm else draw(tokens, linear.outputs),
    )


def _apart(linear: Linear, given: Operands) -> Tensor:
    x = given.x if given.norm is None else kernels.layer_norm(given.x, given.norm, None, EPS)
    y = F.linear(x, given.weight)
    y = kernels.glu(y) if linear.gated else y
    return y if given.residual is None else given.residual + y


def _prepared(linear: Linear, given: Operands) -> Any:
    """Ours as a function, its weight folded."""
    from modernbert.kernels import triton_gemm

    weight, sums = given.weight, None
    if given.norm is not None:
        weight, sums = triton_gemm.fold(weight, given.norm)
    return lambda: triton_gemm.linear(
        given.x, weight, sums=sums, residual=given.residual, eps=EPS, gated=linear.gated
    )
