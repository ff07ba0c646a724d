"""Fully sharded data parallelism (FSDP2): every process keeps a slice of each layer."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from modernbert.heads import HeadModel


def shard(model: HeadModel) -> None:
    """Spread the layers' weights, gradients and moments over all processes, in place.

    A layer is gathered when it runs, forward and backward, and its gradients are summed. What
    stands outside the layers stays whole in every process: embeddings, final norm and head, which
    objectives call one by one and which a masked LM's decoder shares. Raises `ValueError` for a
    torch that cannot do it. Source: Zhao et al. 2023, arXiv 2304.11277.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(
            f"parallel = 'fsdp' needs a newer torch than {torch.__version__}: update it, or take "
            "parallel = 'ddp'"
        )
    encoder: Any = model.model
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for layer in encoder.layers:
        fully_shard(layer, mesh=mesh)
        layer.set_gradient_divide_factor(1.0)
        layer.set_force_sum_reduction_for_comms(True)  # NCCL would scale, gloo cannot
    inside = {id(p) for p in encoder.layers.parameters()}
    # The encoder shards nothing more: it lets the layers share streams and prefetch each other.
    outside = {p for p in encoder.parameters() if id(p) not in inside}
    fully_shard(encoder, mesh=mesh, ignored_params=outside)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a slice of the tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensors: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """The full tensors, sharded ones on the CPU; every process has to call it.

    A process that does not `keep` them helps the others and gets nothing.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full: Any = tensor
        if is_sharded(tensor):
            full = full.full_tensor()
            full = full.cpu() if keep else None
        if keep:
            gathered[name] = full
    return gathered


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor on the device of `parameter`, and as sharded; all processes have read it."""
    tensor = tensor.to(parameter.device)
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(
        tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
    )
