"""Weight tiling: the published known answers, and whole models."""

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from torch import nn

from modernbert.config import ModernBertConfig
from modernbert.heads import ModernBertForMaskedLM, ModernBertForSequenceClassification
from modernbert.model import ModernBertModel
from modernbert.pretrained import PreTrainedModel
from modernbert.tokenizer import Tokenizer
from modernbert.training.initialization import transplant
from modernbert.training.tiling import layer_map, tile, tile_model

SMALL = ModernBertConfig(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=3,
    pad_token_id=0,
    cls_token_id=1,
    bos_token_id=1,
    sep_token_id=2,
    eos_token_id=2,
)
LARGE = SMALL.replace(
    hidden_size=56, intermediate_size=36, num_hidden_layers=9, num_attention_heads=7
)


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """As if it had been trained: no norm is 1, no bias is 0."""
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


def wrapped(old: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The definition, element by element."""
    new = np.empty(shape)
    for place in np.ndindex(*shape):
        new[place] = old[
            tuple((i - (n - o) // 2) % o for i, n, o in zip(place, shape, old.shape, strict=True))
        ]
    return new


def test_known_vector() -> None:
    assert tile(torch.tensor([1, 2, 3]), (8,)).tolist() == [2, 3, 1, 2, 3, 1, 2, 3]


def test_known_matrix() -> None:
    tiled = tile(torch.tensor([[1, 2], [3, 4]]), (4, 4))
    assert tiled.tolist() == [[4, 3, 4, 3], [2, 1, 2, 1], [4, 3, 4, 3], [2, 1, 2, 1]]


def test_known_layer_map_of_base_to_large() -> None:
    expected = "0 1 2 2 3 4 5 6 6 7 8 9 9 10 11 12 13 13 14 15 16 16 17 18 19 20 20 21"
    assert layer_map(22, 28) == [int(i) for i in expected.split()]


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 7)), min_size=1, max_size=3),
    st.integers(0, 2**31),
)
def test_tile_is_its_definition(sizes: list[tuple[int, int]], seed: int) -> None:
    old = np.random.default_rng(seed).standard_normal([o for o, _ in sizes])
    shape = tuple(o + more for o, more in sizes)
    tiled = tile(torch.from_numpy(old), shape).numpy()
    np.testing.assert_array_equal(tiled, wrapped(old, shape))
    centre = tuple(slice(more // 2, more // 2 + o) for o, more in sizes)
    np.testing.assert_array_equal(tiled[centre], old)


@given(st.integers(1, 40), st.integers(0, 60))
def test_layer_map_is_monotone_and_misses_no_layer(old: int, more: int) -> None:
    layers = layer_map(old, old + more)
    assert layers[0] == 0 and len(layers) == old + more
    assert layers == sorted(layers)
    assert set(layers) == set(range(old))


@pytest.mark.parametrize("arguments", [(4, 3), (0, 3)])
def test_layer_map_refuses_to_shrink(arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{arguments[0]} layers over 3"):
        layer_map(*arguments)


@pytest.mark.parametrize("shape", [(2,), (2, 4), (4, 4, 1)])
def test_tile_refuses_to_shrink(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot tile a tensor of shape"):
        tile(torch.zeros(3, 4), shape)


def test_every_weight_changes_and_small_stays() -> None:
    """But the attention norm of a layer copied from layer 0, which has none."""
    small, large = randomised(ModernBertForMaskedLM(SMALL)), ModernBertForMaskedLM(LARGE)
    kept = {name: p.clone() for name, p in small.named_parameters()}
    before = {name: p.clone() for name, p in large.named_parameters()}
    values = torch.cat([p.flatten() for p in small.parameters()])
    tile_model(small, large)
    alike = [name for name, p in large.named_parameters() if (p == before[name]).any()]
    assert alike == ["model.layers.1.attn_norm.weight"]
    for name, p in large.named_parameters():
        assert p.shape == before[name].shape
        assert name in alike or torch.isin(p, values).all()
    for name, p in small.named_parameters():
        assert torch.equal(p, kept[name])
    assert large.decoder.weight is large.get_input_embeddings().weight
    logits = large(torch.randint(3, 50, (2, 9))).logits
    assert torch.isfinite(logits).all()


def test_each_tensor_against_its_definition() -> None:
    """Q, K, V and heads apart, both halves of the GLU apart, the vocabulary untouched."""
    small, large = randomised(ModernBertForMaskedLM(SMALL)), ModernBertForMaskedLM(LARGE)
    tile_model(small, large)
    old = {name: p.detach().numpy() for name, p in small.named_parameters()}
    new = {name: p.detach().numpy() for name, p in large.named_parameters()}
    layers = layer_map(4, 9)
    assert layers == [0, 0, 1, 1, 2, 2, 3, 3, 3]  # 3.11 and 3.56: the last is clamped
    for i, source in enumerate(layers):
        for name in ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo", "mlp_norm", "attn_norm"):
            if name == "attn_norm" and source == 0:
                if i:
                    assert (new[f"model.layers.{i}.attn_norm.weight"] == 1).all()
                continue
            a = old[f"model.layers.{source}.{name}.weight"]
            b = new[f"model.layers.{i}.{name}.weight"]
            if name == "attn.Wqkv":
                parts = zip(np.split(a, 3), np.split(b, 3), strict=True)
            elif name == "mlp.Wi":
                parts = zip(np.split(a, 2), np.split(b, 2), strict=True)
            else:
                parts = iter([(a, b)])
            for x, y in parts:  # (7 - 3) / 2 heads of 8 are the offset (56 - 24) / 2
                np.testing.assert_array_equal(y, wrapped(x, y.shape))
    for name in ("head.dense.weight", "head.norm.weight", "model.embeddings.norm.weight"):
        np.testing.assert_array_equal(new[name], wrapped(old[name], new[name].shape))
    np.testing.assert_array_equal(new["decoder.bias"], old["decoder.bias"])
    table = "model.embeddings.tok_embeddings.weight"
    for a, b in zip(old[table], new[table], strict=True):
        np.testing.assert_array_equal(b, wrapped(a, (56,)))


@pytest.mark.parametrize("heads", [4, 5, 6, 7])
def test_heads_stay_whole(heads: int) -> None:
    """Also where half the growth is no whole number of heads: every new head is an old one."""
    config = SMALL.replace(hidden_size=8 * heads, num_attention_heads=heads)
    small, large = randomised(ModernBertModel(SMALL)), ModernBertModel(config)
    tile_model(small, large)
    first, off = (heads - 3) // 2, (8 * heads - 24) // 2
    for old, new in zip(small.layers, large.layers, strict=True):
        for part in range(3):
            a = old.attn.Wqkv.weight.view(3, 3, 8, 24)[part]
            b = new.attn.Wqkv.weight.view(3, heads, 8, 8 * heads)[part]
            for h in range(heads):
                assert torch.equal(b[h][:, off : off + 24], a[(h - first) % 3])
        a = old.attn.Wo.weight.view(24, 3, 8)
        b = new.attn.Wo.weight.view(8 * heads, heads, 8)
        for h in range(heads):
            assert torch.equal(b[off : off + 24, h], a[:, (h - first) % 3])


def test_same_size_is_a_copy() -> None:
    biased = SMALL.replace(attention_bias=True, mlp_bias=True, norm_bias=True, classifier_bias=True)
    small, large = randomised(ModernBertForMaskedLM(biased)), ModernBertForMaskedLM(biased)
    tile_model(small, large)
    for p, q in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.equal(p, q)


def test_biases_follow_their_rows() -> None:
    changes = {"attention_bias": True, "mlp_bias": True}
    small = randomised(ModernBertModel(SMALL.replace(**changes)))
    large = ModernBertModel(LARGE.replace(**changes))
    tile_model(small, large)
    for name, parts in (("attn.Wqkv", 3), ("mlp.Wi", 2), ("attn.Wo", 1), ("mlp.Wo", 1)):
        old = small.get_submodule(f"layers.3.{name}").bias.detach().numpy()
        new = large.get_submodule(f"layers.8.{name}").bias.detach().numpy()
        for a, b in zip(np.split(old, parts), np.split(new, parts), strict=True):
            np.testing.assert_array_equal(b, wrapped(a, b.shape))


def test_between_classes_and_into_an_untied_decoder() -> None:
    small = randomised(ModernBertForMaskedLM(SMALL))
    encoder = ModernBertModel(LARGE)
    untied = ModernBertForMaskedLM(LARGE.replace(tie_word_embeddings=False))
    tile_model(small, encoder)
    tile_model(small, untied)
    for name, p in encoder.named_parameters():
        assert torch.equal(p, dict(untied.model.named_parameters())[name])
    assert untied.decoder.weight is not untied.get_input_embeddings().weight
    assert torch.equal(untied.decoder.weight, untied.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 51}, "same vocab_size"),
        ({"num_attention_heads": 14}, "same head_dim"),
        ({"num_hidden_layers": 3}, "4 layers over 3"),
        ({"intermediate_size": 12}, "cannot tile"),
        ({"hidden_size": 16, "num_attention_heads": 2}, "cannot tile"),
        ({"mlp_bias": True}, "no model.layers.0.mlp.Wi.bias"),
    ],
)
def test_models_that_do_not_fit(change: dict[str, int], message: str) -> None:
    large = LARGE.replace(**change)
    with pytest.raises(ValueError, match=message):
        tile_model(ModernBertForMaskedLM(SMALL), ModernBertForMaskedLM(large))


def test_a_part_that_the_small_model_lacks() -> None:
    small, large = ModernBertForMaskedLM(SMALL), ModernBertForSequenceClassification(LARGE)
    with pytest.raises(ValueError, match=r"no classifier\.weight"):
        tile_model(small, large)


def test_a_function_of_repeated_inputs_survives() -> None:
    """Doubled width: each copy of the stream sees the same norm statistics as the small model."""
    norm = nn.LayerNorm(6, bias=False)
    nn.init.normal_(norm.weight)
    wide = nn.LayerNorm(12, bias=False)
    with torch.no_grad():
        wide.weight.copy_(tile(norm.weight, (12,)))
    x = torch.randn(5, 6)
    torch.testing.assert_close(wide(tile(x, (5, 12))), tile(norm(x), (5, 12)))


def byte_tokenizer(*merges: tuple[str, str]) -> Tokenizer:
    """Byte-level BPE of the bytes, the given merges and a special token at the end."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(a + b for a, b in merges)]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=list(merges))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["[PAD]", "[MASK]"])
    return Tokenizer(backend.to_str().encode())


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_is_carried_over(tied: bool) -> None:
    old = byte_tokenizer(("a", "b"), ("ab", "c"))
    new = byte_tokenizer(("x", "y"), ("a", "b"), ("ab", "xy"), ("\u0120", "ab"))
    config = SMALL.replace(vocab_size=old.vocab_size, tie_word_embeddings=tied)
    model = randomised(ModernBertForMaskedLM(config))
    before = [t.clone() for t in (model.get_input_embeddings().weight, *model.decoder.parameters())]
    transplant(model, old, new)
    assert model.config.vocab_size == new.vocab_size == model.decoder.out_features
    assert (model.decoder.weight is model.get_input_embeddings().weight) == tied
    tables = (model.get_input_embeddings().weight, *model.decoder.parameters())
    pieces = {"a": "a", "ab": "ab", "xy": "x y", "abxy": "ab x y", "\u0120ab": "\u0120 ab"}
    pieces |= {"[MASK]": "[MASK]", "\u0122": "\u0122"}  # a byte that is no text has its own row
    for table, rows in zip(tables, before, strict=True):
        for token, of in pieces.items():
            expected = rows[[old.token_to_id(piece) for piece in of.split()]].mean(0)
            assert torch.equal(table[new.token_to_id(token)], expected), token


def test_a_token_that_is_no_text_starts_at_the_mean() -> None:
    old, new = byte_tokenizer(), byte_tokenizer(("\u0142", "\u0143"))
    model = randomised(ModernBertModel(SMALL.replace(vocab_size=old.vocab_size)))
    mean = model.get_input_embeddings().weight.mean(0)
    transplant(model, old, new)
    row = model.get_input_embeddings().weight[new.token_to_id("\u0142\u0143")]
    assert torch.equal(row, mean)
