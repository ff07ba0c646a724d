"""8-bit linear layers for inference: weights in int8 or fp8, activations quantised on the way.

Each output channel of a weight has its own scale, and so has each token of the input:
y = (codes of x) (codes of W)^T * (scale of the token) * (scale of the channel). Only the product
differs: oneDNN's on CPUs, cuBLAS's in int8 from sm_75 (T4) and in fp8 (e4m3) from sm_89 (RTX 4090,
H100). `kernels.dispatch.eight_bit` says what runs where.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modernbert import kernels
from modernbert.kernels import dispatch

LINEARS = ("Wqkv", "Wo", "Wi")
KINDS = ("int8", "fp8")


class Linear8(nn.Module):
    """A linear layer (T, in) to (T, out) with 8-bit weights, made from a float one where it is.

    It keeps no float weights: it cannot be trained, saved or moved to another device.
    """

    dtype = torch.int8
    step = 1  # the product wants `in` and `out` in multiples of it: zeros fill up

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        spare = -self.in_features % self.step, -self.out_features % self.step
        weight = F.pad(linear.weight.detach(), (0, spare[0], 0, spare[1]))
        self.weight, scales = kernels.quantize_rows(weight, self.dtype, self.largest_weight())
        self.scales = scales.T.contiguous()  # (1, out)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def largest_weight(self) -> float:
        """The code of the largest weight of a channel."""
        return kernels.LARGEST[self.dtype]

    def forward(self, x: Tensor) -> Tensor:
        spare = -self.in_features % self.step
        codes, scales = kernels.quantize_rows(F.pad(x, (0, spare)) if spare else x, self.dtype)
        y = self.product(codes, scales, x.dtype)[:, : self.out_features]
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def product(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The scaled product (T, out), from codes (T, in) and scales (T, 1) of an x of `dtype`."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class OneDnnLinear(Linear8):
    """int8 on CPUs, by VNNI or AMX where there is any.

    Without, oneDNN adds pairs of products in int16, which 8 bits by 8 bits would overflow: weights
    then get 7 bits, so that sums are exact.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)
        self.zeros = torch.zeros(self.out_features, dtype=torch.int32)

    def largest_weight(self) -> float:
        return 127.0 if torch.cpu._is_vnni_supported() else 63.0

    def product(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        y = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, self.weight, self.scales[0], self.zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        return y.mul_(scales)


class IntLinear(Linear8):
    """int8 on GPUs."""

    step = 8

    def product(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        tokens = len(codes)
        if tokens <= 16:  # which PyTorch's operator refused for long
            codes = F.pad(codes, (0, 0, 0, 32 - tokens))
        sums = torch._int_mm(codes, self.weight.T)[:tokens]
        return kernels.rescale(sums, scales, self.scales, dtype)


class Fp8Linear(Linear8):
    """fp8 on GPUs."""

    dtype = torch.float8_e4m3fn
    step = 16

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.by_row = dispatch.scales_rows(dispatch.this_machine(self.weight.device))
        self.one = torch.ones((), device=self.weight.device)

    def product(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        if self.by_row and dtype in dispatch.HALVES:  # float32 comes out of some versions only
            return torch._scaled_mm(
                codes, self.weight.T, scales, self.scales, out_dtype=dtype, use_fast_accum=True
            )
        sums = torch._scaled_mm(
            codes, self.weight.T, self.one, self.one, out_dtype=torch.float32, use_fast_accum=True
        )
        return kernels.rescale(sums, scales, self.scales, dtype)


def quantize_linears(model: nn.Module, kind: str = "int8") -> None:
    """Replace the linear layers of every block by 8-bit ones, in place; embeddings and norms stay.

    `kind` is "int8" or "fp8". Raises `ValueError` where the model's device has no such products,
    and on a CPU for a PyTorch without oneDNN.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize={kind!r}; choose from {', '.join(KINDS)}")
    machine = dispatch.this_machine(next(model.parameters()).device)
    states = {state.name: state for state in dispatch.eight_bit(machine)}
    if not states[kind].usable:
        raise ValueError(f"quantize={kind!r} cannot run here: {states[kind].reason}")
    layer: type[Linear8] = Fp8Linear if kind == "fp8" else IntLinear
    if machine.capability is None:
        if not torch.backends.mkldnn.is_available():
            raise ValueError("quantize='int8' needs a PyTorch with oneDNN, which this one is not")
        layer = OneDnnLinear
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in LINEARS and isinstance(child, nn.Linear):
                setattr(module, name, layer(child))


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize_linears` has been here."""
    return any(isinstance(module, Linear8) for module in model.modules())
