"""Packing drops padding and puts it back: an identity, whatever the lengths and the padding."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modernbert.packing import PackedBatch, pack, pack_padded, token_budget_batches

LENGTHS = st.lists(st.integers(0, 12), max_size=6)
SIDES = st.sampled_from(["right", "left", "mixed"])


def padded(lengths: list[int], side: str, spare: int = 0) -> tuple[Tensor, Tensor]:
    """Distinct ids from 1 (B, L) with 0 at the pads, and the mask; `spare` columns of padding."""
    width = max(lengths, default=0) + spare
    ids = torch.zeros(len(lengths), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    first = 1
    for row, length in enumerate(lengths):
        start = {"right": 0, "left": width - length, "mixed": (width - length) // 2}[side]
        ids[row, start : start + length] = torch.arange(first, first + length)
        mask[row, start : start + length] = 1
        first += length
    return ids, mask


def check(batch: PackedBatch, lengths: list[int]) -> None:
    """What holds for every batch."""
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert batch.lengths == tuple(lengths)
    assert len(batch) == len(lengths)
    assert batch.num_tokens == sum(lengths)
    assert batch.max_seqlen == max(lengths, default=0)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == starts
    assert batch.positions.dtype == torch.int64
    assert batch.max_position >= max(batch.positions.tolist(), default=0)


@given(LENGTHS)
def test_pack_puts_texts_side_by_side(lengths: list[int]) -> None:
    texts = [[10 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    batch = pack(texts)
    check(batch, lengths)
    assert batch.input_ids is not None
    assert batch.input_ids.tolist() == [i for text in texts for i in text]
    assert batch.positions.tolist() == [j for n in lengths for j in range(n)]
    assert [part.tolist() for part in batch.split(batch.input_ids)] == texts
    with pytest.raises(ValueError, match="packed from separate texts"):
        batch.unpack(batch.input_ids)


@given(LENGTHS, SIDES, st.integers(0, 3))
def test_padding_is_dropped_and_put_back(lengths: list[int], side: str, spare: int) -> None:
    ids, mask = padded(lengths, side, spare)
    batch = pack_padded(ids, mask)
    check(batch, lengths)
    assert batch.input_ids is not None
    assert batch.input_ids.tolist() == list(range(1, sum(lengths) + 1))  # rows stay in order
    assert batch.positions.tolist() == [j for n in lengths for j in range(n)]
    assert torch.equal(batch.unpack(batch.input_ids), ids)
    assert torch.equal(batch.flatten(ids), batch.input_ids)
    assert torch.equal(batch.unpack(torch.ones(batch.num_tokens)), mask.float())
    hidden = torch.randn(batch.num_tokens, 2, 3)
    back = batch.unpack(hidden, fill=-7.0)
    assert back.shape == (*ids.shape, 2, 3)
    assert torch.equal(back[mask.bool()], hidden)
    assert (back[~mask.bool()] == -7.0).all()
    assert [len(part) for part in batch.split(hidden)] == lengths


@given(LENGTHS, SIDES, st.sampled_from([torch.bool, torch.int32, torch.float32]))
def test_masks_of_any_dtype(lengths: list[int], side: str, dtype: torch.dtype) -> None:
    ids, mask = padded(lengths, side)
    assert same(pack_padded(ids, mask.to(dtype)), pack_padded(ids, mask))


@given(LENGTHS.filter(lambda lengths: len(lengths) > 0), st.randoms(use_true_random=False))
def test_order_of_rows_is_order_of_texts(lengths: list[int], random) -> None:
    ids, mask = padded(lengths, "right")
    order = list(range(len(lengths)))
    random.shuffle(order)
    plain, permuted = pack_padded(ids, mask), pack_padded(ids[order], mask[order])
    assert plain.input_ids is not None and permuted.input_ids is not None
    parts = plain.split(plain.input_ids)
    assert permuted.input_ids.tolist() == [i for row in order for i in parts[row].tolist()]


@given(LENGTHS, SIDES)
def test_padded_and_separate_texts_pack_alike(lengths: list[int], side: str) -> None:
    ids, mask = padded(lengths, side)
    one = pack_padded(ids, mask)
    other = pack([row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)])
    assert same(dataclasses.replace(one, padded_shape=None, padded_index=None), other)


@given(st.integers(0, 4), st.integers(0, 5))
def test_without_padding_nothing_moves(rows: int, columns: int) -> None:
    ids = torch.arange(rows * columns).view(rows, columns)
    for mask in (None, torch.ones_like(ids)):
        batch = pack_padded(ids, mask)
        check(batch, [columns] * rows)
        assert batch.padded_index is None
        assert batch.input_ids is not None
        assert batch.input_ids.data_ptr() == ids.data_ptr()
        assert torch.equal(batch.unpack(batch.input_ids), ids)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_dtype(dtype: torch.dtype) -> None:
    ids, mask = padded([3, 1], "left")
    assert same(pack_padded(ids.to(dtype), mask), pack_padded(ids, mask))


@given(LENGTHS, SIDES)
def test_embeddings_instead_of_ids(lengths: list[int], side: str) -> None:
    ids, mask = padded(lengths, side)
    embeds = torch.randn(*ids.shape, 4)
    batch = pack_padded(None, mask, None, embeds)
    check(batch, lengths)
    assert batch.input_ids is None and batch.inputs_embeds is not None
    assert torch.equal(batch.inputs_embeds, embeds[mask.bool()])


@given(LENGTHS, SIDES, st.booleans())
def test_positions_of_the_user(lengths: list[int], side: str, shared: bool) -> None:
    ids, mask = padded(lengths, side)
    positions = torch.randint(0, 1000, (1 if shared else ids.shape[0], ids.shape[1]))
    batch = pack_padded(ids, mask, positions)
    check(batch, lengths)
    expected = positions.expand(ids.shape)[mask.bool()]
    assert torch.equal(batch.positions, expected)
    assert batch.max_position == max(expected.tolist(), default=0)


@given(LENGTHS, st.integers(0, 4))
def test_query_only_tokens_belong_to_their_row(lengths: list[int], expansion: int) -> None:
    """ColBERT: expansion tokens follow the text; the mask is 0 there as at the pads behind them."""
    ids, mask = padded(lengths, "right", spare=expansion + 1)
    places = torch.arange(ids.shape[1])
    sizes = torch.tensor(lengths, dtype=torch.int64)[:, None]
    expanded = (places >= sizes) & (places < sizes + expansion)
    batch = pack_padded(ids.masked_fill(expanded, 99), mask, query_only=expanded)
    check(batch, [n + expansion for n in lengths])
    assert batch.query_only is not None
    assert torch.equal(batch.unpack(batch.query_only), expanded)
    separate = pack(
        [row[row > 0].tolist() for row in ids.masked_fill(expanded, 99)],
        query_only=[[False] * n + [True] * expansion for n in lengths],
    )
    assert same(dataclasses.replace(batch, padded_shape=None, padded_index=None), separate)


def test_query_only_tokens_inside_the_mask() -> None:
    ids, mask = padded([3, 2], "right")
    marked = torch.tensor([[False, False, True], [False, True, False]])
    batch = pack_padded(ids, mask, query_only=marked)
    assert batch.query_only is not None
    assert batch.query_only.tolist() == [False, False, True, False, True]


def same(one: PackedBatch, other: PackedBatch) -> bool:
    for spec in dataclasses.fields(PackedBatch):
        x, y = getattr(one, spec.name), getattr(other, spec.name)
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.dtype != y.dtype or not torch.equal(x, y):
                return False
        elif type(x) is not type(y) or x != y:
            return False
    return True


def test_tensors_and_lists_pack_alike() -> None:
    assert same(pack([[1, 2], [3]]), pack([torch.tensor([1, 2]), torch.tensor([3])]))
    assert same(pack([]), pack([], device="cpu"))


def test_to_moves_every_tensor() -> None:
    ids, mask = padded([2, 1], "right")
    batch = pack_padded(ids, mask, query_only=mask.bool())
    moved = batch.to("meta")
    assert batch.device.type == "cpu" and moved.device.type == "meta"
    for name, value in vars(moved).items():
        if isinstance(value, Tensor):
            assert value.is_meta, name
        else:
            assert value == getattr(batch, name)
    assert pack([[1]], device="meta").device.type == "meta"


def test_a_batch_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        pack([[1]]).lengths = (2,)  # type: ignore[misc]


def test_gradients_flow_through_both_doors() -> None:
    _, mask = padded([3, 1], "left")
    embeds = torch.randn(2, 3, 4, requires_grad=True)
    batch = pack_padded(None, mask, None, embeds)
    assert batch.inputs_embeds is not None
    (batch.unpack(batch.inputs_embeds) * 2).sum().backward()
    assert embeds.grad is not None
    assert torch.equal(embeds.grad, 2.0 * mask[..., None].expand_as(embeds))


IDS = torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "exactly one of input_ids and inputs_embeds"),
        ((IDS, None, None, torch.ones(2, 3, 4)), "exactly one of input_ids and inputs_embeds"),
        ((IDS[0],), r"shape \(3,\); expected .*unsqueeze"),
        ((IDS[None],), r"shape \(1, 2, 3\)"),
        ((None, None, None, torch.ones(2, 3)), r"shape \(2, 3\)"),
        ((IDS.float(),), "input_ids are torch.float32; expected integers"),
        ((IDS.bool(),), "input_ids are torch.bool; expected integers"),
        ((IDS, torch.ones(2, 4)), r"attention_mask has shape \(2, 4\), the batch \(2, 3\)"),
        ((IDS, torch.ones(2, 1, 3, 3)), r"attention_mask has shape \(2, 1, 3, 3\)"),
        ((IDS, IDS * 2), "attention_mask holds values other than 0 and 1"),
        ((IDS, IDS * 0.5), "attention_mask holds values other than 0 and 1"),
        ((IDS, IDS * torch.nan), "attention_mask holds values other than 0 and 1"),
        ((IDS, torch.tensor([[1, 1, 1], [1, 0, 1]])), "a hole in row 1"),
        ((IDS, None, torch.ones(3, 3)), r"position_ids have shape \(3, 3\), the batch \(2, 3\)"),
        ((IDS, None, torch.ones(3)), r"position_ids have shape \(3,\)"),
        ((IDS, None, IDS - 2), "position_ids contain -1; positions start at 0"),
    ],
)
def test_refused(arguments: tuple[Tensor | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_padded(*arguments)


@given(LENGTHS.filter(lambda lengths: max(lengths, default=0) > 2), SIDES, st.data())
def test_every_hole_is_found(lengths: list[int], side: str, data: st.DataObject) -> None:
    ids, mask = padded(lengths, side)
    row = data.draw(st.sampled_from([i for i, n in enumerate(lengths) if n > 2]))
    places = mask[row].nonzero().flatten().tolist()
    mask[row, data.draw(st.sampled_from(places[1:-1]))] = 0
    with pytest.raises(ValueError, match=f"attention_mask has a hole in row {row}:"):
        pack_padded(ids, mask)


def test_a_gap_before_query_only_tokens_is_a_hole() -> None:
    mask = torch.tensor([[1, 0, 0]])
    with pytest.raises(ValueError, match="hole in row 0"):
        pack_padded(IDS[:1], mask, query_only=torch.tensor([[False, False, True]]))


def test_query_only_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="query_only must mark every token"):
        pack([[1, 2]], query_only=[[True]])
    for mask in (None, torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"query_only has shape \(2, 2\), the batch \(2, 3\)"):
            pack_padded(IDS, mask, query_only=torch.ones(2, 2))


@pytest.mark.parametrize(
    "text", [[0.5], [1, 2.0], [True], ["a"], "text", [[1, 2]], [[1], [2, 3]], 5, None, [2**70]]
)
def test_pack_refuses_what_is_no_text(text: Any) -> None:
    with pytest.raises(ValueError, match="each text must be a list of integer token ids, not "):
        pack([[1, 2], text])


def test_flatten_refuses_another_layout() -> None:
    batch = pack_padded(IDS)
    with pytest.raises(ValueError, match=r"shape \(3, 2\) does not belong .* \(2, 3\)"):
        batch.flatten(IDS.T)
    with pytest.raises(ValueError, match="does not belong"):
        pack([[1, 2]]).flatten(IDS)


@given(st.lists(st.integers(0, 50)), st.integers(1, 60), st.one_of(st.none(), st.integers(1, 5)))
def test_token_budget(lengths: list[int], budget: int, most: int | None) -> None:
    groups = list(token_budget_batches(lengths, budget, max_sequences=most))
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    for group in groups:
        tokens = sum(lengths[i] for i in group)
        assert tokens <= budget or len(group) == 1
        assert most is None or len(group) <= most
        following = group[-1] + 1
        if following < len(lengths):  # as full as it can be
            assert len(group) == most or tokens + lengths[following] > budget


def test_token_budget_is_lazy_and_checked() -> None:
    def endless():
        while True:
            yield 3

    groups = token_budget_batches(endless(), 10)
    assert [next(groups), next(groups)] == [[0, 1, 2], [3, 4, 5]]
    for budget in (0, -5):
        with pytest.raises(ValueError, match=f"the token budget is {budget}"):
            next(token_budget_batches([1], budget))
    with pytest.raises(ValueError, match="max_sequences is 0"):
        next(token_budget_batches([1], 10, max_sequences=0))
