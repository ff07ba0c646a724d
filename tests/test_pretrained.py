"""Loading and saving: every layout a checkpoint comes in, and what is refused by name."""

import copy
import json
import logging
import math
import pickle
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import modernbert
from modernbert import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel, Tokenizer
from modernbert.pretrained import PreTrainedModel
from modernbert.weights import CheckpointError, open_checkpoint

WEIGHTS = "model.safetensors"
TINY: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "local_attention": 8,
    "max_position_embeddings": 64,
    "classifier_pooling": "mean",
}
HEADS = [
    "ModernBertForMaskedLM",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
    "ModernBertForQuestionAnswering",
    "ModernBertForMultipleChoice",
]
CLASSES = ["ModernBertModel", *HEADS]
CLASSIFIER = modernbert.ModernBertForSequenceClassification


@torch.no_grad()
def unit_scale_(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5)
        else:
            parameter.normal_(0 if name.endswith("bias") else 1, 0.3)


def make(name: str = "ModernBertForMaskedLM", **changes: Any) -> Any:
    torch.manual_seed(1)
    model = getattr(modernbert, name)(ModernBertConfig(**{**TINY, **changes}))
    unit_scale_(model)
    return model.eval()


IDS = torch.arange(1, 61).view(3, 20)
MASK = (torch.arange(20) < torch.tensor([[20], [1], [9]])).long()


def inputs_of(name: str) -> tuple[Tensor, Tensor]:
    if name.endswith("MultipleChoice"):
        return IDS[:2].unflatten(0, (1, 2)), MASK[:2].unflatten(0, (1, 2))
    return IDS, MASK


def answers(model: nn.Module) -> list[Tensor]:
    """Every tensor the model returns, at real tokens."""
    ids, mask = inputs_of(type(model).__name__)
    with torch.no_grad():
        output = model(ids, attention_mask=mask)
    names = ("last_hidden_state", "logits", "start_logits", "end_logits")
    found = [getattr(output, name) for name in names if hasattr(output, name)]
    assert found
    return [x[mask.bool()] if x.shape[:2] == mask.shape else x for x in found]


def agree(one: nn.Module, other: nn.Module, tolerance: float = 1e-6) -> None:
    # Not bit for bit: where memory-mapped weights start decides which kernel multiplies them.
    for x, y in zip(answers(one), answers(other), strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=0)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """A checkpoint as other programs write it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / WEIGHTS)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / WEIGHTS)
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A masked LM as we write it."""
    make().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# -- our own files ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_round_trip(name: str, tmp_path: Path) -> None:
    model = make(name)
    model.save_pretrained(tmp_path / "one")
    again = getattr(modernbert, name).from_pretrained(tmp_path / "one")
    assert not again.training
    assert (again.dtype, again.device.type) == (torch.float32, "cpu")
    assert again.config.replace(architectures=(), dtype=None) == model.config
    agree(again, model)
    again.save_pretrained(tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    assert config["architectures"] == [name]
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert set(files(tmp_path / "one")) == {"config.json", WEIGHTS}


@pytest.mark.parametrize("limit", [1, 8000, "10KB"])
def test_shards(limit: int | str, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=limit)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = ModernBertForMaskedLM.from_pretrained(tmp_path)
    assert again.decoder.weight is again.get_input_embeddings().weight
    agree(again, model)
    again.save_pretrained(tmp_path)  # over the files it was loaded from
    assert set(files(tmp_path)) == {"config.json", WEIGHTS}
    agree(ModernBertForMaskedLM.from_pretrained(str(tmp_path)), model)


def test_training_does_not_touch_the_files(saved: Path) -> None:
    before = files(saved)
    model = ModernBertForMaskedLM.from_pretrained(saved).train()
    expected = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, MASK, labels=IDS).loss.backward()
    optimizer.step()
    assert files(saved) == before
    assert all(not torch.equal(p, expected[name]) for name, p in model.named_parameters())
    agree(ModernBertForMaskedLM.from_pretrained(saved), make())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_loaded_model_can_be_copied_and_sent(copied: Callable[[Any], Any], saved: Path) -> None:
    (saved / "tokenizer.json").write_text("{}")
    model = ModernBertForMaskedLM.from_pretrained(saved)
    twin = copied(model)
    agree(twin, model)
    assert twin.files_to_save().keys() == model.files_to_save().keys()


