"""int8 linear layers for inference on CPUs: weights in 8 bits, activations quantised on the way.

Each output channel of a weight has its own scale, and so has each token of the input. The products
are oneDNN's, with VNNI or AMX where the CPU has it. Without them, pairs of products are added in
int16, which 8 bits by 8 bits would overflow: weights then get 7 bits, so that sums are exact.
"""

import torch
from torch import Tensor, nn

LINEARS = ("Wqkv", "Wo", "Wi")
LARGEST = 127
SMALLEST = 1e-12  # a token of zeros has no scale


class Int8Linear(nn.Module):
    """A linear layer (T, in) to (T, out) with int8 weights, made from a float one on the CPU.

    It keeps no float weights: it cannot be trained, saved or moved to another device.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().float()
        largest = LARGEST if torch.cpu._is_vnni_supported() else LARGEST // 2
        self.scales = weight.abs().amax(dim=1).clamp_min(SMALLEST) / largest  # (out,)
        codes = (weight / self.scales[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(codes, None)
        self.zeros = torch.zeros(linear.out_features, dtype=torch.int32)
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        scale = x.float().abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST) / LARGEST  # (T, 1)
        codes = (x / scale).round_().to(torch.int8)
        y = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, 0, self.weight, self.scales, self.zeros, None, 1.0, 0, torch.float32,
            "none", [], "",
        )  # fmt: skip
        y = y.mul_(scale)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize_linears(model: nn.Module) -> None:
    """Replace the linear layers of every block by int8 ones, in place; embeddings and norms stay.

    Raises `ValueError` for a model that is not on the CPU, and for a PyTorch without oneDNN.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"quantize='int8' runs on CPUs and the model is on {device}: device='cpu'")
    if not torch.backends.mkldnn.is_available():
        raise ValueError("quantize='int8' needs a PyTorch with oneDNN, which this one is not")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in LINEARS and isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize_linears` has been here."""
    return any(isinstance(module, Int8Linear) for module in model.modules())
