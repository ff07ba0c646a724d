"""Same weights, same numbers as transformers' ModernBERT: six classes, many configs, gradients.

Weights are at unit scale (each linear keeps the variance of its input, the layers together that
of the residual stream), so that a wrong window, theta or activation shows in the first digits; a
table of such mistakes proves it.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.modernbert import modeling_modernbert as oracle

import modernbert
from modernbert.config import ModernBertConfig

TOLERANCE = 2e-5  # float32: a few hundred roundings of numbers near 1
CLASSES = [
    "ModernBertModel",
    "ModernBertForMaskedLM",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
    "ModernBertForQuestionAnswering",
    "ModernBertForMultipleChoice",
]
BIASES = ["norm_bias", "attention_bias", "mlp_bias", "classifier_bias"]
SMALL = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 32,
    "max_position_embeddings": 1024,
}


@dataclass
class Case:
    name: str
    lengths: list[int]
    padding: str = "right"
    config: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("defaults", [50, 50], "none"),
    Case("one-token-row", [1, 90, 33]),
    Case("left-padding", [1, 90, 33], "left", {"classifier_pooling": "mean"}),
    Case("700-tokens", [700, 3], config={"local_attention": 128}),
    Case("window-2", [40, 7], config={"local_attention": 2}),
    Case("window-3", [40, 7], config={"local_attention": 3}),
    Case("window-128", [300, 65, 64], config={"local_attention": 128}),
    Case("single-text", [131], "none", {"local_attention": 128}),
    Case("single-token", [1], "none"),
    Case("1-head", [60, 61], config={"num_attention_heads": 1}),
    Case("2-heads", [60, 61], "left", {"num_attention_heads": 2, "classifier_pooling": "mean"}),
    Case("16-heads", [60, 61], config={"num_attention_heads": 16}),
    Case("mean", [200, 100, 1, 150], config={"classifier_pooling": "mean"}),
    Case("norm-bias", [70, 30], config={"norm_bias": True}),
    Case("attention-bias", [70, 30], config={"attention_bias": True}),
    Case("mlp-bias", [70, 30], config={"mlp_bias": True}),
    Case("classifier-bias", [70, 30], config={"classifier_bias": True}),
    Case("all-biases", [70, 30], config=dict.fromkeys(BIASES, True)),
    Case("no-decoder-bias", [70, 30], config={"decoder_bias": False}),
    Case("untied", [70, 30], config={"tie_word_embeddings": False}),
    Case("all-local", [150, 90], config={"layer_types": ["sliding_attention"] * 4}),
    Case("all-global", [150, 90], config={"layer_types": ["full_attention"] * 4}),
    Case(
        "irregular-layers",
        [150, 90, 17],
        config={"layer_types": ["sliding_attention", *["full_attention"] * 2, "sliding_attention"]},
    ),
    Case("every-second-global", [150, 90], config={"global_attn_every_n_layers": 2}),
    Case("7-layers", [128, 129], config={"num_hidden_layers": 7}),
    Case("other-thetas", [256, 90], config={"global_rope_theta": 1e6, "local_rope_theta": 5e2}),
    Case("tanh-gelu", [90, 20], config={"hidden_activation": "gelu_pytorch_tanh"}),
    Case("silu-head", [90, 20], config={"classifier_activation": "silu"}),
    Case("many-rows", [5, 80, 1, 33, 64, 65, 66, 2, 17, 80, 80, 1]),
]


def pair(class_name: str, settings: dict[str, Any], seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A transformers model at unit scale and ours with the same weights and config."""
    torch.manual_seed(seed)
    config = transformers.ModernBertConfig(**settings)
    with torch.device("meta"):
        theirs = getattr(transformers, class_name)(config)
    theirs = theirs.to_empty(device="cpu")
    for name, parameter in theirs.named_parameters():
        unit_scale_(name, parameter, config.num_hidden_layers)
    theirs.tie_weights()
    for kind in set(config.layer_types):  # buffers of a model built on meta are not filled
        frequencies, _ = oracle.ModernBertRotaryEmbedding.compute_default_rope_parameters(
            config, layer_type=kind
        )
        rotary = next(
            m for m in theirs.modules() if isinstance(m, oracle.ModernBertRotaryEmbedding)
        )
        setattr(rotary, f"{kind}_inv_freq", frequencies)
    ours = getattr(modernbert, class_name)(ModernBertConfig.from_dict(config.to_dict()))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.eval(), ours.eval()


