"""An NVIDIA GPU that is not there, and what the library does with it.

Tensors say that they are on cuda:0 and keep their numbers on the CPU; Triton's kernels run in the
interpreter, PyTorch's own flash and memory-efficient attention are written out. What fails as on a
GPU: tensors of two devices in one operation, and, inside of a CUDA graph's capture, waiting for the
device. What makes the host wait is counted. Speed and the kernels' own arithmetic stay unknown.

`run()` starts this file in a process of its own, with the few C++ functions below loaded before
PyTorch: a build for CPUs has no guard for CUDA devices, and autograd looks for one.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPP = """
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
const c10::Device here(c10::DeviceType::CUDA, 0);
const c10::Stream only(c10::Stream::DEFAULT, here);
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device exchangeDevice(c10::Device) const override { return here; }
  c10::Device getDevice() const override { return here; }
  c10::Stream getStream(c10::Device) const noexcept override { return only; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return only; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
}
namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
namespace accelerator {
__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool) {
  return c10::DeviceType::CUDA;
}
}
}
"""
aten = torch.ops.aten
BOTH_DEVICES = {"aten::copy_", "aten::_to_copy", "aten::index", "aten::index_put_"}
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
COMPOSITE = {"aten::to", "aten::scaled_dot_product_attention"}  # seen whole in inference mode

waits: Counter[str] = Counter()
capture: list[tuple[Any, ...]] | None = None


class Simulated(torch.Tensor):
    """A tensor of cuda:0 whose numbers are those of `inner`, on the CPU."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls: type["Simulated"], inner: Tensor) -> "Simulated":
        with torch.inference_mode(False):
            outer = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, inner.stride(), inner.storage_offset(),
                dtype=inner.dtype, device="cuda:0",
            )  # fmt: skip
        outer.inner = inner
        return outer

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Factories(TorchDispatchMode):
    """Catches what makes a tensor of cuda:0 from none."""

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs)
        simulated = any(isinstance(x, Simulated) for x in tree_leaves((args, kwargs)))
        if simulated or _is_cuda(kwargs.get("device")):
            return dispatch(func, args, kwargs)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the numbers; the result is where PyTorch would have it."""
    name = func._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    ours = {id(x.inner): x for x in tensors if isinstance(x, Simulated)}
    strangers = [x for x in tensors if not isinstance(x, Simulated) and x.dim()]
    if ours and strangers and name not in BOTH_DEVICES:
        raise RuntimeError(f"{name}: tensors on cuda:0 and on the CPU")
    on_gpu = bool(ours)
    if kwargs.get("device") is not None:
        on_gpu = _is_cuda(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif name == "aten::copy_":
        on_gpu = isinstance(args[0], Simulated)
    if ours and (name in WAITING or not on_gpu):
        waits[name] += 1
        if capture is not None:
            raise RuntimeError(f"{name} waits for the GPU inside of a capture")
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Simulated) else x, (args, kwargs))
    kwargs.pop("non_blocking", None)
    run_here = SUBSTITUTES.get(name, func)
    out = run_here(*args, **kwargs)
    if name == "aten::_to_copy" and out is args[0]:
        out = out.clone()
    if capture is not None:
        capture.append((run_here, args, kwargs, out))

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor) or not on_gpu:
            return x
        return ours[id(x)] if id(x) in ours else Simulated(x)

    return tree_map(placed, out)


# -- PyTorch's own variable-length attention ------------------------------------------------------


def _pairs(
    tensors: tuple[Tensor, ...], cu_queries: Tensor, cu_keys: Tensor, left: int, right: int
) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
    """Per sequence: its rows, its keys, q k^T under the window, and k and v, (H, length, d)."""
    q, k, v = (x.double().transpose(0, 1) for x in tensors)
    ends, key_ends = cu_queries.tolist(), cu_keys.tolist()
    for i in range(len(ends) - 1):
        rows, keys = slice(ends[i], ends[i + 1]), slice(key_ends[i], key_ends[i + 1])
        scores = q[:, rows] @ k[:, keys].mT * q.shape[-1] ** -0.5
        distance = torch.arange(scores.shape[2]) - torch.arange(scores.shape[1])[:, None]
        if left >= 0:
            scores = scores.masked_fill((distance < -left) | (distance > right), float("-inf"))
        yield rows, keys, scores, k[:, keys], v[:, keys]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, left: int, right: int
) -> tuple[Tensor, Tensor]:
    assert cu_queries.dtype == cu_keys.dtype == torch.int32 and q.dtype == torch.float16
    out, sums = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for rows, _, scores, _, values in _pairs((q, k, v), cu_queries, cu_keys, left, right):
        out[rows] = (scores.softmax(-1) @ values).transpose(0, 1).to(q.dtype)
        sums[:, rows] = scores.logsumexp(-1).float()
    return out, sums


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor,
    left: int, right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    found = tuple(torch.zeros_like(x) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5
    for rows, keys, scores, its_keys, values in _pairs((q, k, v), cu_queries, cu_keys, left, right):
        upstream = grad[rows].double().transpose(0, 1)
        weights, of_weights = scores.softmax(-1), upstream @ values.mT
        slope = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
        queries = q[rows].double().transpose(0, 1)
        parts = slope @ its_keys, slope.mT @ queries, weights.mT @ upstream
        for whole, here, part in zip(found, (rows, keys, keys), parts, strict=True):
            whole[here] = part.transpose(0, 1).to(whole.dtype)
    return found


def _flash(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, key_starts: Tensor, *_: Any,
           window_size_left: int = -1, window_size_right: int = -1, **__: Any) -> Any:  # fmt: skip
    out, sums = _attend(q, k, v, starts, key_starts, window_size_left, window_size_right)
    seed = torch.zeros(2, dtype=torch.uint64)
    return out, sums, seed, torch.zeros((), dtype=torch.uint64), q.new_empty(0)


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor,
                    starts: Tensor, key_starts: Tensor, *_: Any, window_size_left: int = -1,
                    window_size_right: int = -1, **__: Any) -> Any:  # fmt: skip
    window = window_size_left, window_size_right
    return _attend_backward(grad, q, k, v, starts, key_starts, *window)


def _named(operator: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    names = (x.name for x in operator.default._schema.arguments)
    return dict(zip(names, args, strict=False)) | kwargs


def _varlen(*args: Any, **kwargs: Any) -> Any:
    x = _named(torch.ops.torch_attn._varlen_attn, args, kwargs)
    ends = x["cu_seq_q"], x["cu_seq_k"]
    window = x.get("window_size") or (-1, -1)
    out, sums = _attend(x["query"], x["key"], x["value"], *ends, *window)
    return out, sums, torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(*args: Any, **kwargs: Any) -> Any:
    x = _named(torch.ops.torch_attn._varlen_attn_backward, args, kwargs)
    ends = x["cu_seq_q"], x["cu_seq_k"]
    window = x.get("window_size") or (-1, -1)
    return _attend_backward(x["grad_out"], x["query"], x["key"], x["value"], *ends, *window)


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: None, starts: Tensor, key_starts: Tensor,
               longest: int, longest_key: int, *_: Any, **__: Any) -> Any:  # fmt: skip
    assert q.shape[0] == 1 and bias is None
    out, sums = _attend(q[0], k[0], v[0], starts, key_starts, -1, -1)
    seed = torch.zeros((), dtype=torch.int64)
    return out[None], sums[None], seed, seed.clone(), longest, longest_key


def _efficient_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: None, out: Tensor,
                        starts: Tensor, key_starts: Tensor, *_: Any, **__: Any) -> Any:  # fmt: skip
    found = _attend_backward(grad[0], q[0], k[0], v[0], starts, key_starts, -1, -1)
    return *(x[None] for x in found), None


SUBSTITUTES: dict[str, Callable[..., Any]] = {
    "aten::_fused_sdp_choice": lambda *_, **__: 0,  # PyTorch's plain way
    "aten::_flash_attention_forward": _flash,
    "aten::_flash_attention_backward": _flash_backward,
    "aten::_efficient_attention_forward": _efficient,
    "aten::_efficient_attention_backward": _efficient_backward,
    "torch_attn::_varlen_attn": _varlen,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}


# -- torch.cuda -----------------------------------------------------------------------------------


class Quiet:
    """A stream or an event: all that it is told has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait_stream(self, _: Any) -> None: ...


