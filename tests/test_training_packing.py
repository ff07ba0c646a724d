import gzip
import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernbert.tokenizer import Tokenizer
from modernbert.training.masking import mask_tokens
from modernbert.training.packing import BestFitPacker, permutation


def packer(lengths, capacity, rows=256, seed=0):
    return BestFitPacker(
        np.array(lengths), lambda epoch: permutation(len(lengths), seed, epoch), capacity, rows
    )


def in_order(lengths, capacity, rows):
    return BestFitPacker(np.array(lengths), lambda epoch: np.arange(len(lengths)), capacity, rows)


@st.composite
def packings(draw):
    capacity = draw(st.integers(1, 60))
    lengths = draw(st.lists(st.integers(0, capacity), min_size=1, max_size=80))
    return lengths, capacity, draw(st.integers(1, 6)), draw(st.integers(0, 5))


@given(packings())
def test_an_epoch_uses_every_piece_once_and_no_row_overflows(packing):
    lengths, capacity, _, _ = packing
    pieces = packer(*packing)
    for epoch in range(3):
        assert pieces.epoch == epoch
        rows = list(pieces.rest_of_epoch())
        assert sorted(sum(rows, [])) == list(range(len(lengths)))
        assert max(sum(lengths[piece] for piece in row) for row in rows) <= capacity


@given(packings(), st.integers(0, 60))
def test_resumes_exactly_from_any_point(packing, taken):
    original = packer(*packing)
    original.next_rows(taken)
    saved = json.loads(json.dumps(original.state_dict()))
    expected = original.next_rows(100)
    resumed = packer(*packing)
    resumed.next_rows(7)
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved
    assert resumed.next_rows(100) == expected
    assert resumed.state_dict() == original.state_dict()


@given(packings(), st.lists(st.integers(0, 5), max_size=10))
def test_batch_sizes_do_not_change_the_stream(packing, sizes):
    stream = packer(*packing)
    assert sum((stream.next_rows(size) for size in sizes), []) == packer(*packing).next_rows(
        sum(sizes)
    )


def test_each_piece_goes_into_the_smallest_space_that_is_enough():
    #                          a  b  c: beside b  d: beside a, into the smaller of two spaces
    assert in_order([6, 5, 5, 3, 4, 8], 10, 9).next_rows(4) == [[1, 2], [0, 3], [5], [4]]


def test_beyond_the_open_rows_the_fullest_is_done():
    assert in_order([6, 7, 8, 1, 4], 10, 2).next_rows(3) == [[2], [0, 4], [1, 3]]


def test_a_saved_state_is_not_changed_by_what_follows():
    stream = packer([3, 4, 5, 6, 2, 1], 10, 2)
    stream.next_rows(1)
    state = stream.state_dict()
    before = json.dumps(state)
    stream.load_state_dict(state)
    stream.next_rows(20)
    assert json.dumps(state) == before


def test_an_order_may_leave_pieces_out():
    stream = BestFitPacker(np.full(10, 5), lambda epoch: np.array([epoch, 9]), 10)
    assert stream.next_rows(3) == [[0, 9], [1, 9], [2, 9]]


def test_permutations_are_those_of_the_recipe():
    expected = np.random.Generator(np.random.PCG64DXSM(17 + 3)).permutation(1000)
    assert (permutation(1000, 17, 3) == expected).all()
    assert permutation(8, 17, 0).tolist() == [5, 6, 4, 7, 0, 1, 3, 2]


def filled(lengths, capacity, rows=256):
    rows = list(packer(lengths, capacity, rows).rest_of_epoch())
    return sum(lengths) / (len(rows) * capacity)


@pytest.mark.parametrize("capacity", [1024, 8192])
@pytest.mark.parametrize("mean, sigma", [(4.5, 1.0), (5.5, 1.2), (6.0, 0.8)])
def test_log_normal_lengths_fill_98_percent(capacity, mean, sigma):
    rng = np.random.default_rng(5)
    lengths = np.clip(rng.lognormal(mean, sigma, 50_000).astype(int) + 2, 3, capacity)
    assert filled(lengths.tolist(), capacity) >= 0.98


@pytest.fixture(scope="module")
def paragraph_lengths(shared_data: Path) -> np.ndarray:
    """Tokens of each paragraph of 250 Wikipedia articles, with [CLS] and [SEP]."""
    tokenizer = Tokenizer.from_file(shared_data / "tokenizer_modernbert" / "tokenizer.json")
    with gzip.open(shared_data / "text_wikipedia_en" / "enwiki_core_AA_0.jsonl.gz", "rt") as file:
        articles = [json.loads(line)["text"] for line in islice(file, 250)]
    paragraphs = [p for article in articles for p in article.split("\n") if p.strip()]
    return np.array(list(map(len, tokenizer(paragraphs).input_ids)))


