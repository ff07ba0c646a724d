"""`model.optimize()`: the blocks of a loaded model, prepared once for inference on NVIDIA GPUs.

Norm weights go into the linear layer that follows, and what stands around the four linear layers of
a block into the linear layers: 25.5 KiB a token are read and written where 43.5 are without
(ModernBERT-base), in five kernels. Where cuBLAS with a pass of its own for what is around is as
fast, it stays. The scale of the softmax stays in attention, where it costs nothing: softmax in base
2 has a factor there anyway.

Shapes: T = packed tokens, B = sequences, D = hidden size, I = intermediate size, d = head size.
"""

import logging
from collections.abc import Callable
from functools import partial
from itertools import chain, combinations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modernbert import kernels
from modernbert.allocator import keep_freed_memory
from modernbert.int8 import is_quantized
from modernbert.kernels import AttentionPlan, dispatch
from modernbert.model import Layer, LayerNorm, ModernBertModel, Rotation, attend

logger = logging.getLogger("modernbert")

LINEARS = ("Wqkv", "attention Wo", "Wi", "MLP Wo")
BUCKETS = (512, 4096, 32_768)  # tokens that are measured; a batch goes by the next larger
LENGTH = 256  # of the texts in them
PASSES = 10
GAIN = 0.01  # less is a tie
Fused = frozenset[str]  # of LINEARS


