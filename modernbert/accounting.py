"""What a model costs, from its config alone: parameters, memory, arithmetic. No torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from modernbert.config import FULL, ModernBertConfig
from modernbert.weights.manifest import expected_tensors

HEADS = {
    "ForMaskedLM": "masked_lm",
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "classification",
    "ForQuestionAnswering": "classification",
    "ForMultipleChoice": "classification",
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Flops:
    """Floating-point operations per token of the encoder: 2 for each multiply-add.

    Attributes:
        linear: the linear layers.
        global_attention, local_attention: q k^T and the weighted sum of v.
    """

    linear: float
    global_attention: float
    local_attention: float

    @property
    def total(self) -> float:
        return self.linear + self.global_attention + self.local_attention


def flops_per_token(config: ModernBertConfig, length: int) -> Flops:
    """The forward pass of the encoder, per token of a text of `length` tokens, without a head.

    Norms, activations and the softmax are left out: they are bound by memory, not arithmetic.
    """
    tensors = expected_tensors(asdict(config), None)
    matrices = [shape for shape in tensors.values() if len(shape) == 2]
    linear = 2 * sum(map(prod, matrices[1:]))  # the first is the embedding table: a look-up
    reach = min(config.sliding_window, length - 1)
    keys_seen = (2 * reach + 1) - reach * (reach + 1) / length  # the ends of a text see fewer
    layers_global = config.layer_types.count(FULL)
    layers_local = config.num_hidden_layers - layers_global
    per_key = 4 * config.hidden_size
    return Flops(linear, per_key * length * layers_global, per_key * keys_seen * layers_local)


def flops_of_decoder(config: ModernBertConfig) -> float:
    """What predicting one masked token adds."""
    return 2 * config.hidden_size * (config.hidden_size + config.vocab_size)


def parameters_by_part(config: ModernBertConfig) -> dict[str, int]:
    """Numbers of parameters of the model class that the config names, shared ones once.

    The parts are embeddings, attention, mlp, norms, head and decoder or classifier; a config that
    names no class is taken for the encoder alone.
    """
    architecture = _architecture(config)
    head = next((kind for name, kind in HEADS.items() if architecture.endswith(name)), None)
    labels = 1 if architecture.endswith("ForMultipleChoice") else config.num_labels
    parts: dict[str, int] = {}
    for name, shape in expected_tensors(asdict(config), head, num_labels=labels).items():
        part = _part(name)
        parts[part] = parts.get(part, 0) + prod(shape)
    return parts


def _architecture(config: ModernBertConfig) -> str:
    return str(config.architectures[0]) if config.architectures else "ModernBertModel"


def _part(name: str) -> str:
    if not name.startswith("model."):
        return name.split(".")[0]  # head, decoder, classifier
    if "norm" in name:
        return "norms"
    return next(part for part in ("embeddings", "attn", "mlp") if part in name)


def account(config: ModernBertConfig, lengths: tuple[int, ...] = (512, 8192)) -> dict[str, Any]:
    """All figures of `modernbert info`, as a JSON object."""
    parts = parameters_by_part(config)
    total = sum(parts.values())
    layers_global = config.layer_types.count(FULL)
    flops: Mapping[int, Flops] = {length: flops_per_token(config, length) for length in lengths}
    return {
        "architecture": _architecture(config),
        "layers": {
            "all": config.num_hidden_layers,
            "global": layers_global,
            "local": config.num_hidden_layers - layers_global,
        },
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "attention_heads": config.num_attention_heads,
        "vocabulary": config.vocab_size,
        "window": config.local_attention,
        "parameters": {**parts, "total": total},
        "bytes": {name: size * total for name, size in BYTES.items()},
        "flops_per_token": {
            str(length): {**asdict(figures), "total": figures.total}
            for length, figures in flops.items()
        },
        "flops_per_predicted_token": flops_of_decoder(config) if "decoder" in parts else None,
    }
