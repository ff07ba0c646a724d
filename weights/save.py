"""Write a model folder: any files, and tensors as safetensors, in one file or in shards."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .checkpoint import DTYPES, INDEX, WEIGHTS
from .folder import CheckpointError, relative_parts
from .swap import replaced_folder, write_file

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_EMPTY: Mapping[str, Mapping[str, torch.Tensor]] = MappingProxyType({})


def save_folder(
    folder: str | os.PathLike[str],
    *,
    files: Mapping[str, bytes],
    tensors: Mapping[str, torch.Tensor] | None = None,
    max_shard_size: int | str = "5GB",
    extra_tensors: Mapping[str, Mapping[str, torch.Tensor]] = _EMPTY,
) -> None:
    """Write a model folder so that a crash leaves the old one or the new one, never a mixture.

    `files` maps relative names ("1_Pooling/config.json") to contents; `tensors` become
    model.safetensors, or shards of at most `max_shard_size` (bytes, or "200MB") with an index;
    `extra_tensors` maps further file names ("2_Dense/model.safetensors") to their tensors. Names
    that share one tensor are saved once, under the first.

    Whatever else an existing folder holds stays (README.md, .git, ...), except the weight files
    that this save supersedes. Raises `ValueError` for tensors that cannot be saved, and
    `CheckpointError` when the folder cannot be written.
    """
    contents: dict[str, Iterable[bytes | memoryview]] = {
        relative: [content] for relative, content in files.items()
    }
    if tensors is not None:
        contents |= _model_files(tensors, max_shard_size)
    for relative, extra in extra_tensors.items():
        contents[relative] = safetensors_chunks(_saved_once(extra))
    superseded = {os.path.dirname(name) for name in extra_tensors}
    if tensors is not None:
        superseded.add("")
    for relative in contents:
        if len(relative_parts(relative)) > 2:
            raise CheckpointError(f"{relative!r} is too deep; a model has one level of folders")

    def stale(relative: str) -> bool:
        inside, name = os.path.split(relative)
        return inside in superseded and (
            name in (WEIGHTS, INDEX) or fnmatchcase(name, "model-?????-of-?????.safetensors")
        )

    with replaced_folder(folder, stale=stale) as fresh:
        for relative, chunks in contents.items():
            path = fresh / relative
            if not path.parent.is_dir():
                os.mkdir(path.parent)
            write_file(path, chunks)


def safetensors_chunks(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file in pieces, one tensor in memory at a time.

    The library's own writer leaves files at mode 0600 and does not sync them (0.8), and copies all
    tensors first (before 0.8). Format: https://github.com/huggingface/safetensors#format
    """
    # Large numbers first keep every tensor aligned to its own size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        flat = tensor.detach().cpu().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _model_files(
    tensors: Mapping[str, torch.Tensor], max_shard_size: int | str
) -> dict[str, Iterable[bytes | memoryview]]:
    unique = _saved_once(tensors)
    if not unique:
        raise ValueError("there are no tensors to save")
    if isinstance(max_shard_size, int) and max_shard_size < 1:
        raise ValueError(f"max_shard_size is {max_shard_size}; give a number of bytes above 0")
    plan = split_state_dict_into_shards_factory(
        unique,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    files: dict[str, Iterable[bytes | memoryview]] = {
        file: safetensors_chunks({name: unique[name] for name in names})
        for file, names in plan.filename_to_tensors.items()
    }
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        files[INDEX] = [json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"]
    return files


def _saved_once(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`tensors` without the further names of a tied tensor.

    Raises `ValueError` for what cannot be saved faithfully: tensors without data, in a format that
    we do not read, or that share a part of their memory only.
    """
    unique: dict[str, torch.Tensor] = {}
    views: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in _NAMES:
            raise ValueError(
                f"{name} cannot be saved: {tensor.dtype} on {tensor.device} ({tensor.layout}); "
                f"give a dense tensor with data in one of {', '.join(map(str, _NAMES))}"
            )
        view = (str(tensor.device), *_extent(tensor), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() == 0 or views.setdefault(view, name) == name:
            unique[name] = tensor
    ordered = sorted((*view[:3], name) for view, name in views.items())
    for (device, _, end, name), (other_device, start, _, other) in pairwise(ordered):
        if device == other_device and start < end:
            raise ValueError(
                f"{name} and {other} share a part of their memory; clone one of them before saving"
            )
    return unique


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last address of a tensor's memory (the end is exclusive)."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.dtype.itemsize
