"""The packed stream: texts of a batch one after another, without padding.

Shapes: T = tokens of the batch, B = sequences, L = longest row of a padded batch.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """B sequences in one stream of T tokens; made by `pack` or `pack_padded`.

    Attributes:
        lengths: tokens of each sequence, on the host; their sum is T.
        cu_seqlens: (B + 1,) int32, where each sequence starts; the last entry is T.
        positions: (T,) int64, position of each token for the rotary embedding.
        max_position: the largest of `positions`, on the host.
        input_ids: (T,) int64, or None when `inputs_embeds` is given.
        inputs_embeds: (T, D), or None.
        query_only: (T,) bool, tokens that attend but that nobody attends to, or None.
        padded_shape: (B, L) of the padded batch this came from, or None.
        padded_index: (T,) int64, place of each token in the flattened padded batch; None when
            every place is taken.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    positions: Tensor
    max_position: int
    input_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    query_only: Tensor | None = None
    padded_shape: tuple[int, int] | None = None
    padded_index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T, the tokens of all sequences together."""
        return sum(self.lengths)

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence; 0 for an empty batch."""
        return max(self.lengths, default=0)

    @property
    def device(self) -> torch.device:
        return self.positions.device

    def to(self, device: torch.device | str) -> "PackedBatch":
        """The same batch with its tensors on `device`."""
        # A copy from memory that is not pinned waits for all that the GPU was given before.
        pins = self.device.type == "cpu" and torch.device(device).type == "cuda"
        moved: dict[str, Any] = {
            name: (value.pin_memory() if pins else value).to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def pieces(self, tokens: int) -> Iterator["PackedBatch"]:
        """Batches of neighbouring sequences, `tokens` at most; a longer sequence has its own."""
        start = 0
        for group in token_budget_batches(self.lengths, tokens):
            lengths = tuple(self.lengths[i] for i in group)
            here = slice(start, start + sum(lengths))
            yield PackedBatch(
                lengths,
                self.cu_seqlens[group[0] : group[-1] + 2] - start,
                self.positions[here],
                self.max_position,
                None if self.input_ids is None else self.input_ids[here],
                None if self.inputs_embeds is None else self.inputs_embeds[here],
                None if self.query_only is None else self.query_only[here],
            )
            start = here.stop

    def split(self, x: Tensor) -> list[Tensor]:
        """Cut a stream (T, ...) into one view (length, ...) per sequence."""
        return list(x.split(list(self.lengths)))

    def flatten(self, x: Tensor) -> Tensor:
        """The tokens (T, ...) of a padded tensor (B, L, ...) laid out like this batch."""
        if self.padded_shape is None or x.shape[:2] != self.padded_shape:
            raise ValueError(
                f"a tensor of shape {tuple(x.shape)} does not belong to a padded batch of "
                f"{self.padded_shape}"
            )
        flat = x.flatten(0, 1)
        return flat if self.padded_index is None else flat[self.padded_index]

    def unpack(self, x: Tensor, *, fill: float = 0.0) -> Tensor:
        """Put a stream (T, ...) back into the padded layout (B, L, ...), `fill` at the pads.

        Raises `ValueError` for a batch that did not come from a padded one.
        """
        if self.padded_shape is None:
            raise ValueError("this batch was packed from separate texts; use split() instead")
        if self.padded_index is None:
            return x.unflatten(0, self.padded_shape)
        rows, columns = self.padded_shape
        padded = x.new_full((rows * columns, *x.shape[1:]), fill)
        return padded.index_copy(0, self.padded_index, x).unflatten(0, self.padded_shape)


def pack(
    sequences: Sequence[Sequence[int] | Tensor],
    *,
    query_only: Sequence[Sequence[bool]] | None = None,
    device: torch.device | str | None = None,
) -> PackedBatch:
    """Pack token ids, one sequence per text, into one stream.

    `query_only` marks, in the same shape, tokens that attend but are attended to by none
    (ColBERT's query expansion). Raises `ValueError` when its lengths differ from the ids', and for
    anything but lists of integers.
    """
    parts = [_token_ids(text) for text in sequences]
    lengths = tuple(len(ids) for ids in parts)
    ids = torch.cat([torch.empty(0, dtype=torch.int64), *parts])
    mask = None
    if query_only is not None:
        if tuple(len(row) for row in query_only) != lengths:
            raise ValueError("query_only must mark every token: its lengths differ from the ids'")
        mask = torch.tensor([flag for row in query_only for flag in row], dtype=torch.bool)
    cu_seqlens, positions = _layout(lengths, torch.device("cpu"))
    last = max((1, *lengths)) - 1
    batch = PackedBatch(lengths, cu_seqlens, positions, last, ids, query_only=mask)
    return batch if device is None else batch.to(device)


def _token_ids(text: Sequence[int] | Tensor) -> Tensor:
    """The ids of one text, (length,) int64 on the host; rounds nothing to an id."""
    try:
        ids = torch.as_tensor(text, device="cpu")
    except (OverflowError, RuntimeError, TypeError, ValueError):
        ids = torch.empty(())
    if ids.dim() != 1 or (len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool)):
        raise ValueError(f"each text must be a list of integer token ids, not {text!r:.80}")
    return ids.long()


