"""The conditions of a measurement: hardware, versions, load, and the revision of the code."""

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FEATURES = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni"),
    *("amx_tile", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve"),
)
PACKAGES = (
    *("modernbert", "torch", "transformers", "sentence-transformers", "openvino", "onnxruntime"),
    *("onnx", "onnxscript", "flash-attn", "triton", "tokenizers", "numpy"),
)
GPU_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")


def conditions(device: torch.device) -> dict[str, Any]:
    """Everything about this machine that a reader needs to judge a figure."""
    cpu = _cpuinfo()
    flags = set((cpu.get("flags") or cpu.get("Features") or "").split())
    return {
        "system": platform.platform(),
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_features": [name for name in FEATURES if name in flags],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory_total(),
        "cores_in_use": cores_in_use(),
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "pretended": os.environ.get("MODERNBERT_PRETEND") or None,
        "python": sys.version.split()[0],
        "compiler": cpp_compiler(),
        "versions": versions(),
        "revision": revision(),
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_in_use(seconds: float = 1.0) -> float | None:
    """Cores that others keep busy while this process sleeps; None where there is no /proc/stat."""
    if not Path("/proc/stat").exists():
        return None
    before = _ticks()
    time.sleep(seconds)
    total, idle = (now - then for now, then in zip(_ticks(), before, strict=True))
    return round((os.cpu_count() or 1) * (1 - idle / max(total, 1)), 2)


def _ticks() -> tuple[int, int]:
    """All time of all cores since the start, and what of it was idle or waiting for a disk."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(fields), fields[3] + fields[4]


def versions() -> dict[str, str | None]:
    """Installed versions of every package that is measured; None for an absent one."""
    return {name: _version(name) for name in PACKAGES}


def cpp_compiler() -> str | None:
    """The C++ compiler that `torch.compile` needs on a CPU, or None."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def revision() -> dict[str, Any] | None:
    """Commit of the checkout this package runs from, and whether its files differ from it."""
    root = repository()
    if root is None:
        return None
    changes = git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": git(root, "rev-parse", "HEAD").strip(), "dirty": bool(changes.strip())}


def repository() -> Path | None:
    """Root of the git checkout this package runs from, or None when it was installed."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / ".git").exists() and shutil.which("git") else None


def git(root: Path, *arguments: str) -> str:
    """Output of a git command; `ValueError` with git's own words when it fails."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def short_name(device: str) -> str:
    """Machine name for files: "nvidia-h200", "amd-epyc-2-cores"."""
    if device == "cuda" and torch.cuda.is_available():
        text = torch.cuda.get_device_name()
    else:
        cpu = _cpuinfo().get("model name") or platform.machine()
        text = f"{cpu.split('@')[0]} {usable_cores()} cores"
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return "-".join(word for word in words if word not in ("r", "tm", "cpu", "processor"))


def memory_total() -> int | None:
    """Bytes of main memory."""
    path = Path("/proc/meminfo")
    if not path.exists():
        return None
    return int(path.read_text().split("MemTotal:")[1].split()[0]) * 1024


def _cpuinfo() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
        query += ["-i", str(device.index or 0)]
        done = subprocess.run(query, capture_output=True, text=True)
        if done.returncode == 0:
            values = (value.strip() for value in done.stdout.split(","))
            found |= dict(zip(GPU_FIELDS, values, strict=False))
    return found
