"""FSDP2 on two CPU processes: the numbers and the files of one process."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import log, write_material

from modernbert import ModernBertForMaskedLM
from modernbert.training import loop
from modernbert.training.recipe import read_recipe

# The first steps have one row: the second process must run the layers without one. The pairs of a
# step fill a different number of micro-batches in each process.
RECIPE = """
name = "tiny"
output = "run"
tokenizer = "tokenizer"
micro_tokens = 48
threads = 1
log_steps = 1
validation_steps = 4
checkpoint_steps = 3
device = "cpu"
gradient_checkpointing = true

[model]
hidden_size = 36
intermediate_size = 33
num_hidden_layers = 2
num_attention_heads = 2

[data.documents]
files = ["documents.jsonl"]
validation = 0.2

[data.pairs]
files = ["pairs.jsonl"]
fields = ["anchor", "positive"]

[[phases]]
name = "only"
tokens = 1200
max_length = 24
learning_rate = 1e-2
warmup_tokens = 200
batch_warmup_tokens = 400

[[phases.tasks]]
objective = "mlm"
data = "documents"
rows = 3

[[phases.tasks]]
objective = "contrastive"
data = "pairs"
texts = 8
temperature = 0.1
every = 2
"""
PROCESS = """
import sys
from modernbert.training import loop
from modernbert.training.recipe import read_recipe

def run(output, until):
    loop.Trainer._agree_to_stop = lambda self: self.state["step"] == until
    settings = [f"output={output!r}", 'parallel="fsdp"']
    loop.Trainer(read_recipe(sys.argv[1], settings)).run()

run(sys.argv[2], None)
run(sys.argv[3], 5)
run(sys.argv[3], None)
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("material")
    words = [f"word{i}" for i in range(40)]
    draw = random.Random(7)

    def text(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    documents = [{"text": text(3, 30)} for _ in range(60)]
    pairs = [{"anchor": text(2, 20), "positive": text(2, 20)} for _ in range(24)]
    return write_material(folder, RECIPE, words, documents=documents, pairs=pairs)


def test_two_sharded_processes_train_like_one(material, tmp_path):
    """And an interrupted sharded run equals an uninterrupted one to the last bit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": "2", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROCESS, str(material / "recipe.toml")]
    command += [str(tmp_path / "sharded"), str(tmp_path / "cut")]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    recipe = read_recipe(material / "recipe.toml", [f"output={str(tmp_path / 'one')!r}"])
    loop.Trainer(recipe).run()
    errors = [process.communicate()[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)

    one, sharded = log(tmp_path / "one"), log(tmp_path / "sharded")
    assert len(one) == len(sharded) and one[0]["mlm/documents/rows"] == 1
    for a, b in zip(one, sharded, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"phase"}:
            assert b[key] == pytest.approx(a[key], rel=1e-5, abs=1e-5)
    assert log(tmp_path / "cut") == sharded
    for name in ("model.safetensors", "config.json", "modules.json"):
        model = tmp_path / "sharded" / "model" / name
        assert (tmp_path / "cut" / "model" / name).read_bytes() == model.read_bytes()

    last = sorted((tmp_path / "one" / "checkpoints").iterdir())[-1].name
    for name in ("model.safetensors", "optimizer/model.safetensors"):
        ours, theirs = (
            load_file(tmp_path / run / "checkpoints" / last / name) for run in ("one", "sharded")
        )
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=1e-5)
    ModernBertForMaskedLM.from_pretrained(tmp_path / "sharded" / "model")
