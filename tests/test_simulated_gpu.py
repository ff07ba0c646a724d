"""The library on a GPU that is not there: everything is on its device, and nothing waits for it."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import simulated_gpu  # noqa: E402

BOUND = 2.0  # times the error of plain PyTorch in the same dtype
UNIT = 1e-3  # of vectors of length 1 in float16
# Keys are gathered into a stream of their own, whose length the host must know.
GATHERING = ("auto, query-only", "flash, query-only")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloads a Linux library")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to compile the device's guard with")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has a guard of its own")
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90"])
def test_a_gpu_that_is_not_there(architecture: str, tmp_path: Path) -> None:
    report = simulated_gpu.run(architecture, tmp_path)
    for name, found in report.items():
        if name == "encode":
            assert found["error"] < UNIT and found["same"], name
            assert found["waits"] == {"aten::_to_copy": 2}, name  # once for each batch
        else:
            assert found["error"] <= BOUND * found["plain"], name
            assert found["waits"] == (2 if name in GATHERING else 0), name
    assert len(report) == (3 if architecture == "sm_75" else 8)
