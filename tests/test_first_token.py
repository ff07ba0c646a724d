"""The last layer for the first token of each sequence only, as [CLS] pooling needs it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from modernbert import (
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    pack,
)
from modernbert.kernels import first_token, reference


def starts(lengths: list[int]) -> Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    window=st.sampled_from([None, 0, 1, 5, 100]),
    share=st.sampled_from([None, 0.5, 0.0]),
    dtype=st.sampled_from([torch.float64, torch.float16]),
)
def test_equals_the_first_row_of_all(
    lengths: list[int], window: int | None, share: float | None, dtype: torch.dtype
) -> None:
    tensors = [torch.randn(sum(lengths), 2, 8, dtype=torch.float64).to(dtype) for _ in range(3)]
    keys = None if share is None else torch.rand(sum(lengths)) < share
    at, upstream = starts(lengths)[:-1].long(), torch.randn(len(lengths), 2, 8)

    def first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return first_token.attention(q[at], k, v, starts(lengths), window, keys)

    def all_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v, tuple(lengths), window=window, keys=keys)[0][at]

    results = []
    for function, kind in ((first, dtype), (all_rows, torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in tensors]
        out = function(*leaves)
        assert out.dtype == kind
        results.append([out, *torch.autograd.grad(out, leaves, upstream.to(kind))])
    tolerance = 1e-12 if dtype == torch.float64 else 4e-3
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance)


def config(**changes: object) -> ModernBertConfig:
    return ModernBertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        pad_token_id=0,
        local_attention=8,
        num_labels=3,
    ).replace(**changes)


TEXTS = [[1, 2, 3], [4], list(range(5, 40)), [7] * 12]


@pytest.mark.parametrize("every", [3, 5])  # the last layer is global, or local
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_the_states_of_first_tokens(every: int, layers: int, bias: bool) -> None:
    changes = {"global_attn_every_n_layers": every, "num_hidden_layers": layers}
    model = ModernBertModel(config(**changes, attention_bias=bias, norm_bias=bias)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    marked = [[False] * len(text) for text in TEXTS]
    marked[2] = [i % 3 == 1 for i in range(35)]
    for query_only in (None, marked):
        batch = pack(TEXTS, query_only=query_only)
        expected = model(batch).last_hidden_state[batch.cu_seqlens[:-1].long()]
        with torch.no_grad():
            overwriting = model(batch, first_only=True).last_hidden_state
        recording = model(batch, first_only=True).last_hidden_state
        torch.testing.assert_close(overwriting, expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(recording, expected, atol=1e-12, rtol=0)


def test_a_classifier_computes_first_tokens_only() -> None:
    model = ModernBertForSequenceClassification(config(classifier_pooling="cls")).double()
    batch = pack(TEXTS)
    rows = []
    model.model.layers[-1].mlp.register_forward_hook(lambda *call: rows.append(len(call[2])))
    labels = torch.tensor([0, 1, 2, 0])
    gradients = []
    for states in (False, True):  # with the states of all tokens, all must be computed
        model.zero_grad()
        out = model(batch, labels=labels, output_hidden_states=states)
        assert out.loss is not None
        out.loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert rows == [len(TEXTS), batch.num_tokens]
    for name, x in gradients[0].items():
        torch.testing.assert_close(x, gradients[1][name], atol=1e-12, rtol=1e-9, msg=name)


def test_one_state_a_sequence_and_nothing_else() -> None:
    model = ModernBertModel(config())
    with pytest.raises(ValueError, match="first_only gives one state per sequence"):
        model(pack(TEXTS), first_only=True, output_hidden_states=True)
    with pytest.raises(ValueError, match="no empty sequence"):
        model(pack([[1], []]), first_only=True)
    padded = torch.tensor([[1, 2, 3], [4, 0, 0]])
    out = model(padded, padded != 0, first_only=True).last_hidden_state
    assert out.shape == (2, 32)
