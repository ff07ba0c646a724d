"""int8 linear layers: their arithmetic, their accuracy, and what they refuse."""

import copy

import pytest
import torch
from torch import nn

from modernbert import ModernBertConfig, ModernBertModel, SentenceEncoder
from modernbert.int8 import Int8Linear, is_quantized, quantize_linears
from modernbert.packing import pack


def small(**changes: object) -> ModernBertModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 192, "pad_token_id": 0}
    depth = {"num_hidden_layers": 4, "num_attention_heads": 2, "initializer_range": 0.1}
    return ModernBertModel(ModernBertConfig(**{**sizes, **depth, **changes})).eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 16), (33, 64, 48), (5, 128, 7)])
def test_a_layer_is_the_exact_product_of_its_codes(shape, bias):
    tokens, inner, outer = shape
    layer = nn.Linear(inner, outer, bias=bias)
    # Tokens and channels of very different size: each has a scale of its own.
    x = torch.randn(tokens, inner) * 10.0 ** torch.randint(-4, 4, (tokens, 1))
    layer.weight.data *= 10.0 ** torch.randint(-3, 3, (outer, 1))
    x_scale = x.abs().amax(1, keepdim=True) / 127
    largest = 127 if torch.cpu._is_vnni_supported() else 63
    w_scale = layer.weight.data.abs().amax(1, keepdim=True) / largest
    codes = (x / x_scale).round().double() @ (layer.weight.data / w_scale).round().double().T
    expected = codes * x_scale * w_scale.T + (layer.bias.data if bias else 0)
    got = Int8Linear(layer)(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_zeros_give_zeros_and_half_precision_stays():
    layer = nn.Linear(16, 8, bias=False)
    layer.weight.data[3] = 0
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    x[1] = 0
    y = Int8Linear(layer)(x)
    assert y.dtype == torch.bfloat16
    assert (y[1] == 0).all() and (y[:, 3] == 0).all()
    assert Int8Linear(layer)(x[:0]).shape == (0, 8)


def test_the_model_stays_within_its_bound():
    model = small()
    fast = copy.deepcopy(model)
    quantize_linears(fast)
    assert is_quantized(fast) and not is_quantized(model)
    assert sum(isinstance(m, Int8Linear) for m in fast.modules()) == 4 * 4
    batch = pack([torch.randint(5, 200, (n,)) for n in (1, 17, 64, 150)])
    with torch.no_grad():
        cosines = torch.cosine_similarity(
            model(batch).last_hidden_state, fast(batch).last_hidden_state
        )
    assert cosines.mean() > 0.995 and cosines.min() > 0.98


def test_what_cannot_be_is_refused(tmp_path):
    model = small()
    quantize_linears(model)
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    with pytest.raises(ValueError, match="runs on CPUs and the model is on meta"):
        with torch.device("meta"):
            quantize_linears(small())
    with pytest.raises(ValueError, match="quantize='int4'"):
        SentenceEncoder.from_pretrained(tmp_path, quantize="int4")
