"""Attention alone, forward and backward, by every backend that runs on this device; self-check.

What is timed is one layer: RoPE and attention over packed q, k, v of the model's own shape, so that
a backend that turns q and k as it loads them is credited for it.
"""

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from modernbert import doctor, kernels
from modernbert.packing import pack

from .measure import describe, timed
from .peers import Setting
from .workloads import Workload, fixed, variable

PASSES = 7


def workloads(tokens: int) -> list[Workload]:
    """The paper's two kinds of short texts and its long ones, about `tokens` tokens each."""
    return [
        variable(256, 64, 512, max(tokens // 256, 1)),
        fixed(512, max(tokens // 512, 1)),
        fixed(8192, max(tokens // 8192, 1)),
    ]


def measure_attention(
    setting: Setting, jobs: list[Workload], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Seconds of one layer, by workload, kind of layer and backend."""
    names = [
        state.name
        for state in kernels.available_backends(setting.device, setting.dtype)
        if state.usable and state.name != "reference"
    ]
    rows = []
    for job in jobs:
        say(f"attention alone, {job.name}: {job.tokens} tokens, {', '.join(names)}")
        for kind, backend in [(k, b) for k in ("window", "full") for b in names]:
            row: dict[str, Any] = {"workload": job.name, "kind": kind, "backend": backend}
            row |= {"tokens": job.tokens, "forward": None, "both": None, "note": ""}
            try:
                row["forward"], row["both"] = _layer(setting, job, backend, kind == "window")
            except (RuntimeError, ValueError) as error:  # out of memory, or no such kernel here
                row["note"] = describe(error)
            rows.append(row)
    return rows


def _layer(setting: Setting, job: Workload, backend: str, local: bool) -> tuple[float, float]:
    """Median seconds of a forward pass, and of a forward and a backward pass."""
    config, device, dtype = setting.config, setting.device, setting.dtype
    batch = pack([[1] * length for length in job.lengths], device=device)
    shape = (job.tokens, 3, config.num_attention_heads, config.head_dim)
    qkv = torch.randn(shape, device=device, dtype=dtype)
    upstream = torch.randn(job.tokens, *shape[2:], device=device, dtype=dtype)
    angles = torch.rand(job.tokens, config.head_dim // 2, device=device)
    rotation = angles.cos(), angles.sin()
    plans = {}
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            plans[gradients] = kernels.plan_attention(
                batch.cu_seqlens,
                job.tokens,
                batch.lengths,
                window=config.sliding_window,
                dtype=dtype,
                backend=backend,
                head_size=config.head_dim,
            )

    def forward() -> None:
        with torch.no_grad():
            kernels.rotary_attention(qkv, rotation, plans[False], local=local)

    def both() -> None:
        leaf = qkv.detach().requires_grad_()
        out: Tensor = kernels.rotary_attention(leaf, rotation, plans[True], local=local)[0]
        out.backward(upstream)

    return _usual(forward, device), _usual(both, device)


def _usual(run: Callable[[], None], device: torch.device) -> float:
    run()  # compiles
    return median(timed(run, device, time.perf_counter) for _ in range(PASSES))


def self_check() -> Iterator[dict[str, Any]]:
    """What `modernbert doctor` checks: every backend's largest error against float64."""
    for check in doctor.self_check():
        yield {**vars(check), "passed": check.passed}


def attention_rows(report: dict[str, Any]) -> list[list[str]]:
    """The measurements as rows of a table; only a head when there are none."""
    rows = [
        ["attention alone", "layer", "backend", "forward, ms", "M tokens/s", "and backward, ms"]
    ]
    for found in report.get("attention", []):
        cells = [found["workload"], found["kind"], found["backend"]]
        if found["forward"] is None:
            rows.append([*cells, "", "", found["note"]])
            continue
        speed = found["tokens"] / found["forward"] / 1e6
        figures = [f"{1e3 * found['forward']:.3f}", f"{speed:.2f}", f"{1e3 * found['both']:.3f}"]
        rows.append([*cells, *figures])
    return rows


def failures(report: dict[str, Any]) -> list[str]:
    """Self-checks that did not pass, a line each."""
    return [
        f"{c['backend']} on {c['device']} in {c['dtype']}: {c['result']}, error {c['error']:.2e}, "
        f"allowed {c['bound']:.2e}"
        for c in report.get("self_check", [])
        if not c["passed"]
    ]
