"""Checkpoints: a model folder's config and its safetensors weights under canonical names."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .folder import (
    METADATA_PATTERNS,
    WEIGHT_PATTERNS,
    CheckpointError,
    ModelFolder,
    locate,
    name_of,
    parse_json,
    quoted,
)
from .remap import canonical_name

logger = logging.getLogger("modernbert")

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

MAX_HEADER_BYTES = 2 * 2**20  # of all shards together; the largest ModernBERT needs 25 kB

# The number formats a checkpoint may hold, by their names in safetensors headers.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the file's header describes it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    stored_name: str


class Checkpoint(ModelFolder):
    """A model folder with weights, opened without reading any tensor.

    `config` is config.json as it is written (any dialect); `tensors` describes the weights by
    canonical name (see `remap`). Everything is checked here that headers can tell: an opened
    checkpoint has every tensor its index promises, once, within its file.
    """

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name, folder)
        self.config: dict[str, Any] = self._read_config()
        self._files: dict[Path, Any] = {}
        self._header_bytes = 0
        self.tensors: dict[str, TensorInfo] = {}
        for info in self._read_weights():
            if (other := self.tensors.setdefault(info.name, info)) is not info:
                raise CheckpointError(
                    f"{info.file} stores {quoted(info.stored_name)} and {other.file} stores "
                    f"{quoted(other.stored_name)}, which are both {quoted(info.name)}; "
                    "remove one of them"
                )

    def get(self, name: str) -> torch.Tensor:
        """The tensor called `name` (canonical), memory-mapped on the CPU in its stored dtype.

        Raises `CheckpointError` when there is none, or when it holds NaN or infinity.
        """
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"{self.folder} has no tensor {quoted(name)}; it holds "
                f"{len(self.tensors)} tensors, see `tensors`"
            )
        return self._read_tensor(info)

    def read_tensors(self, relative: str) -> dict[str, torch.Tensor]:
        """All tensors of a further safetensors file ("2_Dense/model.safetensors"), names as stored.

        The file is checked like the model's own weights; `CheckpointError` when it is absent.
        """
        path = self.path(relative)
        if path is None:
            missing = self.folder / relative
            raise CheckpointError(f"{missing} does not exist{self._advice(missing.parent)}")
        return {info.stored_name: self._read_tensor(info) for info in self._open(path)}

    def _read_config(self) -> dict[str, Any]:
        config = self.read_json("config.json")
        if config is None:
            raise CheckpointError(
                f"{self.folder} has no config.json; give the folder that holds the model's "
                "config.json and model.safetensors"
            )
        if not isinstance(config, dict):
            raise CheckpointError(
                f"{self.folder / 'config.json'} holds a {type(config).__name__} where an object of "
                "settings is expected; download it again"
            )
        return config

    def _read_weights(self) -> list[TensorInfo]:
        single = self.path(WEIGHTS)
        if single is not None:
            if self.path(INDEX) is not None:
                logger.warning("%s: %s is used and %s ignored", self.folder, WEIGHTS, INDEX)
            return self._open(single)
        index = self.read_json(INDEX)
        if index is None:
            raise CheckpointError(
                f"{self.folder} has no {WEIGHTS} and no {INDEX}{self._advice(self.folder)}"
            )
        return self._read_shards(index)

    def _read_shards(self, index: Any) -> list[TensorInfo]:
        source = self.folder / INDEX
        promised = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(promised, dict) or not promised:
            raise CheckpointError(
                f"{source} has no object 'weight_map' of tensor names to files; download it again"
            )
        for shard in promised.values():
            # Names only, no folders; read as on every system, so that C:x is refused on Linux too.
            if not isinstance(shard, str) or not _is_plain_name(shard):
                raise CheckpointError(
                    f"{source} names the shard {quoted(shard)}; a shard must be a plain file name "
                    "that ends in .safetensors"
                )
        infos: list[TensorInfo] = []
        found: dict[str, str] = {}
        for shard in sorted(set(promised.values())):
            path = self.path(shard)
            if path is None:
                raise CheckpointError(
                    f"{self.folder / shard} is missing, which {INDEX} lists; download it again"
                )
            opened = self._open(path)
            infos += opened
            for info in opened:
                if (other := found.setdefault(info.stored_name, shard)) != shard:
                    raise CheckpointError(
                        f"{path} and {self.folder / other} both hold {quoted(info.stored_name)}; "
                        "delete the shard that is left over from another save"
                    )
        for name, shard in promised.items():
            if found.get(name) != shard:
                raise CheckpointError(
                    f"{self.folder / shard} does not hold {quoted(name)}, which {INDEX} promises; "
                    "download both again"
                )
        if unlisted := found.keys() - promised.keys():
            name = min(unlisted)
            raise CheckpointError(
                f"{self.folder / found[name]} holds {quoted(name)}, which {INDEX} does not list; "
                "download both again"
            )
        return infos

    def _open(self, path: Path) -> list[TensorInfo]:
        """What the header of a safetensors file says, after its size and offsets are checked."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                start = file.read(8)
                length = int.from_bytes(start, "little")
                if start == b"version ":
                    raise CheckpointError(
                        f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`"
                    )
                if size < 8 or length > size - 8:
                    raise CheckpointError(
                        f"{path} is cut short or no safetensors file ({size:,} bytes); "
                        "download it again"
                    )
                self._header_bytes += 0 if path in self._files else length
                if self._header_bytes > MAX_HEADER_BYTES:
                    raise CheckpointError(
                        f"{path} has a header of {length:,} bytes, more than the "
                        f"{MAX_HEADER_BYTES:,} allowed for a model; it is no ModernBERT checkpoint"
                    )
                raw = file.read(length)
            self._files[path] = safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is no intact safetensors file ({quoted(error)}); download it again"
            ) from None
        header = parse_json(raw, f"the header of {path}")
        header.pop("__metadata__", None)
        return [_tensor_info(path, name, entry) for name, entry in header.items()]

    def _read_tensor(self, info: TensorInfo) -> torch.Tensor:
        tensor: torch.Tensor = self._files[info.file].get_tensor(info.stored_name)
        if tensor.is_floating_point() and tensor.numel():
            # One pass without temporaries; NaN wins both ends.
            low, high = torch.aminmax(tensor)
            if not (low.isfinite() and high.isfinite()):
                raise CheckpointError(
                    f"{info.file}: {quoted(info.stored_name)} contains NaN or infinity; the "
                    "weights are damaged, use another copy or an earlier training checkpoint"
                )
        return tensor

    def _advice(self, folder: Path) -> str:
        """What to do about weights that `folder` should have."""
        names = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
        pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
        if pickles:
            return (
                f", only pickled weights ({quoted(pickles[0])}), which can run code when they are "
                "read. If you trust their author, run "
                f"`modernbert convert {self.folder} NEW_FOLDER --allow-pickle`"
            )
        if self.revision is not None:
            return (
                "; pickled weights are never downloaded. If the repository has no others, fetch it "
                f"with `hf download {self.name} --local-dir FOLDER` and run "
                "`modernbert convert FOLDER NEW_FOLDER --allow-pickle`"
            )
        return "; give the folder the model was saved to"


def open_checkpoint(
    name: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Checkpoint:
    """Open a Hub repository or local folder; only headers are read, no tensor takes memory.

    Without a name, the checkpoint that ships with the package. `revision` is a branch, tag or
    commit, for Hub ids only. Without network the Hub's cache is used, as `local_files_only` (or
    HF_HUB_OFFLINE=1) demands from the start.

    Raises `CheckpointError` for a folder that cannot be trusted or is incomplete, and the
    exceptions of `huggingface_hub` for what the Hub refuses.
    """
    folder = locate(
        name,
        METADATA_PATTERNS + WEIGHT_PATTERNS,
        revision=revision,
        local_files_only=local_files_only,
        token=token,
        cache_dir=cache_dir,
    )
    return Checkpoint(name_of(name), folder)


def _is_plain_name(name: str) -> bool:
    return (
        name.isascii()
        and name.isprintable()
        and not any(mark in name for mark in "/\\:")
        and name.endswith(".safetensors")
    )


def _tensor_info(path: Path, stored: str, entry: dict[str, Any]) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{path} stores {quoted(stored)} as {entry['dtype']}, which is not supported; convert "
            f"it to one of {', '.join(DTYPES)}"
        )
    return TensorInfo(
        name=canonical_name(stored),
        dtype=DTYPES[entry["dtype"]],
        shape=tuple(entry["shape"]),
        file=path,
        stored_name=stored,
    )