class OptimizedLayer(nn.Module):
    """A `Layer` for inference; `fused` says by number of tokens which linear layers are ours.

    It is called as a `Layer` is, but adds the update to the stream itself where it can. Those of
    its linear layers that are not fused are cuBLAS's, with the same folded weights.
    """

    def __init__(self, layer: Layer, fused: dict[int, Fused], *, fp16_accumulate: bool) -> None:
        super().__init__()
        attn, mlp = layer.attn, layer.mlp
        self.heads, self.local, self.eps = attn.num_heads, attn.local, layer.mlp_norm.eps
        self.fused, self.fp16_accumulate = fused, fp16_accumulate
        self.qkv = Folded(attn.Wqkv, layer.attn_norm)
        self.gate = Folded(mlp.Wi, layer.mlp_norm)
        self.attended = nn.Parameter(attn.Wo.weight.detach(), requires_grad=False)  # (D, D)
        self.gated = nn.Parameter(mlp.Wo.weight.detach(), requires_grad=False)  # (D, I)

    def forward(
        self,
        x: Tensor,
        delta: Tensor | None,
        rotation: Rotation,
        plan: AttentionPlan,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor] | None]:
        """(T, D) each; the stream is x + delta, or x, before and after."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("an optimized model has no gradients: load it anew to train it")
        fused = by_tokens(self.fused, x.shape[0])
        x, qkv = self.normed(x, delta, self.qkv, "Wqkv" in fused)
        out, maps = attend(qkv, rotation, plan, cu_seqlens, heads=self.heads, local=self.local)
        if cu_seqlens is not None:
            x = x[cu_seqlens[:-1].long()]
        x, delta = self.added(x, out, self.attended, "attention Wo" in fused)
        x, y = self.normed(x, delta, self.gate, "Wi" in fused, gated=True)
        x, delta = self.added(x, y, self.gated, "MLP Wo" in fused)
        return x, delta, maps

    def normed(
        self, x: Tensor, delta: Tensor | None, linear: "Folded", fused: bool, gated: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The stream without what was left to add, and the linear layer of its norm."""
        if linear.ones is None:
            assert delta is None, "only the first layer has no norm"
            return x, F.linear(x, linear.weight)
        if fused:
            x = x if delta is None else x + delta
            return x, self._ours(x, linear.weight, sums=linear.sums, gated=gated)
        if delta is None:
            y = kernels.layer_norm(x, linear.ones, None, self.eps)
        else:
            x, y = kernels.add_layer_norm(x, delta, linear.ones, None, self.eps)
        y = F.linear(y, linear.weight)
        return x, kernels.glu(y) if gated else y

    def added(
        self, x: Tensor, y: Tensor, weight: Tensor, fused: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The stream after a linear layer of y, and what is left to add to it."""
        if fused:
            return self._ours(y, weight, residual=x), None
        return x, F.linear(y, weight)

    def _ours(
        self,
        x: Tensor,
        weight: Tensor,
        *,
        sums: Tensor | None = None,
        residual: Tensor | None = None,
        gated: bool = False,
    ) -> Tensor:
        from modernbert.kernels import triton_gemm

        return triton_gemm.linear(
            x, weight, sums=sums, residual=residual, eps=self.eps, gated=gated,
            narrow=self.fp16_accumulate,
        )  # fmt: skip


class Folded(nn.Module):
    """The weight of a linear layer with that of the norm before it inside; see `triton_gemm.fold`.

    Without a norm it is the weight itself, and `sums` and `ones`, the weight that the norm is left
    with, are None.
    """

    def __init__(self, linear: nn.Linear, norm: nn.Module) -> None:
        super().__init__()
        from modernbert.kernels import triton_gemm

        weight, sums, ones = linear.weight.detach(), None, None
        if isinstance(norm, LayerNorm):
            weight, sums = triton_gemm.fold(weight, norm.weight.detach())
            ones = torch.ones_like(norm.weight, requires_grad=False)
        self.weight = nn.Parameter(weight, requires_grad=False)  # (N, D)
        self.sums: Tensor | None
        self.ones: Tensor | None
        self.register_buffer("sums", sums, persistent=False)  # (N,) float32
        self.register_buffer("ones", ones, persistent=False)  # (D,)


def by_tokens(fused: dict[int, Fused], tokens: int) -> Fused:
    """The entry of the smallest bucket that holds so many tokens, or of the largest."""
    return next((found for bucket, found in fused.items() if tokens <= bucket), fused[max(fused)])


def obstacle(model: ModernBertModel) -> str:
    """Why the fused linear layers cannot run `model` here; "" where they can."""
    config, dtype = model.config, model.dtype
    if found := dispatch.obstacle_to("triton", model.device.type, model.device.index, dtype):
        return found
    if dtype not in dispatch.HALVES:
        return f"they compute in float16 and bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if config.attention_bias or config.mlp_bias or config.norm_bias:
        return "its norms or linear layers have biases"
    if config.hidden_activation != "gelu":
        return f"its activation is {config.hidden_activation!r}, not the exact gelu"
    return "its linear layers have 8 bits" if is_quantized(model) else ""


def optimize(model: ModernBertModel, linears: str, fp16_accumulate: bool) -> None:
    """`ModernBertModel.optimize`."""
    if linears not in ("auto", "fused"):
        raise ValueError(f"linears={linears!r}; choose auto or fused")
    if model.training:
        raise ValueError("optimize() is for inference, and the model is in training mode: eval()")
    if model.optimized:
        raise ValueError("the model is optimized already: load it anew to choose otherwise")
    if fp16_accumulate and model.dtype != torch.float16:
        raise ValueError(f"fp16_accumulate needs a float16 model, and this one is {model.dtype}")
    if reason := obstacle(model):
        if linears == "fused":
            raise ValueError(f"linears='fused' cannot run here: {reason}")
        kept = model.device.type == "cpu" and keep_freed_memory()
        memory = ", but this process keeps up to 512 MiB of freed memory" if kept else ""
        logger.info("optimize() leaves the layers as they are: %s%s", reason, memory)
        return
    fused = {BUCKETS[-1]: frozenset(LINEARS)}
    if linears == "auto" and model.device.type == "cuda":  # the interpreter's speed says nothing
        fused = {tokens: fastest(model, tokens, fp16_accumulate, on_gpu) for tokens in BUCKETS}
    model.requires_grad_(False)
    model.optimized = True
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        model.layers[i] = OptimizedLayer(layer, fused, fp16_accumulate=fp16_accumulate)


@torch.inference_mode()
def fastest(
    model: ModernBertModel,
    tokens: int,
    fp16_accumulate: bool,
    seconds: Callable[[Callable[[], object], torch.device], float],
) -> Fused:
    """Which linear layers to fuse for so many tokens: all 16 ways are timed, on the last layer.

    What is fused must gain: of two ways as fast, the one with more of cuBLAS is taken.
    """
    config, device = model.config, model.device
    layer = model.layers[-1]
    assert isinstance(layer, Layer)
    starts = torch.arange(0, tokens + 1, LENGTH, dtype=torch.int32, device=device)
    plan = kernels.plan_attention(
        starts, tokens, (LENGTH,) * (tokens // LENGTH), window=config.sliding_window,
        dtype=model.dtype, backend=model.attention, head_size=config.head_dim,
    )  # fmt: skip
    x = torch.randn(tokens, config.hidden_size, device=device).to(model.dtype)
    angles = torch.zeros(tokens, config.head_dim // 2, device=device)
    trial = OptimizedLayer(layer, {}, fp16_accumulate=fp16_accumulate)
    best, least = frozenset[str](), float("inf")
    for names in chain.from_iterable(combinations(LINEARS, n) for n in range(len(LINEARS) + 1)):
        trial.fused = {tokens: frozenset(names)}
        # As in the middle of a model: what the layer before left to add is there, or not.
        delta = None if "MLP Wo" in names or isinstance(layer.attn_norm, nn.Identity) else x
        took = seconds(partial(trial, x, delta, (angles, angles), plan), device)
        if took < least * (1 - GAIN):
            best, least = trial.fused[tokens], took
    logger.info("%d tokens: fused %s", tokens, ", ".join(sorted(best)) or "nothing")
    return best


def on_gpu(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few passes, by the device's own clock."""
    run()  # compiles
    times = []
    for _ in range(PASSES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream(device))
        run()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return min(times)
