import os
import subprocess
import sys

import pytest

from modernbert.allocator import CHOSEN, keep_freed_memory

FAULTS = """
import resource
from modernbert.allocator import keep_freed_memory
import torch

print(keep_freed_memory())
def layer():
    torch.empty(2**24).fill_(1)  # 64 MiB
for _ in range(30):  # until nothing small lies in between
    layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(**environment: str) -> tuple[str, int]:
    plain = {name: value for name, value in os.environ.items() if name not in CHOSEN}
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(
        command, env=plain | environment, capture_output=True, text=True, check=True
    )
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is on Linux")
def test_freed_memory_is_used_again() -> None:
    kept, faults = run()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    refused, usual = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert refused == "False"  # what the user chose stays
    assert faults < usual / 2


def test_other_systems_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory.__wrapped__()
