"""The implementations that are measured side by side, each a small class.

Every ModernBERT among them gets the same weights and the same padded batches, and is asked whether
it computes the same. B = texts of a batch, L = longest of them, D = hidden size.
"""

import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modernbert import kernels
from modernbert.config import FULL, SLIDING, ModernBertConfig
from modernbert.graphs import GraphedModel
from modernbert.int8 import quantize_linears
from modernbert.kernels import dispatch
from modernbert.model import ModernBertModel
from modernbert.packing import pack_padded

from .batches import PaddedBatch
from .machine import cpp_compiler, memory_total

SIZES = {
    "base": ModernBertConfig(),
    "large": ModernBertConfig(
        hidden_size=1024, intermediate_size=2624, num_attention_heads=16, num_hidden_layers=28
    ),
    "tiny": ModernBertConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=2, num_hidden_layers=2
    ),
}


@dataclass(frozen=True)
class Setting:
    """What every peer is prepared for; `weights` are ours, with the names of the checkpoint."""

    size: str
    config: ModernBertConfig
    weights: Mapping[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    threads: int

    @classmethod
    def make(
        cls,
        size: str,
        dtype: torch.dtype,
        device: torch.device,
        threads: int,
        layers: int | None = None,
    ) -> "Setting":
        """Random weights, the same for the same size."""
        config = SIZES[size] if layers is None else SIZES[size].replace(num_hidden_layers=layers)
        with torch.device("meta"):
            model = ModernBertModel(config)
        return cls(size, config, random_weights(model), dtype, device, threads)


class Peer(ABC):
    """One implementation.

    Attributes:
        name: as it stands in tables.
        packs: it drops padding itself, so that batches need no sorting.
        modernbert: it computes what ours computes.
        remark: what `prepare` found out about the way it runs.
    """

    name: str
    packs: ClassVar[bool] = False
    modernbert: ClassVar[bool] = True
    remark: str = ""

    def missing(self, setting: Setting) -> str | None:
        """Why it cannot run here, or None; imports nothing heavy."""
        return None

    def longest(self, setting: Setting) -> int:
        """Tokens of the longest text it can encode."""
        return setting.config.max_position_embeddings

    @abstractmethod
    def prepare(self, setting: Setting) -> None:
        """Load, convert, compile."""

    @abstractmethod
    def forward(self, batch: PaddedBatch) -> Tensor:
        """Last hidden state (B, L, D)."""


def absent(*packages: str) -> str | None:
    """The reason when one of these packages is not installed."""
    for package in packages:
        if find_spec(package) is None:
            return f"{package} is not installed: pip install 'modernbert[bench]'"
    return None


class Ours(Peer):
    """This library: padded tensors in, padding dropped and put back inside the pass."""

    name = "modernbert"
    packs = True

    def prepare(self, setting: Setting) -> None:
        with torch.device("meta"):
            model = ModernBertModel(setting.config)
        model.load_state_dict(setting.weights, assign=True)
        self.model = model.to(setting.device, setting.dtype).eval()

    def forward(self, batch: PaddedBatch) -> Tensor:
        return self.model(batch.input_ids, batch.attention_mask).last_hidden_state


class OursCompiled(Ours):
    """This library with the packed forward through `torch.compile`."""

    name = "modernbert + torch.compile"

    def missing(self, setting: Setting) -> str | None:
        return no_compiler(setting.device)

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.packed = torch.compile(self.model, dynamic=True)

    def forward(self, batch: PaddedBatch) -> Tensor:
        packed = pack_padded(batch.input_ids, batch.attention_mask)
        return packed.unpack(self.packed(packed).last_hidden_state)


class OursEightBit(Ours):
    """This library with 8-bit linear layers, "int8" or "fp8"."""

    def __init__(self, kind: str):
        self.name, self.kind = f"modernbert, {kind}", kind

    def missing(self, setting: Setting) -> str | None:
        states = dispatch.eight_bit(dispatch.this_machine(setting.device))
        state = next(state for state in states if state.name == self.kind)
        return None if state.usable else state.reason

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        quantize_linears(self.model, self.kind)


class OursGraphs(Ours):
    """This library with batches of up to 2048 tokens as CUDA graphs."""

    name = "modernbert, CUDA graphs"

    def missing(self, setting: Setting) -> str | None:
        return None if setting.device.type == "cuda" else "CUDA graphs need an NVIDIA GPU"

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.graphed = GraphedModel(self.model)

    def forward(self, batch: PaddedBatch) -> Tensor:
        packed = pack_padded(batch.input_ids, batch.attention_mask)
        return packed.unpack(self.graphed(packed))


class OursOptimized(Ours):
    """This library after `optimize()`: norms, gates and residuals inside of linear layers."""

    name = "modernbert, optimized"

    def missing(self, setting: Setting) -> str | None:
        device, dtype = setting.device, setting.dtype
        return dispatch.obstacle_to("triton", device.type, device.index, dtype) or None

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.model.optimize()
        fused = self.model.layers[-1].fused
        if isinstance(fused, dict):
            parts = (f"{', '.join(sorted(v)) or 'none'} to {k} tokens" for k, v in fused.items())
            self.remark = f"fused by measurement: {'; '.join(parts)}"


class OursPlain(Ours):
    """This library without its own kernels: PyTorch's flash attention, separate operations."""

    name = "modernbert without its kernels"

    def missing(self, setting: Setting) -> str | None:
        states = kernels.available_backends(setting.device, setting.dtype)
        flash = next(state for state in states if state.name == "flash")
        return None if flash.usable else flash.reason

    def prepare(self, setting: Setting) -> None:
        super().prepare(setting)
        self.model.attention = "flash"

    def forward(self, batch: PaddedBatch) -> Tensor:
        with kernels.dispatch.unfused():
            return super().forward(batch)


class Transformers(Peer):
    """Hugging Face's ModernBERT with one of its attention implementations."""

    def __init__(self, name: str, attention: str, *, compiled: bool = False):
        self.name, self.attention, self.compiled = name, attention, compiled

    def missing(self, setting: Setting) -> str | None:
        if self.attention == "flash_attention_2":
            if setting.device.type != "cuda":
                return "flash-attn runs on CUDA only"
            if find_spec("flash_attn") is None:
                return "flash_attn is not installed: pip install flash-attn"
        if self.compiled and (reason := no_compiler(setting.device)):
            return reason
        return absent("transformers")

    def longest(self, setting: Setting) -> int:
        limit = super().longest(setting)
        if self.attention != "eager" or setting.device.type != "cpu":
            return limit
        # Several copies of (H, L, L) float32 live at once; without memory the system ends the run.
        copies = 16 * 4 * setting.config.num_attention_heads
        return min(limit, isqrt((memory_total() or 2**33) // copies))

    def prepare(self, setting: Setting) -> None:
        self.model = hugging_face(setting, self.attention).to(setting.device, setting.dtype)
        self.call = torch.compile(self.model, dynamic=True) if self.compiled else self.model

    def forward(self, batch: PaddedBatch) -> Tensor:
        mask = None if batch.full else batch.attention_mask  # it is faster without one
        return self.call(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state


class OpenVino(Peer):
    """OpenVINO on the converted Hugging Face backbone."""

    name = "OpenVINO"

    def missing(self, setting: Setting) -> str | None:
        if setting.device.type != "cpu":
            return "OpenVINO is measured on the CPU only"
        if setting.dtype not in (torch.float32, torch.bfloat16):
            return f"OpenVINO has no {setting.dtype} on the CPU"
        return absent("openvino", "transformers")

    def prepare(self, setting: Setting) -> None:
        openvino = import_module("openvino")
        precision = {torch.float32: "f32", torch.bfloat16: "bf16"}[setting.dtype]
        self.remark = f"converted from transformers sdpa, {precision}, latency hint"
        converted = openvino.convert_model(Exportable(setting), example_input=example())
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": setting.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.model = openvino.Core().compile_model(converted, "CPU", options)

    def forward(self, batch: PaddedBatch) -> Tensor:
        return torch.from_numpy(self.model(arrays(batch))[0])


class OnnxRuntime(Peer):
    """ONNX Runtime on the exported Hugging Face backbone."""

    name = "ONNX Runtime"

    def missing(self, setting: Setting) -> str | None:
        if setting.device.type != "cpu":
            return "ONNX Runtime is measured on the CPU only"
        return absent("onnxruntime", "onnx", "transformers")

    def prepare(self, setting: Setting) -> None:
        runtime = import_module("onnxruntime")
        self.remark = "exported from transformers sdpa by TorchScript, float32"
        if setting.dtype != torch.float32:
            self.remark += f" (it has no {setting.dtype} on the CPU)"
        options = runtime.SessionOptions()
        options.intra_op_num_threads = setting.threads
        # Its threads would otherwise keep a core busy during the next implementation's pass.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        names = list(example())
        axes = {0: "batch", 1: "length"}
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "model.onnx")
            torch.onnx.export(
                Exportable(setting),
                tuple(example().values()),
                path,
                input_names=names,
                output_names=["hidden"],
                dynamic_axes={name: axes for name in (*names, "hidden")},
                opset_version=18,
                dynamo=False,
            )
            self.session = runtime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )

    def forward(self, batch: PaddedBatch) -> Tensor:
        return torch.from_numpy(self.session.run(None, arrays(batch))[0])


class Exportable(nn.Module):
    """Hugging Face's backbone in float32 as a function of two tensors, for converters.

    It makes the masks itself: in those of `transformers` a pad far from every token sees nothing,
    which OpenVINO answers with NaN.
    """

    def __init__(self, setting: Setting):
        super().__init__()
        self.model = hugging_face(setting, "sdpa")
        self.window = setting.config.sliding_window
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        keys = attention_mask.bool()[:, None, None]  # (B, 1, 1, L)
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        distance = (place[:, None] - place).abs()
        local = (keys & (distance <= self.window)) | (distance == 0)
        masks = {FULL: keys.expand_as(local), SLIDING: local}
        return self.model(input_ids=input_ids, attention_mask=masks).last_hidden_state


def hugging_face(setting: Setting, attention: str) -> Any:
    """Hugging Face's ModernBERT in float32 with our weights."""
    transformers = quiet_transformers()
    config = transformers.ModernBertConfig(**setting.config.to_dict())
    with import_module("transformers.initialization").no_init_weights():
        model = transformers.ModernBertModel._from_config(config, attn_implementation=attention)
    model.load_state_dict(setting.weights, assign=True)
    return model.eval()


def random_weights(model: nn.Module) -> dict[str, Tensor]:
    """Seeded values for every parameter: N(0, 0.02), ones for norms, zeros for biases.

    Truncated normals, as for training, would take half a minute.
    """
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, parameter in model.named_parameters():
        value = torch.ones(parameter.shape)
        if parameter.dim() > 1:
            value.normal_(0.0, 0.02, generator=generator)
        elif name.endswith("bias"):
            value.zero_()
        values[name] = value
    return values


def quiet_transformers() -> Any:
    """The package, with its hints about configs and its progress bars switched off."""
    transformers = import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def example() -> dict[str, Tensor]:
    """A ragged batch to trace a model with."""
    ids = torch.randint(100, 16_000, (3, 200))
    mask = torch.ones_like(ids)
    mask[1, 150:] = mask[2, 33:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def arrays(batch: PaddedBatch) -> dict[str, Any]:
    """The batch as numpy arrays, without a copy."""
    return {
        "input_ids": batch.input_ids.numpy(),
        "attention_mask": batch.attention_mask.numpy(),
    }


def no_compiler(device: torch.device) -> str | None:
    """Why `torch.compile` cannot run here, or None."""
    if device.type == "cuda":
        return absent("triton")
    return None if cpp_compiler() else "torch.compile needs a C++ compiler; none was found"


def prepare(peer: Peer, setting: Setting) -> None:
    """`peer.prepare` without the many warnings that converters give about themselves."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        peer.prepare(setting)
