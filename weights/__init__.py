"""Model folders: read, remapped, checked and written. A leaf that knows files and names, no model.

Names are resolved on first use, so that reading a tokenizer's folder never imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, TensorInfo, open_checkpoint
    from .convert import convert_pickle
    from .folder import (
        EMBEDDED_NAME,
        CheckpointError,
        ModelFolder,
        embedded_folder,
        open_folder,
    )
    from .manifest import OFFICIAL, expected_tensors, parameters_of
    from .push import push_folder
    from .remap import FLEXBERT_CONFIG, canonical_name
    from .save import save_folder

_HOME = {
    "EMBEDDED_NAME": "folder",
    "CheckpointError": "folder",
    "ModelFolder": "folder",
    "embedded_folder": "folder",
    "open_folder": "folder",
    "Checkpoint": "checkpoint",
    "TensorInfo": "checkpoint",
    "open_checkpoint": "checkpoint",
    "save_folder": "save",
    "convert_pickle": "convert",
    "push_folder": "push",
    "FLEXBERT_CONFIG": "remap",
    "canonical_name": "remap",
    "OFFICIAL": "manifest",
    "expected_tensors": "manifest",
    "parameters_of": "manifest",
}

__all__ = [
    "EMBEDDED_NAME",
    "OFFICIAL",
    "FLEXBERT_CONFIG",
    "Checkpoint",
    "CheckpointError",
    "ModelFolder",
    "TensorInfo",
    "canonical_name",
    "convert_pickle",
    "embedded_folder",
    "expected_tensors",
    "open_checkpoint",
    "open_folder",
    "parameters_of",
    "push_folder",
    "save_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
