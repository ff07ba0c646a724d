"""Compile every Triton kernel for GPUs that are not here, and show what each of them needs.

    python benchmarks/aot.py                          # all of them, some minutes; writes results/
    python benchmarks/aot.py --arch 90 --dtype bfloat16 --only attention --no-file

The library's own functions are called on small CPU tensors; where they would launch a kernel, it is
compiled for the target instead, with the very arguments of the launch. So what is checked is what
ships: that it compiles, that its shared memory is within the architecture's limit, that products
run on tensor cores, and that registers do not spill beyond a bound. Exit code 1 otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does today, without a warning

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from modernbert.kernels import (  # noqa: E402
    triton_attention,
    triton_elementwise,
    triton_gemm,
    triton_quantize,
)

# Shared memory that a block (on sm_75: a multiprocessor) has, in KiB.
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227}
SPILLED = 0  # bytes a thread may spill to memory
LENGTHS, WINDOW, HEADS, SIZE, VOCABULARY = (130, 33), 64, 12, 64, 50_368
HIDDEN, INTERMEDIATE = 768, 1152
MANY = 4096  # tokens of a linear layer with large tiles
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Compiled:
    """One kernel as launched for one target.

    `products` counts tensor-core instructions in the PTX; `failure` says what is wrong.
    """

    case: str
    kernel: str
    arch: int
    dtype: str
    shared: int
    registers: int
    spilled: int
    products: int
    warps: int
    stages: int
    failure: str


@contextmanager
def instead_of_launching(arch: int, found: list[tuple[str, Any]]) -> Iterator[None]:
    """Every launch compiles for `arch` and is noted in `found`; nothing runs."""
    elsewhere = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: arch,  # Triton keeps compiled kernels by device
        get_current_stream=lambda device: 0,
    )
    run, active = JITFunction.run, triton.runtime.driver._active
    os.environ["MODERNBERT_PRETEND"] = f"sm_{arch}"

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((self.fn.__name__, kernel))
        return kernel

    JITFunction.run = compiled
    triton.runtime.driver.set_active(elsewhere)
    try:
        yield
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active
        del os.environ["MODERNBERT_PRETEND"]


# -- what is launched -------------------------------------------------------------------------


def _leaf(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _norm(dtype: torch.dtype) -> None:
    x, delta, weight = (_leaf(*s, dtype=dtype) for s in ((64, HIDDEN), (64, HIDDEN), (HIDDEN,)))
    triton_elementwise.layer_norm(x, weight, 1e-5).sum().backward()
    total, out = triton_elementwise.add_layer_norm(x, delta, weight, 1e-5)
    (total + out).sum().backward()


def _embed(dtype: torch.dtype) -> None:
    table, weight = _leaf(100, HIDDEN, dtype=dtype), _leaf(HIDDEN, dtype=dtype)
    ids = torch.zeros(64, dtype=torch.int64)
    triton_elementwise.embed_norm(ids, table, weight, 1e-5, 0).sum().backward()


def _geglu(dtype: torch.dtype) -> None:
    triton_elementwise.geglu(_leaf(64, 2 * INTERMEDIATE, dtype=dtype)).sum().backward()


def _rope(dtype: torch.dtype) -> None:
    qkv, angles = _leaf(64, 3, HEADS, SIZE, dtype=dtype), torch.zeros(64, SIZE // 2)
    triton_elementwise.rope(qkv[:, :2], angles, angles).sum().backward()
    triton_elementwise.rope_(qkv.detach()[:, :2], angles, angles)


def _pool(dtype: torch.dtype) -> None:
    x, some = _leaf(sum(LENGTHS), HIDDEN, dtype=dtype), torch.zeros(sum(LENGTHS), dtype=torch.bool)
    triton_elementwise.mean_pool(x, _starts()).sum().backward()
    triton_elementwise.mean_pool(x, _starts(), some, normalize=True).sum().backward()


def _loss(dtype: torch.dtype) -> None:
    x, weight = _leaf(4, 16, dtype=dtype), _leaf(VOCABULARY, 16, dtype=dtype)
    labels = torch.zeros(4, dtype=torch.int64)
    triton_elementwise.linear_cross_entropy(x, weight, None, labels)[0].backward()


def _quantize(dtype: torch.dtype, codes: torch.dtype) -> None:
    triton_quantize.quantize_rows(torch.zeros(64, HIDDEN, dtype=dtype), codes)
    sums = torch.zeros(64, HIDDEN, dtype=torch.int32 if codes == torch.int8 else torch.float32)
    triton_quantize.rescale(sums, torch.zeros(64, 1), torch.zeros(1, HIDDEN), dtype)


def _attention(
    dtype: torch.dtype, *, local: bool, rope: bool = True, some: bool = False, train: bool = True
) -> None:
    total = sum(LENGTHS)
    keys = torch.ones(total, dtype=torch.bool) if some else None
    plan = triton_attention.plan(_starts(), total, LENGTHS, WINDOW, keys)
    qkv, angles = _leaf(total, 3, HEADS, SIZE, dtype=dtype), torch.zeros(total, SIZE // 2)
    rotation = (angles, angles) if rope else (None, None)
    if train:
        triton_attention.attention(qkv, *rotation, plan, local=local).sum().backward()
    else:
        triton_attention.attention(qkv.detach(), *rotation, plan, local=local)


def _linear(
    dtype: torch.dtype,
    inputs: int,
    outputs: int,
    *,
    tokens: int = MANY,
    norm: bool = False,
    add: bool = False,
    gated: bool = False,
    narrow: bool = False,
) -> None:
    x, weight = torch.zeros(tokens, inputs, dtype=dtype), torch.zeros(outputs, inputs, dtype=dtype)
    sums = torch.zeros(outputs) if norm else None
    residual = torch.zeros(tokens, outputs, dtype=dtype) if add else None
    triton_gemm.linear(
        x, weight, sums=sums, residual=residual, eps=1e-5, gated=gated, narrow=narrow
    )


def _starts() -> Tensor:
    return torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)


CASES: dict[str, Callable[[torch.dtype], None]] = {
    "norm": _norm,
    "embed": _embed,
    "geglu": _geglu,
    "rope": _rope,
    "pool": _pool,
    "loss": _loss,
    "quantize, int8": lambda dtype: _quantize(dtype, torch.int8),
    "quantize, fp8": lambda dtype: _quantize(dtype, torch.float8_e4m3fn),
    "attention, window": lambda dtype: _attention(dtype, local=True, train=False),
    "attention, full": lambda dtype: _attention(dtype, local=False, train=False),
    "attention, full, turned before": lambda dtype: _attention(
        dtype, local=False, rope=False, train=False
    ),
    "attention, window, training": lambda dtype: _attention(dtype, local=True),
    "attention, full, training": lambda dtype: _attention(dtype, local=False),
    "attention, window, query-only": lambda dtype: _attention(
        dtype, local=True, some=True, train=False
    ),
    "linear, norm": lambda dtype: _linear(dtype, HIDDEN, 3 * HIDDEN, norm=True),
    "linear, norm and gate": lambda dtype: _linear(
        dtype, HIDDEN, 2 * INTERMEDIATE, norm=True, gated=True
    ),
    "linear, residual": lambda dtype: _linear(dtype, INTERMEDIATE, HIDDEN, add=True),
    "linear, norm and gate, few tokens": lambda dtype: _linear(
        dtype, HIDDEN, 2 * INTERMEDIATE, tokens=64, norm=True, gated=True
    ),
    "linear, residual, few tokens": lambda dtype: _linear(
        dtype, INTERMEDIATE, HIDDEN, tokens=64, add=True
    ),
    "linear, narrow": lambda dtype: _linear(
        dtype, HIDDEN, 2 * INTERMEDIATE, norm=True, gated=True, narrow=True
    ),
}
PRODUCTS = ("attention", "linear")  # cases that need tensor cores


# -- what is found out ------------------------------------------------------------------------


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: what did not fit into registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = [word for line in text.splitlines() if "REG:" in line for word in line.split()]
    values = dict(word.split(":", 1) for word in words if ":" in word)
    return int(values["REG"]), int(values["STACK"]) + int(values["LOCAL"])


def products(ptx: str) -> int:
    """Tensor-core instructions."""
    names = ("mma.sync", "wgmma.mma_async")
    return sum(any(name in line for name in names) for line in ptx.splitlines())


def compile_case(case: str, arch: int, dtype: str) -> list[Compiled]:
    """Every kernel that the case launches."""
    found: list[tuple[str, Any]] = []
    failure = ""
    with instead_of_launching(arch, found):
        try:
            CASES[case](DTYPES[dtype])
        except (RuntimeError, triton.CompilationError) as error:
            failure = f"does not compile: {error}"
    rows = {}
    for name, kernel in found:
        registers, spilled = resources(kernel.asm["cubin"])
        count, shared = products(kernel.asm["ptx"]), kernel.metadata.shared
        problem = ""
        if shared > SHARED[arch] * 1024:
            problem = f"{shared} bytes of shared memory, {SHARED[arch]} KiB is the limit"
        elif spilled > SPILLED:
            problem = f"spills {spilled} bytes, {SPILLED} are allowed"
        elif case.startswith(PRODUCTS) and not count:
            problem = "uses no tensor cores"
        warps, stages = kernel.metadata.num_warps, kernel.metadata.num_stages
        rows[kernel.hash] = Compiled(
            case, name, arch, dtype, shared, registers, spilled, count, warps, stages, problem
        )
    if failure or not rows:
        failure = failure or "launched nothing"
        return [*rows.values(), Compiled(case, "-", arch, dtype, 0, 0, 0, 0, 0, 0, failure)]
    return list(rows.values())


def targets(
    archs: list[int], dtypes: list[str], cases: list[str]
) -> Iterator[tuple[str, int, str]]:
    """Every combination that can run.

    sm_75 has no bfloat16, products need tensor cores, fp8 is converted from sm_89 on, and a narrow
    sum is one of float16 products.
    """
    for arch in archs:
        for dtype in dtypes:
            for case in cases:
                if arch < 80 and (dtype == "bfloat16" or case.startswith(PRODUCTS)):
                    continue
                if arch < 89 and case.endswith("fp8"):
                    continue
                if dtype == "bfloat16" and case.endswith("narrow"):
                    continue
                yield case, arch, dtype


def line(row: Compiled) -> str:
    what = f"sm_{row.arch} {row.dtype:8} {row.case:34} {row.kernel:18}"
    needs = f"{row.shared:7} {row.registers:5} {row.spilled:5} {row.products:5}"
    return f"{what} {needs} {row.warps:5} {row.stages:6}  {row.failure or 'ok'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED, default=list(SHARED))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--file", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    cases = [case for case in CASES if options.only in case]
    heading = f"{'':6}{'dtype':9} {'case':34} {'kernel':18} {'shared':>7} {'regs':>5} "
    print(f"{heading}{'spill':>5} {'mma':>5} {'warps':>5} {'stages':>6}")
    rows: list[Compiled] = []
    for case, arch, dtype in targets(options.arch, options.dtype, cases):
        for row in compile_case(case, arch, dtype):
            rows.append(row)
            print(line(row), flush=True)
    failures = [row for row in rows if row.failure]
    report = {
        "benchmark": "ahead-of-time compilation",
        "date": date.today().isoformat(),
        "versions": {name: metadata.version(name) for name in ("torch", "triton")},
        "spill_bound": SPILLED,
        "shared_limit_kib": SHARED,
        "kernels": len(rows),
        "failures": len(failures),
        "rows": [asdict(row) for row in rows],
    }
    if options.file:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"aot-{report['date']}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