class CudaGraph:
    calls: list[tuple[Any, ...]]

    def replay(self) -> None:
        """What was captured, into the same memory."""
        for func, args, kwargs, out in self.calls:
            again = tree_leaves(func(*args, **kwargs))
            for old, new in zip(tree_leaves(out), again, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def _capturing(graph: CudaGraph, **_: Any) -> Iterator[None]:
    global capture
    capture = graph.calls = []
    try:
        yield
    finally:
        capture = None


def install(capability: tuple[int, int]) -> None:
    """From here on this process believes in a GPU."""
    facts = types.SimpleNamespace(
        total_memory=80 << 30, multi_processor_count=132, major=capability[0], minor=capability[1]
    )
    fakes = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_properties": lambda device=None: facts,
        "current_stream": lambda device=None: Quiet(),
        "graph_pool_handle": lambda: (0, 0),
        "device_of": contextlib.nullcontext,
        "stream": contextlib.nullcontext,
        "Stream": Quiet,
        "Event": Quiet,
        "CUDAGraph": CudaGraph,
        "graph": _capturing,
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    torch.Tensor.pin_memory = lambda self, device=None: self  # type: ignore[assignment,method-assign]
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.autograd.set_multithreading_enabled(False)  # a mode belongs to its thread
    Factories().__enter__()


# -- what is tried --------------------------------------------------------------------------------


def passes(backend: str, query_only: bool) -> dict[str, Any]:
    """Errors of a forward and a backward pass, and those of plain PyTorch on the CPU beside it."""
    from modernbert import ModernBertConfig, ModernBertModel
    from modernbert.packing import pack

    config = ModernBertConfig(
        hidden_size=64, intermediate_size=96, num_attention_heads=2, num_hidden_layers=2,
        vocab_size=100, local_attention=16, global_attn_every_n_layers=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    exact = ModernBertModel(config, attention="reference").double()
    texts = [torch.randint(3, 100, (length,)) for length in (1, 50, 33, 33)]
    flags = [[i % 5 == 3 for i in range(len(text))] for text in texts]
    batch = pack(texts, query_only=flags if query_only else None)
    upstream = torch.randn(117, 64, dtype=torch.float64)

    def run(attention: str, device: str, dtype: torch.dtype) -> tuple[list[Tensor], int]:
        model = ModernBertModel(config, attention=attention)
        model.load_state_dict(exact.state_dict())
        model = model.to(device, dtype)
        here, slope = batch.to(device), upstream.to(device, dtype)
        waits.clear()
        out = model(here).last_hidden_state
        (out * slope).sum().backward()
        waited = sum(waits.values())
        assert out.device.type == device
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return [x.detach().cpu().double() for x in (out, *gradients)], waited

    right, _ = run("reference", "cpu", torch.float64)
    plain, _ = run("reference", "cpu", torch.float16)
    found, waited = run(backend, "cuda", torch.float16)

    def error(candidates: list[Tensor]) -> float:
        pairs = zip(candidates, right, strict=True)
        return max(float((x - y).norm() / y.norm().clamp(min=1e-9)) for x, y in pairs)

    return {"error": error(found), "plain": error(plain), "waits": waited}


def encode(optimize: bool, **options: Any) -> dict[str, Any]:
    """`SentenceEncoder.encode` on the GPU beside the CPU's float32."""
    from modernbert import SentenceEncoder

    texts = ["Paris is the capital of France.", "", "An apple a day " * 4, "x"]
    there = SentenceEncoder.from_pretrained(device="cpu", dtype=torch.float32)
    here = SentenceEncoder.from_pretrained(device="cuda", dtype=torch.float16, **options)
    if optimize:
        here.optimize(linears="fused")
    found = [here.encode(texts, batch_tokens=24)]
    waits.clear()
    found.append(here.encode(texts, batch_tokens=24))  # of graphs, a replay
    want = there.encode(texts)
    error = max(float(abs(x - want).max()) for x in found)
    return {"error": error, "same": bool((found[0] == found[1]).all()), "waits": dict(waits)}


def main(architecture: str) -> None:
    from modernbert.kernels import dispatch as dispatch_table

    digits = architecture.removeprefix("sm_")
    install((int(digits[:-1]), int(digits[-1])))
    old = architecture == "sm_75"
    report: dict[str, Any] = {}
    for backend in ("auto",) if old else ("triton", "flash", "turing", "blocked"):
        report[backend] = passes(backend, query_only=False)
    # Those that gather keys share the code that does; blocked takes masks, as the reference does.
    for backend in ("auto",) if old else ("triton", "flash"):
        report[f"{backend}, query-only"] = passes(backend, query_only=True)
    if not old:
        dispatch_table.VARLEN_WITH_WINDOW = (99, 0)  # as before PyTorch 2.12
        report["flash, before PyTorch 2.12"] = passes("flash", query_only=False)
    report["encode"] = encode(optimize=not old, cuda_graphs=True)
    print(json.dumps(report))


def run(architecture: str, folder: Path) -> dict[str, Any]:
    """The report of `main` on a GPU of that architecture; `folder` is for the compiled C++."""
    compiler = shutil.which("g++")
    assert compiler is not None
    packages = Path(torch.__file__).parent
    library = folder / "guard.so"
    subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library),
         f"-I{packages / 'include'}", f"-L{packages / 'lib'}", "-lc10", "-ltorch_cpu",
         f"-Wl,-rpath,{packages / 'lib'}"],
        input=CPP, text=True, check=True,
    )  # fmt: skip
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "TRITON_INTERPRET": "1",
        "MODERNBERT_PRETEND": architecture,
    }
    done = subprocess.run(
        [sys.executable, __file__, architecture], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


if __name__ == "__main__":
    main(sys.argv[1])
