"""What `--preset` sets: a machine's dtype, batches, amount of work, and limits."""

from dataclasses import dataclass

import torch

from modernbert.kernels import computes_natively

CPU_PEERS = ("sdpa", "compile", "openvino", "onnxruntime", "eager", "modernbert-compiled")
GPU_PEERS = ("sdpa", "compile", "flash", "eager", "modernbert-compiled")


@dataclass(frozen=True)
class Preset:
    """Settings of one run.

    Attributes:
        device: "cpu" or "cuda".
        dtype: a torch dtype's name; "auto" is bfloat16 where the CPU multiplies it natively.
        docs: texts of the N(256, 64) workload; the others have about as many tokens.
        batch_tokens: places of a batch as it is given to everyone, padding counted.
        minutes: the whole run must end within.
        rounds: alternating pairs at most.
        peers: implementations beside ours.
        sweep: fixed lengths besides the paper's, for speed by length.
        memory: (texts, tokens) whose peak memory is measured, growing.
        memory_layers: of the model for that; peak memory above the weights does not depend on it.
        largest: up to how many texts the largest batch is sought; 0 for not at all.
    """

    device: str
    dtype: str
    docs: int
    batch_tokens: int
    minutes: float
    rounds: int = 7
    peers: tuple[str, ...] = GPU_PEERS
    sweep: tuple[int, ...] = (128, 1024, 2048, 4096)
    memory: tuple[tuple[int, int], ...] = ((1, 512), (1, 2048), (1, 8192), (64, 512))
    memory_layers: int | None = None
    memory_peers: tuple[str, ...] = ("sdpa",)
    largest: int = 4096


PRESETS = {
    "cpu": Preset(
        device="cpu",
        dtype="auto",
        docs=16,
        batch_tokens=8192,
        minutes=14,
        rounds=5,
        peers=CPU_PEERS,
        sweep=(128, 2048),
        memory_layers=4,
        largest=0,
    ),
    "t4": Preset("cuda", "float16", docs=1024, batch_tokens=65_536, minutes=25),
    "rtx-4090": Preset("cuda", "bfloat16", docs=4096, batch_tokens=262_144, minutes=20),
    "a100": Preset("cuda", "bfloat16", docs=8192, batch_tokens=262_144, minutes=20),
    "h200": Preset("cuda", "bfloat16", docs=8192, batch_tokens=524_288, minutes=15, largest=16_384),
}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is what the device multiplies fastest without emulation."""
    if name != "auto":
        return getattr(torch, name)
    native = computes_natively(torch.bfloat16, device)
    if device.type == "cuda" and not native:
        return torch.float16
    return torch.bfloat16 if native else torch.float32