@torch.no_grad()
def unit_scale_(name: str, parameter: Tensor, layers: int) -> None:
    if parameter.dim() == 2:
        branches = 2 * layers if "Wo" in name else 1
        parameter.normal_(0, (parameter.shape[1] * branches) ** -0.5)
    else:
        parameter.normal_(0 if name.endswith("bias") else 1, 0.3)


def padded(lengths: list[int], side: str, vocab_size: int) -> tuple[Tensor, Tensor | None]:
    """Random ids (B, L) and their mask, None without padding."""
    ids = torch.randint(3, vocab_size, (len(lengths), max(lengths)))
    if side == "none":
        assert len(set(lengths)) == 1
        return ids, None
    places = torch.arange(max(lengths))
    sizes = torch.tensor(lengths)[:, None]
    mask = places < sizes if side == "right" else places >= max(lengths) - sizes
    return ids.masked_fill(~mask, 0), mask.long()


def call(model: nn.Module, ids: Tensor, mask: Tensor | None, **extra: Any) -> dict[str, Tensor]:
    """Every tensor of the answer that is comparable at real tokens, by name."""
    out = model(ids, attention_mask=mask, output_hidden_states=True, **extra)
    found = {f"hidden_states[{i}]": x for i, x in enumerate(out.hidden_states)}
    for name in ("last_hidden_state", "logits", "start_logits", "end_logits", "loss"):
        value = getattr(out, name, None)
        if value is not None:
            found[name] = value
    if mask is not None:
        flat = mask.flatten(0, -2).bool() if mask.dim() == 3 else mask.bool()
        for name, value in found.items():
            if value.shape[:2] == flat.shape:
                found[name] = value[flat]
    return found


def difference(theirs: nn.Module, ours: nn.Module, ids: Tensor, mask: Tensor | None) -> float:
    with torch.no_grad():
        expected, actual = call(theirs, ids, mask), call(ours, ids, mask)
    assert expected.keys() == actual.keys()
    for name in expected:
        assert expected[name].shape == actual[name].shape, name
    return max(float((expected[n] - actual[n]).abs().max()) for n in expected)


def inputs_for(class_name: str, case: Case, vocab_size: int) -> tuple[Tensor, Tensor | None]:
    ids, mask = padded(case.lengths, case.padding, vocab_size)
    if class_name.endswith("MultipleChoice"):  # (B, C, L)
        other, _ = padded(case.lengths, case.padding, vocab_size)
        stack = torch.stack((ids, other.masked_fill(ids == 0, 0)), 1)
        return stack, None if mask is None else torch.stack((mask, mask), 1)
    return ids, mask