def pack_padded(
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    query_only: Tensor | None = None,
) -> PackedBatch:
    """Drop the padding of a batch: ids (B, L) or embeddings (B, L, D) and a mask (B, L).

    A row's tokens may stand anywhere in it (padding left or right) but must be contiguous.
    Positions start at 0 for each row whatever its padding, unless `position_ids`, (B, L) or
    (1, L), says otherwise. Tokens marked in `query_only` (B, L) belong to their row even where
    the mask is 0. Raises `ValueError` for anything else, naming it.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    source = input_ids if input_ids is not None else inputs_embeds
    assert source is not None
    if source.dim() != (2 if input_ids is not None else 3):
        raise ValueError(
            f"got inputs of shape {tuple(source.shape)}; expected input_ids (batch, length) or "
            "inputs_embeds (batch, length, hidden); pack a single text with unsqueeze(0)"
        )
    if input_ids is not None and (input_ids.is_floating_point() or input_ids.dtype == torch.bool):
        raise ValueError(f"input_ids are {input_ids.dtype}; expected integers")
    shape = (source.shape[0], source.shape[1])
    lengths, index = _runs(shape, attention_mask, query_only)
    cu_seqlens, positions = _layout(lengths, source.device)
    batch = PackedBatch(
        lengths,
        cu_seqlens,
        positions,
        max((1, *lengths)) - 1,
        padded_shape=shape,
        padded_index=index,
    )
    if position_ids is not None:
        if position_ids.shape not in (shape, (1, shape[1])):
            raise ValueError(
                f"position_ids have shape {tuple(position_ids.shape)}, the batch {shape}"
            )
        positions = batch.flatten(position_ids.expand(shape)).to(torch.int64)
        low, high = (int(x) for x in positions.aminmax()) if len(positions) else (0, 0)
        if low < 0:
            raise ValueError(f"position_ids contain {low}; positions start at 0")
        batch = replace(batch, positions=positions, max_position=high)
    return replace(
        batch,
        input_ids=None if input_ids is None else batch.flatten(input_ids).long(),
        inputs_embeds=None if inputs_embeds is None else batch.flatten(inputs_embeds),
        query_only=None if query_only is None else batch.flatten(query_only).bool(),
    )


def _runs(
    shape: tuple[int, int], mask: Tensor | None, query_only: Tensor | None
) -> tuple[tuple[int, ...], Tensor | None]:
    """Length of each row's run of tokens, and the flat place of every token (None: all)."""
    for name, given in (("attention_mask", mask), ("query_only", query_only)):
        if given is not None and given.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(given.shape)}, the batch {shape}; "
                "only masks of one entry per token are supported"
            )
    if mask is None:
        return (shape[1],) * shape[0], None
    if mask.dtype != torch.bool and ((mask != 0) & (mask != 1)).any():
        raise ValueError("attention_mask holds values other than 0 and 1")
    present = mask.bool() if query_only is None else mask.bool() | query_only.bool()
    starts = present & ~torch.nn.functional.pad(present, (1, 0))[:, :-1]
    holes = (starts.sum(1) > 1).nonzero()
    if len(holes):
        raise ValueError(
            f"attention_mask has a hole in row {int(holes[0])}: a row's tokens must be contiguous "
            "(padding on the left or on the right, none in between)"
        )
    lengths = tuple(int(n) for n in present.sum(1).tolist())
    if all(n == shape[1] for n in lengths):
        return lengths, None
    return lengths, present.flatten().nonzero().squeeze(1)


def _layout(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """cu_seqlens (B + 1,) int32 and positions (T,) int64 that restart at 0 in each sequence."""
    sizes = torch.tensor(lengths, dtype=torch.int64)
    cu_seqlens = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    positions = torch.arange(int(cu_seqlens[-1])) - cu_seqlens[:-1].repeat_interleave(sizes)
    return cu_seqlens.to(device, torch.int32), positions.to(device)


def token_budget_batches(
    lengths: Iterable[int], budget: int, *, max_sequences: int | None = None
) -> Iterator[list[int]]:
    """Group texts, in the given order, so that no group holds more than `budget` tokens.

    Yields lists of indices into `lengths`; a text longer than the budget is a group of its own.
    """
    for name, least in (("the token budget", budget), ("max_sequences", max_sequences)):
        if least is not None and least < 1:
            raise ValueError(f"{name} is {least}; it must be at least 1")
    group: list[int] = []
    tokens = 0
    for index, length in enumerate(lengths):
        if group and (tokens + length > budget or len(group) == max_sequences):
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += length
    if group:
        yield group
