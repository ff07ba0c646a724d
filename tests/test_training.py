"""Recipes, objectives and the loop: interrupted, resumed, spread over processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_training import SPECIAL, log, train, write_material

from modernbert import ModernBertForMaskedLM, SentenceEncoder
from modernbert.cli import main
from modernbert.training import loop, objectives
from modernbert.training.readers import is_validation
from modernbert.training.recipe import read_recipe
from modernbert.training.report import smooth
from modernbert.training.store import TokenStore
from modernbert.training.teacher import rotation, teacher_vectors

RECIPE = """
name = "tiny"
output = "run"
tokenizer = "tokenizer"
micro_tokens = 96
threads = 1
log_steps = 1
validation_steps = 4
checkpoint_steps = 3
dtype = "float32"
device = "cpu"

[model]
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 2
num_attention_heads = 2
attention_dropout = 0.1
mlp_dropout = 0.1

[data.documents]
files = ["documents.jsonl"]
validation = 0.1

[data.pairs]
files = ["pairs.jsonl"]
fields = ["anchor", "positive"]

[[phases]]
name = "short"
tokens = 4800
max_length = 24
learning_rate = 1e-2
warmup_tokens = 300
batch_warmup_tokens = 600
global_rope_theta = 10000.0

[[phases.tasks]]
objective = "mlm"
data = "documents"
rows = 2

[[phases.tasks]]
objective = "contrastive"
data = "pairs"
texts = 8
temperature = 0.1
dims = [8, 32]

[[phases]]
name = "long"
tokens = 3000
max_length = 64
learning_rate = 1e-2
decay_tokens = 800
global_rope_theta = 150000.0

