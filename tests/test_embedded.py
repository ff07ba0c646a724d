"""modernbert-mini, the checkpoint that ships: what loads without a name, and what it is."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import modernbert
from modernbert import ModernBertConfig, ModernBertForMaskedLM, SentenceEncoder, Tokenizer
from modernbert.predict import fill_mask
from modernbert.weights import CheckpointError, embedded_folder, open_checkpoint, open_folder
from modernbert.weights.folder import EMBEDDED

MODELS = [
    "ModernBertModel",
    "ModernBertForMaskedLM",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
    "ModernBertForQuestionAnswering",
    "ModernBertForMultipleChoice",
]
LOADERS: list[Any] = [
    *(getattr(modernbert, name).from_pretrained for name in (*MODELS, "Tokenizer")),
    SentenceEncoder.from_pretrained,
    open_checkpoint,
    open_folder,
]

real = pytest.mark.skipif(
    not (EMBEDDED / "config.json").is_file(), reason="modernbert-mini is not in weights/embedded"
)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small random masked LM in half precision in the place of what ships."""
    config = ModernBertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        **{f"{name}_token_id": 3 for name in ("bos", "cls", "eos", "sep", "pad")},
    )
    ModernBertForMaskedLM(config).half().save_pretrained(tmp_path)
    monkeypatch.setattr("modernbert.weights.folder.EMBEDDED", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_without_a_name(name: str, stand_in: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The weights of the folder; a head that it lacks is fresh, and that is all there is to say."""
    model = getattr(modernbert, name).from_pretrained()
    assert model.checkpoint.name == "modernbert-mini" and model.checkpoint.folder == stand_in
    stored = open_checkpoint(stand_in)
    fresh = {"classifier.weight", "classifier.bias"}
    for key, parameter in model.named_parameters():
        if key not in fresh:
            expected = stored.get(model.canonical(key))
            torch.testing.assert_close(parameter.detach(), expected, check_dtype=False)
    warnings = [record.getMessage() for record in caplog.records]
    if name in ("ModernBertModel", "ModernBertForMaskedLM"):
        assert warnings == []
    else:
        [warning] = warnings
        assert warning.startswith("modernbert-mini has no classifier.")


def test_a_revision_needs_a_name(stand_in: Path) -> None:
    for load in LOADERS:
        with pytest.raises(CheckpointError, match="drop the revision or give the Hub id"):
            load(revision="main")


def test_when_it_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modernbert.weights.folder.EMBEDDED", tmp_path)
    for load in (*LOADERS, embedded_folder):
        with pytest.raises(CheckpointError, match="reinstall the package, or give a Hub id or a"):
            load()


# -- what ships ----------------------------------------------------------------------------------


@real
def test_it_is_small_and_complete() -> None:
    files = [path for path in embedded_folder().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 24 * 2**20
    assert {"README.md", "modules.json", "model.safetensors"} <= {path.name for path in files}
    checkpoint = open_checkpoint()
    assert checkpoint.name == "modernbert-mini" and checkpoint.revision is None
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.float16}
    assert sum(math.prod(info.shape) for info in checkpoint.tensors.values()) < 8_000_000
    config = ModernBertConfig.from_dict(checkpoint.config)
    tokenizer = Tokenizer.from_pretrained()
    assert config.max_position_embeddings == tokenizer.model_max_length == 8192
    assert tokenizer.vocab_size <= config.vocab_size == 16_384
    text = "def f(x):\n        return  naïve ☀ \t 你好"
    [ids] = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


@real
@pytest.mark.parametrize("name", MODELS)
def test_every_class_loads_it(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = getattr(modernbert, name).from_pretrained()
    ids = torch.tensor(Tokenizer.from_pretrained()(["A short text."]).input_ids)
    with torch.no_grad():
        output = model(ids[None] if name.endswith("MultipleChoice") else ids)
    assert torch.isfinite(output[0]).all()
    assert len(caplog.records) == (name not in ("ModernBertModel", "ModernBertForMaskedLM"))


@real
def test_it_knows_what_belongs_together(caplog: pytest.LogCaptureFixture) -> None:
    encoder = SentenceEncoder.from_pretrained()
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = encoder.encode(texts)
    assert vectors.shape == (3, encoder.get_embedding_dimension()) == (3, 256)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for dimensions in (256, 128, 64):
        short = encoder.encode(texts, truncate_dim=dimensions)
        weather, drive, mixed = encoder.similarity(short, short)[[0, 0, 1], [1, 2, 2]].tolist()
        assert weather > 0.4 and weather > max(drive, mixed) + 0.2
    assert not caplog.records


@real
def test_it_fills_masks() -> None:
    model, tokenizer = ModernBertForMaskedLM.from_pretrained(), Tokenizer.from_pretrained()
    texts = ["He studied at the [MASK] of Oxford.", "The film was released in the United [MASK]."]
    [[place], [country]] = fill_mask(model, tokenizer, texts)
    assert (place[0]["token"], country[0]["token"]) == (" University", " States")


@real
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_sentence_transformers_gets_the_same_vectors() -> None:
    st = pytest.importorskip("sentence_transformers")
    texts = ["The weather is lovely today.", "", "naïve café ☀ " * 60]
    other = st.SentenceTransformer(
        str(embedded_folder()), device="cpu", model_kwargs={"dtype": torch.float32}
    )
    ours = SentenceEncoder.from_pretrained(device="cpu")
    np.testing.assert_allclose(ours.encode(texts), other.encode(texts), atol=1e-5)
