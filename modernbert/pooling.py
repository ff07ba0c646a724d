"""From token states to one vector per text: sentence-transformers' Pooling, Dense and Normalize.

Shapes: T = packed tokens of the batch, B = texts, D = hidden size, d = width of the vectors.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert import kernels
from modernbert.packing import PackedBatch
from modernbert.weights import Checkpoint, CheckpointError

# The pooling modes and the booleans that stand for them in files up to sentence-transformers 5.3.
# Files of that age concatenate several modes in this order.
POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (nn.Tanh, nn.Identity, nn.ReLU, nn.GELU, nn.Sigmoid)
}


class Pooling(nn.Module):
    """One vector per text from its token states; several modes are concatenated.

    With `include_prompt=False` the tokens of the prompt, [CLS] among them, are left out.
    `weightedmean` weighs a token by its place in the text, from 1, prompt included.
    """

    def __init__(
        self, hidden_size: int, modes: Sequence[str] = ("mean",), *, include_prompt: bool = True
    ) -> None:
        super().__init__()
        unknown = [mode for mode in modes if mode not in POOLING_FLAGS]
        if unknown or not modes:
            raise ValueError(f"pooling mode {unknown}: choose from {', '.join(POOLING_FLAGS)}")
        self.hidden_size = hidden_size
        self.modes = tuple(modes)
        self.include_prompt = include_prompt
        self.out_features = len(self.modes) * hidden_size

    def first_only(self, prompt_length: int = 0) -> bool:
        """Whether the first state of each text is all that is looked at."""
        return self.modes == ("cls",) and (self.include_prompt or not prompt_length)

    def forward(self, hidden: Tensor, batch: PackedBatch, prompt_length: int = 0) -> Tensor:
        """Token states (T, D) to vectors (B, D x modes), float32 when the states are narrower."""
        x = hidden.float() if hidden.dtype.itemsize < 4 else hidden
        offsets, positions = batch.cu_seqlens.long(), batch.positions
        if prompt_length and not self.include_prompt:
            # A merge across the seam can make prompt + text shorter than the prompt: keep a token.
            counts = offsets.diff()
            skips = (counts - 1).clamp(0, prompt_length)
            kept = positions >= skips.repeat_interleave(counts, output_size=len(positions))
            x, positions = x[kept], positions[kept]
            offsets = F.pad((counts - skips).cumsum(0), (1, 0))
        return torch.cat([self._pool(mode, x, positions, offsets) for mode in self.modes], dim=-1)

    @staticmethod
    def _pool(mode: str, x: Tensor, positions: Tensor, offsets: Tensor) -> Tensor:
        """One mode; text i is x[offsets[i] : offsets[i + 1]]."""
        if mode == "cls":
            return x[offsets[:-1]]
        if mode == "lasttoken":
            return x[offsets[1:] - 1]
        if mode == "max":
            return torch.segment_reduce(x, "max", offsets=offsets, axis=0)
        if mode == "weightedmean":
            weights = (positions + 1).to(x.dtype)[:, None]  # (T, 1)
            return kernels.mean_pool(x * weights, offsets) / kernels.mean_pool(weights, offsets)
        mean = kernels.mean_pool(x, offsets)
        if mode == "mean":
            return mean
        return mean * offsets.diff().to(x.dtype).sqrt()[:, None]

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, hidden_size: int, source: str) -> "Pooling":
        """Read a Pooling `config.json` of either layout; `source` names it in errors."""
        width = config.get("embedding_dimension", config.get("word_embedding_dimension"))
        if width != hidden_size:
            raise CheckpointError(
                f"{source} pools vectors of {width!r}, the model's hold {hidden_size}"
            )
        modes = config.get("pooling_mode")
        if modes is None:
            modes = [mode for mode, flag in POOLING_FLAGS.items() if config.get(flag)] or ["mean"]
        modes = [modes] if isinstance(modes, str) else modes
        if not isinstance(modes, list) or not all(isinstance(mode, str) for mode in modes):
            raise CheckpointError(f"{source}: pooling_mode is {modes!r}; expected a name or a list")
        try:
            include_prompt = bool(config.get("include_prompt", True))
            return cls(hidden_size, modes, include_prompt=include_prompt)
        except ValueError as error:
            raise CheckpointError(f"{source}: {error}") from None

    def to_config(self) -> dict[str, Any]:
        """The form up to sentence-transformers 5.3, which TEI, vLLM and llama.cpp read too."""
        flags = {flag: mode in self.modes for mode, flag in POOLING_FLAGS.items()}
        config: dict[str, Any] = {"word_embedding_dimension": self.hidden_size, **flags}
        config["include_prompt"] = self.include_prompt
        if self.modes != tuple(mode for mode in POOLING_FLAGS if mode in self.modes):
            # Booleans have no order. This key makes old readers refuse what they would get wrong.
            config["pooling_mode"] = list(self.modes)
        return config


class Dense(nn.Module):
    """A linear map and an activation on the sentence vector: (B, in) to (B, out)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        activation_function: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, bias=bias)
        self.activation_function = activation_function or nn.Tanh()

    @property
    def out_features(self) -> int:
        return self.linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.linear.weight.to(x.dtype), self.linear.bias
        return self.activation_function(F.linear(x, weight, None if bias is None else bias.to(x)))

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, path: str, *, in_features: int) -> "Dense":
        """Read the folder `path` ("2_Dense/"); raises `CheckpointError` by file, key and value."""
        config, source = (
            checkpoint.read_json(f"{path}config.json"),
            f"{checkpoint.name}/{path}config.json",
        )
        if not isinstance(config, dict):
            raise CheckpointError(f"{source} is missing or holds no JSON object")
        sizes: dict[str, Any] = {key: config.get(key) for key in ("in_features", "out_features")}
        for key, value in sizes.items():
            if type(value) is not int or not 1 <= value <= 2**20:
                raise CheckpointError(f"{source}: {key} is {value!r}; expected a positive integer")
        if sizes["in_features"] != in_features:
            raise CheckpointError(
                f"{source}: in_features is {sizes['in_features']}, "
                f"the module before it gives {in_features}"
            )
        for key, expected in (
            ("module_input_name", "sentence_embedding"),
            ("module_output_name", "sentence_embedding"),
            ("use_residual", False),
        ):
            if config.get(key) not in (None, expected):
                raise CheckpointError(
                    f"{source}: {key} is {config[key]!r}; this library implements {expected!r} only"
                )
        activation = config.get("activation_function", "torch.nn.modules.activation.Tanh")
        if activation not in list(ACTIVATIONS):
            raise CheckpointError(
                f"{source}: activation_function is {activation!r}; known: {', '.join(ACTIVATIONS)}"
            )
        with torch.device("meta"):
            dense = cls(
                **sizes,
                bias=bool(config.get("bias", True)),
                activation_function=ACTIVATIONS[activation](),
            )
        tensors = checkpoint.read_tensors(f"{path}model.safetensors")
        expected_shapes = {name: tuple(p.shape) for name, p in dense.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != expected_shapes:
            raise CheckpointError(f"{source} asks for {expected_shapes}, the weights are {found}")
        if not all(tensor.is_floating_point() for tensor in tensors.values()):
            raise CheckpointError(f"{source}: the weights beside it are not floating-point numbers")
        dense.load_state_dict({name: x.float() for name, x in tensors.items()}, assign=True)
        return dense

    def to_config(self) -> dict[str, Any]:
        """The Dense `config.json` that every sentence-transformers reads."""
        kind = type(self.activation_function)
        return {
            "in_features": self.linear.in_features,
            "out_features": self.linear.out_features,
            "bias": self.linear.bias is not None,
            "activation_function": f"{kind.__module__}.{kind.__name__}",
        }


class Normalize(nn.Module):
    """Scales each vector to length 1: (B, d) to (B, d); a zero vector stays zero."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1)
