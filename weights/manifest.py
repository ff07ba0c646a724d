"""What the official checkpoints hold: every tensor's name and shape, from the sizes alone."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any


def _sizes(vocab: int, hidden: int, layers: int, heads: int, intermediate: int) -> dict[str, int]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
    }


# All of them are masked language models with the default bias flags and a tied decoder.
OFFICIAL = {
    "answerdotai/ModernBERT-base": _sizes(50368, 768, 22, 12, 1152),
    "answerdotai/ModernBERT-large": _sizes(50368, 1024, 28, 16, 2624),
    "jhu-clsp/ettin-encoder-17m": _sizes(50368, 256, 7, 4, 384),
    "jhu-clsp/ettin-encoder-32m": _sizes(50368, 384, 10, 6, 576),
    "jhu-clsp/ettin-encoder-68m": _sizes(50368, 512, 19, 8, 768),
    "jhu-clsp/ettin-encoder-150m": _sizes(50368, 768, 22, 12, 1152),
    "jhu-clsp/ettin-encoder-400m": _sizes(50368, 1024, 28, 16, 2624),
    "jhu-clsp/ettin-encoder-1b": _sizes(50368, 1792, 28, 28, 3840),
    "jhu-clsp/mmBERT-small": _sizes(256000, 384, 22, 6, 1152),
    "jhu-clsp/mmBERT-base": _sizes(256000, 768, 22, 12, 1152),
}


def expected_tensors(
    config: Mapping[str, Any], head: str | None = "masked_lm", *, num_labels: int = 2
) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that a checkpoint stores, in file order.

    `config` has Hugging Face's field names: the sizes of `OFFICIAL`, and optionally the bias flags
    and `tie_word_embeddings`. `head` is None for the backbone, "masked_lm", or "classification"
    for the four fine-tuned classes (`num_labels`: 2 for question answering, 1 for multiple choice).

    Raises `ValueError` for another head.
    """
    if head not in (None, "masked_lm", "classification"):
        raise ValueError(f"head is {head!r}; use None, 'masked_lm' or 'classification'")
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    intermediate = config["intermediate_size"]

    def norm(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (hidden,)
        if config.get("norm_bias", False):
            yield f"{name}.bias", (hidden,)

    def linear(name: str, d_out: int, d_in: int, bias: bool) -> Iterator[tuple[str, Any]]:
        yield f"{name}.weight", (d_out, d_in)
        if bias:
            yield f"{name}.bias", (d_out,)

    def tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embeddings.tok_embeddings.weight", (vocab, hidden)
        yield from norm("model.embeddings.norm")
        attention_bias = config.get("attention_bias", False)
        mlp_bias = config.get("mlp_bias", False)
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            if layer > 0:  # the embeddings' norm has just run before layer 0
                yield from norm(f"{name}.attn_norm")
            yield from linear(f"{name}.attn.Wqkv", 3 * hidden, hidden, attention_bias)
            yield from linear(f"{name}.attn.Wo", hidden, hidden, attention_bias)
            yield from norm(f"{name}.mlp_norm")
            yield from linear(f"{name}.mlp.Wi", 2 * intermediate, hidden, mlp_bias)
            yield from linear(f"{name}.mlp.Wo", hidden, intermediate, mlp_bias)
        yield from norm("model.final_norm")
        if head is None:
            return
        yield from linear("head.dense", hidden, hidden, config.get("classifier_bias", False))
        yield from norm("head.norm")
        if head == "classification":
            yield from linear("classifier", num_labels, hidden, True)
            return
        if not config.get("tie_word_embeddings", True):
            yield "decoder.weight", (vocab, hidden)
        if config.get("decoder_bias", True):
            yield "decoder.bias", (vocab,)

    return dict(tensors())


def parameters_of(name: str, head: str | None = "masked_lm") -> int:
    """The number of parameters of an official model; `ValueError` for an unknown name."""
    if name not in OFFICIAL:
        raise ValueError(f"{name!r} is no official model; known are {', '.join(OFFICIAL)}")
    return sum(prod(shape) for shape in expected_tensors(OFFICIAL[name], head).values())
