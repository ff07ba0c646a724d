"""A few of our Triton kernels compiled for GPUs that are not here, as `benchmarks/aot.py` does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "aot.py"
LIMITS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("aot", sys.argv[1])
aot = importlib.util.module_from_spec(spec)
sys.modules["aot"] = aot
spec.loader.exec_module(aot)
aot.SHARED[80] = 1
sys.argv = sys.argv[1:]
sys.exit(aot.main())
"""


def compile_kernels(cache: Path, *options: str, script: tuple[str, ...] = ()) -> tuple[int, Any]:
    """Exit code and report, from a process of its own: this one interprets kernels."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *script, str(SCRIPT), "--no-file", *options],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_attention_compiles_and_uses_tensor_cores(tmp_path: Path) -> None:
    options = ("--dtype", "bfloat16", "--only", "window, query-only")
    code, report = compile_kernels(tmp_path, "--arch", "80", "90", *options)
    assert code == 0 and report["kernels"] == 2 and report["failures"] == 0
    assert [row["arch"] for row in report["rows"]] == [80, 90]
    for row in report["rows"]:
        assert row["kernel"] == "_forward" and row["products"] > 0
        assert 0 < row["shared"] <= 1024 * report["shared_limit_kib"][str(row["arch"])]
        assert 0 < row["registers"] <= 255 and row["spilled"] <= report["spill_bound"]
    # The same kernel under a limit that it breaks: the script says so, and fails.
    code, report = compile_kernels(tmp_path, "--arch", "80", *options, script=("-c", LIMITS))
    assert code == 1 and report["failures"] == 1
    assert "bytes of shared memory, 1 KiB is the limit" in report["rows"][0]["failure"]


def test_elementwise_kernels_compile_for_a_t4(tmp_path: Path) -> None:
    code, report = compile_kernels(tmp_path, "--arch", "75", "--only", "geglu")
    assert code == 0
    rows = [(row["kernel"], row["dtype"]) for row in report["rows"]]
    assert rows == [("_geglu_forward", "float16"), ("_geglu_backward", "float16")]


def test_linear_layers_compile_and_use_tensor_cores(tmp_path: Path) -> None:
    options = ("--dtype", "float16", "bfloat16", "--only", "linear, residual, few")
    code, report = compile_kernels(tmp_path, "--arch", "75", "89", *options)
    assert code == 0 and report["failures"] == 0
    # Not for a T4: it has tensor cores, but Triton has none for it.
    assert [row["arch"] for row in report["rows"]] == [89, 89]
    for row in report["rows"]:
        assert row["kernel"] == "_linear_kernel" and row["products"] > 0
