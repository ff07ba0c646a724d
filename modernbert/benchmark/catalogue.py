"""Every implementation by the name that `--peer` takes."""

from collections.abc import Callable
from functools import partial

from .architectures import Architecture
from .peers import (
    OnnxRuntime,
    OpenVino,
    Ours,
    OursCompiled,
    OursInt8,
    OursPlain,
    Peer,
    Transformers,
)

OURS = "modernbert"
PEERS: dict[str, Callable[[], Peer]] = {
    OURS: Ours,
    "modernbert-compiled": OursCompiled,
    "modernbert-int8": OursInt8,
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
