"""Fine-tuning of classification heads: labels, learning, early stopping, resuming, saving."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_training import log, train, write_material, write_records

from modernbert import (
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    Tokenizer,
)
from modernbert.training import loop
from modernbert.training.classification import (
    Classification,
    Examples,
    class_names,
    macro_f1,
    read_examples,
    tokenized,
)
from modernbert.training.recipe import Data, read_recipe

WORDS = [f"word{i}" for i in range(40)]
RECIPE = """
name = "tiny"
output = "run"
tokenizer = "tokenizer"
micro_tokens = 96
threads = 1
log_steps = 1
validation_steps = 4
checkpoint_steps = 3
early_stopping = 3
device = "cpu"

[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
classifier_pooling = "mean"
classifier_dropout = 0.1

[data.texts]
files = ["texts.jsonl"]
label = "mood"
validation = 0.2

[data.words]
files = ["words.jsonl"]
fields = ["tokens"]
label = "tags"
validation = 0.2

[[phases]]
name = "fine-tuning"
tokens = 6000
max_length = 24
learning_rate = 5e-3
decay_tokens = 1000

[[phases.tasks]]
objective = "sequence-classification"
data = "texts"
texts = 16
"""
PER_WORD = ("phases.0.tasks.0.objective=token-classification", "phases.0.tasks.0.data=words")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word tokenizer; texts whose mood, and words whose tag, follow from the words."""
    folder = tmp_path_factory.mktemp("material")
    draw = random.Random(3)
    texts, words = [], []
    for _ in range(150):
        mood = draw.choice(("sad", "glad"))
        half = WORDS[:20] if mood == "glad" else WORDS[20:]
        texts.append({"text": " ".join(draw.choices(half, k=draw.randint(3, 9))), "mood": mood})
        chosen = draw.choices(range(40), k=draw.randint(2, 6))
        tags = ["ODD" if i % 2 else "EVEN" for i in chosen]
        words.append({"tokens": [f"word{i}-word{i}" for i in chosen], "tags": tags})
    return write_material(folder, RECIPE, [*WORDS, "-"], texts=texts, words=words)


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    assert train(material, output) == output / "model"
    return output


# -- labels ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ["a", "b"]),
        (["10", "9", "-1"], ["-1", "9", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
    ],
)
def test_classes_are_sorted(labels, names):
    assert class_names([Examples([[]], [[label] for label in labels])]) == names


def test_one_class_is_none():
    with pytest.raises(ValueError, match="two at least"):
        class_names([Examples([[]], [["a"], ["a"]])])


def test_a_label_a_word_goes_to_its_first_token(material):
    tokenizer = Tokenizer.from_pretrained(material / "tokenizer")
    examples = Examples([[["word1-word2", "word3", " ", "word3"], []]], [["a", "b", "a", "c"], []])
    ids = {"a": 0, "b": 1, "c": 2}
    texts, targets = tokenized(examples, tokenizer, ids, "token-classification", 99)
    dash = 5 + len(WORDS)
    assert texts == [[1, 6, dash, 7, 8, 8, 2], [1, 2]]  # a word that is a space gives no token
    assert [t.tolist() for t in targets] == [[-100, 0, -100, -100, 1, 2, -100], [-100, -100]]
    texts, targets = tokenized(examples, tokenizer, ids, "token-classification", 4)
    assert texts[0] == [1, 6, dash, 2] and targets[0].tolist() == [-100, 0, -100, -100]


def test_a_pair_is_one_text(material):
    tokenizer = Tokenizer.from_pretrained(material / "tokenizer")
    examples = Examples([["word0", "word1"], ["word2 word3", "word4"]], [["x"], ["y"]])
    texts, targets = tokenized(examples, tokenizer, {"x": 0, "y": 1}, "sequence-classification", 99)
    assert texts == [[1, 5, 2, 7, 8, 2], [1, 6, 2, 9, 2]]
    assert [t.tolist() for t in targets] == [[0], [1]]


def test_the_split_is_whole_and_by_document(tmp_path):
    records = [{"text": f"text {i % 50}", "label": i % 3} for i in range(100)]
    write_records(tmp_path / "x.jsonl", records)
    data = Data(("x.jsonl",), label="label", validation=0.3)
    train_part, held_out = read_examples(
        data, [str(tmp_path / "x.jsonl")], "sequence-classification"
    )
    assert held_out is not None
    assert sorted(train_part.columns[0] + held_out.columns[0]) == sorted(
        record["text"] for record in records
    )
    assert not set(train_part.columns[0]) & set(held_out.columns[0])
    assert train_part.labels[:2] and set(map(tuple, train_part.labels)) == {("0",), ("1",), ("2",)}


@pytest.mark.parametrize(
    ("record", "objective", "message"),
    [
        ({"text": "a"}, "sequence-classification", "'label' is None"),
        ({"text": "a", "label": 0.5}, "sequence-classification", "not a string or integer"),
        ({"text": "a", "label": True}, "sequence-classification", "not a string or integer"),
        ({"text": ["a"], "label": 1}, "sequence-classification", "holds list, not a text"),
        ({"text": "a b", "label": [1, 2]}, "token-classification", "not a list of words"),
        ({"text": ["a"], "label": "x"}, "token-classification", "not a list of strings"),
        ({"text": ["a", "b"], "label": ["x"]}, "token-classification", "1 labels .* for 2 words"),
        ({"text": ["a", 2], "label": ["x", "x"]}, "token-classification", "holds int"),
    ],
)
def test_a_wrong_record_is_refused_with_its_line(tmp_path, record, objective, message):
    good = {"text": ["a"], "label": ["x"]} if "token" in objective else {"text": "a", "label": "x"}
    write_records(tmp_path / "x.jsonl", [good, record])
    with pytest.raises(ValueError, match=f"x.jsonl.*2.*{message}"):
        read_examples(Data(("x",), label="label"), [str(tmp_path / "x.jsonl")], objective)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.texts.validation=0.0", "data.words.validation=0.0"], "data.NAME.validation"),
        (["average=2"], "choose one"),
        (['data.texts.fields=["a", "b", "c"]'], "2 fields at most"),
        ([*PER_WORD, 'data.words.fields=["a", "b"]'], "1 fields at most"),
    ],
)
def test_a_wrong_recipe_is_refused(material, settings, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(material / "recipe.toml", settings)


@pytest.mark.parametrize("other", ["mlm", "token-classification"])
def test_a_recipe_trains_one_head(material, tmp_path, other):
    task = f'\n[[phases.tasks]]\nobjective = "{other}"\ndata = "words"\n'
    (tmp_path / "recipe.toml").write_text(RECIPE + task)
    with pytest.raises(ValueError, match="more than one head"):
        read_recipe(tmp_path / "recipe.toml")


def test_macro_f1_is_the_mean_over_the_classes_that_occur():
    confusion = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    expected = (2 * 3 / (2 * 3 + 2 + 1) + 2 * 4 / (2 * 4 + 1 + 2)) / 2
    assert macro_f1(confusion) == pytest.approx(expected)
    assert macro_f1(np.zeros((2, 2), dtype=np.int64)) == 0


# -- runs -----------------------------------------------------------------------------------


def test_moods_are_learnt_and_the_best_weights_saved(material, whole):
    lines = log(whole)
    name = "validation/sequence-classification/texts"
    scored = [line for line in lines if f"{name}/loss" in line]
    assert scored[-1][f"{name}/accuracy"] > 0.95 and scored[-1][f"{name}/macro_f1"] > 0.95
    # The last line is a validation of the weights that are kept.
    assert scored[-1][f"{name}/loss"] == min(line[f"{name}/loss"] for line in scored)
    assert not any((whole / "best").iterdir())
    model = ModernBertForSequenceClassification.from_pretrained(whole / "model")
    assert model.config.id2label == {0: "glad", 1: "sad"}
    assert model.config.problem_type == "single_label_classification"
    assert not (whole / "model" / "modules.json").exists()


def test_the_saved_folder_loads_in_transformers(whole):
    folder = whole / "model"
    classify = transformers.pipeline("text-classification", str(folder), device="cpu")
    texts = ["word1 word2 word3 word4", "word30 word31 word32"]
    assert [answer["label"] for answer in classify(texts)] == ["glad", "sad"]
    ours = ModernBertForSequenceClassification.from_pretrained(folder)
    ids = torch.tensor(Tokenizer.from_pretrained(folder)(texts[0]).input_ids)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, classify.model(ids).logits)


