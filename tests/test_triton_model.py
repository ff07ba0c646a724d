"""The whole model through our Triton kernels, as an A100 would run it, in the interpreter."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from modernbert import (  # noqa: E402
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    PackedBatch,
    pack,
)
from modernbert.kernels import triton_attention, triton_elementwise  # noqa: E402

CONFIG = ModernBertConfig(
    vocab_size=60,
    hidden_size=64,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    global_attn_every_n_layers=2,
    pad_token_id=0,
    local_attention=16,
)


@pytest.fixture(autouse=True)
def _as_an_a100(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_80")
    cut = triton_attention.Tiling(16, 16, 4, 2, split=True)
    monkeypatch.setattr(triton_attention, "tiling", lambda *_: cut)
    monkeypatch.setattr(triton_attention, "tiling_backward", lambda *_: cut)
    torch.compiler.reset()
    yield


def make(dtype: torch.dtype, attention: str = "auto") -> ModernBertForMaskedLM:
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(CONFIG, attention=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # larger than at the start of training: errors show
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.half())
    return model.to(DEVICE, dtype).eval()


def batch_of(lengths: tuple[int, ...]) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    return pack([torch.randint(1, 60, (n,), generator=generator) for n in lengths], device=DEVICE)


def step(model: ModernBertForMaskedLM, batch: PackedBatch) -> dict[str, Tensor]:
    """Hidden states and the gradient of every parameter."""
    model.zero_grad()
    out = model.model(batch).last_hidden_state
    (out.double() * torch.linspace(-1, 1, out.shape[1], device=DEVICE)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.model.named_parameters() if p.grad is not None}
    return {"out": out.detach(), **gradients}


def operators(profiler: profile) -> set[str]:
    """The operators of ours that ran."""
    names = {event.key for event in profiler.key_averages()}
    return {n.removeprefix("modernbert::") for n in names if n.startswith("modernbert::")}


def test_the_model_and_its_gradients() -> None:
    batch = batch_of((17, 1, 30))
    exact = step(make(torch.float64, "reference"), batch)
    plain = step(make(torch.float16, "reference"), batch)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        ours = step(make(torch.float16), batch)
    forward = {"norm", "attention", "geglu"}
    assert operators(profiler) == forward | {f"{name}_backward" for name in forward}
    assert ours.keys() == exact.keys() and len(exact) > 10
    for name, truth in exact.items():
        allowed = 2 * (plain[name] - truth).norm() + torch.finfo(torch.float16).eps * truth.norm()
        assert (ours[name] - truth).norm() <= allowed, name


def test_long_texts_turn_before_the_kernel_without_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batch = batch_of((17, 1, 18))
    model = make(torch.float16)
    with torch.no_grad():
        expected = model.model(batch).last_hidden_state
        monkeypatch.setattr(triton_attention, "TURN_ON_LOAD", 17)
        turn, turned = triton_elementwise._turn, []

        def record(x: Tensor, *others: object, **options: bool) -> None:
            turned.append(x.shape)
            turn(x, *others, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(triton_elementwise, "_turn", record)
        found = model.model(batch).last_hidden_state
    assert turned == [(36, 2, 2, 32)]  # q and k of the global layer
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_one_graph_serves_many_batches() -> None:
    model: ModernBertModel = make(torch.float32).model
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for lengths in ((5, 17), (9,)):
            batch = batch_of(lengths)
            expected = model(batch).last_hidden_state
            actual = compiled(batch).last_hidden_state
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_gradient_checkpointing_changes_nothing() -> None:
    batch = batch_of((9, 3))
    model = make(torch.float16).train()
    expected = step(model, batch)
    model.gradient_checkpointing_enable()
    found = step(model, batch)
    for name, x in expected.items():
        assert (found[name] - x).norm() <= 0.01 * x.norm(), name
