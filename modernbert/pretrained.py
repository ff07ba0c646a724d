"""What every model class shares: loading, saving, devices, embeddings.

A model is built without memory (on the meta device) and then filled by a loop over its own
parameters, so that a missing, extra or misshapen tensor is an error by name.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from modernbert.config import ModernBertConfig
from modernbert.int8 import is_quantized
from modernbert.kernels import BACKENDS, computes_natively
from modernbert.weights import (
    EMBEDDED_NAME,
    Checkpoint,
    CheckpointError,
    ModelFolder,
    open_checkpoint,
    push_folder,
    save_folder,
)

logger = logging.getLogger("modernbert")

DECODER = "decoder.weight"
EMBEDDINGS = "model.embeddings.tok_embeddings.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Output:
    """Base of the result dataclasses: fields by name, or by position without the empty ones."""

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __getitem__(self, key: int | slice | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        values = (getattr(self, spec.name) for spec in dataclasses.fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)


def trunc_normal(module: nn.Linear | nn.Embedding, std: float, config: ModernBertConfig) -> None:
    """Normal weights cut at initializer_cutoff_factor standard deviations; zero bias."""
    cut = config.initializer_cutoff_factor * std
    nn.init.trunc_normal_(module.weight, 0.0, std, -cut, cut)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class PreTrainedModel(nn.Module):
    """Base of every model class."""

    # Modules that start from random numbers when a checkpoint has nothing of them.
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ModernBertConfig, *, attention: str = "auto"):
        if attention not in ("auto", *BACKENDS):
            raise ValueError(f"attention={attention!r}; choose auto, {', '.join(BACKENDS)}")
        super().__init__()
        self.config = config
        self.attention = attention
        self.checkpoint: ModelFolder | None = None  # the folder it was loaded from

    # -- weights ----------------------------------------------------------------------------

    def reset_parameters(self) -> None:
        """Fill the weights with the random numbers of the published recipe."""
        raise NotImplementedError

    def initialize(self) -> None:
        """Last step of every constructor: random weights (unless on meta), shared weights."""
        if not next(self.parameters()).is_meta:
            self.reset_parameters()
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the tensors that the config says are one; only the masked LM has any."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        attention: str = "auto",
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        **changes: Any,
    ) -> Self:
        """Load a Hub id or a folder, ready for inference (`eval()`).

        Args:
            name_or_path: "answerdotai/ModernBERT-base", or a folder with `config.json` and
                safetensors; by default modernbert-mini, which ships with the package.
            revision: branch, tag or commit of the Hub repository.
            dtype: of the weights; by default the stored one where the device computes in it
                natively, else float32.
            device: where the weights go; the CPU by default.
            attention: the attention backend.
            local_files_only, token, cache_dir: as in `huggingface_hub`.
            changes: fields of the config to override, such as `num_labels=3`.

        Raises `CheckpointError` (a `ValueError`) for a folder that cannot be loaded exactly, and
        `huggingface_hub`'s own errors for the network.
        """
        checkpoint = open_checkpoint(
            name_or_path,
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
        )
        return cls.from_checkpoint(
            checkpoint, dtype=dtype, device=device, attention=attention, **changes
        )

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        attention: str = "auto",
        **changes: Any,
    ) -> Self:
        """`from_pretrained` for a checkpoint that is already open."""
        config = read_config(checkpoint, **changes)
        target = torch.device(device or "cpu")
        kind = choose_dtype(checkpoint, dtype, target)
        with torch.device("meta"):
            model = cls(config, attention=attention)
        missing = model._check(checkpoint)
        for name, parameter in list(model.named_parameters()):
            if name in missing:
                values = torch.empty_like(parameter, dtype=kind, device=target)
            else:
                values = checkpoint.get(model.canonical(name)).to(target, kind)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.Parameter(values))
        if missing:
            with torch.no_grad():
                model.reset_optional(missing)
            logger.warning(
                "%s has no %s: random weights, train them before use",
                checkpoint.name,
                ", ".join(missing),
            )
        model.tie_weights()
        model._check_tied(checkpoint)
        # Not the checkpoint itself: open files cannot be copied or sent to another process.
        model.checkpoint = ModelFolder(checkpoint.name, checkpoint.folder)
        return model.eval()

    def reset_optional(self, names: list[str]) -> None:
        """Random numbers for those of the `optional` tensors that a checkpoint does not hold."""

    @classmethod
    def canonical(cls, name: str) -> str:
        """The checkpoint's name of a parameter; the bare encoder is `model.` in checkpoints."""
        prefixes = ("model.", "head.", "decoder.", "classifier.")
        return name if name.startswith(prefixes) else f"model.{name}"

    def _check(self, checkpoint: Checkpoint) -> list[str]:
        """Compare names, shapes and dtypes; the names of tensors that are to be initialised."""
        own = {self.canonical(name): p for name, p in self.named_parameters()}
        missing = sorted(own.keys() - checkpoint.tensors.keys())
        # A base model has nothing of a head; half a head, or less than its own, is a broken file.
        stored = {name.split(".")[0] for name in checkpoint.tensors}
        absent = [part for part in self.optional if part not in stored]
        fresh = [name for name in missing if name.split(".")[0] in absent]
        if "classifier" in stored:
            fresh = []
        missing = [name for name in missing if name not in fresh]
        # What belongs to a head that this class does not have is of no concern to it.
        others = {part for part in ("head", "decoder", "classifier") if not hasattr(self, part)}
        extra = sorted(
            name
            for name in checkpoint.tensors.keys() - own.keys()
            if name.split(".")[0] not in others
            and not (name == DECODER and self.config.tie_word_embeddings)
        )
        for problem, names in (("lacks", missing), ("holds unexpected", extra)):
            if names:
                shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" * (len(names) > 8))
                raise CheckpointError(
                    f"{checkpoint.name} {problem} {shown}: its tensors do not belong to a "
                    f"{type(self).__name__} with its config.json"
                )
        for name, parameter in own.items():
            if name in fresh:
                continue
            info = checkpoint.tensors[name]
            if info.shape != tuple(parameter.shape):
                raise CheckpointError(
                    f"{info.file.name}: {info.stored_name} has shape {list(info.shape)}, "
                    f"config.json asks for {list(parameter.shape)}"
                )
            if not info.dtype.is_floating_point:
                raise CheckpointError(
                    f"{info.file.name}: {info.stored_name} is {info.dtype}, not a floating dtype"
                )
        return fresh

    def _check_tied(self, checkpoint: Checkpoint) -> None:
        """A stored decoder.weight that differs from the embeddings contradicts the config."""
        if DECODER in checkpoint.tensors and self.get_output_embeddings() is not None:
            if self.config.tie_word_embeddings and not torch.equal(
                checkpoint.get(DECODER), checkpoint.get(EMBEDDINGS)
            ):
                raise CheckpointError(
                    f"{checkpoint.name}: decoder.weight differs from the token embeddings although "
                    "tie_word_embeddings is true; pass tie_word_embeddings=False to keep both"
                )

    def tensors_to_save(self) -> dict[str, Tensor]:
        """Every parameter by its name in the checkpoint, shared ones once.

        Raises `ValueError` for a model that has given up its weights: with 8-bit layers, or after
        `optimize()`.
        """
        if getattr(self.encoder(), "optimized", False):
            raise ValueError(
                "an optimized model cannot be saved, its weights are folded: save it before "
                "optimize(), or load it anew"
            )
        if is_quantized(self):
            raise ValueError("an int8 model cannot be saved: save the one that it was made from")
        return {name: p.detach() for name, p in self.named_parameters()}

    def files_to_save(self) -> dict[str, bytes]:
        """config.json, and the tokenizer files of the checkpoint this model was loaded from."""
        dtype = str(self.dtype).removeprefix("torch.")
        config = self.config.replace(architectures=(type(self).__name__,), dtype=dtype)
        text = json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
        files = {"config.json": text.encode()}
        if self.checkpoint is not None:
            for name in TOKENIZER_FILES:
                content = self.checkpoint.read_bytes(name)
                if content is not None:
                    files[name] = content
        return files

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write safetensors, config.json and the tokenizer it was loaded with.

        The folder appears complete or, if anything fails, stays what it was.
        """
        save_folder(
            Path(folder),
            files=self.files_to_save(),
            tensors=self.tensors_to_save(),
            max_shard_size=max_shard_size,
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; the commit's URL. Options: see `push_folder`."""
        return push_folder(self.save_pretrained, repo_id, **options)

    # -- the module -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def num_parameters(self) -> int:
        """Parameters, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def encoder(self) -> nn.Module:
        """The `ModernBertModel` inside."""
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding table, (vocab_size, D)."""
        return self.encoder().get_input_embeddings()  # type: ignore[operator]

    def set_input_embeddings(self, table: nn.Embedding) -> None:
        """Replace the token embedding table."""
        self.encoder().set_input_embeddings(table)  # type: ignore[operator]
        self.tie_weights()

    def get_output_embeddings(self) -> nn.Linear | None:
        """The decoder of a masked LM; None for other heads."""
        return None

    def gradient_checkpointing_enable(self) -> None:
        """Recompute each layer in the backward pass instead of storing its activations."""
        self.encoder().gradient_checkpointing = True  # type: ignore[assignment]

    def gradient_checkpointing_disable(self) -> None:
        """Store activations again."""
        self.encoder().gradient_checkpointing = False  # type: ignore[assignment]

    @torch.no_grad()
    def resize_token_embeddings(self, vocab_size: int) -> nn.Embedding:
        """Grow or cut the vocabulary; new rows start at the mean of the old ones.

        Returns the new table; the config and a masked LM's decoder follow.
        """
        config = self.config.replace(vocab_size=vocab_size)
        old = self.get_input_embeddings()
        table = nn.Embedding(
            vocab_size,
            old.embedding_dim,
            config.pad_token_id,
            device=old.weight.device,
            dtype=old.weight.dtype,
        )
        table.weight.copy_(_resized(old.weight, vocab_size))
        decoder = self.get_output_embeddings()
        if decoder is not None:
            if decoder.bias is not None:
                decoder.bias = nn.Parameter(_resized(decoder.bias, vocab_size))
            decoder.weight = nn.Parameter(_resized(decoder.weight, vocab_size))
            decoder.out_features = vocab_size
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.config = config
        self.set_input_embeddings(table)
        return table


