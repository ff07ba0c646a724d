"""One compiled graph serves every batch: torch.compile sees through the packed forward."""

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from modernbert import ModernBertConfig, ModernBertModel, PackedBatch, pack

CONFIG = ModernBertConfig(
    vocab_size=200,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    pad_token_id=0,
    local_attention=16,
)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


def random_batch(generator: random.Random) -> PackedBatch:
    lengths = [generator.randint(1, 300) for _ in range(generator.randint(1, 20))]
    return pack([torch.randint(1, CONFIG.vocab_size, (n,)) for n in lengths])


def test_two_graphs_serve_a_hundred_batches() -> None:
    model = ModernBertModel(CONFIG).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    generator = random.Random(0)
    with torch.no_grad():
        for _ in range(100):
            batch = random_batch(generator)
            expected = model(batch).last_hidden_state
            actual = compiled(batch).last_hidden_state
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert counter.frame_count <= 2


def test_gradients_through_a_compiled_graph() -> None:
    model = ModernBertModel(CONFIG).double()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    batch = random_batch(random.Random(1))
    weights = torch.randn(batch.num_tokens, CONFIG.hidden_size, dtype=torch.float64)
    gradients = []
    for run in (model, compiled):
        model.zero_grad()
        (run(batch).last_hidden_state * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-10, rtol=1e-10, msg=name)


def test_the_operator_obeys_its_contract() -> None:
    """Fake shapes, aliasing and gradients of the attention node are what it declares."""
    q, k, v = (torch.randn(9, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    keys = torch.tensor([True] * 8 + [False])
    for mask in (None, keys):
        arguments = (q, k, v, torch.tensor([0, 4, 4, 9], dtype=torch.int32), mask)
        torch.library.opcheck(torch.ops.modernbert.global_attention.default, arguments)
