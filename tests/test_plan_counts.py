"""Operations and bytes of one forward pass, counted on what the code runs, against arithmetic.

The model runs on fake tensors, as it would on an A100; every operator is looked at on the way.
"""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from modernbert import ModernBertConfig, ModernBertModel, kernels, pack  # noqa: E402
from modernbert.config import SLIDING  # noqa: E402
from modernbert.kernels import triton_attention  # noqa: E402

BASE = ModernBertConfig()
LARGE = ModernBertConfig(
    hidden_size=1024, intermediate_size=2624, num_attention_heads=16, num_hidden_layers=28
)
TOKENS = 384


class Counter(TorchDispatchMode):
    """Floating-point operations of matrix products, and bytes of 16-bit states per operator."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens, self.flops = tokens, 0
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace == "prim":
            return out
        if func is torch.ops.aten.mm.default:
            self.flops += 2 * args[0].numel() * args[1].shape[1]
        if func._schema.name == "modernbert::linear":
            self.flops += 2 * args[0].numel() * args[1].shape[0]
        outputs = out if isinstance(out, tuple | list) else [out]
        moved = [*args, *outputs]
        schema = func._schema
        moved += [  # written in place
            x
            for x, spec in zip(args, schema.arguments, strict=False)
            if spec.alias_info is not None and spec.alias_info.is_write
        ]
        size = sum(x.numel() * x.element_size() for x in moved if self.is_state(x))
        self.bytes[schema.name] = self.bytes.get(schema.name, 0) + size
        return out

    def is_state(self, x: Any) -> bool:
        """Not a weight, an angle or a list of tiles."""
        return isinstance(x, Tensor) and x.dtype == torch.float16 and x.shape[:1] == (self.tokens,)


def count(config: ModernBertConfig, layers: int, *, optimize: bool = False) -> Counter:
    """One forward pass in float16 over texts of 128 tokens."""
    counter = Counter(TOKENS)
    with torch.device("meta"):
        model = ModernBertModel(config.replace(num_hidden_layers=layers)).half().eval()
    batch = pack([[1] * 128] * (TOKENS // 128))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = model.to_empty(device="cpu")
        states = torch.empty(TOKENS, config.hidden_size, dtype=torch.float16)
        if optimize:
            model.optimize(linears="fused")
        with counter:
            model(replace(batch, input_ids=None, inputs_embeds=states))
    return counter


def kib_per_layer(config: ModernBertConfig, *, optimize: bool = False) -> dict[str, float]:
    """KiB per token that one more layer reads and writes, by operator."""
    fewer, more = (count(config, layers, optimize=optimize).bytes for layers in (2, 3))
    found = {name: (size - fewer.get(name, 0)) / TOKENS / 1024 for name, size in more.items()}
    return {name: size for name, size in found.items() if size}


@pytest.fixture(autouse=True)
def _as_an_a100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_80")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_bytes_of_a_layer_with_our_kernels() -> None:
    """43.5 KiB a token: add and norm are one pass, RoPE costs none."""
    assert kib_per_layer(BASE) == {
        "modernbert::norm": 12.0,  # twice: stream and update in, stream and norm out
        "aten::mm": 6.0 + 3.0 + 6.0 + 3.75,  # Wqkv, Wo, Wi, Wo
        "modernbert::attention": 6.0,
        "modernbert::geglu": 6.75,
    }
    assert sum(kib_per_layer(BASE).values()) == 43.5


def test_bytes_of_an_optimized_layer() -> None:
    """25.5 KiB a token, 17 times the stream's 1.5: what stands around a product costs nothing."""
    assert kib_per_layer(BASE, optimize=True) == {
        # norm and Wqkv; Wo and residual; norm, Wi and GeGLU; Wo and residual
        "modernbert::linear": (1.5 + 4.5) + (1.5 + 3.0) + (1.5 + 2.25) + (2.25 + 3.0),
        "modernbert::attention": 4.5 + 1.5,
    }
    assert sum(kib_per_layer(BASE, optimize=True).values()) == 25.5
    assert count(BASE, 3, optimize=True).flops == count(BASE, 3).flops


def test_bytes_of_a_layer_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """52.5 KiB a token when each operation is a pass of its own; RoPE alone is 6."""
    monkeypatch.setattr(triton_attention, "TURN_ON_LOAD", 0)  # local layers turn on load still
    full = BASE.replace(global_attn_every_n_layers=1)
    turned = kib_per_layer(full)
    assert turned["modernbert::rope_"] == 6.0 and sum(turned.values()) == 49.5

    def apart(
        x: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        x = x + delta
        return x, kernels.layer_norm(x, weight, bias, eps)

    monkeypatch.setattr(kernels, "add_layer_norm", apart)
    assert sum(kib_per_layer(full).values()) == 52.5


def visible_pairs(tiles: Tensor, rows: int, window: int | None) -> int:
    """Pairs of query and key that the tiles of a plan stand for."""
    total = 0
    for start, end, first in tiles.tolist():
        for row in range(first, min(first + rows, end)):
            low, high = (
                (start, end)
                if window is None
                else (max(start, row - window), min(end, row + window + 1))
            )
            total += high - low
    return total


# MFLOP a token: linear layers, all at 128, 512, 1024, 2048 and 8192 tokens.
TABLE = [
    (BASE, 220.6, {128: 227.9, 512: 238.4, 1024: 251.1, 2048: 276.4, 8192: 427.4}),
    (LARGE, 686.3, {128: 698.7, 512: 716.2, 1024: 737.4, 2048: 779.5, 8192: 1031.0}),
]


@pytest.mark.parametrize(("config", "linear", "totals"), TABLE, ids=["base", "large"])
def test_operations_of_a_forward_pass(
    config: ModernBertConfig, linear: float, totals: dict[int, float]
) -> None:
    per_layer = (count(config, 3).flops - count(config, 2).flops) / TOKENS
    flops = per_layer * config.num_hidden_layers
    assert round(flops / 1e6, 1) == linear
    local = config.layer_types.count(SLIDING)
    for length, expected in totals.items():
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        plan = triton_attention.plan(cu_seqlens, length, (length,), config.sliding_window, None)
        assert plan.local is not None
        pairs = local * visible_pairs(plan.local, plan.rows[0], config.sliding_window)
        pairs += (config.num_hidden_layers - local) * visible_pairs(plan.full, plan.rows[1], None)
        total = flops + 4 * config.hidden_size * pairs / length
        assert total / 1e6 == pytest.approx(expected, abs=0.5 if expected > 1000 else 0.05)


@pytest.mark.parametrize(("rows", "columns", "waste"), [(64, 64, 1.49), (64, 32, 1.49)])
def test_a_window_computes_half_more_than_it_needs(rows: int, columns: int, waste: float) -> None:
    """192 keys a query where 129 are seen; flash attention's tiles of 128 x 128 compute 384."""
    window, length = 64, 8192
    for architecture in ((8, 0), (9, 0)):
        cut = triton_attention.tiling(True, True, architecture)
        assert cut.rows == 64 and cut.columns in (32, 64)
    first = length // 2
    low, high = first - window, first + rows + window
    computed = -(-(high - low) // columns) * columns * rows
    seen = rows * (2 * window + 1)
    assert round(computed / seen, 2) == waste and prod((rows, columns)) <= 4096
