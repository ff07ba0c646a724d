"""Sequences in one stream, as kernels want them that know where each starts: cu_seqlens.

Such kernels let queries and keys be streams of different lengths. That is how tokens that nobody
attends to are left out: the keys among the tokens are gathered into a stream of their own.

Shapes: T = packed tokens, B = sequences, H = heads, d = head size, K = tokens that are keys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# (q, k, v, cu_queries, cu_keys, longest_query, longest_key, ...) to (T, H, d)
Kernel = Callable[..., Tensor]


@dataclass(frozen=True)
class Keys:
    """Where some tokens are query-only: the others, which are all that k and v need to hold.

    Attributes:
        index: (K,) int64, places of the keys in the stream. A sequence without any lends its
            first token, so that no softmax is empty.
        cu_seqlens: (B + 1,) int32, where each sequence's keys start.
        longest: keys of the sequence with the most.
        blind: (T,) bool, tokens of sequences without any key: they get zeros.
    """

    index: Tensor
    cu_seqlens: Tensor
    longest: int
    blind: Tensor


@dataclass(frozen=True)
class Sequences:
    """The sequences of a batch.

    Attributes:
        cu_seqlens: (B + 1,) int32.
        longest: no sequence has more tokens; exactly that many where the host knows the lengths.
        keys: the keys among the tokens; None where all are.
    """

    cu_seqlens: Tensor
    longest: int
    keys: Keys | None


def sequences(
    cu_seqlens: Tensor, total: int, lengths: tuple[int, ...] | None, keys: Tensor | None
) -> Sequences:
    """Prepare sequences of `lengths` tokens, `total` together; None: whatever their lengths."""
    longest = total if lengths is None else max(lengths, default=0)
    chosen = None if keys is None or not total else _choose_keys(cu_seqlens, total, keys)
    return Sequences(cu_seqlens, longest, chosen)


def _choose_keys(cu_seqlens: Tensor, total: int, keys: Tensor) -> Keys:
    offsets = cu_seqlens.long()
    place = torch.arange(total, device=keys.device)
    owner = torch.bucketize(place, offsets[1:], right=True)
    counts = F.pad(keys.long().cumsum(0), (1, 0))
    blind = (counts[offsets[1:]] == counts[offsets[:-1]])[owner]
    lent = keys | (blind & (place == offsets[owner]))
    counts = F.pad(lent.long().cumsum(0), (1, 0))[offsets]
    return Keys(lent.nonzero().squeeze(1), counts.int(), int(counts.diff().max()), blind)


def attend(
    kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, **options: Any
) -> Tensor:
    """Each sequence's queries at its keys and values, (T, H, d) each, by `kernel`: (T, H, d)."""
    ends, longest, keys = sequences.cu_seqlens, sequences.longest, sequences.keys
    if keys is None:
        return kernel(q, k, v, ends, ends, longest, longest, **options)
    k, v = k[keys.index], v[keys.index]
    out = kernel(q, k, v, ends, keys.cu_seqlens, longest, keys.longest, **options)
    return out.masked_fill(keys.blind[:, None, None], 0.0)