def test_the_best_weights_are_kept_and_patience_ends_the_phase(material, tmp_path, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 1.0, 1.5, 0.5])  # an equal one is no better; the last of the best
    monkeypatch.setattr(Classification, "validate", lambda self: {"loss": next(losses)})
    train(material, tmp_path, "validation_steps=1", "checkpoint_steps=1", "keep=9")
    name = "validation/sequence-classification/texts/loss"
    assert [line[name] for line in log(tmp_path)] == [3.0, 1.0, 2.0, 1.0, 1.5, 0.5]
    steps = sorted((tmp_path / "checkpoints").iterdir())
    assert len(steps) == 5
    finished = load_file(tmp_path / "model" / "model.safetensors")
    third, last = (load_file(steps[i] / "model.safetensors") for i in (2, 4))
    assert all(torch.equal(finished[name], last[name]) for name in finished)
    assert not torch.equal(finished["classifier.weight"], third["classifier.weight"])
    best = load_file(steps[1] / "model.safetensors")
    assert all(torch.equal(finished[name], best[name]) for name in finished)


def test_an_interrupted_run_goes_on_bit_for_bit(material, whole, tmp_path, monkeypatch):
    """Stopped at steps with and without a checkpoint of their own, and after the best step."""
    for until in (5, 9, 13):
        with monkeypatch.context() as patch:
            patch.setattr(
                loop.Trainer, "_agree_to_stop", lambda self, n=until: self.state["step"] == n
            )
            assert train(material, tmp_path) is None
    train(material, tmp_path)
    assert log(tmp_path) == log(whole)
    assert (tmp_path / "model/model.safetensors").read_bytes() == (
        whole / "model/model.safetensors"
    ).read_bytes()


