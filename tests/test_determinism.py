"""Deterministic mode: two training steps agree to the last bit, and who must be told so is."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modernbert import ModernBertConfig, ModernBertForMaskedLM, PackedBatch, kernels, pack
from modernbert.kernels import dispatch

CONFIG = ModernBertConfig(
    vocab_size=60,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    global_attn_every_n_layers=2,
    pad_token_id=0,
    local_attention=16,
    initializer_range=0.1,
)


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # refuses what is not; fills empty() with NaN
    yield
    torch.use_deterministic_algorithms(False)


def batch_of(*lengths: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    # Few ids: many tokens add to the same row of the table.
    return pack([torch.randint(1, 6, (n,), generator=generator) for n in lengths])


def step(attention: str, batch: PackedBatch) -> dict[str, Tensor]:
    """The loss and every gradient of one step, pooled vectors among them."""
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(CONFIG, attention=attention).train()
    labels = torch.where(torch.arange(batch.num_tokens) % 3 == 0, batch.input_ids, -100)
    output = model(batch, labels=labels, output_hidden_states=True)
    assert output.loss is not None and output.hidden_states is not None
    hidden = output.hidden_states[-1]
    first = model.model(batch, first_only=True).last_hidden_state
    pooled = kernels.mean_pool(hidden, batch.cu_seqlens)
    (output.loss + pooled.square().sum() + first.square().sum()).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return {"loss": output.loss.detach(), **found}


@pytest.mark.parametrize(
    ("attention", "pretence"), [("blocked", ""), ("turing", "sm_75"), ("triton", "sm_80")]
)
def test_two_steps_agree_to_the_last_bit(
    attention: str, pretence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attention == "triton":
        pytest.importorskip("triton")
        from modernbert.kernels import triton_attention

        cut = triton_attention.Tiling(16, 16, 4, 2, split=True)
        monkeypatch.setattr(triton_attention, "tiling", lambda *_: cut)
        monkeypatch.setattr(triton_attention, "tiling_backward", lambda *_: cut)
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("MODERNBERT_PRETEND", pretence)
    batch = batch_of(1, 19, 5)
    first, second = step(attention, batch), step(attention, batch)
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, second[name]), name


def test_our_kernels_have_no_atomics() -> None:
    folder = Path(kernels.__file__).parent
    sources = {path.name: path.read_text() for path in folder.glob("triton_*.py")}
    assert len(sources) >= 3
    assert [name for name, text in sources.items() if "tl.atomic" in text] == []


def test_what_doctor_says() -> None:
    gpu, cpu = dispatch.Machine("cuda", (9, 0)), dispatch.Machine()
    assert dispatch.deterministic(gpu, False, None).startswith("not asked for: torch.use_determ")
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in dispatch.deterministic(gpu, True, None)
    for machine, workspace in ((gpu, ":4096:8"), (gpu, ":16:8"), (cpu, None)):
        assert dispatch.deterministic(machine, True, workspace).startswith("yes")
