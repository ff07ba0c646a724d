"""What a step minimises. Shapes: T = packed tokens, B = texts, D = hidden size, d = a width <= D.

Every loss is a sum over the global batch divided by the global batch's own size, so that gradients
of micro-batches and of processes simply add up to the gradient of the whole.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from modernbert import kernels
from modernbert.heads import ModernBertForMaskedLM
from modernbert.packing import PackedBatch

VectorLoss = Callable[[Tensor], Tensor]


def masked_lm(
    model: ModernBertForMaskedLM, batch: PackedBatch, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """(summed cross-entropy, number of right predictions) over the labelled tokens.

    labels: (T,), -100 where there is nothing to predict. Head and decoder run on the labelled
    tokens only.
    """
    chosen = (labels >= 0).nonzero().squeeze(1)
    hidden = model.head(model.model(batch).last_hidden_state[chosen])
    decoder = model.decoder
    return kernels.linear_cross_entropy(hidden, decoder.weight, decoder.bias, labels[chosen])


def vectors(model: ModernBertForMaskedLM, batch: PackedBatch) -> Tensor:
    """(B, D): the mean of each text's last hidden states."""
    return kernels.mean_pool(model.model(batch).last_hidden_state.float(), batch.cu_seqlens)


def matryoshka(loss: VectorLoss, dims: Sequence[int]) -> VectorLoss:
    """The mean of `loss` over the leading `dims` of the vectors.

    Source: Kusupati et al. 2022, arXiv 2205.13147.
    """
    if not dims:
        return loss
    return lambda x: torch.stack([loss(x[..., :d]) for d in dims]).mean()


def info_nce(x: Tensor, temperature: float, keys: Tensor | None = None) -> Tensor:
    """Contrastive loss of texts x (N, k, d): anchor, positive, then any hard negatives.

    Each anchor is to find its positive among the positives and negatives of all N, and each
    positive its anchor. `keys` (N,) marks equal positives by equal numbers: they are no negatives
    of one another. Source: van den Oord et al. 2018, arXiv 1807.03748.
    """
    unit = F.normalize(x, dim=-1)
    anchors, positives = unit[:, 0], unit[:, 1]
    scores = anchors @ positives.T / temperature  # (N, N)
    same = torch.zeros_like(scores, dtype=torch.bool)
    if keys is not None:
        same = keys[:, None] == keys
        same.fill_diagonal_(False)
    scores = scores.masked_fill(same, float("-inf"))
    hard = anchors @ unit[:, 2:].flatten(0, 1).T / temperature  # (N, N (k - 2))
    target = torch.arange(len(x), device=x.device)
    forward = F.cross_entropy(torch.cat((scores, hard), dim=1), target)
    return (forward + F.cross_entropy(scores.T, target)) / 2


def distillation(x: Tensor, target: Tensor, similarity_weight: float) -> Tensor:
    """How far vectors x (N, d) are from the teacher's (N, D'), of which the first d are compared.

    1 - cosine of each vector with its target, plus `similarity_weight` times the mean squared
    difference of the in-batch cosine matrices, in which the teacher keeps all D' dimensions.
    """
    unit = F.normalize(x, dim=-1)
    alone = 1 - (unit * F.normalize(target[:, : x.shape[1]], dim=-1)).sum(-1).mean()
    full = F.normalize(target, dim=-1)
    difference = unit @ unit.T - full @ full.T
    pairs = max(1, len(x) * (len(x) - 1))
    return alone + similarity_weight * difference.square().sum() / pairs


def backward_through_vectors(
    encode: Callable[[int], Tensor], count: int, loss: VectorLoss, weight: float
) -> float:
    """Gradients of weight * loss(all vectors), whatever the number of micro-batches and processes.

    `encode(i)` gives the vectors of micro-batch i of this process, the same on every call; the
    global batch is the processes' vectors one after another. With more than one micro-batch the
    vectors are computed twice, the second time with the gradient of the loss by each vector (Gao
    et al. 2021, arXiv 2101.06983), so that memory holds one micro-batch. Returns the loss.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if count == 1 and world == 1:
        value = loss(encode(0))
        (weight * value).backward()
        return value.item()
    with torch.no_grad():
        parts = [encode(i) for i in range(count)]
    own = torch.cat(parts)
    everyone = [own]
    if world > 1:
        everyone = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(everyone, own)
    together = torch.cat(everyone).requires_grad_()
    value = loss(together)
    (gradient,) = torch.autograd.grad(weight * value, together)
    rank = dist.get_rank() if world > 1 else 0
    mine = gradient[rank * len(own) : (rank + 1) * len(own)].split([len(p) for p in parts])
    for i, part in enumerate(mine):
        encode(i).backward(part)
    return value.item()
