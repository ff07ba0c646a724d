"""Every implementation by the name that `--peer` takes."""

from collections.abc import Callable
from functools import partial

from .architectures import Architecture
from .peers import (
    OnnxRuntime,
    OpenVino,
    Ours,
    OursCompiled,
    OursEightBit,
    OursGraphs,
    OursOptimized,
    OursPlain,
    Peer,
    Transformers,
)

OURS = "modernbert"
PEERS: dict[str, Callable[[], Peer]] = {
    OURS: Ours,
    "modernbert-compiled": OursCompiled,
    "modernbert-fp8": partial(OursEightBit, "fp8"),
    "modernbert-graphs": OursGraphs,
    "modernbert-int8": partial(OursEightBit, "int8"),
    "modernbert-optimized": OursOptimized,
    "modernbert-plain": OursPlain,
    "sdpa": partial(Transformers, "transformers sdpa", "sdpa"),
    "eager": partial(Transformers, "transformers eager", "eager"),
    "flash": partial(Transformers, "transformers flash-attn", "flash_attention_2"),
    "compile": partial(Transformers, "transformers + torch.compile", "sdpa", compiled=True),
    "openvino": OpenVino,
    "onnxruntime": OnnxRuntime,
    "bert": partial(Architecture, "BERT"),
    "roberta": partial(Architecture, "RoBERTa"),
    "deberta-v3": partial(Architecture, "DeBERTaV3"),
    "nomic-bert": partial(Architecture, "NomicBERT"),
    "xlm-roberta": partial(Architecture, "XLM-RoBERTa"),
}


def make_peer(name: str) -> Peer:
    """The implementation of that name, not yet prepared; `ValueError` for an unknown one."""
    if name not in PEERS:
        raise ValueError(f"unknown peer {name!r}; choose from {', '.join(PEERS)}")
    return PEERS[name]()