@pytest.mark.parametrize("capacity", [512, 1024])
def test_wikipedia_paragraphs_fill_98_percent(paragraph_lengths: np.ndarray, capacity: int):
    assert filled(np.minimum(paragraph_lengths, capacity).tolist(), capacity) >= 0.98


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="piece 1 has 11 tokens.*cut texts.*at most 10"):
        packer([3, 11, 4], 10)
    with pytest.raises(ValueError, match="no pieces"):
        packer([], 10)
    with pytest.raises(ValueError, match="capacity is 0"):
        packer([1], 0)
    with pytest.raises(ValueError, match="rows is 0"):
        packer([1], 10, rows=0)
    with pytest.raises(ValueError, match="order of epoch 0 is empty"):
        BestFitPacker(np.array([1]), lambda epoch: np.arange(0), 10)


VOCABULARY = 500
MASK = 4
SPECIAL = np.arange(VOCABULARY) < 5
TOKENS = 100_000


def text_ids(dtype=np.uint16):
    return np.random.default_rng(1).integers(5, VOCABULARY, TOKENS).astype(dtype)


def masked(ids, seed=2, **options):
    settings = dict(mask_id=MASK, vocab_size=VOCABULARY, special=SPECIAL) | options
    return mask_tokens(ids, np.random.default_rng(seed), **settings)


@pytest.mark.parametrize(
    "options, shares",
    [
        ({}, (0.24, 0.03, 0.03)),
        ({"rate": 0.15}, (0.12, 0.015, 0.015)),
        ({"rate": 1.0, "mask": 0.5, "random": 0.25}, (0.5, 0.25, 0.25)),
        ({"rate": 0.4, "mask": 1.0, "random": 0.0}, (0.4, 0.0, 0.0)),
        ({"rate": 0.0}, (0.0, 0.0, 0.0)),
    ],
)
def test_rates_are_as_asked(options, shares):
    ids = text_ids()
    seen, labels = masked(ids, **options)
    chosen = labels != -100
    is_mask = seen == MASK
    changed = chosen & ~is_mask & (seen != ids)
    kept = chosen & (seen == ids)
    # A random token is the original one now and then.
    again = shares[1] / (VOCABULARY - 5)
    for found, share in [(is_mask, shares[0]), (changed, shares[1] - again), (kept, shares[2])]:
        assert abs(found.mean() - share) <= 4 * np.sqrt(share * (1 - share) / TOKENS) + again
    assert (labels[chosen] == ids[chosen]).all()
    assert (seen[~chosen] == ids[~chosen]).all()


def test_one_uniform_number_a_token_decides():
    ids = text_ids()
    seen, labels = masked(ids)
    r = np.random.default_rng(2).random(TOKENS)
    assert ((seen == MASK) == (r < 0.24)).all()
    assert ((labels != -100) == (r < 0.3)).all()
    assert (seen[r >= 0.27] == ids[r >= 0.27]).all()


def test_special_tokens_are_masked_only_when_asked():
    ids = text_ids()
    ids[::2] = 1
    seen, labels = masked(ids)
    assert (labels[::2] == -100).all() and (seen[::2] == 1).all()
    assert abs((labels[1::2] != -100).mean() - 0.3) < 0.01
    seen, labels = masked(ids, mask_special=True)
    assert abs((labels[::2] == 1).mean() - 0.3) < 0.01
    assert abs((seen[::2] == MASK).mean() - 0.24) < 0.01


def test_random_tokens_are_any_but_special_ones():
    seen, _ = masked(text_ids(), rate=1.0, mask=0.0, random=1.0)
    assert set(np.unique(seen)) == set(range(5, VOCABULARY))
    counts = np.bincount(seen, minlength=VOCABULARY)[5:]
    assert np.abs(counts / counts.mean() - 1).max() < 0.4


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_masks_any_shape_and_leaves_its_input(dtype):
    ids = text_ids(dtype)
    before = ids.copy()
    flat = masked(ids)
    square = masked(ids.reshape(100, -1))
    for one, other in zip(flat, square, strict=True):
        assert one.dtype == np.int64 and other.shape == (100, TOKENS // 100)
        assert (one == other.ravel()).all()
    assert (ids == before).all()
    assert not (masked(ids, seed=3)[1] == flat[1]).all()
    assert [a.shape for a in masked(ids[:0])] == [(0,), (0,)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rate": 1.5}, "rate=1.5"),
        ({"mask": 0.8, "random": 0.3}, "random=0.3"),
        ({"mask": -0.1}, "mask=-0.1"),
        ({"vocab_size": 501}, r"bool of shape \(500,\).*501 ids"),
        ({"special": SPECIAL.astype(int)}, "one bool for each"),
    ],
)
def test_senseless_masking_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        masked(text_ids()[:10], **options)