def best_device() -> torch.device:
    """The accelerator of this machine (CUDA, MPS, ...), else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def read_config(checkpoint: Checkpoint, **changes: Any) -> ModernBertConfig:
    """The config of a checkpoint, checked against what the files hold before anything is built."""
    unknown = changes.keys() - {spec.name for spec in dataclasses.fields(ModernBertConfig)}
    if unknown:
        raise ValueError(f"unknown options or config fields: {', '.join(sorted(unknown))}")
    try:
        source = f"{checkpoint.name}/config.json"
        config = ModernBertConfig.from_dict(checkpoint.config, source=source).replace(**changes)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    layers = {n.split(".")[2] for n in checkpoint.tensors if n.startswith("model.layers.")}
    if len(layers) != config.num_hidden_layers:
        raise CheckpointError(
            f"{checkpoint.name}: config.json says num_hidden_layers {config.num_hidden_layers}, "
            f"the safetensors files hold {len(layers)} layers"
        )
    return config


def choose_dtype(
    checkpoint: Checkpoint, dtype: torch.dtype | str | None, device: torch.device
) -> torch.dtype:
    """The dtype asked for, else the stored one where `device` computes in it, else float32."""
    if dtype is not None and dtype != "auto":
        chosen = (
            getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
        )
        if not isinstance(chosen, torch.dtype) or not chosen.is_floating_point:
            raise ValueError(f"dtype={dtype!r} is not a floating dtype such as 'float32'")
        return chosen
    info = checkpoint.tensors.get(EMBEDDINGS)
    stored = torch.float32 if info is None else info.dtype
    if computes_natively(stored, device):
        return stored
    # What ships is in half precision to be small: nothing that its user could change.
    level = logging.INFO if checkpoint.name == EMBEDDED_NAME else logging.WARNING
    logger.log(
        level,
        "%s is stored in %s, which this %s only emulates: loading it in float32 "
        "(pass dtype= to choose)",
        checkpoint.name,
        str(stored).removeprefix("torch."),
        device.type.upper(),
    )
    return torch.float32


def _resized(weight: Tensor, size: int) -> Tensor:
    """The first `size` rows of a table (V, ...), filled up with the mean row."""
    if size <= len(weight):
        return weight[:size].clone()
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat((weight, mean.expand(size - len(weight), *weight.shape[1:])))
