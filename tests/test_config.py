"""Every dialect of config.json, what each trap in it means, and what is refused by name."""

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from modernbert.config import FULL, INTEGER_BOUNDS, SLIDING, ModernBertConfig

# The published form of answerdotai/ModernBERT-base, as transformers 4 wrote it.
V4_BASE = {
    "_name_or_path": "ModernBERT-base",
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "sep_token_id": 50282,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
    "vocab_size": 50368,
}
LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2624,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
}


def v5_form(v4: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 5 writes it: no thetas, but layer types and RoPE settings."""
    raw = dict(v4)
    thetas = {FULL: raw.pop("global_rope_theta"), SLIDING: raw.pop("local_rope_theta")}
    raw["rope_parameters"] = {
        kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()
    }
    every = raw.pop("global_attn_every_n_layers")
    raw["layer_types"] = [SLIDING if i % every else FULL for i in range(raw["num_hidden_layers"])]
    raw["dtype"] = raw.pop("torch_dtype")
    raw["transformers_version"] = "5.3.0"
    return raw


MMBERT = {
    **V4_BASE,
    "vocab_size": 256000,
    "local_rope_theta": 160000.0,
    "bos_token_id": 2,
    "cls_token_id": 1,
    "eos_token_id": 1,
    "sep_token_id": 1,
    "pad_token_id": 0,
}
MMBERT_V5 = v5_form(MMBERT)
FLEXBERT = {
    "model_type": "bert",
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "attention_layer": "rope",
    "attention_probs_dropout_prob": 0.0,
    "attn_out_bias": False,
    "attn_out_dropout_prob": 0.1,
    "bert_layer": "prenorm",
    "decoder_bias": True,
    "embed_dropout_prob": 0.0,
    "embed_norm": True,
    "embedding_layer": "sans_pos",
    "final_norm": True,
    "global_attn_every_n_layers": 3,
    "head_class_act": "silu",
    "head_pred_act": "gelu",
    "hidden_act": "gelu",
    "init_cutoff_factor": 2.0,
    "layer_norm_eps": 1e-12,
    "local_attn_rotary_emb_base": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_dropout_prob": 0.0,
    "mlp_in_bias": False,
    "mlp_layer": "glu",
    "norm_kwargs": {"eps": 1e-05, "bias": False},
    "normalization": "layernorm",
    "pooling_type": "mean",
    "rotary_emb_base": 160000.0,
    "rotary_emb_dim": None,
    "rotary_emb_interleaved": False,
    "skip_first_prenorm": True,
    "sliding_window": 128,
}

read = ModernBertConfig.from_dict


def meaning(config: ModernBertConfig) -> dict[str, Any]:
    """All of a config that changes what a model computes, without what is only carried along."""
    own = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(config)}
    for name in ("extra", "dtype", "architectures", "global_attn_every_n_layers", "id2label"):
        own.pop(name)
    return {**own, "label2id": config.label2id}


# -- dialects ---------------------------------------------------------------------------------


def test_official_base() -> None:
    assert meaning(read(V4_BASE)) == meaning(ModernBertConfig(classifier_pooling="mean"))


def test_official_large() -> None:
    config = read({**V4_BASE, **LARGE})
    assert (config.head_dim, config.sliding_window) == (64, 64)
    kinds = [i for i, kind in enumerate(config.layer_types) if kind == FULL]
    assert kinds == [0, 3, 6, 9, 12, 15, 18, 21, 24, 27]


def test_the_real_file(shared_data: Path) -> None:
    path = shared_data / "tokenizer_modernbert" / "model_config.json"
    config = read(json.loads(path.read_text()), source=str(path))
    assert meaning(config) == meaning(read(V4_BASE))
    assert config.dtype == "float32"
    assert config.layer_types.count(FULL) == 8


@pytest.mark.parametrize("v4", [V4_BASE, {**V4_BASE, **LARGE}, MMBERT], ids=["base", "large", "mm"])
def test_v4_and_v5_forms_mean_the_same(v4: dict[str, Any]) -> None:
    ours = read(v5_form(v4))
    assert meaning(ours) == meaning(read(v4))
    assert ours.dtype == "float32"


@pytest.mark.parametrize("raw", [MMBERT, MMBERT_V5, {**MMBERT_V5, **MMBERT}])
def test_mmbert_keeps_its_local_theta(raw: dict[str, Any]) -> None:
    config = read(raw)
    assert (config.global_rope_theta, config.local_rope_theta) == (160000.0, 160000.0)
    assert read(config.to_dict()) == config


def test_flexbert_names() -> None:
    config = read(FLEXBERT)
    assert meaning(config) == meaning(ModernBertConfig(classifier_pooling="mean"))
    assert config.extra["attn_out_dropout_prob"] == 0.1
    changed = {
        "norm_kwargs": {"eps": 1e-6, "bias": True},
        "attn_out_bias": True,
        "mlp_in_bias": True,
        "mlp_dropout_prob": 0.1,
        "embed_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
        "sliding_window": 64,
        "rotary_emb_base": 1e6,
        "head_pred_act": "relu",
        "init_cutoff_factor": 1.5,
        "hidden_act": "gelu_tanh",
    }
    assert meaning(read({**FLEXBERT, **changed})) == meaning(
        ModernBertConfig(
            classifier_pooling="mean",
            norm_eps=1e-6,
            norm_bias=True,
            attention_bias=True,
            mlp_bias=True,
            mlp_dropout=0.1,
            embedding_dropout=0.2,
            attention_dropout=0.3,
            local_attention=64,
            global_rope_theta=1e6,
            classifier_activation="relu",
            initializer_cutoff_factor=1.5,
            hidden_activation="gelu_tanh",
        )
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"local_attn_rotary_emb_base": -1}, {"local_rope_theta": 160000.0}),
        ({"sliding_window": -1}, {"layer_types": (FULL,) * 22}),
        ({"global_attn_every_n_layers": -1}, {"layer_types": (SLIDING,) * 22}),
        (
            {"global_attn_every_n_layers": -1, "sliding_window": -1},
            {"layer_types": (FULL,) * 22, "local_attention": 128},
        ),
    ],
)
def test_flexbert_sentinels(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    config = read({**FLEXBERT, **changes})
    assert {name: getattr(config, name) for name in expected} == expected


def test_norm_kwargs_alone_are_flexbert() -> None:
    config = read({"norm_kwargs": {"eps": 1e-6, "bias": True}})
    assert (config.norm_eps, config.norm_bias) == (1e-6, True)


# -- traps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "thetas"),
    [
        ({}, (160000.0, 10000.0)),
        ({"global_rope_theta": 1e6}, (1e6, 10000.0)),
        ({"local_rope_theta": None}, (160000.0, 160000.0)),
        ({"local_rope_theta": None, "global_rope_theta": 5e4}, (5e4, 5e4)),
        ({"local_rope_theta": -1}, (160000.0, 160000.0)),
        ({"local_rope_theta": -1.0, "global_rope_theta": 5e4}, (5e4, 5e4)),
        ({"global_rope_theta": None}, (160000.0, 10000.0)),
        ({"global_rope_theta": 160000, "local_rope_theta": 500}, (160000.0, 500.0)),
        ({"rope_parameters": None}, (160000.0, 10000.0)),
        ({"rope_parameters": {}}, (160000.0, 10000.0)),
        ({"rope_parameters": {FULL: None, SLIDING: {"rope_theta": 5e4}}}, (160000.0, 5e4)),
        ({"rope_parameters": {FULL: {"rope_theta": 5e4}, SLIDING: None}}, (5e4, 10000.0)),
        (
            {"rope_parameters": {FULL: {"rope_type": "default"}}, "global_rope_theta": 7.0},
            (7.0, 1e4),
        ),
        (
            {"rope_parameters": {SLIDING: {"rope_theta": 9.0}}, "local_rope_theta": 7.0},
            (160000.0, 9.0),
        ),
        ({"rope_scaling": None}, (160000.0, 10000.0)),
        ({"rope_scaling": {"type": "default"}}, (160000.0, 10000.0)),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 77.0}}, (77.0, 77.0)),
    ],
)
def test_thetas(raw: dict[str, Any], thetas: tuple[float, float]) -> None:
    config = read(raw)
    assert (config.global_rope_theta, config.local_rope_theta) == thetas
    assert type(config.global_rope_theta) is type(config.local_rope_theta) is float


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({}, {"classifier_pooling": "cls"}),
        ({"classifier_pooling": None}, {"classifier_pooling": "cls"}),
        ({"layer_norm_eps": 1e-6}, {"norm_eps": 1e-6}),
        ({"layer_norm_eps": 1e-12, "norm_eps": 1e-5}, {"norm_eps": 1e-5}),
        ({"layer_norm_eps": 1e-6, "norm_eps": None}, {"norm_eps": 1e-6}),
        ({"hidden_act": "silu"}, {"hidden_activation": "silu"}),
        ({"hidden_act": "silu", "hidden_activation": "gelu"}, {"hidden_activation": "gelu"}),
        ({"hidden_activation": None}, {"hidden_activation": "gelu"}),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "dtype": "float16"}, {"dtype": "float16"}),
        ({"torch_dtype": "torch.float16", "dtype": None}, {"dtype": "float16"}),
        ({"sparse_pred_ignore_index": None}, {"sparse_pred_ignore_index": -100}),
        ({"initializer_cutoff_factor": None}, {"initializer_cutoff_factor": 3.0}),
        ({"tie_word_embeddings": None}, {"tie_word_embeddings": True}),
        ({"num_labels": None}, {"num_labels": 2}),
        ({"global_attn_every_n_layers": None}, {"global_attn_every_n_layers": 3}),
        ({"layer_types": None, "num_hidden_layers": 2}, {"layer_types": (FULL, SLIDING)}),
        ({"pad_token_id": None}, {"pad_token_id": None}),
        ({"bos_token_id": None}, {"bos_token_id": None}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": [1, 2]}),
        ({"architectures": None}, {"architectures": ()}),
        ({"problem_type": None}, {"problem_type": None}),
        ({"model_type": None}, {"hidden_size": 768}),
        ({"head_dim": 64, "num_key_value_heads": 12}, {"head_dim": 64, "extra": {}}),
        ({"is_causal": False, "causal_mask": False}, {"hidden_size": 768}),
        # transformers 5 reads `sliding_window` as the reach to one side, FlexBERT as the whole.
        ({"model_type": "modernbert", "sliding_window": 32}, {"local_attention": 64}),
        ({"sliding_window": 64, "local_attention": 128}, {"local_attention": 128}),
        ({"sliding_window": 32, "rotary_emb_base": 1e4}, {"local_attention": 32}),
    ],
)
def test_aliases_and_nulls(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    config = read(raw)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("raw", "num_labels", "names"),
    [
        ({}, 2, {"LABEL_0": 0, "LABEL_1": 1}),
        ({"num_labels": 3}, 3, {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}),
        ({"id2label": {"0": "no", "1": "yes"}}, 2, {"no": 0, "yes": 1}),
        ({"id2label": {1: "yes", 0: "no"}}, 2, {"no": 0, "yes": 1}),
        ({"id2label": {"0": "only"}, "label2id": {"only": 0}}, 1, {"only": 0}),
        ({"id2label": {"0": "a"}, "num_labels": 2}, 1, {"a": 0}),
        ({"id2label": {"0": 7}}, 1, {"7": 0}),
        ({"id2label": None, "num_labels": 1}, 1, {"LABEL_0": 0}),
    ],
)
def test_labels(raw: dict[str, Any], num_labels: int, names: dict[str, int]) -> None:
    config = read(raw)
    assert config.num_labels == num_labels
    assert config.label2id == names
    assert meaning(read(json.loads(json.dumps(config.to_dict())))) == meaning(config)


def test_harmless_keys_survive() -> None:
    extra = {
        "my_key": {"deep": [1, None, "x"]},
        "gradient_checkpointing": False,
        "is_causal": False,
    }
    unsafe = {"auto_map": {"AutoModel": "evil.Model"}, "_name_or_path": "x", "head_dim": 64}
    raw = {**V4_BASE, **extra, **unsafe}
    before = json.dumps(raw)
    saved = read(raw).to_dict()
    assert json.dumps(raw) == before
    assert {name: saved[name] for name in extra} == extra
    assert not unsafe.keys() & saved.keys()
    assert read(saved) == read(raw)


# -- refusals ---------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "bert"}, "model_type is 'bert'"),
    ({"model_type": "bert", "hidden_act": "gelu", "attention_probs_dropout_prob": 0.1}, "bert"),
    ({"model_type": "qwen3", "rope_scaling": None}, "model_type is 'qwen3'"),
    ({"model_type": ["modernbert"]}, r"model_type is \['modernbert'\]"),
    ({"hidden_activation": "tanh"}, "hidden_activation is 'tanh'"),
    ({"hidden_activation": ["gelu"]}, "hidden_activation"),
    ({"classifier_activation": "mish"}, "classifier_activation is 'mish'"),
    ({"classifier_pooling": "max"}, "classifier_pooling is 'max'"),
    ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
    ({"dtype": "int8"}, "dtype is 'int8'"),
    ({"torch_dtype": 5}, "dtype is 5"),
    ({"hidden_size": 770}, "hidden_size 770 is not a multiple of num_attention_heads 12"),
    ({"hidden_size": 36}, "head size 3 .* is odd"),
    ({"head_dim": 32}, "head_dim is 32"),
    ({"num_key_value_heads": 4}, "num_key_value_heads is 4"),
    ({"num_attention_heads": None, "num_key_value_heads": 4}, "num_key_value_heads is 4"),
    ({"num_attention_heads": "12"}, "num_attention_heads is '12'"),
    ({"num_hidden_layers": 22.0}, "num_hidden_layers is 22.0"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"local_attention": -1}, "local_attention is -1"),
    ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers is 0"),
    ({"norm_bias": 1}, "norm_bias is 1"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'"),
    ({"norm_eps": math.nan}, "norm_eps is nan"),
    ({"norm_eps": 0}, "norm_eps is 0"),
    ({"norm_eps": True}, "norm_eps is True"),
    ({"norm_eps": "1e-5"}, "norm_eps is '1e-5'"),
    ({"initializer_range": 10**400}, "initializer_range is 1000"),
    ({"initializer_cutoff_factor": 0}, "initializer_cutoff_factor is 0"),
    ({"global_rope_theta": math.inf}, "global_rope_theta is inf"),
    ({"global_rope_theta": -1}, "global_rope_theta is -1"),
    ({"local_rope_theta": 0.0}, "local_rope_theta is 0.0"),
    ({"local_rope_theta": [1]}, r"local_rope_theta is \[1\]"),
    ({"attention_dropout": 1.0}, "attention_dropout is 1.0"),
    ({"mlp_dropout": -0.1}, "mlp_dropout is -0.1"),
    ({"pad_token_id": 50368}, "pad_token_id 50368 is outside vocab_size 50368"),
    ({"pad_token_id": -1}, "pad_token_id is -1"),
    ({"bos_token_id": [1]}, r"bos_token_id is \[1\]"),
    ({"eos_token_id": [1, True]}, "eos_token_id"),
    ({"sparse_pred_ignore_index": 1.5}, "sparse_pred_ignore_index is 1.5"),
    ({"layer_types": []}, "layer_types is an empty list"),
    ({"layer_types": FULL}, "layer_types is 'full_attention'"),
    ({"layer_types": [FULL]}, "layer_types has 1 entries for num_hidden_layers 22"),
    ({"layer_types": ["chunked_attention"] * 22}, "layer_types is 'chunked_attention'"),
    ({"architectures": "ModernBertModel"}, "architectures is 'ModernBertModel'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE .*'yarn'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "RoPE .*'linear'"),
    ({"rope_scaling": 5}, "RoPE settings"),
    ({"rope_parameters": {FULL: {"rope_type": "llama3"}}}, "full_attention .*'llama3'"),
    ({"rope_parameters": {SLIDING: {"partial_rotary_factor": 0.5}}}, "sliding_attention .*0.5"),
    ({"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters is {'rope_theta'"),
    ({"rope_parameters": {FULL: 5}}, "full_attention are 5"),
    ({"rope_parameters": 5}, "rope_parameters is 5"),
    ({"id2label": ["a"]}, r"id2label is \['a'\]"),
    ({"id2label": {}}, "id2label is {}"),
    ({"id2label": {"x": "a"}}, "id2label has a key that is not an integer"),
    ({"id2label": {"1": "a", "2": "b"}}, r"id2label keys are \[1, 2\]"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"is_decoder": True}, "is_decoder is True"),
    ({"is_causal": True}, "is_causal is True"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"norm_kwargs": 5}, "norm_kwargs is 5"),
    ({"norm_kwargs": {"eps": {}}}, "norm_eps is {}"),
    ({**FLEXBERT, "normalization": "rmsnorm"}, "normalization is 'rmsnorm'"),
    ({**FLEXBERT, "mlp_layer": "mlp"}, "mlp_layer is 'mlp'"),
    ({**FLEXBERT, "attention_layer": "base"}, "attention_layer is 'base'"),
    ({**FLEXBERT, "rotary_emb_interleaved": True}, "rotary_emb_interleaved is True"),
]


@pytest.mark.parametrize(("raw", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused_by_name_and_value(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^some/config.json: .*{message}") as caught:
        read(raw, source="some/config.json")
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", INTEGER_BOUNDS)
def test_integer_bounds(name: str) -> None:
    low, high = INTEGER_BOUNDS[name]
    assert high < 10**9
    for value in (low - 1, high + 1, 10**9, 10**18):
        with pytest.raises(ValueError, match=f"{name} is {value}; expected an integer in"):
            read({name: value})


@pytest.mark.parametrize("theirs", ["yes", 7, {}, [None]])
def test_the_constructor_checks_too(theirs: Any) -> None:
    with pytest.raises(ValueError, match="decoder_bias"):
        ModernBertConfig(decoder_bias=theirs)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 3),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([10**9, 10**400, FULL, "gelu", "cls", "float32", "modernbert", 1e308, {}, []]),
    st.lists(st.one_of(st.none(), st.integers(0, 3), st.sampled_from([FULL, SLIDING])), max_size=4),
    st.dictionaries(
        st.sampled_from([FULL, SLIDING, "0", "1", "eps", "bias", "rope_type", "rope_theta"]),
        st.one_of(st.none(), st.integers(), st.floats(), st.dictionaries(st.text(), st.integers())),
        max_size=3,
    ),
)
KEYS = sorted({*V4_BASE, *MMBERT_V5, *FLEXBERT, "id2label", "num_labels", "problem_type", "extra"})


@settings(max_examples=1000)
@given(
    base=st.sampled_from([V4_BASE, MMBERT_V5, FLEXBERT, {}]),
    changes=st.dictionaries(
        st.sampled_from([*KEYS, "rope_scaling", "head_dim"]), VALUES, max_size=4
    ),
    dropped=st.sets(st.sampled_from(KEYS), max_size=3),
)
def test_mutations_give_a_config_or_a_value_error(
    base: dict[str, Any], changes: dict[str, Any], dropped: set[str]
) -> None:
    raw = {name: value for name, value in {**base, **changes}.items() if name not in dropped}
    try:
        config = read(raw)
    except ValueError as error:
        assert str(error).startswith("config: ")
        return
    again = read(json.loads(json.dumps(config.to_dict())))
    assert meaning(again) == meaning(config)
    assert json.dumps(again.extra) == json.dumps(config.extra)  # as text, for NaN's sake


# -- writing ----------------------------------------------------------------------------------

VARIED = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 100,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "max_position_embeddings": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "classifier_activation": "silu",
    "initializer_range": 0.01,
    "initializer_cutoff_factor": 3.0,
    "norm_eps": 1e-6,
    "norm_bias": True,
    "attention_bias": True,
    "mlp_bias": True,
    "classifier_bias": True,
    "decoder_bias": False,
    "attention_dropout": 0.1,
    "embedding_dropout": 0.2,
    "mlp_dropout": 0.3,
    "classifier_dropout": 0.4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": [3, 4],
    "cls_token_id": 1,
    "sep_token_id": 2,
    "global_rope_theta": 1e6,
    "local_rope_theta": 5e4,
    "global_attn_every_n_layers": 2,
    "local_attention": 33,
    "classifier_pooling": "mean",
    "deterministic_flash_attn": True,
    "sparse_prediction": True,
    "sparse_pred_ignore_index": -1,
    "tie_word_embeddings": False,
    "num_labels": 3,
    "id2label": {0: "a", 1: "b", 2: "c"},
    "problem_type": "multi_label_classification",
    "dtype": "bfloat16",
    "architectures": ("ModernBertForSequenceClassification",),
}
CONFIGS = {
    "defaults": ModernBertConfig(),
    "base": read(V4_BASE),
    "mmbert": read(MMBERT),
    "flexbert": read({**FLEXBERT, "local_attn_rotary_emb_base": -1}),
    "varied": ModernBertConfig(**VARIED),
    "one-label": ModernBertConfig(num_labels=1, problem_type="regression"),
    "two-named-labels": ModernBertConfig(id2label={0: "no", 1: "yes"}),
    "irregular": ModernBertConfig(num_hidden_layers=3, layer_types=(SLIDING, SLIDING, FULL)),
    "null-cutoff": read({"initializer_cutoff_factor": None}),
    "integers-for-floats": ModernBertConfig(norm_eps=1, initializer_range=1, mlp_dropout=0),
}


def test_varied_leaves_no_field_at_its_default() -> None:
    default = ModernBertConfig()
    assert VARIED.keys() | {"layer_types", "extra"} == {
        spec.name for spec in dataclasses.fields(default)
    }
    assert all(getattr(default, name) != value for name, value in VARIED.items())


def theirs(config: transformers.ModernBertConfig) -> dict[str, Any]:
    """`meaning` of a config of transformers 5, field by field."""
    found = {
        name: getattr(config, name)
        for name in meaning(ModernBertConfig())
        if not name.endswith("_rope_theta")
    }
    found["layer_types"] = tuple(config.layer_types)
    found["global_rope_theta"] = config.rope_parameters[FULL]["rope_theta"]
    found["local_rope_theta"] = config.rope_parameters[SLIDING]["rope_theta"]
    assert {kind["rope_type"] for kind in config.rope_parameters.values()} == {"default"}
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_ours(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    read_there = transformers.ModernBertConfig.from_pretrained(tmp_path)
    assert theirs(read_there) == meaning(config)
    assert {name: i for i, name in read_there.id2label.items()} == config.label2id
    assert read_there.architectures == (list(config.architectures) or None)
    assert str(read_there.dtype).removeprefix("torch.") == str(config.dtype)
    assert read_there.sliding_window == config.sliding_window


@pytest.mark.parametrize("name", CONFIGS)
def test_we_read_transformers(name: str, tmp_path: Path) -> None:
    theirs_config = transformers.ModernBertConfig(**CONFIGS[name].to_dict())
    theirs_config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for raw in (saved, theirs_config.to_dict()):
        config = read(raw)
        assert meaning(config) == theirs(theirs_config)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_form_transformers_4_reads(name: str) -> None:
    """Its constructor takes thetas and an integer; it ignores layer_types and rope_parameters."""
    config = CONFIGS[name]
    saved = config.to_dict()
    v4 = {k: v for k, v in saved.items() if k not in ("layer_types", "rope_parameters", "dtype")}
    again = read(v4)
    if name == "irregular":
        assert again.layer_types != config.layer_types
        again = again.replace(layer_types=config.layer_types)
    assert meaning(again) == meaning(config)
    assert again.dtype == config.dtype
    assert saved["model_type"] == "modernbert"


def test_flexbert_activation_gets_the_name_transformers_knows() -> None:
    saved = ModernBertConfig(hidden_activation="gelu_tanh").to_dict()
    assert saved["hidden_activation"] == "gelu_pytorch_tanh"
    assert saved["classifier_activation"] == "gelu"


def test_layers_that_transformers_4_cannot_express_are_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "modernbert"):
        CONFIGS["base"].to_dict()
        assert not caplog.records
        CONFIGS["irregular"].to_dict()
    assert "transformers 4 ignores the list" in caplog.text


# -- replace ----------------------------------------------------------------------------------


def test_replace_keeps_a_regular_pattern() -> None:
    config = ModernBertConfig(num_hidden_layers=4).replace(num_hidden_layers=5)
    assert config.layer_types == (FULL, SLIDING, SLIDING, FULL, SLIDING)
    assert config.replace(global_attn_every_n_layers=2).layer_types[2] == FULL
    with pytest.raises(ValueError, match="layer_types has 3 entries for num_hidden_layers 4"):
        CONFIGS["irregular"].replace(num_hidden_layers=4)


def test_replace_labels() -> None:
    config = ModernBertConfig(id2label={0: "no", 1: "yes"})
    assert config.replace(num_labels=2).label2id == {"no": 0, "yes": 1}
    assert config.replace(num_labels=3).id2label is None
    assert config.replace(id2label={0: "a", 1: "b", 2: "c"}).num_labels == 3
    with pytest.raises(ValueError, match="id2label names 1 labels, num_labels is 3"):
        config.replace(num_labels=3, id2label={0: "a"})


def test_configs_are_values() -> None:
    config = ModernBertConfig(num_hidden_layers=2, layer_types=[FULL, SLIDING])  # type: ignore[arg-type]
    assert config == ModernBertConfig(num_hidden_layers=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="num_hidden_layers is 0"):
        config.replace(num_hidden_layers=0)
