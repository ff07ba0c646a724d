"""Attention where only the first token of each sequence asks: a last layer before [CLS] pooling.

One pass over the keys and one over the values, in plain PyTorch on any device.
Shapes: T = packed tokens, B = sequences, H = heads, d = head size.
"""

import torch
from torch import Tensor

from .reference import wide


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, keys: Tensor | None
) -> Tensor:
    """Each sequence's query (B, H, d) at its own keys and values (T, H, d): (B, H, d).

    `window` is the reach to the right, None for all; `keys` (T,) bool marks the tokens that may be
    attended to. A query that sees none gives zeros. No sequence may be empty.
    """
    kind, offsets = wide(q.dtype), cu_seqlens.long()
    total, heads, size = k.shape
    texts = torch.arange(len(q), device=q.device)
    owner = texts.repeat_interleave(offsets.diff(), output_size=total)
    scores = (q.to(kind)[owner] * k).sum(-1) * size**-0.5  # (T, H)
    hidden = torch.zeros(total, dtype=torch.bool, device=q.device)
    if window is not None:
        hidden = torch.arange(total, device=q.device) - offsets[owner] > window
    if keys is not None:
        hidden = hidden | ~keys
    scores = scores.masked_fill(hidden[:, None], float("-inf"))
    peak = torch.segment_reduce(scores.detach(), "max", offsets=offsets, axis=0)
    peak = peak.masked_fill(peak.isinf(), 0.0)
    weights = (scores - peak[owner]).exp()
    shares = torch.segment_reduce(weights, "sum", offsets=offsets, axis=0)  # (B, H)
    products = (weights[..., None] * v).flatten(1)  # (T, H d)
    sums = torch.segment_reduce(products, "sum", offsets=offsets, axis=0)
    shares = shares.masked_fill(shares == 0, 1.0)
    return (sums.unflatten(1, (heads, size)) / shares[..., None]).to(q.dtype)
