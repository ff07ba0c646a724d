"""Checkpoints of a run: weights and optimizer as safetensors, the rest as JSON, nothing pickled."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from modernbert.pretrained import PreTrainedModel
from modernbert.weights import save_folder

from .sharding import like, whole

STATE, OPTIMIZER, WEIGHTS = "state.json", "optimizer/model.safetensors", "model.safetensors"
NAME = re.compile(r"step-(\d{9})")


def checkpoint_name(step: int) -> str:
    """The name of a step's folder."""
    return f"step-{step:09}"


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    state: dict,
    *,
    write: bool = True,
) -> Path:
    """Write `folder`/step-000000123; a crash leaves no half of it.

    Every process has to call it, for parts of a sharded model; one of them is to `write`.
    """
    path = folder / checkpoint_name(step)
    moments, numbers = optimizer_tensors(model, optimizer)
    weights = whole(model.tensors_to_save(), keep=write)
    moments = whole(moments, keep=write)
    if not write:
        return path
    text = json.dumps({**state, "step": step, "optimizer_steps": numbers}, indent=1)
    save_folder(
        path,
        files={**model.files_to_save(), STATE: text.encode()},
        tensors=weights,
        extra_tensors={OPTIMIZER: moments},
        max_shard_size="1TB",
    )
    return path


def load_checkpoint(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Fill model and optimizer, bit for bit; the state that was saved with them.

    Raises `ValueError` for a checkpoint of another model or that is broken.
    """
    try:
        state = json.loads((path / STATE).read_bytes())
        weights, moments = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {path} cannot be read ({error}); delete it") from error
    load_weights(model, weights, path)
    restore_optimizer(model, optimizer, moments, state.pop("optimizer_steps"))
    return state


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Copy tensors by name into the parameters."""
    own = dict(model.named_parameters())
    if own.keys() != weights.keys() or any(own[n].shape != weights[n].shape for n in own):
        raise ValueError(f"checkpoint {path} is of another model: the recipe has changed")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(like(weights[name], parameter))


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The optimizer's tensors as "NAME.m", "NAME.v", ... and each parameter's step."""
    tensors, steps = {}, {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}.{key}"] = value
            else:
                steps[name] = int(value)
    return tensors, steps


def restore_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    steps: dict[str, int],
) -> None:
    """The inverse of `optimizer_tensors`."""
    optimizer.state.clear()
    parameters = dict(model.named_parameters())
    for name, step in steps.items():
        optimizer.state[parameters[name]] = {"step": step}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(".")
        optimizer.state[parameters[parameter]][key] = like(value, parameters[parameter])


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name) and (p / STATE).is_file())


def prune(folder: Path, keep: int, *, since: str = "") -> None:
    """Delete all but the last `keep` of the checkpoints that are named `since` or later."""
    found = [path for path in checkpoints(folder) if path.name >= since]
    for path in found[: max(0, len(found) - keep)]:
        shutil.rmtree(path)


def average(paths: list[Path]) -> dict[str, Tensor]:
    """The mean of the weights of several checkpoints, summed in float64."""
    total: dict[str, Tensor] = {}
    for path in paths:
        for name, tensor in load_file(path / WEIGHTS).items():
            total[name] = total.get(name, torch.zeros(())) + tensor.double() / len(paths)
    return {name: tensor.float() for name, tensor in total.items()}
