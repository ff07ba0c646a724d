"""Attention by others' kernels: what they are called with, and their simulation on the CPU."""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from modernbert import ModernBertConfig, ModernBertModel, kernels, pack
from modernbert.kernels import flash, reference, turing

HALF = torch.float16
LENGTHS = st.one_of(
    st.lists(st.integers(0, 40), max_size=5),
    st.sampled_from([[1], [128], [129, 1], [300, 1, 2, 3], [7] * 4, [5, 0, 0], [0, 0, 200]]),
)
WINDOWS = st.one_of(st.integers(0, 5), st.sampled_from([64, 1000]))


def starts(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0)).int()


def keys_of(kind: str, lengths: list[int]) -> Tensor | None:
    """(T,) bool: all (None), a random half, all but whole texts, none."""
    total = sum(lengths)
    if kind == "all":
        return None
    if kind == "none":
        return torch.zeros(total, dtype=torch.bool)
    if kind == "random":
        return torch.rand(total) < 0.5
    parts = [torch.full((n,), i % 2 == 0) for i, n in enumerate(lengths)]
    return torch.cat([torch.zeros(0, dtype=torch.bool), *parts])


KEYS = st.sampled_from(["all", "all", "random", "some texts", "none"])
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(attend: Attend, tensors: list[Tensor]) -> list[Tensor]:
    """Output and the gradients of q, k and v."""
    inputs = [x.detach().clone().requires_grad_() for x in tensors[:3]]
    out = attend(*inputs)
    found = torch.autograd.grad(out, inputs, tensors[3], allow_unused=True)
    gradients = [
        torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)
    ]
    return [out.detach(), *gradients]


def check(
    attend: Attend,
    lengths: list[int],
    window: int | None,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """|fast - f64| <= 2 |plain - f64| in the root mean square, plus a rounding."""
    tensors = [torch.randn(sum(lengths), 2, 16).double().to(dtype) for _ in range(4)]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, tuple(lengths), window=window, keys=keys)[0]

    exact = run(plain, [x.double() for x in tensors])
    usual, found = run(plain, tensors), run(attend, tensors)
    scale = torch.cat(exact).norm()
    for truth, by_torch, ours in zip(exact, usual, found, strict=True):
        assert ours.shape == truth.shape and ours.dtype == dtype
        assert ours.isfinite().all()
        rounding = torch.finfo(dtype).eps * scale
        assert (ours - truth).norm() <= 2 * (by_torch - truth).norm() + rounding


# -- T4 ---------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    lengths=LENGTHS,
    window=WINDOWS,
    kind=KEYS,
    local=st.booleans(),
    dtype=st.sampled_from([HALF, HALF, torch.float32]),
    known=st.booleans(),
)
def test_the_path_of_a_t4_in_simulation(
    lengths: list[int], window: int, kind: str, local: bool, dtype: torch.dtype, known: bool
) -> None:
    keys, told = keys_of(kind, lengths), tuple(lengths) if known else None
    plan = turing.plan(starts(lengths), sum(lengths), told, window, keys, dtype)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return turing.attention(q, k, v, plan, local=local)

    check(attend, lengths, window if local else None, keys, dtype)


