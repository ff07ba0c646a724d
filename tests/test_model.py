"""What the model classes do, whatever numbers they hold: doors, dtypes, training, heads, errors."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import modernbert
from modernbert import ModernBertConfig, PackedBatch, pack
from modernbert.model import RotaryTable
from modernbert.packing import pack_padded

TINY = ModernBertConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=2,
    pad_token_id=0,
    local_attention=8,
    max_position_embeddings=64,
    num_labels=3,
)
HEADS = [
    "ModernBertForMaskedLM",
    "ModernBertForSequenceClassification",
    "ModernBertForTokenClassification",
    "ModernBertForQuestionAnswering",
    "ModernBertForMultipleChoice",
]
CLASSES = ["ModernBertModel", *HEADS]
BACKENDS = ["reference", "blocked"]
LENGTHS = [5, 1, 19, 12]


def make(name: str = "ModernBertModel", *, attention: str = "auto", **changes: Any) -> Any:
    """A model in eval mode whose numbers are near 1 everywhere, so that mistakes show."""
    torch.manual_seed(1)
    if name.endswith("QuestionAnswering"):
        changes = {"num_labels": 2, **changes}
    model = getattr(modernbert, name)(TINY.replace(**changes), attention=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(1, 0.3)
    return model.eval()


def padded(lengths: list[int] = LENGTHS, side: str = "right") -> tuple[Tensor, Tensor]:
    """Random ids (B, L) from 1 and their mask."""
    places, sizes = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    mask = places < sizes if side == "right" else places >= max(lengths) - sizes
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    generator = torch.Generator().manual_seed(2)
    ids[mask] = torch.randint(1, TINY.vocab_size, (sum(lengths),), generator=generator)
    return ids, mask.long()


def answer(output: Any) -> Tensor:
    """The main tensor of any class's output."""
    for name in ("last_hidden_state", "logits", "start_logits"):
        if hasattr(output, name):
            return getattr(output, name)
    raise AssertionError(output)


