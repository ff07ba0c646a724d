"""Pickled checkpoints -> safetensors, for those who say that they trust the file.

The only place where the library reads a pickle: with torch's restricted unpickler, without any
fallback, and never on a torch release in which that unpickler could be made to run code.
"""

import json
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import PICKLE_SUFFIXES
from .folder import CheckpointError, ModelFolder, quoted
from .remap import BARE, canonical_name, inverse, rename
from .save import save_folder

logger = logging.getLogger("modernbert")

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
# What is carried to the new folder, of the root and of module folders such as `1_Pooling`.
CARRIED_SUFFIXES = (".json", ".txt")
DECODER, EMBEDDING = "decoder.weight", "model.embeddings.tok_embeddings.weight"


def convert_pickle(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    config: Mapping[str, Any] | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write the pickled checkpoint `source` as a safetensors folder and return the folder.

    `source` is a FlexBERT / Composer .pt file, a `pytorch_model.bin`, or a folder that holds
    pytorch_model.bin, whole or in shards with an index, or a single .pt file. FlexBERT names become
    Hugging Face's, a decoder that repeats the embedding is dropped. JSON and text files beside the
    weights are carried over; `config`, when given, becomes config.json.

    Raises `CheckpointError` without `allow_pickle`, on torch before 2.6, and for a file that holds
    anything but tensors and plain values.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {quoted(path)}")
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, and reading a pickle can run code of whoever wrote it; if you "
            "trust its author, pass --allow-pickle (allow_pickle=True)"
        )
    _check_torch(torch.__version__)
    folder = ModelFolder(str(path), path if path.is_dir() else path.parent)
    stored = _load(folder, _weight_files(folder) if path.is_dir() else [path])
    files = _carried_files(folder)
    if config is not None:
        files["config.json"] = json.dumps(dict(config), indent=2).encode() + b"\n"
    modules = [
        name.removesuffix("config.json")
        for name in files
        if name.endswith("/config.json") and folder.path(name.replace("config.json", PICKLE))
    ]
    save_folder(
        destination,
        files=files,
        tensors=_renamed(stored, path),
        max_shard_size=max_shard_size,
        extra_tensors={
            f"{module}model.safetensors": _load(folder, [folder.folder / module / PICKLE])
            for module in modules
        },
    )
    return Path(destination)


def _check_torch(version: str) -> None:
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if release < (2, 6):
        raise CheckpointError(
            f"torch {version} can be made to run code by a pickle even with weights_only=True "
            "(CVE-2025-32434); upgrade torch to 2.10 or later"
        )
    if release < (2, 10):
        logger.warning(
            "torch %s has a memory corruption in its restricted unpickler (CVE-2026-24747); "
            "convert only files of authors you trust, or upgrade torch to 2.10 or later",
            version,
        )


def _weight_files(folder: ModelFolder) -> list[Path]:
    if (single := folder.path(PICKLE)) is not None:
        return [single]
    index = folder.read_json(PICKLE_INDEX)
    if index is None:
        names = sorted(entry.name for entry in os.scandir(folder.folder))
        pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
        if len(pickles) != 1:
            raise CheckpointError(
                f"{folder.folder} has no {PICKLE}, and {len(pickles)} other pickled files; "
                "give the path of the one to convert"
            )
        return [folder.folder / pickles[0]]
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(
            f"{folder.folder / PICKLE_INDEX} has no object 'weight_map' of tensor names to files"
        )
    return [folder.folder / name for name in sorted(set(shards.values()))]


def _load(folder: ModelFolder, paths: list[Path]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        if folder.path(path.relative_to(folder.folder).as_posix()) is None:
            raise CheckpointError(f"{path} is missing; download it again")
        loaded = _state_dict(path)
        if repeated := tensors.keys() & loaded.keys():
            raise CheckpointError(
                f"{path} repeats {quoted(min(repeated))} of another shard; remove the stale one"
            )
        tensors |= loaded
    return tensors


def _state_dict(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception as error:  # on broken input the unpickler raises whatever it stumbles over
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as tensors alone ({quoted(reason)}); where it was made, save "
            "the weights by themselves: torch.save(model.state_dict(), FILE)"
        ) from error
    # Composer keeps the weights at state["state"]["model"], plain trainers at "model" or the top.
    for key in ("state", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not name.isprintable() or not torch.is_tensor(value):
            raise CheckpointError(
                f"{path} holds {quoted(name)} = {type(value).__name__} among its tensors; where it "
                "was made, save the weights by themselves: torch.save(model.state_dict(), FILE)"
            )
    return state


def _renamed(stored: Mapping[str, torch.Tensor], source: Path) -> dict[str, torch.Tensor]:
    """`stored` under Hugging Face's names: bare for a backbone alone, as HF saves it."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        canonical = canonical_name(name)
        if canonical in tensors:
            raise CheckpointError(f"{source} holds {quoted(canonical)} under two names")
        tensors[canonical] = tensor
    decoder, embedding = tensors.get(DECODER), tensors.get(EMBEDDING)
    if decoder is not None and embedding is not None and decoder.dtype == embedding.dtype:
        if torch.equal(decoder, embedding):
            del tensors[DECODER]
    if all(name.startswith("model.") for name in tensors):
        bare = inverse(BARE)
        return {rename(name, bare) or name: tensor for name, tensor in tensors.items()}
    return tensors


def _carried_files(folder: ModelFolder) -> dict[str, bytes]:
    names = []
    for entry in os.scandir(folder.folder):
        if entry.is_dir() and entry.name[:1].isdigit():
            names += [f"{entry.name}/{inner.name}" for inner in os.scandir(entry.path)]
        else:
            names.append(entry.name)
    carried = {}
    for name in sorted(names):
        if name.endswith(CARRIED_SUFFIXES) and not name.endswith(".index.json"):
            content = folder.read_bytes(name)
            if content is not None:
                carried[name] = content
    return carried
