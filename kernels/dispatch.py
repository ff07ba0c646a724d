"""Which backend runs on which machine, and why: one table, read by the library and by `doctor`.

`MODERNBERT_PRETEND=sm_75` in the environment makes the table believe that every GPU is a T4 (or
sm_80, sm_90, ...), so that the code for one GPU can be tried on another, or on none: on the CPU the
path for sm_75 runs in PyTorch, and Triton's kernels run where `TRITON_INTERPRET=1` is set.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from itertools import takewhile
from math import gcd
from typing import Any

import torch

HALVES = (torch.float16, torch.bfloat16)
TRITON_HEAD_SIZES = (32, 64, 128)  # as in triton_attention, which needs Triton to be imported
# Distribution: the oldest version that will do.
PACKAGES = {"triton": (3, 6), "flash-attn": (2, 5), "flash-attn-3": (3, 0), "flash-attn-4": (4, 0)}
VARLEN_WITH_WINDOW = (2, 12)  # torch.nn.attention.varlen has had windows since
ROW_SCALES = ((8, 9), (9, 0), (10, 0), (10, 3))  # PyTorch's fp8 products by row and channel


@dataclass(frozen=True)
class Machine:
    """What a choice depends on.

    Attributes:
        device: "cpu", "cuda", "mps", ...
        capability: of an NVIDIA GPU, (7, 5) for sm_75; None for anything else.
        memory: of the GPU, in GiB.
        torch: its version, (2, 13).
        packages: versions of those of `PACKAGES` that are installed and can be used.
        interpreted: Triton's kernels run in its interpreter, on the CPU.
        pretended: the capability is not the device's own.
        windows: PyTorch for it lacks some kernels.
        processors: of the GPU; 0 where unknown.
    """

    device: str = "cpu"
    capability: tuple[int, int] | None = None
    memory: int = 0
    torch: tuple[int, int] = (2, 13)
    packages: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    interpreted: bool = False
    pretended: bool = False
    windows: bool = False
    processors: int = 0

    @property
    def architecture(self) -> str:
        """ "sm_75"."""
        assert self.capability is not None
        return "sm_{}{}".format(*self.capability)

    def has(self, package: str) -> bool:
        """Whether a version of `package` that will do is installed."""
        return self.packages.get(package, (0, 0)) >= PACKAGES[package]

    def version(self, package: str) -> str:
        return ".".join(map(str, self.packages[package]))


@dataclass(frozen=True)
class Need:
    """What is asked of a backend: numbers in `dtype`, gradients, heads of a size, dropout.

    `deterministic` asks for gradients that are, where PyTorch's own switch does not.
    """

    dtype: torch.dtype = torch.bfloat16
    training: bool = False
    head_size: int = 64
    dropout: bool = False
    deterministic: bool = False


@dataclass(frozen=True)
class BackendStatus:
    """Whether an attention backend can run on this machine, and why or why not."""

    name: str
    usable: bool
    reason: str


# -- the table: for each backend, why it cannot run (""), and what it is ----------------------


def _reference(machine: Machine, need: Need) -> tuple[str, str]:
    return "", "plain PyTorch, any device and dtype; for comparison"


def _blocked(machine: Machine, need: Need) -> tuple[str, str]:
    return "", "scaled_dot_product_attention, any device and dtype"


def _turing(machine: Machine, need: Need) -> tuple[str, str]:
    what = "PyTorch's memory-efficient attention without padding, local layers in strided blocks"
    if machine.capability is None:
        return _no_gpu(machine), what
    if need.dtype == torch.bfloat16 and machine.capability < (8, 0):
        return f"{machine.architecture} has no bfloat16: use float16", what
    if need.dtype == torch.float64:
        return "has no float64", what
    return _shape(need, 8, 256) or _no_dropout(need), what


def _flash(machine: Machine, need: Need) -> tuple[str, str]:
    kind = flash_kind(machine, need)
    what = FLASH[kind]
    if machine.capability is None:
        return _no_gpu(machine), what
    if machine.capability < (8, 0):
        return f"flash attention needs sm_80 or newer, this is {machine.architecture}", what
    if machine.device != "cuda":
        return f"flash attention runs on CUDA only, not on {machine.device}", what
    if need.deterministic and need.training and kind in ("varlen", "aten"):
        return "PyTorch's own is deterministic under torch.use_deterministic_algorithms(True)", what
    return _halves_only(need) or _shape(need, 8, 256) or _no_dropout(need), what


def _triton(machine: Machine, need: Need) -> tuple[str, str]:
    if machine.capability is None:
        return _no_gpu(machine), ""
    if machine.capability < (8, 0):
        return f"Triton has no tensor cores on {machine.architecture}: sm_80 or newer needed", ""
    if not _triton_runs(machine):
        return _no_triton(machine), ""
    if need.dtype not in HALVES and not machine.interpreted:
        return _halves_only(need), ""
    if need.head_size not in TRITON_HEAD_SIZES:
        return f"heads of {need.head_size}; it has kernels for 32, 64 and 128", ""
    where = "in the interpreter" if machine.interpreted else f"for {machine.architecture}"
    version = machine.version("triton")
    return _no_dropout(need), f"our kernels through Triton {version} {where}: RoPE on load, windows"


TABLE = {
    "reference": _reference,
    "blocked": _blocked,
    "turing": _turing,
    "flash": _flash,
    "triton": _triton,
}
BACKENDS = tuple(TABLE)
CAPTURABLE = ("turing", "flash", "triton")  # whose plans need not know the lengths on the host
FLASH = {
    "flash_attn_3": "flash-attn 3",
    "flash_attn_4": "flash-attn 4 (beta)",
    "flash_attn_2": "flash-attn 2",
    "varlen": "PyTorch's own variable-length flash attention",
    "aten": "PyTorch's own variable-length flash attention, by its internal operator",
}


def flash_kind(machine: Machine, need: Need) -> str:
    """Which implementation the backend "flash" calls: a key of `FLASH`."""
    capability = machine.capability or (0, 0)
    if capability[0] == 9 and machine.has("flash-attn-3"):
        return "flash_attn_3"
    if capability >= (10, 0) and machine.has("flash-attn-4") and not need.training:
        return "flash_attn_4"
    if machine.has("flash-attn"):
        return "flash_attn_2"
    return "varlen" if machine.torch >= VARLEN_WITH_WINDOW else "aten"


def table(machine: Machine, need: Need) -> list[BackendStatus]:
    """Every backend with its state, slowest first: "auto" takes the last that is usable."""
    states = []
    for name, row in TABLE.items():
        obstacle, what = row(machine, need)
        states.append(BackendStatus(name, not obstacle, obstacle or what))
    return states


def choose(machine: Machine, need: Need) -> str:
    """The backend that "auto" stands for."""
    return [state.name for state in table(machine, need) if state.usable][-1]


def fuses(machine: Machine, dtype: torch.dtype) -> bool:
    """Whether norms, GeGLU, RoPE, pooling and the loss run in our Triton kernels."""
    if machine.capability is None or machine.capability < (7, 5) or not _triton_runs(machine):
        return False
    return dtype in (torch.float32, torch.float16) or (
        dtype == torch.bfloat16 and machine.capability >= (8, 0)
    )


# Measured: activations of base stay in the cache, as those of 4096 do not.
CPU_TOKENS = 2048


def token_budget(machine: Machine) -> int:
    """Tokens of a batch that fill whole waves of a GPU's multiprocessors, as far as memory goes.

    Matrix tiles are 128 x 256, on T4 and GeForce 128 x 128. As many tokens as make the tiles of Wo,
    768 wide in ModernBERT-base, a multiple of the multiprocessors do so for Wqkv, three times as
    wide, and for attention, whose tiles times heads are four times as many or more. By arithmetic,
    to be confirmed by measurement.
    """
    if machine.device == "cpu":
        return CPU_TOKENS
    if machine.capability is None or not machine.processors:
        return 8192
    columns = 3 if machine.capability in ((8, 0), (9, 0), (10, 0), (10, 3)) else 6
    wave = 128 * machine.processors // gcd(machine.processors, columns)
    # 64 KiB a token: what the widest layer holds at once in base and large, with room to spare.
    most = machine.memory * 2**30 // 4 // 2**16
    return wave * max(min(65_536, most) // wave, 1)


def eight_bit(machine: Machine) -> list[BackendStatus]:
    """Whether linear layers of 8 bits run on this machine, "int8" and "fp8", and how or why not."""
    capability, states = machine.capability, []
    for name, oldest in (("int8", (7, 5)), ("fp8", (8, 9))):
        how = "cuBLAS" if name == "int8" or scales_rows(machine) else "cuBLAS, scaled afterwards"
        obstacle = ""
        if capability is None and name == "int8" and machine.device == "cpu":
            how = "oneDNN"
        elif capability is None:
            obstacle = _no_gpu(machine)
        elif capability < oldest:
            obstacle = "needs sm_{}{} or newer, this is {}".format(*oldest, machine.architecture)
        what = f"{how}; a scale for each token and each channel"
        states.append(BackendStatus(name, not obstacle, obstacle or what))
    return states


def scales_rows(machine: Machine) -> bool:
    """Whether PyTorch multiplies fp8 by a scale for each row and column in one call.

    On sm_120 and in its Windows build it knows a scale for the whole matrix only.
    """
    return machine.capability in ROW_SCALES and not machine.windows


def deterministic(machine: Machine, enabled: bool, workspace: str | None) -> str:
    """Whether two training runs agree to the last bit here, in a sentence.

    `enabled` is PyTorch's switch, `workspace` the environment's CUBLAS_WORKSPACE_CONFIG.
    """
    if not enabled:
        return (
            "not asked for: torch.use_deterministic_algorithms(True) does; our Triton kernels "
            "always are, flash attention's and the memory-efficient backward pass are not"
        )
    if machine.device == "cuda" and workspace not in (":4096:8", ":16:8"):
        return "asked for, and cuBLAS refuses: set CUBLAS_WORKSPACE_CONFIG=:4096:8 before the start"
    return "yes: every backend's forward and backward pass repeats to the last bit"


def _no_gpu(machine: Machine) -> str:
    return f"needs an NVIDIA GPU, this is {machine.device}"


def _triton_runs(machine: Machine) -> bool:
    on_device = machine.device == "cuda" or machine.interpreted
    return on_device and machine.has("triton")


def _no_triton(machine: Machine) -> str:
    if machine.device != "cuda" and machine.has("triton"):
        return f"on {machine.device} Triton runs in its interpreter only: TRITON_INTERPRET=1"
    if "triton" in machine.packages:
        oldest = "{}.{}".format(*PACKAGES["triton"])
        return f"Triton {machine.version('triton')} is too old: {oldest} or newer needed"
    return "triton is not installed: pip install triton"


def _halves_only(need: Need) -> str:
    if need.dtype in HALVES:
        return ""
    return f"computes in float16 and bfloat16, not in {str(need.dtype).removeprefix('torch.')}"


def _shape(need: Need, step: int, most: int) -> str:
    if need.head_size % step == 0 and need.head_size <= most:
        return ""
    return f"heads of {need.head_size}; they must be multiples of {step} up to {most}"


def _no_dropout(need: Need) -> str:
    return "has no attention dropout" if need.dropout else ""


# -- this machine -----------------------------------------------------------------------------


def pretended() -> tuple[int, int] | None:
    """The capability that `MODERNBERT_PRETEND` names; `ValueError` for anything but sm_XY."""
    name = os.environ.get("MODERNBERT_PRETEND", "")
    if not name:
        return None
    digits = name.removeprefix("sm_")
    if name == digits or not digits.isascii() or not digits.isdigit() or len(digits) < 2:
        raise ValueError(f"MODERNBERT_PRETEND={name!r}; expected something like sm_75")
    return int(digits[:-1]), int(digits[-1])


def this_machine(device: torch.device) -> Machine:
    """The facts about `device`, or what `MODERNBERT_PRETEND` says about it."""
    return _machine(device.type, device.index, pretended(), _interpreting())


def _constant(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, which would import the compiler for its mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def backend_for(kind: str, index: int | None, *need: Any) -> str:
    """`choose` for a device and the fields of a `Need`, as one constant of a compiled graph."""
    return choose(this_machine(_device(kind, index)), Need(*need))


@_constant
def obstacle_to(name: str, kind: str, index: int | None, *need: Any) -> str:
    """Why the backend `name` cannot run on a device, "" where it can; a constant likewise."""
    return TABLE[name](this_machine(_device(kind, index)), Need(*need))[0]


@_constant
def _architecture(kind: str, index: int | None) -> int:
    major, minor = this_machine(_device(kind, index)).capability or (8, 0)
    return 10 * major + minor


def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU, or of the one it is taken for; (8, 0) for a CPU that interprets kernels."""
    architecture = _architecture(device.type, device.index)
    return architecture // 10, architecture % 10