def test_words_are_learnt_from_the_finished_model_of_another_run(material, whole, tmp_path):
    """Token classification started from an encoder; without validation the last weights count."""
    encoder = tmp_path / "encoder"
    ModernBertForSequenceClassification.from_pretrained(whole / "model").model.save_pretrained(
        encoder
    )
    settings = [*PER_WORD, f"start.checkpoint={str(encoder)!r}", "early_stopping=0"]
    settings += ["data.words.validation=0.0"]
    train(material, tmp_path / "run", *settings)
    lines = log(tmp_path / "run")
    assert lines[-1]["token-classification/words/accuracy"] > 0.9
    assert lines[0]["token-classification/words/accuracy"] < 0.8
    model = ModernBertForTokenClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "EVEN", 1: "ODD"}
    last = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    saved = load_file(last / "model.safetensors")
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters())
    tag = transformers.pipeline("token-classification", str(tmp_path / "run" / "model"))
    assert [word["entity"] for word in tag("word3 word8")] == ["ODD", "EVEN"]


def test_a_classifier_keeps_its_ids_and_learns_no_new_class(material, whole, tmp_path):
    start = f"start.checkpoint={str(whole / 'model')!r}"
    recipe = read_recipe(material / "recipe.toml", [start, f"output={str(tmp_path)!r}"])
    assert loop.Trainer(recipe)._model().config.label2id == {"glad": 0, "sad": 1}
    write_records(
        tmp_path / "texts.jsonl", [{"text": "word1", "mood": m} for m in ("glad", "grey")]
    )
    changed = f"data.texts.files=[{str(tmp_path / 'texts.jsonl')!r}]"
    with pytest.raises(ValueError, match="knows glad, sad, not 'grey'"):
        train(material, tmp_path / "run", start, changed)
