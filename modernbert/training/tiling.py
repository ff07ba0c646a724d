"""Start a larger model from the weights of a smaller one, instead of from random numbers.

The small tensors go to the centre of the large ones and repeat around it; layers are copied after
the map of Gopher. Sources: Warner et al. 2024, arXiv 2412.13663, section 2.2.2; Rae et al. 2021,
arXiv 2112.11446, appendix G.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modernbert.config import ModernBertConfig
from modernbert.pretrained import PreTrainedModel

# The vocabulary and the classes mean the same in both models, and a head turns as one.
SAME = ("vocab_size", "head_dim", "num_labels")


def layer_map(old: int, new: int) -> list[int]:
    """For each of `new` layers the one of `old` layers that it copies; halves round to even."""
    if not 1 <= old <= new:
        raise ValueError(f"cannot spread {old} layers over {new}: there must be at least as many")
    return [min(old - 1, round(i * old / new)) for i in range(new)]


def tile(old: Tensor, shape: Sequence[int]) -> Tensor:
    """`old` in the middle of a tensor of `shape`, repeated around it on every axis.

    new[i, ...] = old[(i - (new_size - old_size) // 2) mod old_size, ...]. Raises `ValueError`
    where `shape` is smaller than `old` or has another number of axes.
    """
    if len(shape) != old.ndim or any(n < o for n, o in zip(shape, old.shape, strict=True)):
        raise ValueError(f"cannot tile a tensor of shape {list(old.shape)} to {list(shape)}")
    for axis, size in enumerate(shape):
        width = old.shape[axis]
        index = (torch.arange(size, device=old.device) - (size - width) // 2) % width
        old = old.index_select(axis, index)
    return old


@torch.no_grad()
def tile_model(small: PreTrainedModel, large: PreTrainedModel) -> None:
    """Overwrite the weights of `large` with those of `small`, tiled.

    Queries, keys, values and heads, and the two halves of a GLU, are tiled each for itself. What
    `small` has no tensor for, the attention norm of its first layer, stays as it is in a `large`
    layer that copies this one. Raises `ValueError` for a `large` that is smaller in anything,
    that differs in vocabulary, labels or size of a head, or that has parts `small` lacks.
    """
    for field in SAME:
        ours, theirs = getattr(small.config, field), getattr(large.config, field)
        if ours != theirs:
            raise ValueError(f"tiling needs the same {field} in both models, got {ours}, {theirs}")
    layers = layer_map(small.config.num_hidden_layers, large.config.num_hidden_layers)
    # Shared tensors under each of their names: the large model need not share them.
    named = small.named_parameters(remove_duplicate=False)
    sources = {small.canonical(name): parameter for name, parameter in named}
    for name, parameter in large.named_parameters():
        name = large.canonical(name)
        source = _source(name, layers)
        if source not in sources:
            if source.startswith("model.layers.0.attn_norm."):
                continue
            raise ValueError(f"the small model has no {source} to tile {name} from")
        old = sources[source]
        tiled = tile(old.view(_axes(name, old, small.config)), _axes(name, parameter, large.config))
        parameter.copy_(tiled.view(parameter.shape))


def _source(name: str, layers: list[int]) -> str:
    """The small model's name for a canonical name of the large one."""
    parts = name.split(".")
    if "layers" in parts:
        at = parts.index("layers") + 1
        parts[at] = str(layers[int(parts[at])])
    return ".".join(parts)


def _axes(name: str, weight: Tensor, config: ModernBertConfig) -> tuple[int, ...]:
    """The shape of a weight with one axis for each thing that is tiled for itself."""
    heads = (config.num_attention_heads, config.head_dim)
    rows, *columns = weight.shape
    if ".attn.Wqkv." in name:
        return (3, *heads, *columns)
    if ".mlp.Wi." in name:
        return (2, rows // 2, *columns)
    if name.endswith(".attn.Wo.weight"):
        return (rows, *heads)
    return (rows, *columns)
