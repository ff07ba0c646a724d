"""Peak memory of one forward pass, and the largest batch that fits.

On a CPU: growth of the resident set's high-water mark above that of the loaded, warmed model, each
implementation in a process of its own. On a GPU: the allocator's own peak above the loaded model.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .batches import PaddedBatch, pad
from .catalogue import make_peer
from .measure import synchronize
from .peers import Peer, Setting, prepare

Shape = tuple[int, int]  # texts, tokens of each
CHILD = "from modernbert.benchmark.memory import child; child()"


def peak_bytes(
    name: str, setting: Setting, shapes: Sequence[Shape], peer: Peer | None = None
) -> list[int | str]:
    """Peak bytes per shape; a text says why there is none.

    `peer` is the prepared one, used on a GPU; on a CPU a process of its own prepares another.
    """
    if setting.device.type == "cuda":
        assert peer is not None
        return [_peak_on_gpu(peer, setting, shape) for shape in shapes]
    if not Path("/proc/self/clear_refs").exists():
        return ["needs Linux's /proc"] * len(shapes)
    job = {
        "peer": name,
        "size": setting.size,
        "layers": setting.config.num_hidden_layers,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "threads": setting.threads,
        "shapes": shapes,
    }
    # Not in the current folder: a checkout's kernels/ would hide the package of that name.
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", CHILD],
            input=json.dumps(job),
            capture_output=True,
            text=True,
            cwd=folder,
        )
    lines = done.stdout.splitlines()
    measured: list[int | str] = [int(line) for line in lines if line.isdigit()]
    if len(measured) < len(shapes):
        words = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        measured += [f"failed: {words[0]}"] * (len(shapes) - len(measured))
    return measured


def child() -> None:
    """The process that measures: reads its job from standard input, prints one number a shape."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    device = torch.device("cpu")
    dtype = getattr(torch, job["dtype"])
    setting = Setting.make(job["size"], dtype, device, job["threads"], job["layers"])
    peer = make_peer(job["peer"])
    prepare(peer, setting)
    with torch.inference_mode():
        peer.forward(_batch((1, 64), device))  # libraries and thread pools are not the pass's own
        before = _status("VmRSS")
        for shape in job["shapes"]:
            batch = _batch(shape, device)
            _return_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
            peer.forward(batch)
            print(max(_status("VmHWM") - before, 0), flush=True)


def largest_batch(peer: Peer, length: int, limit: int, device: torch.device) -> int:
    """Texts of `length` tokens that fit into GPU memory at once, at most `limit`; 0 for none.

    Doubles until memory runs out, then bisects to within one part in thirty-two.
    """
    fits, fails = 0, limit + 1
    trial = 1
    while fails - fits > max(1, fits // 32):
        if _fits(peer, (trial, length), device):
            fits = trial
        else:
            fails = trial
        trial = min(fits * 2, limit) if fails > limit else (fits + fails) // 2
    return fits


def _fits(peer: Peer, shape: Shape, device: torch.device) -> bool:
    try:
        with torch.inference_mode():
            peer.forward(_batch(shape, device))
            synchronize(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def _peak_on_gpu(peer: Peer, setting: Setting, shape: Shape) -> int | str:
    device = setting.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    if not _fits(peer, shape, device):
        return "out of memory"
    return torch.cuda.max_memory_allocated(device) - before


def _batch(shape: Shape, device: torch.device) -> PaddedBatch:
    ids: Any = torch.randint(100, 16_000, shape)
    return pad(list(ids), device)


def _return_freed_memory() -> None:
    """Or what an earlier shape freed would count for a later one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024
