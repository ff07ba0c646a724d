"""StableAdamW against the published formulas, written out here once more in float64."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from modernbert.config import ModernBertConfig
from modernbert.heads import ModernBertForMaskedLM
from modernbert.training.optimizer import StableAdamW, parameter_groups

SHAPES = [(8, 5), (64, 16), (7,), (1,), (3, 4, 2)]


class Formulas:
    """The recipe for one tensor, in numpy and float64."""

    def __init__(
        self, p: np.ndarray, wd: float = 0.0, max_lr: float = 1.0, eps: float = 1e-6
    ) -> None:
        self.p, self.wd, self.max_lr, self.eps = p.astype(np.float64), wd, max_lr, eps
        self.m, self.v, self.t, self.rms = np.zeros_like(self.p), np.zeros_like(self.p), 0, 0.0

    def step(self, g: np.ndarray, lr: float) -> None:
        self.t += 1
        b1 = (0.9**self.t - 0.9) / (0.9**self.t - 1)
        b2 = (0.98**self.t - 0.98) / (0.98**self.t - 1)
        self.m = self.m + (1 - b1) * (g - self.m)
        self.v = b2 * self.v + (1 - b2) * g**2
        self.rms = float(np.sqrt(np.mean(g**2 / np.maximum(self.v, self.eps**2))))
        lr_t = lr / max(1.0, self.rms)
        self.p = self.p * (1 - (lr_t / self.max_lr) * self.wd)
        self.p = self.p - lr_t * self.m / (np.sqrt(self.v) + self.eps)


def gradients(steps: int, seed: int = 0) -> Iterator[list[np.ndarray]]:
    """Uneven ones: a spike every seventh step, another scale in every tensor, some zeros."""
    rng = np.random.default_rng(seed)
    for t in range(steps):
        spike = 50.0 if t % 7 == 3 else 1.0
        grads = [spike * 10.0**-i * rng.standard_normal(shape) for i, shape in enumerate(SHAPES)]
        if t % 5 == 4:
            grads[1][:] = 0.0
        yield grads


def assign(params: list[nn.Parameter], grads: list[np.ndarray]) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(g).to(p)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str
)
def test_follows_the_formulas(dtype: torch.dtype, tolerance: float) -> None:
    rng = np.random.default_rng(1)
    starts = [rng.standard_normal(shape) for shape in SHAPES]
    params = [nn.Parameter(torch.from_numpy(x).to(dtype)) for x in starts]
    groups: list[dict[str, Any]] = [
        {"params": params[:3], "weight_decay": 0.02},
        {"params": params[3:], "weight_decay": 0.0},
    ]
    optimizer = StableAdamW(groups, lr=1e-2)
    expected = [Formulas(x, wd=0.02 if i < 3 else 0.0, max_lr=1e-2) for i, x in enumerate(starts)]
    clipped = 0
    for t, grads in enumerate(gradients(40)):
        lr = 1e-2 * min(1.0, (t + 1) / 10)
        for group in optimizer.param_groups:
            group["lr"] = lr
        assign(params, grads)
        optimizer.step()
        for formula, p, g in zip(expected, params, grads, strict=True):
            formula.step(g, lr)
            clipped += formula.rms > 1.5
            np.testing.assert_allclose(
                p.detach().numpy(), formula.p, rtol=tolerance, atol=tolerance
            )
    assert clipped > 10  # the spikes did reach the clipping


def test_known_steps() -> None:
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = StableAdamW([p], lr=0.1, eps=1e-6)
    p.grad = torch.tensor([2.0], dtype=torch.float64)
    optimizer.step()  # debiased betas are 0: m = 2, v = 4, rms 1
    assert p.item() == pytest.approx(1 - 0.1 * 2 / (2 + 1e-6), abs=1e-15)
    before = p.item()
    p.grad = torch.tensor([20.0], dtype=torch.float64)
    optimizer.step()
    b1, b2 = 0.9 / 1.9, 0.98 / 1.98  # (b^2 - b) / (b^2 - 1) = b / (1 + b)
    m, v = b1 * 2 + (1 - b1) * 20, b2 * 4 + (1 - b2) * 400
    rms = 20 / math.sqrt(v)
    assert rms > 1.4
    assert p.item() == pytest.approx(before - 0.1 / rms * m / (math.sqrt(v) + 1e-6), abs=1e-14)


def test_zero_gradients_only_decay() -> None:
    decayed, plain = (nn.Parameter(torch.full((4, 4), 2.0)) for _ in range(2))
    groups: list[dict[str, Any]] = [
        {"params": [decayed], "weight_decay": 0.1},
        {"params": [plain]},
    ]
    optimizer = StableAdamW(groups, lr=0.5)
    for group in optimizer.param_groups:
        assert group["max_lr"] == 0.5  # fixed at the first rate...
        group["lr"] = 0.25  # ... so that half of it decays by half
    for _ in range(3):
        decayed.grad, plain.grad = torch.zeros(4, 4), torch.zeros(4, 4)
        optimizer.step()
    torch.testing.assert_close(decayed, torch.full((4, 4), 2.0 * (1 - 0.05) ** 3))
    assert torch.equal(plain, torch.full((4, 4), 2.0))


def test_max_lr_can_be_given() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = StableAdamW([p], lr=1e-3, max_lr=1e-2, weight_decay=0.5)
    p.grad = torch.zeros(2, 2)
    optimizer.step()
    torch.testing.assert_close(p, torch.full((2, 2), 1 - 0.05))


def test_parameters_without_gradient_wait() -> None:
    rng = np.random.default_rng(2)
    starts = [rng.standard_normal((3, 3)) for _ in range(2)]
    params = [nn.Parameter(torch.from_numpy(x)) for x in starts]
    optimizer = StableAdamW(params, lr=1e-2, weight_decay=0.1)
    expected = [Formulas(x, wd=0.1, max_lr=1e-2) for x in starts]
    for t in range(9):
        grads = [rng.standard_normal((3, 3)) for _ in range(2)]
        optimizer.zero_grad()
        present = [0] if t < 3 or t == 6 else [0, 1]  # the second starts late and pauses
        for i in present:
            params[i].grad = torch.from_numpy(grads[i])
            expected[i].step(grads[i], 1e-2)
        optimizer.step()
        assert (params[1] in optimizer.state) == (t >= 3)
        for formula, p in zip(expected, params, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), formula.p, rtol=1e-12)
    assert [optimizer.state[p]["step"] for p in params] == [9, 5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kahan_keeps_what_rounding_takes(dtype: torch.dtype) -> None:
    start = np.array([[1.0, -0.75, 0.5], [2.0, 0.25, -1.5]])
    results = {}
    for kahan in (True, False):
        p = nn.Parameter(torch.from_numpy(start).to(dtype))
        # Each step moves less than half of the distance between two numbers of this dtype.
        optimizer = StableAdamW([p], lr=5e-5, weight_decay=2e-5, kahan=kahan)
        formula = Formulas(start, wd=2e-5, max_lr=5e-5)
        rng = np.random.default_rng(3)
        for _ in range(400):
            p.grad = torch.from_numpy(1e-3 * (1 + 0.5 * rng.standard_normal(start.shape))).to(dtype)
            optimizer.step()
            formula.step(p.grad.double().numpy(), 5e-5)
        state = optimizer.state[p]
        assert ("lost" in state) == kahan and state["m"].dtype == torch.float32
        whole = p.detach().double() + (state["lost"].double() if kahan else 0)
        results[kahan] = np.abs(whole.numpy() - formula.p)
        moved = np.abs(formula.p - start)
        assert moved.min() > 0.005
    assert results[True].max() < 1e-3 < 0.01 < results[False].max()


def test_float16_gradients_whose_squares_vanish() -> None:
    p = nn.Parameter(torch.ones(4, 4, dtype=torch.float16))
    optimizer = StableAdamW([p], lr=0.1, eps=1e-6)
    p.grad = torch.full((4, 4), 2e-5, dtype=torch.float16)  # its square is 0 in float16
    optimizer.step()
    torch.testing.assert_close(
        p.detach().float(), torch.full((4, 4), 1 - 0.1 * 20 / 21), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumes_bit_for_bit_through_safetensors_and_json(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    def build(values: list[torch.Tensor]) -> tuple[list[nn.Parameter], StableAdamW]:
        params = [nn.Parameter(x.clone()) for x in values]
        groups: list[dict[str, Any]] = [
            {"params": params[:2], "weight_decay": 0.01},
            {"params": params[2:]},
        ]
        return params, StableAdamW(groups, lr=1e-2)

    def train(params: list[nn.Parameter], optimizer: StableAdamW, seed: int) -> None:
        for grads in gradients(6, seed):
            for group in optimizer.param_groups:
                group["lr"] = 5e-3
            assign(params, grads)
            params[3].grad = None
            optimizer.step()

    torch.manual_seed(4)
    params, optimizer = build([torch.randn(shape, dtype=dtype) for shape in SHAPES])
    train(params, optimizer, seed=0)

    saved = optimizer.state_dict()
    tensors = {
        f"{i}.{name}": value
        for i, state in saved["state"].items()
        for name, value in state.items()
        if isinstance(value, torch.Tensor)
    }
    save_file(tensors, tmp_path / "optimizer.safetensors")
    steps = {i: state["step"] for i, state in saved["state"].items()}
    text = json.dumps({"steps": steps, "param_groups": saved["param_groups"]})

    read: dict[str, Any] = json.loads(text)
    states: dict[int, dict[str, Any]] = {int(i): {"step": t} for i, t in read["steps"].items()}
    for key, value in load_file(tmp_path / "optimizer.safetensors").items():
        i, _, name = key.partition(".")
        states[int(i)][name] = value
    again, resumed = build([p.detach() for p in params])
    resumed.load_state_dict({"state": states, "param_groups": read["param_groups"]})
    assert resumed.param_groups[0]["max_lr"] == 1e-2

    train(params, optimizer, seed=1)
    train(again, resumed, seed=1)
    for p, q in zip(params, again, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == resumed.state[q].keys()
        for name, value in optimizer.state[p].items():
            other = resumed.state[q][name]
            assert value == other if name == "step" else torch.equal(value, other)


def test_a_loaded_state_is_a_copy() -> None:
    p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    first, second = StableAdamW([p], lr=0.1), StableAdamW([q], lr=0.1)
    p.grad = q.grad = torch.ones(3, 3)
    first.step()
    second.load_state_dict(first.state_dict())
    second.step()
    assert torch.equal(first.state[p]["m"], torch.ones(3, 3)) and first.state[p]["step"] == 1
    q.grad = torch.zeros(3, 3)
    second.step()
    assert torch.equal(first.state[p]["m"], torch.ones(3, 3))


def small_model() -> ModernBertForMaskedLM:
    config = ModernBertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        attention_bias=True,
        norm_bias=True,
        pad_token_id=0,
        cls_token_id=1,
        bos_token_id=1,
        sep_token_id=2,
        eos_token_id=2,
    )
    return ModernBertForMaskedLM(config)


def test_parameter_groups_of_a_model() -> None:
    model = small_model()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    matrices = {names[id(p)] for p in decayed["params"]}
    assert matrices == {
        "model.embeddings.tok_embeddings.weight",  # and decoder.weight, which is the same tensor
        "head.dense.weight",
        *(
            f"model.layers.{i}.{name}.weight"
            for i in range(2)
            for name in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")
        ),
    }
    rest = {names[id(p)] for p in others["params"]}
    assert rest | matrices == set(names.values()) and not rest & matrices
    assert {"decoder.bias", "model.layers.1.attn.Wqkv.bias", "model.final_norm.weight"} <= rest


def test_biases_with_several_axes_and_frozen_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(2, 2))
            self.weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
            self.temperature = nn.Parameter(torch.zeros(()))

    odd = Odd()
    (only,) = parameter_groups(odd, 0.1)
    assert only["weight_decay"] == 0.0
    assert [id(p) for p in only["params"]] == [id(odd.bias), id(odd.temperature)]


def test_a_tied_tensor_moves_once_and_the_model_learns() -> None:
    model = small_model()
    table = model.get_input_embeddings().weight
    start = table.detach().double().numpy().copy()
    optimizer = StableAdamW(parameter_groups(model, 0.05), lr=5e-3)
    ids = torch.randint(3, 40, (4, 12))
    losses = []
    for t in range(12):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if t == 0:
            formula = Formulas(start, wd=0.05, max_lr=5e-3)
            assert table.grad is not None
            formula.step(table.grad.double().numpy(), 5e-3)
            np.testing.assert_allclose(table.detach().numpy(), formula.p, atol=1e-6)
    assert model.decoder.weight is table
    assert losses[-1] < losses[0] - 0.5


@given(st.floats(1e-3, 1e3), st.integers(1, 6))
def test_scale_of_the_gradients_does_not_matter(scale: float, steps: int) -> None:
    a, b = (nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) for _ in range(2))
    first, second = (StableAdamW([p], lr=0.01, eps=1e-30) for p in (a, b))
    rng = np.random.default_rng(steps)
    for _ in range(steps):
        a.grad = torch.from_numpy(rng.standard_normal((4, 3)))
        b.grad = a.grad * scale
        first.step()
        second.step()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_many_tensors_at_once_are_as_each_alone(device: str) -> None:
    if device != "cpu" and not getattr(torch, device).is_available():
        pytest.skip(f"no {device} device")
    results = []
    for together in (True, False):
        torch.manual_seed(5)
        params = [nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]
        optimizers = [StableAdamW(params, lr=1e-2, weight_decay=0.1)]
        if not together:
            optimizers = [StableAdamW([p], lr=1e-2, weight_decay=0.1) for p in params]
        for grads in gradients(8):
            assign(params, [g.astype(np.float32) for g in grads])
            for optimizer in optimizers:
                optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gradient", ["plain", "transposed", "expanded"])
@pytest.mark.parametrize("transposed", [False, True])
def test_any_layout_in_memory(transposed: bool, gradient: str, dtype: torch.dtype) -> None:
    start, g = torch.randn(4, 6), torch.randn(4, 1).expand(4, 6)
    layouts = {"plain": g.contiguous(), "transposed": g.t().contiguous().t(), "expanded": g}
    plain = nn.Parameter(start.to(dtype, copy=True))
    other = nn.Parameter((start.t().contiguous().t() if transposed else start).to(dtype, copy=True))
    assert other.is_contiguous() != transposed
    for p, grad in ((plain, layouts["plain"]), (other, layouts[gradient])):
        optimizer = StableAdamW([p], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            p.grad = grad.to(dtype)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(plain, other) and not torch.equal(plain, start.to(dtype))


def test_closure() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    optimizer = StableAdamW([p], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 4.0
    assert (p < 1).all()


def test_sparse_gradients_are_refused() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    optimizer = StableAdamW(table.parameters(), lr=0.1)
    table(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": 0.0}, "max_lr=0.0"),
        ({"lr": 0.1, "max_lr": 0.0}, "max_lr=0.0"),
        ({"lr": 0.1, "betas": (1.0, 0.98)}, "betas"),
        ({"lr": 0.1, "eps": 0.0}, "eps=0.0"),
        ({"lr": 0.1, "weight_decay": 1.0}, "weight_decay=1.0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StableAdamW([nn.Parameter(torch.ones(2))], **options)