def inputs_of(name: str, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same, with an axis of two choices where the class wants one."""
    if not name.endswith("MultipleChoice"):
        return ids, mask
    return ids.unflatten(0, (-1, 2)), mask.unflatten(0, (-1, 2))


def labels_of(name: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    rows = len(ids)
    if name == "ModernBertModel":
        return {}
    if name.endswith(("MaskedLM", "TokenClassification")):
        high = TINY.vocab_size if name.endswith("MaskedLM") else 3
        return {"labels": (ids % high).masked_fill(mask == 0, -100)}
    if name.endswith("QuestionAnswering"):
        places = torch.zeros(rows, dtype=torch.int64)
        return {"start_positions": places, "end_positions": places}
    return {"labels": torch.arange(rows) % 2}


def loss_of(model: nn.Module, name: str, **changes: Any) -> Tensor:
    ids, mask = inputs_of(name, *padded())
    output = model(ids, mask, **labels_of(name, ids, mask), **changes)
    if name == "ModernBertModel":
        return output.last_hidden_state.square().mean()
    return output.loss


def gradients(model: nn.Module, name: str) -> dict[str, Tensor]:
    model.zero_grad()
    loss_of(model, name).backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(model.parameters()))
    return found


def same(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


# -- doors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ModernBertModel", "ModernBertForMaskedLM"])
def test_padding_packing_and_single_texts_agree(name: str, backend: str) -> None:
    model = make(name, attention=backend).double()
    ids, mask = padded()
    expected = answer(model(ids, mask))
    tokens = mask.bool()
    texts = [row[keep].tolist() for row, keep in zip(ids, tokens, strict=True)]
    batch = pack(texts)

    left_ids, left_mask = padded(side="left")
    same(answer(model(left_ids, left_mask))[left_mask.bool()], expected[tokens])
    same(answer(model(batch)), expected[tokens])
    same(answer(model(pack_padded(ids, mask))), expected[tokens])
    for text, part in zip(texts, batch.split(expected[tokens]), strict=True):
        same(answer(model(torch.tensor([text])))[0], part)


@pytest.mark.parametrize("name", ["ModernBertForSequenceClassification", HEADS[-1]])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooled_heads_agree_for_every_padding(name: str, pooling: str) -> None:
    model = make(name, classifier_pooling=pooling).double()
    expected = model(*inputs_of(name, *padded())).logits
    same(model(*inputs_of(name, *padded(side="left"))).logits, expected)
    if not name.endswith("MultipleChoice"):
        ids, mask = padded()
        same(model(pack_padded(ids, mask)).logits, expected)
        same(model(ids[2:3]).logits, expected[2:3])  # the longest row has no padding


@pytest.mark.parametrize(
    "name", ["ModernBertModel", *HEADS[:1], "ModernBertForTokenClassification"]
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_zeros_at_pads(name: str, side: str) -> None:
    ids, mask = padded(side=side)
    output = make(name)(ids, mask, output_hidden_states=True)
    for x in (answer(output), *output.hidden_states):
        assert (x[mask == 0] == 0).all()
        assert (x[mask == 1] != 0).any(-1).all()


def test_question_answering_never_points_at_padding() -> None:
    ids, mask = padded()
    output = make("ModernBertForQuestionAnswering")(ids, mask)
    for logits in (output.start_logits, output.end_logits):
        assert (logits[mask == 0] == torch.finfo(logits.dtype).min).all()
        assert logits[mask == 1].isfinite().all()
        assert logits.shape == ids.shape


@pytest.mark.parametrize("name", CLASSES)
def test_embeddings_instead_of_ids(name: str) -> None:
    model = make(name)
    ids, mask = inputs_of(name, *padded())
    embeds = model.get_input_embeddings()(ids)
    same(answer(model(inputs_embeds=embeds, attention_mask=mask)), answer(model(ids, mask)), 1e-8)


@pytest.mark.parametrize("name", CLASSES)
def test_hidden_states(name: str) -> None:
    model = make(name)
    ids, mask = inputs_of(name, *padded())
    output = model(ids, mask, output_hidden_states=True)
    assert len(output.hidden_states) == TINY.num_hidden_layers + 1
    flat = ids.flatten(0, -2), mask.flatten(0, -2)
    plain = model.encoder()(*flat, output_hidden_states=True)
    assert torch.equal(plain.hidden_states[-1], plain.last_hidden_state)
    assert all(
        torch.equal(x, y) for x, y in zip(output.hidden_states, plain.hidden_states, strict=True)
    )
    batch = pack_padded(*flat)
    same(batch.unpack(model.encoder().embeddings(batch)), plain.hidden_states[0], 1e-6)
    assert model(ids, mask).hidden_states is None
    packed = model.encoder()(batch, output_hidden_states=True)
    assert {x.shape for x in packed.hidden_states} == {(batch.num_tokens, TINY.hidden_size)}


def test_attention_maps() -> None:
    ids, mask = padded()
    model = make(attention="reference")
    output = model(ids, mask, output_attentions=True)
    assert len(output.attentions) == TINY.num_hidden_layers
    for x in output.attentions:
        assert x.shape == (4, 2, 19, 19)
        same(x.sum(-1), mask[:, None].expand(4, 2, 19).float(), 1e-5)
        assert (x.transpose(-1, -2)[(mask == 0)[:, None].expand(4, 2, 19)] == 0).all()
    packed = model(pack_padded(ids, mask), output_attentions=True)
    for single, x in zip(packed.attentions[1], output.attentions[1], strict=True):
        length = single.shape[-1]
        assert torch.equal(single, x[:, :length, :length])
    assert model(ids, mask).attentions is None


@pytest.mark.parametrize("backend", ["auto", "blocked"])
def test_other_backends_have_no_attention_maps(backend: str) -> None:
    with pytest.raises(ValueError, match=f'attention="reference" .*{backend}'):
        make(attention=backend)(*padded(), output_attentions=True)


def test_outputs_are_tuples_too() -> None:
    ids, mask = padded()
    output = make("ModernBertForMaskedLM")(ids, mask, labels=ids)
    loss, logits = output
    assert loss is output[0] is output["loss"] is output.loss
    assert logits is output[1] is output.logits
    assert make("ModernBertForMaskedLM")(ids, mask)[0].shape == logits.shape
    assert output[:2] == (loss, logits) == output.to_tuple()


@pytest.mark.parametrize("backend", BACKENDS)
def test_query_only_tokens(backend: str) -> None:
    """They see the text, the text does not see them, and they do not see each other."""
    model = make(attention=backend).double()
    ids, mask = padded([6, 4])
    plain = model(ids, mask).last_hidden_state
    expansion = torch.full((2, 3), 99)
    long_ids = torch.cat((ids, expansion), 1)
    long_ids[1, 4:7] = 99  # right behind the text
    long_ids[1, 7:] = 0
    long_mask = torch.cat((mask, torch.zeros_like(expansion)), 1)
    marked = long_ids == 99
    found = model(long_ids, long_mask, query_only=marked).last_hidden_state
    same(found[:, :6][mask.bool()], plain[mask.bool()])
    assert (found[marked] != 0).any(-1).all()
    assert (found[1, 7:] == 0).all()
    texts = [row[row > 0].tolist() for row in long_ids]
    flags = [[i == 99 for i in text] for text in texts]
    same(model(pack(texts, query_only=flags)).last_hidden_state, found[(long_mask + marked).bool()])
    shorter = model(long_ids[:1, :7], long_mask[:1, :7], query_only=marked[:1, :7])
    same(shorter.last_hidden_state[0, 6], found[0, 6])


@pytest.mark.parametrize("given", ["ids", "embeddings", "packed"])
def test_a_cpu_takes_long_batches_in_pieces(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().double()
    lengths = [6, 0, 4, 3, 19, 1]
    ids, mask = padded(lengths, side="left")
    places = torch.arange(19).flip(0) * 2
    marked = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    marked &= mask.bool()
    inputs: dict[str, Any] = {"attention_mask": mask, "query_only": marked}
    inputs["position_ids"] = places.expand(ids.shape)
    if given == "embeddings":
        inputs["inputs_embeds"] = model.embeddings.tok_embeddings(ids).detach()
    else:
        inputs["input_ids"] = ids
    if given == "packed":
        inputs = {"input_ids": pack_padded(**inputs)}
    expected = model(**inputs).last_hidden_state.detach()
    seen: list[tuple[int, ...]] = []
    plan = modernbert.kernels.plan_attention

    def noted(cu_seqlens: Tensor, total: int, lengths: tuple[int, ...], **options: Any) -> Any:
        assert cu_seqlens.diff().tolist() == list(lengths) and sum(lengths) == total
        seen.append(lengths)
        return plan(cu_seqlens, total, lengths, **options)

    monkeypatch.setattr(modernbert.kernels, "plan_attention", noted)
    monkeypatch.setattr(modernbert.kernels, "CPU_TOKENS", 10)
    with torch.no_grad():
        same(model(**inputs).last_hidden_state, expected)
        assert seen == [(6, 0, 4), (3,), (19,), (1,)]
        whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
        same(whole, expected)
        assert seen[4:] == [tuple(lengths)]
    model(**inputs)  # gradients want one graph
    assert seen[5:] == [tuple(lengths)]


def test_first_tokens_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().double()
    batch = pack([[5] * n for n in (6, 4, 3, 19, 1)])
    with torch.no_grad():
        expected = model(batch).last_hidden_state[batch.cu_seqlens[:-1].long()]
        monkeypatch.setattr(modernbert.kernels, "CPU_TOKENS", 10)
        same(model(batch, first_only=True).last_hidden_state, expected)


# -- positions --------------------------------------------------------------------------------


def test_position_ids() -> None:
    model = make().double()
    ids, mask = padded()
    expected = model(ids, mask).last_hidden_state
    places = torch.arange(19)[None]
    same(model(ids, mask, places).last_hidden_state, expected)
    same(model(ids, mask, places.expand(4, 19)).last_hidden_state, expected)
    # Rotary positions are relative: float32 tables limit how exactly.
    same(model(ids, mask, places + 40).last_hidden_state, expected, 1e-4)
    assert (model(ids, mask, places * 2).last_hidden_state - expected).abs().max() > 0.1


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_longer_than_max_position_embeddings(backend: str) -> None:
    short, long = make(attention=backend), make(max_position_embeddings=4096, attention=backend)
    ids = torch.randint(1, 101, (1, 150))
    assert torch.equal(short(ids).last_hidden_state, long(ids).last_hidden_state)
    far = torch.arange(100_000, 100_150)[None]
    same(short(ids, None, far).last_hidden_state, short(ids).last_hidden_state, 0.1)


@pytest.mark.parametrize("theta", [1e4, 160000.0])
def test_rotary_tables(theta: float) -> None:
    table = RotaryTable(theta, 64, 100)
    positions = torch.tensor([0, 1, 99, 63])
    cos, sin = table(positions, 99)
    first = table.tables[torch.device("cpu")]
    assert cos.dtype == sin.dtype == first.dtype == torch.float32
    assert first.shape == (2, 128, 32)
    exponents = torch.arange(0, 64, 2).double() / 64
    angles = positions.double()[:, None] / theta**exponents
    same(cos.double(), angles.cos(), 1e-5)
    same(sin.double(), angles.sin(), 1e-5)
    table(positions, 99)
    assert table.tables[torch.device("cpu")] is first  # made once
    table(torch.tensor([128]), 128)
    grown = table.tables[torch.device("cpu")]
    assert grown.shape[1] == 256
    assert torch.equal(grown[:, :128], first)


# -- empty and tiny ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
def test_no_tokens(backend: str, shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    hidden = make(attention=backend)(ids, output_hidden_states=True).last_hidden_state
    assert hidden.shape == (*shape, 32)
    logits = make("ModernBertForMaskedLM", attention=backend)(ids, torch.ones_like(ids)).logits
    assert logits.shape == (*shape, 101)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_row_among_others(backend: str) -> None:
    model = make(attention=backend)
    ids, mask = padded()
    mask[1] = 0
    hidden = model(ids, mask).last_hidden_state
    assert (hidden[1] == 0).all() and hidden.isfinite().all()
    same(hidden[0], model(ids[:1], mask[:1]).last_hidden_state[0], 1e-5)
    assert make(attention=backend)(pack([[], [5], []])).last_hidden_state.shape == (1, 32)
    assert make(attention=backend)(pack([])).last_hidden_state.shape == (0, 32)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_empty_row_cannot_be_pooled(pooling: str) -> None:
    ids, mask = padded()
    mask[1] = 0
    model = make("ModernBertForSequenceClassification", classifier_pooling=pooling)
    with pytest.raises(ValueError, match="row 1 of the batch has no token"):
        model(ids, mask)


@pytest.mark.parametrize("name", CLASSES)
def test_one_token(name: str) -> None:
    ids, mask = inputs_of(name, torch.tensor([[5], [6]]), torch.ones(2, 1))
    assert answer(make(name)(ids, mask)).isfinite().all()


# -- dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 0.02), (torch.bfloat16, 0.15)]
)
def test_dtypes(name: str, dtype: torch.dtype, tolerance: float, backend: str) -> None:
    model = make(name, attention=backend).to(dtype)
    ids, mask = inputs_of(name, *padded())
    actual = answer(model(ids, mask))
    expected = answer(copy.deepcopy(model).double()(ids, mask))
    assert (model.dtype, actual.dtype, expected.dtype) == (dtype, dtype, torch.float64)
    tokens = expected > -1e4 if name.endswith("Answering") else torch.ones_like(expected) > 0
    error = (actual - expected)[tokens]
    assert error.norm() <= tolerance * expected[tokens].norm()


@pytest.mark.parametrize("name", HEADS)
def test_losses_of_halves_are_float32(name: str) -> None:
    loss = loss_of(make(name).to(torch.bfloat16), name)
    assert loss.dtype == torch.float32
    assert loss_of(make(name).double(), name).dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CLASSES)
def test_autocast(name: str, backend: str) -> None:
    model = make(name, attention=backend).train()
    expected = loss_of(model, name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, name)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=0.1, rtol=0.1)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# -- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_gradients_of_both_backends_agree(name: str) -> None:
    found = [gradients(make(name, attention=backend).double(), name) for backend in BACKENDS]
    for parameter, expected in found[0].items():
        same(found[1][parameter], expected, 1e-11)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing(backend: str, dropout: float) -> None:
    """The same gradients, dropout included, for a second forward pass of each layer."""
    name = "ModernBertForMaskedLM"
    rates = dict.fromkeys(("attention_dropout", "mlp_dropout", "embedding_dropout"), dropout)
    model = make(name, attention=backend, **rates).double().train()
    calls: list[int] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.append(1))

    def run() -> tuple[dict[str, Tensor], int]:
        calls.clear()
        torch.manual_seed(3)
        return gradients(model, name), len(calls)

    expected, plain_calls = run()
    model.gradient_checkpointing_enable()
    found, calls_again = run()
    assert (plain_calls, calls_again) == (4, 8)
    for parameter, gradient in expected.items():
        same(found[parameter], gradient, 1e-12)
    model.gradient_checkpointing_disable()
    assert run()[1] == 4
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        loss_of(model.eval(), name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "field", ["attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout"]
)
def test_each_dropout_acts_in_training_only(field: str, backend: str) -> None:
    name = "ModernBertForTokenClassification"
    model = make(name, attention=backend, **{field: 0.4})
    plain = make(name, attention=backend)
    ids, mask = padded()
    expected = plain(ids, mask).logits
    assert torch.equal(model(ids, mask).logits, expected)
    assert torch.equal(plain.train()(ids, mask).logits, expected)
    torch.manual_seed(0)
    first, second = (model.train()(ids, mask).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(first, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_after_inference_mode(backend: str) -> None:
    name = "ModernBertForMaskedLM"
    model = make(name, attention=backend)
    with torch.inference_mode():
        expected = loss_of(model, name)
    loss = loss_of(model.train(), name)
    loss.backward()
    same(loss.detach(), expected.clone(), 1e-6)


def test_a_step_of_training_lowers_the_loss() -> None:
    for name in HEADS:
        model = make(name).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        before = loss_of(model, name)
        before.backward()
        optimizer.step()
        assert loss_of(model, name) < before, name


# -- initial weights --------------------------------------------------------------------------


def test_initial_weights() -> None:
    config = ModernBertConfig(
        vocab_size=2000, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, tie_word_embeddings=False, norm_bias=True,
        attention_bias=True, mlp_bias=True, classifier_bias=True,
    )  # fmt: skip
    masked_lm = modernbert.ModernBertForMaskedLM(config)
    classifier = modernbert.ModernBertForSequenceClassification(config)
    out = 0.02 / math.sqrt(2 * config.num_hidden_layers)
    deviations = {
        "tok_embeddings": 0.02,
        "Wqkv": 0.02,
        "Wi": 0.02,
        "Wo": out,
        "head.dense": out,
        "decoder": out,
        "classifier": 128**-0.5,
    }
    cut = 0.8796  # standard deviation of a standard normal that is cut at 2
    for name, p in [*masked_lm.named_parameters(), *classifier.named_parameters()]:
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            std = next(value for part, value in deviations.items() if part in name)
            assert p.abs().max() <= 2 * std, name
            assert abs(p.detach().std() / (cut * std) - 1) < 0.1, name
    assert (masked_lm.get_input_embeddings().weight[0] != 0).all()  # the pad's row too


@pytest.mark.parametrize(
    ("name", "sizes", "parameters", "tensors"),
    [
        ("ModernBertForMaskedLM", {}, 149_655_232, 137),
        ("ModernBertModel", {}, 149_014_272, 134),
        ("ModernBertForMaskedLM", {"large": True}, 395_881_664, 173),
        ("ModernBertModel", {"large": True}, 394_781_696, 170),
    ],
)
def test_official_sizes(name: str, sizes: dict, parameters: int, tensors: int) -> None:
    config = ModernBertConfig()
    if sizes:
        config = ModernBertConfig(
            hidden_size=1024, intermediate_size=2624, num_attention_heads=16, num_hidden_layers=28
        )
    with torch.device("meta"):
        model = getattr(modernbert, name)(config)
    assert model.num_parameters() == parameters
    assert len(model.tensors_to_save()) == tensors


# -- embeddings -------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab_size", [60, 101, 140])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_resize_token_embeddings(vocab_size: int, tied: bool, bias: bool) -> None:
    model = make("ModernBertForMaskedLM", tie_word_embeddings=tied, decoder_bias=bias)
    ids = torch.randint(1, 60, (2, 9))
    before = model(ids).logits
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = min(vocab_size, 101)

    table = model.resize_token_embeddings(vocab_size)
    assert table is model.get_input_embeddings()
    assert (table.num_embeddings, table.padding_idx) == (vocab_size, 0)
    assert model.config.vocab_size == model.model.config.vocab_size == vocab_size
    assert model.decoder.out_features == vocab_size
    assert (model.decoder.weight is table.weight) == tied
    logits = model(ids).logits
    assert logits.shape == (2, 9, vocab_size)
    same(logits[..., :kept], before[..., :kept], 1e-5)

    resized = {"model.embeddings.tok_embeddings.weight": table.weight}
    if not tied:
        resized["decoder.weight"] = model.decoder.weight
    if bias:
        resized["decoder.bias"] = model.decoder.bias
    for name, p in model.named_parameters():
        assert p.requires_grad and type(p) is nn.Parameter
        same(p[: len(old[name])] if name in resized else p, old[name][: len(p)], 0)
        if name in resized and vocab_size > 101:
            same(p[101:], old[name].mean(0).expand_as(p[101:]), 1e-6)
    model.train()(
        torch.full((1, 3), vocab_size - 1), labels=torch.ones(1, 3).long()
    ).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["ModernBertModel", "ModernBertForTokenClassification"])
def test_resize_without_a_decoder(name: str) -> None:
    model = make(name)
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == model.encoder().config.vocab_size == 120
    assert answer(model(torch.tensor([[119]]))).isfinite().all()


def test_resize_refused() -> None:
    model = make("ModernBertForMaskedLM", pad_token_id=100)
    before = model.state_dict()
    for size, message in ((100, "pad_token_id 100 is outside vocab_size 100"), (0, "is 0")):
        with pytest.raises(ValueError, match=message):
            model.resize_token_embeddings(size)
    assert model.config.vocab_size == 101
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", CLASSES)
def test_get_and_set_input_embeddings(name: str) -> None:
    model = make(name)
    table = nn.Embedding(101, 32)
    model.set_input_embeddings(table)
    assert model.get_input_embeddings() is table
    decoder = model.get_output_embeddings()
    if name.endswith("MaskedLM"):
        assert decoder is not None and decoder.weight is table.weight
    else:
        assert decoder is None


def test_tied_and_untied_decoders() -> None:
    tied, untied = (
        make("ModernBertForMaskedLM", tie_word_embeddings=flag).train() for flag in (True, False)
    )
    assert tied.decoder.weight is tied.get_input_embeddings().weight
    assert "decoder.weight" not in tied.tensors_to_save()
    untied.load_state_dict(tied.state_dict())
    assert untied.decoder.weight is not untied.get_input_embeddings().weight
    assert "decoder.weight" in untied.tensors_to_save()
    for model in (tied, untied):
        loss_of(model, "ModernBertForMaskedLM").backward()
    same(
        tied.decoder.weight.grad,
        untied.decoder.weight.grad + untied.get_input_embeddings().weight.grad,
        1e-6,
    )
    assert tied.double().decoder.weight is tied.get_input_embeddings().weight


# -- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_copies_are_equal_and_independent(name: str) -> None:
    model = make(name)
    ids, mask = inputs_of(name, *padded())
    expected = answer(model(ids, mask))
    twin = copy.deepcopy(model)
    assert torch.equal(answer(twin(ids, mask)), expected)
    with torch.no_grad():
        twin.encoder().final_norm.weight.zero_()
    assert torch.equal(answer(model(ids, mask)), expected)
    if name.endswith("MaskedLM"):
        assert twin.decoder.weight is twin.get_input_embeddings().weight


@pytest.mark.parametrize("name", CLASSES)
def test_state_dict_round_trip_without_pickled_code(name: str) -> None:
    model = make(name)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = getattr(modernbert, name)(model.config).eval()
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    ids, mask = inputs_of(name, *padded())
    assert torch.equal(answer(other(ids, mask)), answer(model(ids, mask)))


# -- heads ------------------------------------------------------------------------------------


def test_masked_lm_loss() -> None:
    model = make("ModernBertForMaskedLM")
    ids, mask = padded()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.5, -100).masked_fill(mask == 0, -100)
    output = model(ids, mask, labels=labels)
    chosen = labels != -100
    expected = F.cross_entropy(output.logits[chosen], labels[chosen])
    same(output.loss, expected, 1e-5)
    batch = pack_padded(ids, mask)
    packed = model(batch, labels=batch.flatten(labels))
    same(packed.loss, expected, 1e-5)
    same(packed.logits, output.logits[mask.bool()], 1e-5)


def test_sparse_prediction() -> None:
    model = make("ModernBertForMaskedLM", sparse_prediction=True)
    dense = make("ModernBertForMaskedLM")
    ids, mask = padded()
    labels = ids.masked_fill((ids % 3 > 0) | (mask == 0), -100)
    sparse, full = model(ids, mask, labels=labels), dense(ids, mask, labels=labels)
    same(sparse.logits, full.logits[labels != -100], 1e-5)
    same(sparse.loss, full.loss, 1e-5)
    same(model(ids, mask).logits, full.logits, 0)
    nothing = model(ids, mask, labels=torch.full_like(ids, -100))
    assert nothing.logits.shape == (0, 101)
    seen: list[int] = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    model(ids, mask, labels=labels)
    assert seen == [int((labels != -100).sum())]  # the head ran on labelled tokens only


def test_sparse_prediction_with_another_ignored_index() -> None:
    ids, mask = padded()
    labels = ids.masked_fill((ids % 3 > 0) | (mask == 0), -100)
    expected = make("ModernBertForMaskedLM", sparse_prediction=True)(ids, mask, labels=labels)
    model = make("ModernBertForMaskedLM", sparse_prediction=True, sparse_pred_ignore_index=-1)
    found = model(ids, mask, labels=labels.masked_fill(labels == -100, -1))
    same(found.logits, expected.logits, 0)
    same(found.loss, expected.loss, 0)


CLASSIFIER = "ModernBertForSequenceClassification"
SINGLE, MULTI = "single_label_classification", "multi_label_classification"


@pytest.mark.parametrize(
    ("num_labels", "problem", "inferred", "labels"),
    [
        (1, None, "regression", torch.tensor([0.5, -1.0, 2.0, 0.0])),
        (1, "regression", "regression", torch.tensor([[0.5], [-1.0], [2.0], [0.0]])),
        (3, "regression", "regression", torch.arange(12.0).view(4, 3)),
        (3, None, SINGLE, torch.tensor([0, 2, 1, 1])),
        (3, SINGLE, SINGLE, torch.tensor([0, 2, 1, 1])),
        (3, None, MULTI, torch.tensor([[0.0, 1.0, 1.0]] * 4)),
        (3, MULTI, MULTI, torch.tensor([[0, 1, 1]] * 4)),
    ],
)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_sequence_classification_losses(
    num_labels: int, problem: str | None, inferred: str, labels: Tensor, pooling: str
) -> None:
    model = make(
        CLASSIFIER, num_labels=num_labels, problem_type=problem, classifier_pooling=pooling
    )
    ids, mask = padded()
    output = model(ids, mask, labels=labels)
    if inferred == "regression":
        expected = (output.logits - labels.view(4, -1)).square().mean()
    elif inferred == SINGLE:
        expected = -output.logits.log_softmax(-1).gather(1, labels[:, None]).mean()
    else:
        chances, truth = output.logits.sigmoid(), labels.float()
        expected = -(truth * chances.log() + (1 - truth) * (1 - chances).log()).mean()
    same(output.loss, expected, 1e-5)
    assert model.config.problem_type == inferred
    assert output.logits.shape == (4, num_labels)


def test_pooling_comes_before_the_head() -> None:
    ids, mask = padded()
    for pooling in ("cls", "mean"):
        model = make(CLASSIFIER, classifier_pooling=pooling)
        hidden = model.model(ids, mask).last_hidden_state
        pooled = hidden[:, 0] if pooling == "cls" else hidden.sum(1) / mask.sum(1, keepdim=True)
        expected = model.classifier(model.head.norm(F.gelu(model.head.dense(pooled))))
        same(model(ids, mask).logits, expected, 1e-5)


def test_token_classification_loss() -> None:
    model = make("ModernBertForTokenClassification")
    ids, mask = padded()
    labels = (ids % 3).masked_fill((ids % 5 == 0) | (mask == 0), -100)
    output = model(ids, mask, labels=labels)
    assert output.logits.shape == (*ids.shape, 3)
    chosen = labels != -100
    same(output.loss, F.cross_entropy(output.logits[chosen], labels[chosen]), 1e-5)
    batch = pack_padded(ids, mask)
    same(model(batch, labels=batch.flatten(labels)).loss, output.loss, 1e-5)


def test_question_answering_loss() -> None:
    model = make("ModernBertForQuestionAnswering")
    ids, mask = padded()
    start, end = torch.tensor([0, 0, 3, 19]), torch.tensor([4, 0, 18, 50])  # the last is outside
    output = model(ids, mask, start_positions=start, end_positions=end)
    expected = 0.0
    for logits, at in ((output.start_logits, start), (output.end_logits, end)):
        rows = [logits[i][mask[i] == 1].log_softmax(-1)[at[i]] for i in range(3)]
        expected = expected - sum(rows) / 3 / 2
    same(output.loss, expected, 1e-5)
    column = model(ids, mask, start_positions=start[:, None], end_positions=end[:, None])
    same(column.loss, output.loss, 0)
    assert model(ids, mask, start_positions=start).loss is None


def test_multiple_choice_loss() -> None:
    model = make("ModernBertForMultipleChoice")
    ids, mask = inputs_of("ModernBertForMultipleChoice", *padded())
    labels = torch.tensor([1, 0])
    output = model(ids, mask, labels=labels)
    assert output.logits.shape == (2, 2)
    same(output.loss, F.cross_entropy(output.logits, labels), 1e-6)
    for row in range(2):  # choices are scored one by one
        for choice in range(2):
            single = model(ids[row : row + 1, choice : choice + 1], mask[row, choice][None, None])
            same(single.logits[0, 0], output.logits[row, choice], 1e-5)


# -- refusals ---------------------------------------------------------------------------------

IDS, MASK = padded()
BATCH = pack([[1, 2], [3]])


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("ModernBertModel", {}, "exactly one of input_ids and inputs_embeds"),
        (
            "ModernBertModel",
            {"input_ids": IDS, "inputs_embeds": torch.ones(4, 19, 32)},
            "exactly one of input_ids and inputs_embeds",
        ),
        ("ModernBertModel", {"input_ids": IDS + 100}, "reach from 100 to .* 0 to 100"),
        ("ModernBertModel", {"input_ids": IDS - 1}, "reach from -1 to"),
        ("ModernBertModel", {"input_ids": pack([[500]])}, "reach from 500 to 500"),
        ("ModernBertModel", {"input_ids": IDS[0]}, r"shape \(19,\)"),
        ("ModernBertModel", {"input_ids": IDS.float()}, "expected integers"),
        ("ModernBertModel", {"inputs_embeds": torch.ones(4, 19, 31)}, "31 features, the model 32"),
        ("ModernBertModel", {"input_ids": IDS, "attention_mask": MASK[:2]}, "attention_mask has"),
        ("ModernBertModel", {"input_ids": IDS, "attention_mask": 1 - MASK.roll(3, 1)}, "a hole"),
        ("ModernBertModel", {"input_ids": BATCH, "attention_mask": MASK}, "pass it alone"),
        ("ModernBertModel", {"input_ids": BATCH, "position_ids": MASK}, "pass it alone"),
        ("ModernBertForMaskedLM", {"input_ids": IDS, "labels": IDS[:, :3]}, "does not belong"),
        ("ModernBertForMaskedLM", {"input_ids": BATCH, "labels": IDS}, "packed batch 3 tokens"),
        (CLASSIFIER, {"input_ids": IDS, "labels": torch.rand(4, 2)}, "one number per logit"),
        (CLASSIFIER, {"input_ids": IDS, "labels": torch.rand(3, 3)}, "one number per logit"),
        (
            "ModernBertForQuestionAnswering",
            {"input_ids": BATCH, "start_positions": IDS[:2, 0], "end_positions": IDS[:2, 0]},
            "pass padded input_ids",
        ),
        ("ModernBertForMultipleChoice", {"input_ids": IDS}, "batch, choices, length"),
        ("ModernBertForMultipleChoice", {"input_ids": BATCH}, "batch, choices, length"),
        ("ModernBertForMultipleChoice", {}, "batch, choices, length"),
    ],
)
def test_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(name)(**arguments)


def test_refused_when_built() -> None:
    with pytest.raises(ValueError, match="attention='flash3'; choose auto, reference, blocked"):
        make(attention="flash3")
    with pytest.raises(ValueError, match="question answering needs num_labels 2, got 3"):
        make("ModernBertForQuestionAnswering", num_labels=3)


def test_a_batch_moves_to_the_model() -> None:
    model = make()
    assert isinstance(BATCH, PackedBatch)
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert model(BATCH.to(model.device)).last_hidden_state.device == model.device