[[phases.tasks]]
objective = "mlm"
data = "documents"
rows = 2
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a word tokenizer, documents and pairs made of a few words."""
    folder = tmp_path_factory.mktemp("material")
    words = [f"word{i}" for i in range(60)]
    draw = random.Random(5)

    def text(low: int, high: int) -> str:
        start = draw.randrange(60)  # neighbours are predictable, so that there is much to learn
        return " ".join(words[(start + i) % 60] for i in range(draw.randint(low, high)))

    documents = [{"text": text(3, 50)} for _ in range(120)]
    pairs = [{"anchor": text(2, 9), "positive": text(3, 20)} for _ in range(40)]
    return write_material(folder, RECIPE, words, documents=documents, pairs=pairs)


@pytest.fixture(scope="module")
def whole(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    assert train(material, output) == output / "model"
    return output


# -- recipes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("phases.0.tokens=0", "phases.0.tokens is 0"),
        ("phases.0.tasks.0.objective=nsp", "phases.0.tasks.0.objective is 'nsp'"),
        ("phases.0.tasks.0.data=nothing", "phases.0.tasks.0.data is 'nothing'"),
        ("phases.0.tasks.1.data=documents", "two fields"),
        ("phases.0.tasks.0.objective=distillation", "teacher"),
        ("phases.9.tokens=1", "'9' is not one of 2"),
        ("learning_rate=1", "unknown key learning_rate"),
        ("phases.0.lr=1", "unknown key phases.0.lr"),
        ("seed=1.5", "seed is 1.5; expected int"),
        ("phases.0.max_length=97", "micro_tokens = 96"),
        ("phases.0.warmup_tokens=9000", "more than its tokens"),
        ("data.pairs.validation=1.5", "validation is 1.5"),
        ("model.hidden=3", "model.hidden is no field"),
        ("data.pairs.prompts=['one']", "one prompt for each of the 2 fields"),
        ("nonsense", "write key=value"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(material, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        train(material, tmp_path, setting)
    assert not (tmp_path / "log.jsonl").exists()


def test_numbers_of_tokens_may_be_written_as_floats(material):
    recipe = read_recipe(material / "recipe.toml", ["phases.0.tokens=1.7e12", "name=other"])
    assert recipe.phases[0].tokens == 1_700_000_000_000
    assert recipe.name == "other"


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "x.toml").write_text("name = ")
    with pytest.raises(ValueError, match="x.toml is not TOML"):
        read_recipe(tmp_path / "x.toml")


# -- objectives -----------------------------------------------------------------------------


def test_info_nce_is_its_formula():
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    unit = x / x.norm(dim=-1, keepdim=True)
    keys = torch.tensor([0, 1, 1, 2, 3])  # the positives of 1 and 2 are one text
    expected = 0.0
    for i in range(5):
        others = [j for j in range(5) if j == i or keys[j] != keys[i]]
        scores = [unit[i, 0] @ unit[j, 1] / 0.1 for j in others]
        scores += [unit[i, 0] @ unit[j, 2] / 0.1 for j in range(5)]
        back = [unit[j, 0] @ unit[i, 1] / 0.1 for j in others]
        own = unit[i, 0] @ unit[i, 1] / 0.1
        expected += (torch.stack(scores).logsumexp(0) - own) / 10
        expected += (torch.stack(back).logsumexp(0) - own) / 10
    torch.testing.assert_close(objectives.info_nce(x, 0.1, keys), expected)


def test_matryoshka_averages_over_leading_dimensions():
    x = torch.randn(6, 2, 16)
    loss = objectives.matryoshka(lambda v: objectives.info_nce(v, 0.1), [4, 16])
    parts = [objectives.info_nce(x[..., :d], 0.1) for d in (4, 16)]
    torch.testing.assert_close(loss(x), sum(parts) / 2)


def test_distillation_is_zero_for_the_teacher_itself_and_its_formula_elsewhere():
    target = torch.randn(6, 8, dtype=torch.float64)
    assert objectives.distillation(3 * target, target, 5.0).abs() < 1e-12
    x = torch.randn(6, 4, dtype=torch.float64)
    cosine = F.cosine_similarity(x, target[:, :4]).mean()
    own = F.cosine_similarity(x[:, None], x[None], dim=-1)
    full = F.cosine_similarity(target[:, None], target[None], dim=-1)
    apart = ~torch.eye(6, dtype=torch.bool)
    expected = 1 - cosine + 5 * (own - full)[apart].square().mean()
    torch.testing.assert_close(objectives.distillation(x, target, 5.0), expected)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_gradients_through_micro_batches_are_those_of_the_whole_batch(count):
    layer = torch.nn.Linear(6, 4).double()
    x = torch.randn(10, 6, dtype=torch.float64)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return objectives.info_nce(v.unflatten(0, (-1, 2)), 0.2)

    loss(layer(x)).mul(0.7).backward()
    expected = layer.weight.grad.clone()
    layer.zero_grad()
    parts = x.tensor_split(count)
    value = objectives.backward_through_vectors(lambda i: layer(parts[i]), count, loss, 0.7)
    torch.testing.assert_close(layer.weight.grad, expected)
    assert value == pytest.approx(loss(layer(x)).item())


def test_rotation_keeps_cosines_and_puts_variance_first():
    vectors = np.random.default_rng(0).normal(size=(200, 6)) * [3, 1, 5, 0.1, 2, 0.5]
    turned = vectors @ rotation(vectors, 6)
    np.testing.assert_allclose(turned @ turned.T, vectors @ vectors.T, rtol=1e-4, atol=1e-4)
    assert (np.diff((turned**2).sum(0)) < 0).all()


# -- the loop -------------------------------------------------------------------------------


def test_training_learns_and_writes_a_model_that_both_classes_load(whole):
    lines = log(whole)
    first = [line["mlm/documents/loss"] for line in lines[:3]]
    last = [line["mlm/documents/loss"] for line in lines[-3:]]
    assert np.mean(last) < np.mean(first) - 0.04
    assert {line["phase"] for line in lines} == {"short", "long"}
    assert any("validation/mlm/documents/loss" in line for line in lines)
    assert (whole / "training.png").read_bytes()[:4] == b"\x89PNG"
    encoder = SentenceEncoder.from_pretrained(whole / "model")
    assert encoder.encode(["word1 word2", "word3"]).shape == (2, 32)
    model = ModernBertForMaskedLM.from_pretrained(whole / "model")
    assert model.config.global_rope_theta == 150000.0
    saved = load_file(
        whole / "checkpoints" / sorted(os.listdir(whole / "checkpoints"))[-1] / "model.safetensors"
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name])


def test_the_batch_grows_as_the_schedule_says(whole):
    rows = [line["mlm/documents/rows"] for line in log(whole) if line["phase"] == "short"]
    assert rows[0] == 1 and rows[-1] == 2 and rows == sorted(rows)


def test_a_run_killed_at_any_step_goes_on_bit_for_bit(material, whole, tmp_path):
    """kill -9 in both phases; the log and the finished weights equal an uninterrupted run's."""
    output = tmp_path / "killed"
    command = [sys.executable, "-m", "modernbert", "train", str(material / "recipe.toml")]
    command += ["--set", f"output={str(output)!r}"]
    total = len(log(whole))
    for until in (random.randrange(2, total // 2), random.randrange(total // 2, total - 2)):
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        path = output / "log.jsonl"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if path.exists() and path.read_bytes().count(b"\n") >= until:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        assert process.wait() in (0, -signal.SIGKILL), process.stderr.read().decode()
        process.stderr.close()
    subprocess.run(command, check=True, capture_output=True)
    assert log(output) == log(whole)
    assert (output / "model/model.safetensors").read_bytes() == (
        whole / "model/model.safetensors"
    ).read_bytes()


def test_two_processes_train_like_one(material, whole, tmp_path):
    """Gloo on the CPU, without dropout, whose masks differ between processes."""
    settings = ["model.attention_dropout=0.0", "model.mlp_dropout=0.0"]
    train(material, tmp_path / "one", *settings)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "modernbert", "train", str(material / "recipe.toml")]
    for setting in (*settings, f"output={str(tmp_path / 'two')!r}"):
        command += ["--set", setting]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"phase"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5)