def runs_plainly(x: torch.Tensor) -> bool:
    """Whether nothing records or compiles what happens to x: plain inference.

    A kernel may then be launched without going through its operator, which takes 17 microseconds,
    more than many a kernel.
    """
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return not recorded and type(x) in (torch.Tensor, torch.nn.Parameter)


_separate = 0  # depth of `unfused`


@contextmanager
def unfused() -> Iterator[None]:
    """Inside, norms, GeGLU, RoPE, pooling and the loss are PyTorch's: what fusing gains."""
    global _separate
    _separate += 1
    try:
        yield
    finally:
        _separate -= 1


@_constant
def fuses_on(kind: str, index: int | None, dtype: torch.dtype) -> bool:
    """`fuses` for a device, as one constant of a compiled graph."""
    if _separate or (kind == "cpu" and not _interpreting()):
        return False
    return fuses(this_machine(_device(kind, index)), dtype)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") in ("1", "true", "True", "on")


@lru_cache
def _machine(
    kind: str, index: int | None, pretence: tuple[int, int] | None, interpreting: bool
) -> Machine:
    found: dict[str, Any] = {"capability": pretence, "pretended": pretence is not None}
    if kind == "cuda" and torch.version.hip is not None:
        kind = "rocm"
    if kind == "cuda":
        facts = torch.cuda.get_device_properties(_device(kind, index))
        found["memory"] = round(facts.total_memory / 2**30)
        found["processors"] = facts.multi_processor_count
        found["capability"] = pretence or (facts.major, facts.minor)
    return Machine(
        device=kind,
        torch=_two(torch.__version__),
        packages={name: _two(v) for name in PACKAGES if (v := _installed(name))},
        interpreted=interpreting and kind == "cpu",
        windows=os.name == "nt",
        **found,
    )


def _device(kind: str, index: int | None) -> torch.device:
    return torch.device(kind) if index is None else torch.device(kind, index)


def _two(version: str) -> tuple[int, int]:
    """The first two numbers of "2.13.0+cpu" or "2.12rc1"."""
    major, minor = version.split(".")[:2]
    return int(major), int("".join(takewhile(str.isdigit, minor)))


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
