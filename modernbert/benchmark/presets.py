"""What can be chosen on the command line; imports nothing heavy.

A preset sets a machine's dtype, batches, amount of work, and limits.
"""

from dataclasses import dataclass

DTYPES = ("auto", "float32", "bfloat16", "float16")
SIZES = ("base", "large", "tiny")
PARTS = ("paper", "sweep", "real", "end-to-end", "memory", "largest", "attention")
PEERS = (
    *("sdpa", "eager", "flash", "compile", "openvino", "onnxruntime"),
    *("modernbert-optimized", "modernbert-compiled", "modernbert-plain"),
    *("modernbert-int8", "modernbert-fp8", "modernbert-graphs"),
    *("bert", "roberta", "deberta-v3", "nomic-bert", "xlm-roberta"),
)
# Those that compile come last: they take minutes to prepare on a CPU, one of them is enough there.
CPU_PEERS = ("modernbert-int8", "sdpa", "openvino", "onnxruntime", "compile")
GPU_PEERS = (
    *("modernbert-optimized", "modernbert-int8", "modernbert-fp8", "modernbert-graphs"),
    *("sdpa", "flash", "modernbert-plain"),
    *("eager", "compile", "modernbert-compiled"),
)


@dataclass(frozen=True)
class Preset:
    """Settings of one run.

    Attributes:
        device: "cpu" or "cuda".
        dtype: a torch dtype's name; "auto" is bfloat16 where the CPU multiplies it natively.
        docs: texts of the N(256, 64) workload; the others have about as many tokens.
        layers: of the model; None for those of its size.
        pass_seconds: `slow_layers` layers where one pass of ours over `docs` texts would take
            longer with all; None for never.
        batch_tokens: places of a batch as it is given to everyone, padding counted.
        minutes: the whole run must end within.
        rounds: alternating pairs at most.
        peers: implementations beside ours.
        sweep: fixed lengths besides the paper's, for speed by length.
        memory: (texts, tokens) whose peak memory is measured, growing.
        memory_layers: of the model for that; peak memory above the weights does not depend on it.
        largest: the largest batch is sought up to so many texts of 512 tokens, or as many tokens
            of longer ones; 0 for not at all.
    """

    device: str
    dtype: str
    docs: int
    batch_tokens: int
    minutes: float
    rounds: int = 7
    layers: int | None = None
    pass_seconds: float | None = None
    slow_layers: int = 6  # two of them global, as of base's 22 are eight
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
        minutes=13,
        rounds=5,
        pass_seconds=3.0,
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