def test_a_run_that_goes_on_after_its_last_phase_writes_the_same_model(material, whole):
    """Killed between the last checkpoint and the finished model."""
    before = {p.name: p.read_bytes() for p in (whole / "model").iterdir() if p.is_file()}
    shutil.rmtree(whole / "model")
    assert train(material, whole) == whole / "model"
    after = {p.name: p.read_bytes() for p in (whole / "model").iterdir() if p.is_file()}
    assert before == after


def test_sigterm_ends_a_run_with_a_checkpoint(material, tmp_path, monkeypatch):
    steps = []
    original = loop.Trainer._step

    def step(self, *args):
        steps.append(0)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(loop.Trainer, "_step", step)
    assert train(material, tmp_path) is None
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000000002"]


def test_another_recipe_does_not_go_on_with_old_checkpoints(material, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Trainer, "_agree_to_stop", lambda self: self.state["step"] == 3)
    assert train(material, tmp_path) is None
    with pytest.raises(ValueError, match="another recipe"):
        train(material, tmp_path, "phases.0.learning_rate=0.5")


def test_training_stops_early_when_the_held_out_loss_does_not_fall(material, tmp_path):
    settings = ["early_stopping=2", "validation_steps=1", "phases.0.learning_rate=1e-30"]
    settings += ["phases.1.learning_rate=1e-30"]
    train(material, tmp_path, *settings, "phases.0.weight_decay=0.0", "phases.1.weight_decay=0.0")
    steps = [line["step"] for line in log(tmp_path)]
    assert max(steps) <= 8


def test_the_finished_weights_can_be_an_average(material, tmp_path):
    train(material, tmp_path, "average=2")
    names = sorted(os.listdir(tmp_path / "checkpoints"))[-2:]
    parts = [load_file(tmp_path / "checkpoints" / name / "model.safetensors") for name in names]
    mean = load_file(tmp_path / "model" / "model.safetensors")
    for name, tensor in mean.items():
        torch.testing.assert_close(tensor, (parts[0][name] + parts[1][name]) / 2)


def test_a_nan_ends_the_run_with_advice(material, tmp_path):
    with pytest.raises(ValueError, match="lower learning_rate"):
        train(material, tmp_path, "phases.0.learning_rate=1e30", "phases.0.warmup_tokens=0")