def test_the_tokenizer_comes_along(saved: Path, tmp_path: Path) -> None:
    tokenizer = {
        "tokenizer.json": b'{"version": "1.0"}\n',
        "tokenizer_config.json": b'{"model_max_length": 64}',
        "special_tokens_map.json": b"{}",
    }
    for name, content in tokenizer.items():
        (saved / name).write_bytes(content)
    (saved / "README.md").write_text("not ours to copy")
    ModernBertModel.from_pretrained(saved).save_pretrained(tmp_path / "new")
    found = files(tmp_path / "new")
    assert found.keys() == {"config.json", WEIGHTS, *tokenizer}
    assert {name: found[name] for name in tokenizer} == tokenizer


def test_options(saved: Path) -> None:
    model = ModernBertForMaskedLM.from_pretrained(
        saved, attention="reference", device="cpu", dtype="float64", sparse_prediction=True
    )
    assert (model.attention, model.model.attention) == ("reference", "reference")
    assert model.dtype == torch.float64
    assert model.config.sparse_prediction
    assert model(IDS, output_attentions=True).attentions is not None
    checkpoint = open_checkpoint(saved)
    agree(ModernBertForMaskedLM.from_checkpoint(checkpoint), make())
    for options, message in (
        ({"atention": "auto"}, "unknown options or config fields: atention"),
        ({"attention": "fast"}, "attention='fast'"),
        ({"dtype": "int8"}, "dtype='int8' is not a floating dtype"),
        ({"dtype": "banana"}, "dtype='banana' is not a floating dtype"),
        ({"dtype": torch.int64}, "is not a floating dtype"),
        ({"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ({"revision": "main"}, "revision"),
    ):
        with pytest.raises(ValueError, match=message):
            ModernBertForMaskedLM.from_pretrained(saved, **options)


# -- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("native", [True, False])
def test_halves(
    stored: torch.dtype,
    native: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The stored dtype where the device computes in it, else float32 and one line about it."""
    monkeypatch.setattr(
        "modernbert.pretrained.computes_natively",
        lambda dtype, device: native or dtype.itemsize >= 4,
    )
    model = make().to(stored)
    model.save_pretrained(tmp_path)
    assert {x.dtype for x in load_file(tmp_path / WEIGHTS).values()} == {stored}
    with caplog.at_level(logging.INFO, "modernbert"):
        again = ModernBertForMaskedLM.from_pretrained(tmp_path)
    assert again.dtype == (stored if native else torch.float32)
    agree(again, model.to(again.dtype))
    name = str(stored).removeprefix("torch.")
    assert [f"is stored in {name}" in line for line in caplog.messages] == (
        [] if native else [True]
    )
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_asked_for(
    dtype: torch.dtype, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for asked in (dtype, str(dtype), str(dtype).removeprefix("torch.")):
        model = ModernBertForMaskedLM.from_pretrained(saved, dtype=asked)
        assert {p.dtype for p in model.parameters()} == {dtype}
    assert ModernBertModel.from_pretrained(saved, dtype="auto").dtype == torch.float32
    assert not caplog.records


# -- other programs' files --------------------------------------------------------------------


def bare(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")
    }


def flexbert(tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    def old(name: str) -> str:
        name = name.replace("model.layers.", "model.encoder.layers.")
        return prefix + name.replace("model.", "bert.")

    return {old(name): x for name, x in tensors.items()}


FLEXBERT_CONFIG = {
    "model_type": "bert",
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "sliding_window": 8,
    "rotary_emb_base": 160000.0,
    "local_attn_rotary_emb_base": 10000.0,
    "global_attn_every_n_layers": 3,
    "max_position_embeddings": 64,
    "head_pred_act": "gelu",
    "hidden_act": "gelu",
    "norm_kwargs": {"eps": 1e-5, "bias": False},
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize("prefix", ["", "model."], ids=["flexbert", "composer"])
def test_flexbert_names_and_config(prefix: str, tmp_path: Path) -> None:
    model = make()
    tensors = flexbert(model.tensors_to_save(), prefix)
    tensors[f"{prefix}decoder.weight"] = model.decoder.weight.detach().clone()
    folder = write(tmp_path / "flex", FLEXBERT_CONFIG, tensors)
    again = ModernBertForMaskedLM.from_pretrained(folder)
    assert again.config.local_attention == 8
    agree(again, model)
    agree(ModernBertModel.from_pretrained(folder), model.model)
    again.save_pretrained(tmp_path / "new")
    assert load_file(tmp_path / "new" / WEIGHTS).keys() == model.tensors_to_save().keys()


def test_prefixed_and_bare_names_load_into_the_encoder(saved: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / WEIGHTS)
    config = json.loads((saved / "config.json").read_text())
    folder = write(tmp_path / "bare", config, bare(tensors))
    for source in (saved, folder):
        agree(ModernBertModel.from_pretrained(source), make().model)
    make().model.save_pretrained(tmp_path / "encoder")
    assert load_file(tmp_path / "encoder" / WEIGHTS).keys() == bare(tensors).keys()


def test_duplicate_decoder(saved: Path) -> None:
    model = make()
    table = model.get_input_embeddings().weight.detach()
    edit(saved, lambda tensors: tensors.update({"decoder.weight": table.clone()}))
    again = ModernBertForMaskedLM.from_pretrained(saved)
    assert again.decoder.weight is again.get_input_embeddings().weight
    agree(again, model)
    agree(ModernBertModel.from_pretrained(saved), model.model)

    edit(saved, lambda tensors: tensors.update({"decoder.weight": table + 1}))
    with pytest.raises(CheckpointError, match="decoder.weight differs .*tie_word_embeddings=False"):
        ModernBertForMaskedLM.from_pretrained(saved)
    untied = ModernBertForMaskedLM.from_pretrained(saved, tie_word_embeddings=False)
    torch.testing.assert_close(untied.decoder.weight.detach(), table + 1)
    torch.testing.assert_close(untied.get_input_embeddings().weight.detach(), table)


def test_untied_decoder(tmp_path: Path) -> None:
    model = make(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    agree(ModernBertForMaskedLM.from_pretrained(tmp_path), model)
    edit(tmp_path, lambda tensors: tensors.pop("decoder.weight"))
    with pytest.raises(CheckpointError, match="lacks decoder.weight:"):
        ModernBertForMaskedLM.from_pretrained(tmp_path)


# -- new heads --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS[1:])
def test_a_new_head_on_an_encoder(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make().model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    model = getattr(modernbert, name).from_pretrained(tmp_path)
    fresh = ["classifier.bias", "classifier.weight", "head.dense.weight", "head.norm.weight"]
    assert len(caplog.records) == 1
    assert f"has no {', '.join(fresh)}: random weights" in caplog.text
    agree(model.model, make().model)
    weights = dict(model.named_parameters())
    assert (weights["head.norm.weight"] == 1).all() and (weights["classifier.bias"] == 0).all()
    for tensor, std in (("classifier.weight", 32**-0.5), ("head.dense.weight", 0.02 / 8**0.5)):
        assert weights[tensor].abs().max() <= 2 * std
        assert weights[tensor].detach().std() > 0.6 * std
    torch.manual_seed(7)
    agree(getattr(modernbert, name).from_pretrained(tmp_path), model)


def test_a_new_classifier_keeps_the_masked_lms_head(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = CLASSIFIER.from_pretrained(saved, num_labels=7, id2label=dict(enumerate("abcdefg")))
    assert "has no classifier.bias, classifier.weight: random" in caplog.text
    assert model.classifier.weight.shape == (7, 32)
    assert model.config.label2id["g"] == 6
    torch.testing.assert_close(model.head.state_dict(), make().head.state_dict())
    labels = CLASSIFIER.from_pretrained(saved, num_labels=3).config.label2id
    assert labels == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


DENSE, NORM, SCORES = "head.dense.weight", "head.norm.weight", "classifier.weight"


@pytest.mark.parametrize(
    ("name", "dropped", "named"),
    [
        (HEADS[0], [NORM], NORM),
        (HEADS[0], [DENSE, NORM], f"{DENSE}, {NORM}"),
        (HEADS[0], ["decoder.bias"], "decoder.bias"),
        (HEADS[1], [NORM], NORM),
        (HEADS[1], ["classifier.bias"], "classifier.bias"),
        (HEADS[1], [DENSE, NORM], f"{DENSE}, {NORM}"),
        (HEADS[1], [DENSE, SCORES, "classifier.bias"], DENSE),
        (HEADS[1], [DENSE, NORM, SCORES], f"{SCORES}, {DENSE}, {NORM}"),
    ],
)
def test_half_a_head_is_an_error(name: str, dropped: list[str], named: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path)
    edit(tmp_path, lambda tensors: [tensors.pop(tensor) for tensor in dropped])
    with pytest.raises(CheckpointError, match=f"lacks {named}"):
        getattr(modernbert, name).from_pretrained(tmp_path)


def test_other_heads_are_no_concern_of_a_class(tmp_path: Path) -> None:
    """An encoder loads from a classifier's file, a masked LM does not."""
    classifier = make(HEADS[1], num_labels=4)
    classifier.save_pretrained(tmp_path)
    agree(ModernBertModel.from_pretrained(tmp_path), classifier.model)
    with pytest.raises(CheckpointError, match="lacks decoder.bias"):
        ModernBertForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"classifier.weight has shape \[4, 32\], .* \[3, 32\]"
    ):
        CLASSIFIER.from_pretrained(tmp_path, num_labels=3)


# -- refusals ---------------------------------------------------------------------------------

QKV, WI = "model.layers.1.attn.Wqkv.weight", "model.layers.9.mlp.Wi.weight"
MATRIX = torch.zeros(32, 32)


def drop(part: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if part in name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(QKV), f"lacks {QKV}: its tensors do not belong"),
        (drop(".mlp"), "lacks model.layers.0.mlp.Wi.weight, .* and 4 more:"),
        (drop("layers.3"), "num_hidden_layers 4, the safetensors files hold 3 layers"),
        (lambda t: t.update({WI: MATRIX}), "num_hidden_layers 4, .* 5 layers"),
        (lambda t: t.update(odd=MATRIX), "holds unexpected odd:"),
        (lambda t: t.update({"head.gate": MATRIX}), "holds unexpected head.gate:"),
        (lambda t: t.update({"model.layers.0.attn_norm.weight": MATRIX}), "unexpected .*attn_norm"),
        (lambda t: t.update({"model.layers.1.mlp.Wi.bias": MATRIX}), "unexpected .*Wi.bias"),
        (lambda t: t.update({QKV: MATRIX}), r"Wqkv.weight has shape \[32, 32\], .* \[96, 32\]"),
        (lambda t: t.update({QKV: t[QKV].T}), r"Wqkv.weight has shape \[32, 96\]"),
        (lambda t: t.update({QKV: t[QKV].char()}), "Wqkv.weight is torch.int8, not a floating"),
        (lambda t: t.update({QKV: t[QKV] * math.nan}), "Wqkv.weight' contains NaN or infinity"),
        (lambda t: t.update({QKV: t[QKV] / 0}), "Wqkv.weight' contains NaN or infinity"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], object], message: str, saved: Path
) -> None:
    edit(saved, change)
    with pytest.raises(CheckpointError, match=message):
        ModernBertForMaskedLM.from_pretrained(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (
            {"num_hidden_layers": 1000, "layer_types": None},
            "num_hidden_layers 1000, the safetensors files hold 4 layers",
        ),
        ({"num_hidden_layers": 1000}, "layer_types has 4 entries for num_hidden_layers 1000"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"vocab_size": 2**24, "hidden_size": 2**16}, r"has shape .* asks for \[.*65536\]"),
        ({"intermediate_size": 2**20}, r"Wi.weight has shape \[80, 32\], .* \[2097152, 32\]"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"hidden_activation": "mish"}, "hidden_activation is 'mish'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "'yarn'"),
        ({"norm_bias": True}, "lacks head.norm.bias, .* and 2 more:"),
        ({"decoder_bias": False}, "holds unexpected decoder.bias:"),
        ({"tie_word_embeddings": False}, "lacks decoder.weight:"),
    ],
)
def test_configs_that_do_not_fit(changes: dict[str, Any], message: str, saved: Path) -> None:
    configure(saved, **changes)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as caught:
        ModernBertForMaskedLM.from_pretrained(saved)
    assert time.perf_counter() - start < 1
    assert "saved" in str(caught.value) or WEIGHTS in str(caught.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    for name in (tmp_path, str(tmp_path / "absent"), ""):
        with pytest.raises(CheckpointError):
            ModernBertModel.from_pretrained(name)


# -- transformers -----------------------------------------------------------------------------

VARIED = {
    "defaults": {},
    "biases": {
        "norm_bias": True,
        "attention_bias": True,
        "mlp_bias": True,
        "classifier_bias": True,
        "decoder_bias": False,
    },
    "thetas": {"local_rope_theta": 160000.0, "classifier_pooling": "cls"},
}


def settings_of(name: str, config: str) -> dict[str, Any]:
    settings = {**TINY, **VARIED[config]}
    if name in HEADS[1:3]:
        settings["num_labels"] = 5
    return settings


@pytest.mark.parametrize("config", VARIED)
@pytest.mark.parametrize("name", CLASSES)
def test_checkpoints_of_transformers_load(name: str, config: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = getattr(transformers, name)(transformers.ModernBertConfig(**settings_of(name, config)))
    unit_scale_(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    ours = getattr(modernbert, name).from_pretrained(tmp_path / "theirs")
    agree(ours, theirs, 2e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = getattr(modernbert, name).from_pretrained(tmp_path / "ours")
    for (tensor, x), (_, y) in zip(again.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(x, y), tensor


@pytest.mark.parametrize("config", VARIED)
@pytest.mark.parametrize("name", CLASSES)
def test_our_checkpoints_load_in_transformers(name: str, config: str, tmp_path: Path) -> None:
    ours = make(name, **settings_of(name, config))
    ours.save_pretrained(tmp_path / "ours", max_shard_size="20KB")
    theirs, info = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    agree(theirs.eval(), ours, 2e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    again = getattr(modernbert, name).from_pretrained(tmp_path / "theirs")
    for (tensor, x), (_, y) in zip(again.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(x, y), tensor


def test_auto_classes_of_transformers_read_ours(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    agree(theirs, make(), 2e-5)


# -- the published models ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def hub() -> None:
    """Skips where the Hub is out of reach; asks once."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        pytest.skip("HF_HUB_OFFLINE is set")
    host = huggingface_hub.constants.ENDPOINT.split("//")[-1].split("/")[0]
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError as error:
        pytest.skip(f"{host} cannot be reached ({error})")


BASE = "answerdotai/ModernBERT-base"
HELLO = torch.tensor([[50281, 12092, 3645, 2, 50282]])  # "Hello World!"


def published(name: str, repository: str) -> PreTrainedModel:
    """In float32, as the published numbers were made."""
    return getattr(modernbert, name).from_pretrained(repository, dtype="float32")


@pytest.mark.hub
@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("name", "repository", "shape", "expected"),
    [
        (
            "ModernBertForMaskedLM",
            BASE,
            (1, 5, 50368),
            [[3.8387, -0.2017, 12.2839], [3.6300, 0.6869, 14.7123], [-5.1137, -3.8122, 11.9874]],
        ),
        (
            "ModernBertModel",
            BASE,
            (1, 5, 768),
            [[0.3151, -0.6417, -0.7027], [-0.7834, -1.5810, 0.4576], [1.0614, -0.7268, -0.0871]],
        ),
        (
            "ModernBertForTokenClassification",
            "hf-internal-testing/tiny-random-ModernBertForTokenClassification",
            (1, 5, 2),
            [
                [2.0159, 4.6569],
                [-0.9430, 3.1595],
                [-3.8770, 3.2653],
                [1.5752, 4.5167],
                [-1.6939, 1.2524],
            ],
        ),
        (
            "ModernBertForSequenceClassification",
            "hf-internal-testing/tiny-random-ModernBertForSequenceClassification",
            (1, 2),
            [[1.6466, 4.5662]],
        ),
    ],
)
@torch.no_grad()
def test_published_numbers(
    name: str, repository: str, shape: tuple[int, ...], expected: list[list[float]]
) -> None:
    output = published(name, repository)(HELLO)[0]
    assert output.shape == shape
    found = output[:, :3, :3][0] if repository == BASE else output.reshape(-1, shape[-1])
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.hub
@pytest.mark.usefixtures("hub")
@torch.no_grad()
def test_published_multiple_choice() -> None:
    prompt = (
        "In Italy, pizza served in formal settings, such as at a restaurant, is presented unsliced."
    )
    choices = [
        "It is eaten with a fork and a knife.",
        "It is eaten while held in the hand.",
        "It also walks on the sidewalks.",
        "It is a common drink.",
    ]
    batch = Tokenizer.from_pretrained(BASE)([prompt] * 4, choices).input_ids
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in batch], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in batch], batch_first=True)
    model = published("ModernBertForMultipleChoice", "netique/ModernBertForMultipleChoice")
    expected = torch.tensor([[0.1973, 0.2041, 0.1835, 0.1896]])
    logits = model(ids[None], mask[None]).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.hub
@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("width", [9, 512])
@torch.no_grad()
def test_published_masked_words(width: int) -> None:
    ids = torch.full((1, width), 50283)
    ids[0, :9] = torch.tensor([50281, 783, 637, 4307, 347, 247, 50284, 15, 50282])
    logits = published("ModernBertForMaskedLM", BASE)(ids, (ids != 50283).long()).logits
    tokenizer = Tokenizer.from_pretrained(BASE)
    words = [tokenizer.decode([int(i)]).strip() for i in logits[0, 6].topk(5).indices]
    assert words == ["lawyer", "mechanic", "teacher", "doctor", "waiter"]