def settings_for(class_name: str, case: Case) -> dict[str, Any]:
    settings = {**SMALL, **case.config}
    if class_name.endswith(("SequenceClassification", "TokenClassification")):
        settings["num_labels"] = 5
    return settings


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("class_name", CLASSES)
def test_float32(class_name: str, case: Case) -> None:
    theirs, ours = pair(class_name, settings_for(class_name, case))
    ids, mask = inputs_for(class_name, case, SMALL["vocab_size"])
    assert difference(theirs, ours, ids, mask) < TOLERANCE


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("case", [c for c in CASES if c.padding != "left"], ids=str)
def test_float64(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers rounds q and k to float32 inside its RoPE; without that, 1e-10 holds."""

    def exact(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        rotate = oracle.rotate_half
        return q * cos + rotate(q) * sin, k * cos + rotate(k) * sin

    monkeypatch.setattr(oracle, "apply_rotary_pos_emb", exact)
    theirs, ours = pair("ModernBertForMaskedLM", settings_for("", case))
    ours.attention = ours.model.attention = backend
    ids, mask = padded(case.lengths, case.padding, SMALL["vocab_size"])
    assert difference(theirs.double(), ours.double(), ids, mask) < 1e-10


@pytest.mark.parametrize("class_name", CLASSES)
def test_base_size(class_name: str) -> None:
    settings = {"vocab_size": 50368} if class_name in CLASSES[:2] else {"vocab_size": 3000}
    if settings["vocab_size"] == 3000:
        settings["pad_token_id"] = 0
    theirs, ours = pair(class_name, {**settings, "classifier_pooling": "mean"})
    case = Case("base", [1, 200, 77])
    ids, mask = inputs_for(class_name, case, settings["vocab_size"])
    assert difference(theirs, ours, ids, mask) < TOLERANCE


def labels_for(class_name: str, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    rows = ids.shape[0]
    if class_name.endswith("MaskedLM"):
        labels = torch.where(torch.rand(ids.shape) < 0.3, ids, -100)
        labels[:, 0] = ids[:, 0]
    elif class_name.endswith("TokenClassification"):
        labels = torch.randint(0, 5, ids.shape)
    elif class_name.endswith("SequenceClassification"):
        return {"labels": torch.randint(0, 5, (rows,))}
    elif class_name.endswith("MultipleChoice"):
        return {"labels": torch.randint(0, 2, (rows,))}
    else:
        places = torch.randint(0, ids.shape[1], (2, rows))
        return {"start_positions": places[0], "end_positions": places[1]}
    return {"labels": labels if mask is None else labels.masked_fill(mask == 0, -100)}


GRADIENT_CASES = [
    Case("unpadded", [75, 75], "none", {"local_attention": 16}),
    Case("padded", [75, 1, 40], config={"local_attention": 16, "norm_bias": True}),
]


@pytest.mark.parametrize("backend", ["reference", "blocked"])
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=str)
@pytest.mark.parametrize("class_name", CLASSES[1:])
def test_gradients(class_name: str, case: Case, backend: str) -> None:
    if class_name.endswith("QuestionAnswering") and case.padding != "none":
        case = GRADIENT_CASES[0]  # transformers counts the garbage at pads into this loss
    theirs, ours = pair(class_name, settings_for(class_name, case))
    ours.attention = ours.model.attention = backend
    ids, mask = inputs_for(class_name, case, SMALL["vocab_size"])
    labels = labels_for(class_name, ids, mask)
    for model in (theirs.train(), ours.train()):
        model(ids, attention_mask=mask, **labels).loss.backward()
    expected = dict(theirs.named_parameters())
    actual = dict(ours.named_parameters())
    assert expected.keys() == actual.keys()
    shifted = ("classifier.bias", "head.norm.bias")
    for name, parameter in expected.items():
        gradient = actual[name].grad
        assert parameter.grad is not None and gradient is not None, name
        if name in shifted and class_name.endswith(("Answering", "Choice")):
            # Their softmax runs over texts or tokens, which one constant shifts alike: exactly 0.
            assert max(float(gradient.norm()), float(parameter.grad.norm())) < 1e-6
            continue
        error = (gradient - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-5, (name, float(error))


def swap_halves(ours: nn.Module) -> None:
    for layer in ours.layers:
        weight = layer.mlp.Wi.weight
        weight.data = weight.data.roll(weight.shape[0] // 2, 0)


def norm_in_first_layer(ours: nn.Module) -> None:
    ours.layers[0].attn_norm = type(ours.final_norm)(SMALL["hidden_size"], bias=False)


MISTAKES: dict[str, Any] = {
    "swapped thetas": {"global_rope_theta": 10000.0, "local_rope_theta": 160000.0},
    "one theta": {"local_rope_theta": 160000.0},
    "window 63": {"local_attention": 126},
    "window 65": {"local_attention": 130},
    "window as radius": {"local_attention": 256},
    "tanh GELU": {"hidden_activation": "gelu_pytorch_tanh"},
    "norm epsilon": {"norm_eps": 1e-3},
    "all global": {"layer_types": ("full_attention",) * 4},
    "global layers shifted": {
        "layer_types": tuple(
            "full_attention" if i % 3 == 1 else "sliding_attention" for i in range(4)
        )
    },
    "swapped GeGLU halves": swap_halves,
    "norm in layer 0": norm_in_first_layer,
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_comparison_catches(mistake: str) -> None:
    theirs, ours = pair("ModernBertModel", {**SMALL, "local_attention": 128})
    ids, mask = padded([300, 90], "right", SMALL["vocab_size"])
    assert difference(theirs, ours, ids, mask) < TOLERANCE
    change = MISTAKES[mistake]
    if callable(change):
        change(ours)
    else:
        changed = modernbert.ModernBertModel(ours.config.replace(**change)).eval()
        changed.load_state_dict(ours.state_dict())
        ours = changed
    assert difference(theirs, ours, ids, mask) > 5 * TOLERANCE


def test_every_class_of_transformers_is_covered() -> None:
    exported = {n for n in oracle.__all__ if "PreTrained" not in n}
    assert exported == set(CLASSES)


def test_sparse_prediction() -> None:
    theirs, ours = pair("ModernBertForMaskedLM", {**SMALL, "sparse_prediction": True})
    ids, mask = padded([60, 31], "right", SMALL["vocab_size"])
    labels = labels_for("ModernBertForMaskedLM", ids, mask)
    expected, actual = theirs(ids, mask, **labels), ours(ids, mask, **labels)
    assert actual.logits.shape == (int((labels["labels"] != -100).sum()), SMALL["vocab_size"])
    torch.testing.assert_close(actual.logits, expected.logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(actual.loss, expected.loss, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    ("problem", "num_labels"),
    list(itertools.product(["regression", "multi_label_classification", None], [1, 4]))
    + [("single_label_classification", 4)],
)
def test_classification_losses(problem: str | None, num_labels: int) -> None:
    settings = {**SMALL, "num_labels": num_labels, "problem_type": problem}
    theirs, ours = pair("ModernBertForSequenceClassification", settings)
    ids, mask = padded([60, 31, 8], "right", SMALL["vocab_size"])
    shape = (3,) if num_labels == 1 else (3, num_labels)
    labels = torch.rand(shape)
    if problem == "single_label_classification":
        labels = torch.randint(0, num_labels, (3,))
    elif problem == "multi_label_classification":
        labels = torch.randint(0, 2, (3, num_labels)).float()
    expected = theirs(ids, mask, labels=labels).loss
    torch.testing.assert_close(ours(ids, mask, labels=labels).loss, expected, atol=1e-5, rtol=1e-5)


def test_attention_maps() -> None:
    theirs, ours = pair("ModernBertModel", SMALL)
    theirs.set_attn_implementation("eager")
    ours.attention = "reference"
    ids, mask = padded([50, 21], "right", SMALL["vocab_size"])
    expected = theirs(ids, mask, output_attentions=True).attentions
    actual = ours(ids, mask, output_attentions=True).attentions
    both = (mask[:, :, None] * mask[:, None, :])[:, None].bool()
    for theirs_map, ours_map in zip(expected, actual, strict=True):
        assert ours_map.shape == theirs_map.shape
        torch.testing.assert_close(
            ours_map, theirs_map.masked_fill(~both, 0.0), atol=TOLERANCE, rtol=0
        )