class FakeTeacher:
    """Maps a text to counts of its words."""

    calls = 0

    def encode(self, texts, **options):
        FakeTeacher.calls += len(texts)
        rows = np.zeros((len(texts), 60), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split():
                row[int(word.removeprefix("word") or 0) if word.startswith("word") else 0] += 1
        return rows

    def get_embedding_dimension(self):
        return 60


def test_distillation_follows_its_teacher(material, tmp_path, monkeypatch):
    monkeypatch.setattr("modernbert.training.teacher.load_teacher", lambda *_: FakeTeacher())
    monkeypatch.setattr(loop, "load_teacher", lambda *_: FakeTeacher())
    settings = [
        "data.documents.teacher=fake",
        "start.embeddings_from=fake",
        "phases.1.tasks.0.objective=distillation",
        "phases.1.tasks.0.texts=16",
        "phases.1.tasks.0.dims=[8, 32]",
        "phases.1.tokens=20000",
        "phases.1.decay_tokens=10000",
        "micro_tokens=256",
    ]
    train(material, tmp_path, *settings)
    losses = [line.get("distillation/documents/loss") for line in log(tmp_path)]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.7 * losses[0]


def test_prompts_reach_the_student_and_the_finished_model_only(material, tmp_path, monkeypatch):
    """A second run goes on in the first one's directions, with another prompt and the same ones."""
    monkeypatch.setattr("modernbert.training.teacher.load_teacher", lambda *_: FakeTeacher())
    settings = [
        "data.documents.teacher=fake",
        "data.documents.prompts=['word0 ']",
        "prompt='word0 '",
        "phases.1.tasks.0.objective=distillation",
        "phases.1.tasks.0.texts=16",
        "phases.1.tokens=1500",
        "micro_tokens=256",
    ]
    train(material, tmp_path / "first", *settings)
    store = TokenStore(tmp_path / "first" / "data" / "documents-train")
    assert {sequence[0] for sequence in store} == {len(SPECIAL)}
    vectors = np.load(tmp_path / "first" / "data" / "documents-train-vectors" / "vectors.npy")
    lines = (material / "documents.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    kept = [text for text in texts if not is_validation(text, 0.1)]
    np.testing.assert_array_equal(vectors, FakeTeacher().encode(kept))
    encoder = SentenceEncoder.from_pretrained(tmp_path / "first" / "model")
    plain = encoder.encode(["word3 word4"])
    np.testing.assert_array_equal(plain, encoder.encode(["word0 word3 word4"], prompt=""))
    assert np.abs(plain - encoder.encode(["word3 word4"], prompt="")).max() > 1e-3

    directions = tmp_path / "first" / "data" / "directions.npy"
    np.save(directions, np.load(directions)[:, ::-1])
    settings += [f"start.directions={str(directions)!r}", f"output={str(tmp_path / 'second')!r}"]
    second = loop.Trainer(read_recipe(material / "recipe.toml", settings))
    np.testing.assert_array_equal(second._turn(32), np.load(directions)[:, :32])
    np.save(directions, np.eye(3))
    with pytest.raises(ValueError, match="the teacher has 60"):
        loop.Trainer(read_recipe(material / "recipe.toml", settings))._turn(32)


def test_a_phase_does_not_begin_with_the_texts_of_the_one_before(material, tmp_path):
    recipe = read_recipe(material / "recipe.toml", [f"output={str(tmp_path)!r}"])
    context = loop.Trainer(recipe).context
    first, second = (context.order(1000, phase) for phase in recipe.phases)
    orders = [first(0), first(1), second(0), second(1)]
    assert all(np.array_equal(np.sort(order), np.arange(1000)) for order in orders)
    assert len({order.tobytes() for order in orders}) == 4
    np.testing.assert_array_equal(first(0), context.order(1000, recipe.phases[0])(0))


def test_a_run_starts_from_a_model_of_another_vocabulary(material, whole, tmp_path):
    backend = json.loads((material / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"]
    for i in range(30):  # as many tokens, half of the words in each other's places
        a, b = f"word{2 * i}", f"word{2 * i + 1}"
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    shutil.copytree(material / "tokenizer", tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(backend))
    start = [f"start.tile={str(whole / 'model')!r}", f"output={str(tmp_path / 'run')!r}"]
    other = f"tokenizer={str(tmp_path / 'other')!r}"
    rows = load_file(whole / "model" / "model.safetensors")[
        "model.embeddings.tok_embeddings.weight"
    ]
    for settings, places in ((start, slice(None)), ([*start, other], [*vocabulary.values()])):
        trainer = loop.Trainer(read_recipe(material / "recipe.toml", settings))
        table = trainer._model().get_input_embeddings().weight
        torch.testing.assert_close(table[places], rows)


def test_teacher_vectors_go_on_where_they_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("modernbert.training.teacher.load_teacher", lambda *_: FakeTeacher())
    monkeypatch.setattr("modernbert.training.teacher.SHARD", 4)
    texts = [f"word{i}" for i in range(10)]

    def interrupted():
        yield from texts[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        teacher_vectors(tmp_path, interrupted, 10, "fake")
    before = FakeTeacher.calls
    table = teacher_vectors(tmp_path, lambda: iter(texts), 10, "fake")
    assert FakeTeacher.calls - before == 2
    np.testing.assert_array_equal(np.asarray(table).argmax(1), np.arange(10))
    with pytest.raises(ValueError, match="another|delete"):
        teacher_vectors(tmp_path, lambda: iter(texts), 10, "other")


def test_command_line(material, tmp_path):
    arguments = ["train", str(material / "recipe.toml"), "--set", f"output={str(tmp_path)!r}"]
    arguments += ["--set", "phases.0.tokens=300", "--set", "phases.1.tokens=900"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "model after" in result.stdout
    wrong = CliRunner().invoke(main, [*arguments, "--set", "seed=x"])
    assert wrong.exit_code == 2 and "seed is 'x'" in wrong.stderr


def test_smoothing_is_a_running_mean():
    np.testing.assert_allclose(smooth(np.arange(5.0), 2), [0, 0.5, 1.5, 2.5, 3.5])
