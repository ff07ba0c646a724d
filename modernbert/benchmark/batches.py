"""Padded batches, and the ways to cut a workload into them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PAD_ID = 0  # in every vocabulary; the mask hides it


@dataclass(frozen=True)
class PaddedBatch:
    """B texts of at most L tokens, padded on the right.

    Attributes:
        input_ids: (B, L) int64.
        attention_mask: (B, L) int64, 1 at tokens.
        full: no row has padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    full: bool


@dataclass(frozen=True)
class Split:
    """A way to cut texts into batches of at most `tokens` places, padding counted."""

    tokens: int
    by_length: bool

    def __str__(self) -> str:
        return f"{'sorted' if self.by_length else 'as given'}, {self.tokens} tokens a batch"

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of the texts of each batch; a text longer than `tokens` stands alone."""
        order = list(range(len(lengths)))
        if self.by_length:
            order = sorted(order, key=lambda i: -lengths[i])
        groups: list[list[int]] = []
        longest = 0
        for index in order:
            longest = max(longest, lengths[index])
            if not groups or (len(groups[-1]) + 1) * longest > self.tokens:
                groups.append([])
                longest = lengths[index]
            groups[-1].append(index)
        return groups


def make_batches(
    sequences: Sequence[Tensor], split: Split, device: torch.device
) -> list[PaddedBatch]:
    """The texts as padded batches on `device`."""
    lengths = [len(ids) for ids in sequences]
    return [pad([sequences[i] for i in group], device) for group in split.batches(lengths)]


def pad(sequences: Sequence[Tensor], device: torch.device) -> PaddedBatch:
    """One padded batch."""
    ids = pad_sequence(list(sequences), batch_first=True, padding_value=PAD_ID)
    lengths = torch.tensor([len(row) for row in sequences])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return PaddedBatch(ids.to(device), mask.to(device), bool(mask.all()))