def test_a_model_as_a_t4_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 against float64, with the backend that the table chooses for a T4."""
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_75")
    config = ModernBertConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        pad_token_id=0,
        local_attention=16,
    )
    batch = pack([torch.randint(1, 100, (n,)) for n in (1, 130, 40, 7, 40)])
    results = {}
    for attention, dtype in (
        ("reference", torch.float64), ("reference", HALF), ("turing", HALF), ("auto", HALF),
    ):  # fmt: skip
        torch.manual_seed(1)
        model = ModernBertModel(config, attention=attention).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
                parameter.copy_(parameter.half())
            results[attention, dtype] = model.to(dtype)(batch).last_hidden_state.double()
    exact = results["reference", torch.float64]
    plain, ours = results["reference", HALF], results["turing", HALF]
    assert (ours - exact).norm() <= 2 * (plain - exact).norm()
    assert torch.equal(results["auto", HALF], ours)


def test_the_memory_efficient_operator_takes_what_it_is_given() -> None:
    """On meta tensors: the operator itself checks names, types and shapes."""
    q = torch.empty(10, 2, 64, dtype=HALF, device="meta", requires_grad=True)
    k, v = (torch.empty(8, 2, 64, dtype=HALF, device="meta") for _ in range(2))
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    out = turing.efficient(q, k, v, ends, ends, 5, 4)
    assert out.shape == q.shape and out.dtype == HALF
    assert out.grad_fn is not None  # it has a backward of its own


# -- flash attention --------------------------------------------------------------------------


def emulate(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, left: int, right: int
) -> Tensor:
    """What flash attention defines: the window is counted from the last key (bottom right)."""
    outputs = [q[:0]]
    counts = zip(cu_queries.diff().tolist(), cu_keys.diff().tolist(), strict=True)
    at_q = at_k = 0
    for rows, columns in counts:
        here, there = slice(at_q, at_q + rows), slice(at_k, at_k + columns)
        at_q, at_k = at_q + rows, at_k + columns
        place = torch.arange(rows)[:, None] + columns - rows
        distance = torch.arange(columns) - place
        seen = torch.ones(rows, columns, dtype=torch.bool)
        if left >= 0:
            seen &= distance >= -left
        if right >= 0:
            seen &= distance <= right
        scores = torch.einsum("ihd,jhd->hij", q[here], k[there]) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hij,jhd->ihd", weights, v[there]))
    return torch.cat(outputs)


# The documented signatures of flash-attn 2, 3 and 4: another argument would be a TypeError.
def flash_attn_2(
    q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: Any = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Any = None,
) -> Tensor:  # fmt: skip
    assert not causal and softmax_scale is None and not dropout_p
    assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= cu_seqlens_k.diff().max()
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    return emulate(q, k, v, cu_seqlens_q, cu_seqlens_k, *window_size)


def flash_attn_3(*args: Any, num_splits: int = 1, sm_margin: int = 0, **kwargs: Any) -> Any:
    return flash_attn_2(*args, **kwargs)


def flash_attn_4(
    *args: Any, window_size: tuple[int | None, int | None] = (None, None), **kwargs: Any
) -> Any:
    left, right = (-1 if side is None else side for side in window_size)
    assert -1 not in window_size
    return flash_attn_2(*args, window_size=(left, right), **kwargs), None


def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
    """Bound to the signature of the installed PyTorch."""
    given = REAL_VARLEN.bind(*args, **kwargs).arguments
    ends = given["cu_seq_q"], given["cu_seq_k"]
    return emulate(given["query"], given["key"], given["value"], *ends, *given["window_size"])


varlen = pytest.importorskip("torch.nn.attention.varlen")
REAL_VARLEN = inspect.signature(varlen.varlen_attn)
MODULES: dict[str, tuple[str, Callable[..., Any]]] = {
    "flash_attn_2": ("flash_attn", flash_attn_2),
    "flash_attn_3": ("flash_attn_3.flash_attn_interface", flash_attn_3),
    "flash_attn_4": ("flash_attn.cute", flash_attn_4),
}


def install(kind: str, patch: pytest.MonkeyPatch) -> None:
    """Put the emulation where `flash` looks for that implementation."""
    if kind in MODULES:
        path, function = MODULES[kind]
        for name in (path.split(".")[0], path):
            module = ModuleType(name)
            module.__path__ = []  # type: ignore[attr-defined]
            patch.setitem(sys.modules, name, module)
        sys.modules[path].flash_attn_varlen_func = function  # type: ignore[attr-defined]
    elif kind == "varlen":
        patch.setattr(varlen, "varlen_attn", varlen_attn)


@pytest.mark.parametrize("kind", ["flash_attn_2", "flash_attn_3", "flash_attn_4", "varlen"])
@settings(max_examples=15)
@given(lengths=LENGTHS, window=WINDOWS, keys=KEYS, local=st.booleans(), known=st.booleans())
def test_flash_attention_gets_the_right_arguments(
    kind: str, lengths: list[int], window: int, keys: str, local: bool, known: bool
) -> None:
    mask, told = keys_of(keys, lengths), tuple(lengths) if known else None
    with pytest.MonkeyPatch.context() as patch:
        install(kind, patch)
        facts = (starts(lengths), sum(lengths), told, window, mask, torch.float32)
        plan = flash.plan(kind, *facts)
        if known:  # then what an implementation is told is exact
            assert plan.sequences.longest == max(lengths, default=0)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash.attention(q, k, v, plan, local=local)

        check(attend, lengths, window if local else None, mask, torch.float32)


@pytest.mark.parametrize("window", [-1, 64])
def test_the_internal_operator_takes_what_it_is_given(window: int) -> None:
    q, k, v = (torch.empty(10, 2, 64, dtype=HALF, device="meta") for _ in range(3))
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    out = flash.CALLS["aten"](q.requires_grad_(), k, v, ends, ends, 5, 5, window=window)
    assert out.shape == q.shape and out.dtype == HALF and out.grad_fn is not None


@pytest.mark.parametrize("kind", sorted(flash.TOLD))
@pytest.mark.parametrize(("by_config", "by_switch"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_flash_attention_is_told_to_be_deterministic(
    kind: str, by_config: int, by_switch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `deterministic_flash_attn` of a config, or by PyTorch's switch."""
    install(kind, monkeypatch)
    path, function = MODULES[kind]
    told = []

    def noting(*args: Any, **options: Any) -> Any:
        told.append(options["deterministic"])
        return function(*args, **options)

    monkeypatch.setattr(sys.modules[path], "flash_attn_varlen_func", noting)
    monkeypatch.setattr(kernels.dispatch, "obstacle_to", lambda *_: "")
    monkeypatch.setattr(kernels.dispatch, "flash_kind", lambda *_: kind)
    q, k, v = torch.randn(3, 6, 2, 16).unbind()
    torch.use_deterministic_algorithms(bool(by_switch))
    try:
        plan = kernels.plan_attention(
            starts([2, 4]), 6, (2, 4), window=1, dtype=q.dtype, backend="flash",
            deterministic=bool(by_config),
        )  # fmt: skip
        for local in (False, True):
            kernels.attention(q, k, v, plan, local=local)
    finally:
        torch.use_deterministic_algorithms(False)
    assert told == [bool(by_config or by_switch)] * 2


@pytest.mark.parametrize("asked", [False, True])
def test_a_config_asks_for_determinism(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModernBertConfig(
        vocab_size=10,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        pad_token_id=0,
        deterministic_flash_attn=asked,
    )
    told, plan_attention = [], kernels.plan_attention

    def noting(*args: Any, **options: Any) -> Any:
        told.append(options["deterministic"])
        return plan_attention(*args, **options)

    monkeypatch.setattr(kernels, "plan_attention", noting)
    ModernBertModel(config)(pack([[1, 2, 3]]))
    assert told == [asked]


def test_every_kind_can_be_called() -> None:
    assert flash.CALLS.keys() == kernels.dispatch.FLASH.keys()
