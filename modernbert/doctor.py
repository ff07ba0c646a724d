"""What this machine offers, and whether every backend that can run here computes right.

A backend passes when its error against float64 is at most twice that of plain PyTorch in the same
dtype, the reference backend, plus a rounding of the result (the rule of flash-attention's tests).
"""

import math
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor

import modernbert
from modernbert import kernels
from modernbert.allocator import glibc
from modernbert.config import ModernBertConfig
from modernbert.kernels import dispatch
from modernbert.model import ModernBertModel
from modernbert.packing import pack

PACKAGES = (
    "numpy",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "pyarrow",
    "flash-attn",
    "triton",
)
# A single token, the edges of the window, more than a block, and neighbours of equal length.
LENGTHS = (1, 130, 33, 33, 300)
WINDOW, HEADS, HEAD_DIM = 64, 4, 64
CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "sve",
)


@dataclass(frozen=True)
class Check:
    """The largest error of one result against float64, and the error it may have."""

    backend: str
    device: str
    dtype: str
    result: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """False for NaN, too."""
        return self.error <= self.bound


def machine() -> Iterator[tuple[str, str]]:
    """Lines about the machine: (what, how it is)."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    yield "modernbert", f"{modernbert.__version__}, Python {platform.python_version()}, {system}"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    yield "cpu", f"{_cpu_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    yield "cpu flags", ", ".join(_cpu_flags()) or "unknown"
    yield "cpu dtypes", _native(torch.device("cpu"))
    yield from _accelerators()
    for device in devices():
        yield from _decisions(device)
    if name := os.environ.get("MODERNBERT_PRETEND"):
        yield "taken for", f"{name} (MODERNBERT_PRETEND)"
    for package in PACKAGES:
        yield package, _version(package)


def devices() -> list[torch.device]:
    """The devices of this machine: the CPU, every CUDA device, Apple's GPU."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return found


def self_check() -> Iterator[Check]:
    """Every usable backend, on every device, in every dtype that the device computes in.

    Compared are attention, local and global, with its gradients, and the output of a small model
    with random weights.
    """
    for device in devices():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            if kernels.computes_natively(dtype, device):
                yield from _check_device(device, dtype)


def _check_device(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    exact = _results("reference", torch.device("cpu"), dtype, torch.float64)
    plain = _results("reference", device, dtype, dtype)
    for status in kernels.available_backends(device, dtype):
        if not status.usable:
            continue
        where = status.name, str(device), str(dtype).removeprefix("torch.")
        try:
            fast = _results(status.name, device, dtype, dtype)
        except (RuntimeError, ValueError) as error:
            yield Check(*where, f"does not run: {error}", math.inf, 0.0)
            continue
        for name, truth in exact.items():
            bound = 2 * _error(plain[name], truth) + _rounding(truth, dtype)
            yield Check(*where, name, _error(fast[name], truth), bound)


def _results(
    backend: str, device: torch.device, dtype: torch.dtype, compute: torch.dtype
) -> dict[str, Tensor]:
    """The same computation each time, on numbers rounded to `dtype`, carried out in `compute`."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 256, (sum(LENGTHS),), generator=random)
    batch = pack([part.tolist() for part in ids.split(LENGTHS)], device=device)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(*shape, generator=random, dtype=torch.float64).to(dtype)
        return x.to(device, compute)

    plan = kernels.plan_attention(
        batch.cu_seqlens,
        batch.num_tokens,
        batch.lengths,
        window=WINDOW,
        dtype=compute,
        backend=backend,
    )
    results = {}
    for local in (False, True):
        kind = "local" if local else "global"
        q, k, v, upstream = (draw(len(ids), HEADS, HEAD_DIM) for _ in range(4))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out, _ = kernels.attention(q, k, v, plan, local=local)
        gradients = torch.autograd.grad(out, inputs, upstream)
        results[f"{kind} attention"] = out
        for name, gradient in zip("qkv", gradients, strict=True):
            results[f"{kind} attention, gradient of {name}"] = gradient
    config = ModernBertConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,
        pad_token_id=0,
        local_attention=WINDOW,
    )
    model = ModernBertModel(config, attention=backend).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start of training: errors show
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=random) * scale)
            parameter.copy_(parameter.to(dtype))
        results["small model"] = model.to(device, compute)(batch).last_hidden_state
    return {name: x.detach().cpu() for name, x in results.items()}


def _error(result: Tensor, truth: Tensor) -> float:
    return (result.double() - truth).abs().max().item()


def _rounding(truth: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest number."""
    return truth.abs().max().item() * torch.finfo(dtype).eps / 2


def _accelerators() -> Iterator[tuple[str, str]]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        yield "cuda", f"no device (torch built for {built})" if built else "not in this torch"
    for device in devices()[1:]:
        if device.type == "cuda":
            facts = torch.cuda.get_device_properties(device)
            memory = f"{facts.total_memory / 2**30:.0f} GiB"
            yield (
                str(device),
                f"{facts.name}, {facts.major}.{facts.minor}, {memory}, {_native(device)}",
            )
        else:
            yield str(device), _native(device)


def _decisions(device: torch.device) -> Iterator[tuple[str, str]]:
    """What is chosen for a device besides attention."""
    machine, where = dispatch.this_machine(device), str(device)
    for state in dispatch.eight_bit(machine):
        yield f"{where} {state.name}", ("" if state.usable else "no: ") + state.reason
    obstacle = dispatch.TABLE["triton"](machine, dispatch.Need(torch.float16))[0]
    fused = "linear layers with all around them, where that is faster than cuBLAS"
    left = f"leaves the layers as they are: {obstacle}"
    left += "; keeps freed memory" if device.type == "cpu" and glibc() else ""
    yield f"{where} optimize()", left if obstacle else fused
    yield f"{where} batches", f"{dispatch.token_budget(machine)} tokens"
    enabled = torch.are_deterministic_algorithms_enabled()
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield f"{where} repeats", dispatch.deterministic(machine, enabled, workspace)


def _native(device: torch.device) -> str:
    names = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        native = kernels.computes_natively(dtype, device)
        names.append(str(dtype).removeprefix("torch.") + ("" if native else " only emulated"))
    return ", ".join(names)


def _cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty elsewhere than on Linux."""
    if not sys.platform.startswith("linux"):
        return {}
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        pairs = (line.partition(":") for line in file)
        info: dict[str, str] = {}
        for name, _, value in pairs:
            info.setdefault(name.strip(), value.strip())
    return info


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or "unknown"


def _cpu_flags() -> list[str]:
    info = _cpu_info()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in CPU_FLAGS if flag in flags]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
