import copy
import json
import logging
import random
import time
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modernbert import cutting
from modernbert import tokenizer as tokenizer_module
from modernbert.cutting import KNOWN_REGEXES
from modernbert.tokenizer import Tokenizer

# Token ids that the published tokenizer gives.
GOLDEN = {
    "Hello World!": [50281, 12092, 3645, 2, 50282],
    "The capital of France is [MASK].": [50281, 510, 5347, 273, 6181, 310, 50284, 15, 50282],
    "What is Deep Learning?": [50281, 1276, 310, 18147, 20727, 32, 50282],
    "Deep Learning is...": [50281, 30763, 20727, 310, 1051, 50282],
    "def f(x):\n    return x": [50281, 1545, 269, 9, 89, 2262, 187, 50274, 2309, 1269, 50282],
    "a  b    c\n\n\td": [50281, 66, 50276, 67, 50274, 68, 535, 186, 69, 50282],
    "café cafe\u0301 \u212b": [50281, 68, 2320, 860, 36241, 17732, 50282],
    "": [50281, 50282],
    " " * 30 + "x": [50281, 50254, 50272, 89, 50282],
    "search_query: What is TSNE?": [
        *(50281, 8716, 64, 7267, 27, 1737, 310, 22465, 6603, 32, 50282),
    ],
    "the man worked as a [MASK].": [50281, 783, 637, 4307, 347, 247, 50284, 15, 50282],
}
# Pieces that stages of a tokenizer see differently when a cut parts them from their neighbours.
PIECES = [
    *("a", "aaaa", "the", "ing", "Q", "0", "345", "-", "----", "...", "(", "{", "_", "\\", "="),
    *(" ", "  ", "     ", "\n", "\n\n", "\t", "\r\n", " the", " a", " bar", "foo", "x"),
    *(
        "'s",
        "'re",
        "'r",
        "e",
        "'",
        " [MASK]",
        "[MASK]",
        "[SEP]",
        "[Q] ",
        "[Q]",
        "[D] ",
        "[unused1]",
    ),
    *("|||EMAIL_ADDRESS|||", "<|padding|>", "foo bar", "É X", "中 x"),
    *("é", "e\u0301", "\u0301", "\u0323", "\u0338", "\u212b", "\u212a", "\u037e", "\u1fef"),
    *("\u0344", "\u0f73", "İ", "ß", "ﬁ", "中", "国人", "，", "가", "\u1100", "\u1161", "\u11a8"),
    *("👨", "\u200d", "👩", "🏽", "\ufe0f", "שלום", " العربية", "\u0651", "กำ", "▁", "▁▁"),
    *("\u00a0", "\u2003", "\u3000", "\x00", "\x1c", "\x85", "\u200b", "ACGT", "ACGGT"),
]


@pytest.fixture(scope="session")
def official(shared_data: Path) -> bytes:
    return (shared_data / "tokenizer_modernbert" / "tokenizer.json").read_bytes()


@pytest.fixture(scope="session")
def modernbert(official: bytes) -> Tokenizer:
    return Tokenizer(official, settings={"model_max_length": 8192})


@pytest.fixture(scope="session")
def bert(shared_data: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(shared_data / "tokenizer_bert_uncased")


@pytest.fixture(scope="session")
def pipelines(official: bytes, shared_data: Path) -> dict[str, Tokenizer]:
    """One tokenizer for each way in which texts are cut, and one that is never cut."""
    bert_json = (shared_data / "tokenizer_bert_uncased" / "tokenizer.json").read_text("utf-8")
    kinds = {}
    for kind in ("gpt2", "colbert", "llama", "prefix", "words"):
        kinds[kind] = tokenizers.Tokenizer.from_str(official.decode())
    spaced = [AddedToken("[Q] ", normalized=False), AddedToken("[D] "), AddedToken("foo bar")]
    kinds["colbert"].add_tokens([*spaced, AddedToken("é x")])
    kinds["llama"].pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(KNOWN_REGEXES[1]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    kinds["prefix"].pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    kinds["words"].add_tokens([AddedToken("foo", single_word=True), AddedToken("(", rstrip=True)])
    kinds["bert"] = tokenizers.Tokenizer.from_str(bert_json)
    kinds["bert"].add_tokens([AddedToken("foo bar"), AddedToken("É X"), AddedToken("中 x")])
    kinds["gemma"] = _gemma(official)
    return {kind: Tokenizer(backend.to_str().encode()) for kind, backend in kinds.items()}


def _gemma(official: bytes) -> tokenizers.Tokenizer:
    """A tokenizer built as Gemma's: spaces are letters, and there are no words."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    vocabulary = json.loads(official)["model"]["vocab"]
    words = [word.replace("Ġ", " ") for word in vocabulary if word.isalpha()]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=special, show_progress=False, initial_alphabet=["▁"]
    )
    backend.train_from_iterator([*words, *(" " * n for n in range(20)), "a  b   c " * 99], trainer)
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    state = json.loads(backend.to_str())
    state["added_tokens"] = state["added_tokens"][:5]
    state["model"]["vocab"]["▁▁"] = len(state["model"]["vocab"])
    state["model"]["merges"].insert(0, ["▁", "▁"])
    return tokenizers.Tokenizer.from_str(json.dumps(state))


def _full(tokenizer: Tokenizer, text: str) -> tokenizers.Encoding:
    return tokenizer._backend.encode(text, add_special_tokens=False)


@pytest.fixture()
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are cut as if they were very long."""
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_PER_TOKEN", 1)
    monkeypatch.setattr(cutting, "PIECE", 16)
    monkeypatch.setattr(cutting, "PIECES", 2)


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(modernbert: Tokenizer, text: str) -> None:
    batch = modernbert(text)
    assert batch.input_ids == [GOLDEN[text]]
    assert batch.truncated == [0] and len(batch) == 1


def test_golden_batch_and_pair(modernbert: Tokenizer) -> None:
    assert modernbert(list(GOLDEN)).input_ids == list(GOLDEN.values())
    pair = modernbert("Hello world", "How are you?")
    assert pair.input_ids == [[50281, 12092, 1533, 50282, 2347, 403, 368, 32, 50282]]
    assert pair.sequence_ids == [[None, 0, 0, None, 1, 1, 1, 1, None]]
    assert modernbert([]).input_ids == []


def test_id_map(modernbert: Tokenizer) -> None:
    for n in range(2, 25):
        assert modernbert(" " * n, add_special_tokens=False).input_ids == [[50278 - n]]
    for token, token_id in {
        "|||IP_ADDRESS|||": 0,
        "<|padding|>": 1,
        "!": 2,
        "Ġ": 209,
        "ĊĊ": 535,
        "<|endoftext|>": 50279,
        "[unused0]": 50285,
        "[unused82]": 50367,
    }.items():
        assert modernbert.token_to_id(token) == token_id
        assert modernbert.id_to_token(token_id) == token
    assert modernbert.token_to_id("no such token") is None
    assert modernbert.id_to_token(50368) is None and modernbert.id_to_token(-1) is None
    assert modernbert.vocab_size == 50368
    assert modernbert.num_special_tokens() == 2 and modernbert.num_special_tokens(pair=True) == 3


def test_special_tokens(modernbert: Tokenizer, bert: Tokenizer) -> None:
    ids = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    found = [getattr(modernbert, f"{kind}_token_id") for kind in ids]
    assert found == [50281, 50282, 50280, 50282, 50283, 50281, 50284]
    found = [getattr(bert, f"{kind}_token_id") for kind in ids]
    assert found == [101, 102, 100, 102, 0, 101, 103]


def test_files_name_special_tokens(official: bytes, caplog: pytest.LogCaptureFixture) -> None:
    mbert = {"mask_token": {"content": "Ġthe"}, "cls_token": "Ġof", "sep_token": None}
    mapped = {"cls_token": "Ġand", "sep_token": {"content": "Ġto"}}
    config = {"sep_token_id": 1, "bos_token_id": 2, "eos_token_id": [1, 2], "pad_token_id": -1}
    tokenizer = Tokenizer(official, settings=mbert, special_tokens=mapped, config=config)
    assert tokenizer.special_tokens == {
        "mask": "Ġthe",  # the first file to name it
        "cls": "Ġof",
        "sep": "Ġto",
        "bos": "!",
        "eos": "[SEP]",  # a list of ids is none, so by name
        "pad": "[PAD]",
        "unk": "[UNK]",
    }
    with caplog.at_level(logging.WARNING, "modernbert"):
        tokenizer = Tokenizer(official, settings={"pad_token": "<absent>"}, source="here")
    assert tokenizer.pad_token_id is None
    assert caplog.messages == ["here has no token <absent>, which is named pad_token"]


@pytest.mark.parametrize(
    ("settings_length", "config_length", "expected"),
    [
        (8192, 512, 8192),
        (10**30, 512, 512),
        (1e30, None, None),
        (None, 512, 512),
        ("x", None, None),
    ],
)
def test_model_max_length(
    official: bytes, settings_length: Any, config_length: Any, expected: int | None
) -> None:
    tokenizer = Tokenizer(
        official,
        settings={"model_max_length": settings_length},
        config={"max_position_embeddings": config_length},
    )
    assert tokenizer.model_max_length == expected
    length = len(tokenizer("a b " * 9000).input_ids[0])
    assert length == (expected or 18003)


def test_offsets_leave_the_space_out(modernbert: Tokenizer) -> None:
    text = "Hello  World is [MASK].\n x"
    batch = modernbert(text)
    spans = [text[a:b] for a, b in batch.offsets[0][1:-1]]
    assert spans == ["Hello", "", "World", "is", "[MASK]", ".", "", "x"]
    assert batch.offsets[0][0] == batch.offsets[0][-1] == (0, 0)
    assert batch.offsets[0][5] == (16, 22)
    assert batch.word_ids == [[None, 0, 1, 2, 3, 4, 5, 6, 7, None]]


def test_offsets_are_those_of_the_given_text(modernbert: Tokenizer) -> None:
    text = "\u212bngstro\u0308m 👨 naïve"
    offsets = modernbert(text, add_special_tokens=False).offsets[0]
    assert offsets == sorted(offsets) and offsets[-1][1] == len(text)
    assert (10, 11) in offsets and (12, 17) in offsets


def test_split_words_are_running_text(modernbert: Tokenizer) -> None:
    words = ["This", "is", "can't", "New  York", "", "[MASK]", "!"]
    batch = modernbert([words, ["a"]], is_split_into_words=True)
    assert batch.input_ids == modernbert([" ".join(words), "a"]).input_ids
    named = [
        None if number is None else words[number][slice(*offset)]
        for number, offset in zip(batch.word_ids[0], batch.offsets[0], strict=True)
    ]
    expected = ["This", "is", "can", "'t", "New", "", "York", "[MASK]", "!"]
    assert named == [None, *expected, None]
    assert batch.word_ids[0] == [None, 0, 1, 2, 2, 3, 3, 3, 5, 6, None]
    # One list of words is one text, as in transformers.
    assert modernbert(words, is_split_into_words=True).input_ids == batch.input_ids[:1]
    assert modernbert([[]], is_split_into_words=True).input_ids == [[50281, 50282]]


@settings(max_examples=150)
@given(words=st.lists(st.sampled_from([*PIECES, "", "word", "two words"]), max_size=12))
def test_each_token_lies_in_its_word(modernbert: Tokenizer, words: list[str]) -> None:
    batch = modernbert([words], is_split_into_words=True, add_special_tokens=False)
    text = " ".join(words)
    assert batch.input_ids == modernbert(text, add_special_tokens=False).input_ids
    starts = [len(" ".join([*words[:i], ""])) for i in range(len(words))]
    numbers = batch.word_ids[0]
    assert numbers == sorted(numbers, key=lambda number: number or 0)
    plain = modernbert(text, add_special_tokens=False).offsets[0]
    for number, (a, b), (first, last) in zip(numbers, batch.offsets[0], plain, strict=True):
        assert number is not None and 0 <= a <= b <= len(words[number])
        if text[first:last].strip() and " " not in text[first:last]:
            assert (starts[number] + a, starts[number] + b) == (first, last)


@pytest.fixture(scope="session")
def oracle(shared_data: Path) -> dict[str, PreTrainedTokenizerFast]:
    def load(folder: str) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast(tokenizer_file=str(shared_data / folder / "tokenizer.json"))

    return {
        "modernbert": load("tokenizer_modernbert"),
        "bert": load("tokenizer_bert_uncased"),
    }


@pytest.mark.parametrize("name", ["modernbert", "bert"])
@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second", False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_is_that_of_transformers(
    name: str,
    strategy: str | bool,
    side: str,
    oracle: dict[str, PreTrainedTokenizerFast],
    request: pytest.FixtureRequest,
) -> None:
    ours, theirs = request.getfixturevalue(name), oracle[name]
    theirs.truncation_side = side
    rng = random.Random(0)
    alphabet = ["word ", "is ", "[MASK] ", "naïve ", "\n\n", "   ", "x1 ", "…", "can't "]
    refused = 0
    for case in range(150):
        texts = ["".join(rng.choices(alphabet, k=rng.choice([0, 1, 9, 30]))) for _ in range(2)]
        length = rng.choice([3, 4, 5, 8, 9, 16, 17, 40])
        pair = case % 3 > 0 or strategy == "only_second"
        arguments: dict[str, Any] = {"truncation": strategy, "max_length": length}
        specials = 3 if pair else 2
        sizes = [len(_full(ours, text)) for text in texts][: 1 + pair]
        other = {"only_first": sizes[-1], "only_second": sizes[0]}.get(str(strategy), 0)
        only = pair and str(strategy).startswith("only")
        if only and other >= length - specials < sum(sizes):
            # Nothing would be left of the text that may be cut.
            refused += 1
            with pytest.raises(ValueError, match="leaves nothing of the text"):
                ours(*texts, **arguments)
            continue
        given = [[text] for text in texts][: 1 + pair]  # alone, "" is no pair for transformers
        batch = ours(*given, **arguments, truncation_side=side)
        expected = theirs(*given, **arguments)
        assert batch.input_ids == expected["input_ids"], (given, length)
        assert batch.sequence_ids[0] == expected.sequence_ids(0)
        assert batch.word_ids[0] == expected.word_ids(0)
        assert batch.truncated == [sum(sizes) + specials - len(batch.input_ids[0])]
        assert batch.was_truncated == [batch.truncated[0] > 0]
    assert (refused > 0) == (strategy in ("only_first", "only_second"))


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("lengths", [(300, 400), (400, 300), (300, 2), (2, 300), (90, 90)])
@pytest.mark.parametrize("max_length", [10, 11, 43, 44])
def test_long_pairs_share_as_in_transformers(
    modernbert: Tokenizer,
    oracle: dict[str, PreTrainedTokenizerFast],
    lengths: tuple[int, int],
    max_length: int,
) -> None:
    texts = ["word " * lengths[0], "other " * lengths[1]]
    theirs = oracle["modernbert"]
    theirs.truncation_side = "right"
    expected = theirs(*texts, truncation="longest_first", max_length=max_length)["input_ids"]
    batch = modernbert(*texts, max_length=max_length)
    assert batch.input_ids == [expected]
    assert batch.truncated == [sum(len(_full(modernbert, t)) for t in texts) - max_length + 3]


def test_stored_truncation_and_padding_are_ignored(bert: Tokenizer, shared_data: Path) -> None:
    path = shared_data / "tokenizer_bert_uncased" / "tokenizer.json"
    stored = json.loads(path.read_bytes())
    assert stored["truncation"]["max_length"] == 512 and stored["padding"]["pad_id"] == 0
    batch = bert(["a " * 600, "a"])
    assert [len(ids) for ids in batch.input_ids] == [602, 3]


# -- texts that are cut before tokenising --------------------------------------------------------


def _random_text(seed: int, kinds: int) -> str:
    rng = random.Random(seed)
    return "".join(rng.choices(rng.sample(PIECES, kinds), k=rng.choice([20, 100, 300])))


KINDS = ["gpt2", "colbert", "llama", "prefix", "words", "bert", "gemma"]


@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize("kind", KINDS)
def test_cutting_changes_nothing(kind: str, pipelines: dict[str, Tokenizer]) -> None:
    """Ids, offsets, words and counts are those of the whole text, cut afterwards."""
    tokenizer, seen = pipelines[kind], []

    @settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
    @given(
        seed=st.integers(0, 2**32),
        kinds=st.sampled_from([1, 2, 3, 5, 10, 40, len(PIECES)]),
        room=st.sampled_from([0, 1, 2, 7, 33]),
        side=st.sampled_from(["right", "left"]),
    )
    def check(seed: int, kinds: int, room: int, side: str) -> None:
        text = _random_text(seed, kinds)
        full = _full(tokenizer, text)
        batch = tokenizer(text, max_length=room, truncation_side=side, add_special_tokens=False)
        count = min(room, len(full))
        kept = slice(0, count) if side == "right" else slice(len(full) - count, len(full))
        assert batch.input_ids == [full.ids[kept]]
        assert batch.truncated == [len(full) - count]
        assert batch.word_ids == [full.word_ids[kept]]
        for (a, b), (first, last) in zip(batch.offsets[0], full.offsets[kept], strict=True):
            assert b == last and a >= first and text[first:a].strip() == ""
            assert not text[a:b][:1].isspace()
        assert tokenizer._cutter.count(text) == len(full)
        [(part,)] = batch._rows
        seen.append(
            "whole"
            if part.cutter is None
            else "settled"
            if part.size < len(part.encoding)
            else "cut"
        )

    check()
    expected = {"whole"} if kind == "words" else {"whole", "cut"}
    assert set(seen) == expected | ({"settled"} if kind in ("gpt2", "colbert") else set())


def test_no_cut_where_it_would_change_ids(pipelines: dict[str, Tokenizer]) -> None:
    """The cases that the rules exist for, each at the only place where a cut could be."""
    for kind, left, right in [
        ("gpt2", "a ", " b"),  # a run of spaces is one token
        ("gpt2", "a\n", " [MASK]"),  # which eats all spaces before it
        ("colbert", "a[Q]", " b"),
        ("colbert", "foo", " bar"),
        ("colbert", "e\u0301", " x"),
        ("bert", "FOO", " bar"),
        ("bert", "e\u0301", " x"),
        ("gemma", "a▁", " b"),
        ("llama", "!", "\n\n \n b"),  # "!\n\n" is one word
        ("prefix", "a", "\nb"),  # the second part would get a space of its own
    ]:
        tokenizer = pipelines[kind]
        text = left + right
        assert tokenizer._cutter.find(text, len(left)) == len(text), (kind, text)
        if (kind, left) != ("gpt2", "a\n"):
            ids = [i for part in (left, right) for i in _full(tokenizer, part).ids]
            assert ids != _full(tokenizer, text).ids, (kind, text)


def test_what_counts_as_inert_never_composes() -> None:
    """By this Python's Unicode tables, of all characters; Hangul's vowels and finals by rule."""
    composing = {chr(c) for c in (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))}
    for character in map(chr, range(0x110000)):
        parts = unicodedata.decomposition(character).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            composing.add(chr(int(parts[1], 16)))
    for character in map(chr, range(0x110000)):
        if cutting._is_inert(character):
            first = unicodedata.normalize("NFD", character)[0]
            assert unicodedata.combining(first) == 0 and first not in composing, hex(ord(character))


@pytest.mark.parametrize(
    "text",
    ["a" * 10**7, "word " * 10**6, "ACGT" * 10**6, "👨‍👩‍👧‍👦" * 10**5, "中国，" * 10**6],
    ids=["one letter", "words", "no spaces", "emoji", "ideographs"],
)
def test_long_texts_cost_what_is_kept(modernbert: Tokenizer, text: str) -> None:
    modernbert("a " * 9000, max_length=8)  # the cutter is made once
    start = time.process_time()
    batch = modernbert(text, max_length=512)
    assert time.process_time() - start < 1  # tokenising all takes 3 to 10 seconds
    assert len(batch.input_ids[0]) == 512 and batch.was_truncated == [True]
    expected = _full(modernbert, text[:50_000]).ids[:510]
    assert batch.input_ids[0][1:-1] == expected


@pytest.mark.parametrize(
    "unit",
    ["a", "word ", " ", "\n", "e\u0301\u0323", "👨‍👩‍👧‍👦", "שלום ", "\x00", "中", "1+2=3;"],
)
def test_a_megabyte_of_anything(modernbert: Tokenizer, unit: str) -> None:
    text = unit * (200_000 // len(unit))
    full = _full(modernbert, text)
    for side in ("right", "left"):
        batch = modernbert([text, "x"], max_length=66, truncation_side=side)
        kept = full.ids[:64] if side == "right" else full.ids[-64:]
        assert batch.input_ids[0][1:-1] == kept
        assert batch.truncated == [len(full) - 64, 0]
    assert modernbert._cutter.count(text) == len(full)


def test_counting_needs_little_memory(modernbert: Tokenizer) -> None:
    """Of the text itself, a copy; of its tokens, which take ten times as much, a few."""
    batch = modernbert("a" * 2_000_000, max_length=512)
    tracemalloc.start()
    assert batch.truncated == [250_000 - 510]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 6_000_000


# -- input that is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts is NoneType None; give a string"),
        (b"x", "texts is bytes b'x'; give a string"),
        (3, "texts is int 3"),
        (["a", None], r"texts\[1\] is NoneType None, not a string"),
        (["a", float("nan")], r"texts\[1\] is float nan"),
        (["a", b"x"], r"texts\[1\] is bytes b'x', not a string; decode it first"),
        ([("a", "b")], r"texts\[0\] is tuple .*pairs=.*is_split_into_words"),
        (["a", "b\ud800c"], r"texts\[1\] has the lone surrogate '\\ud800' at character 1"),
        (["x " * 9000 + "\udfff"], r"texts\[0\] has the lone surrogate"),
    ],
)
def test_what_is_no_text(modernbert: Tokenizer, texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        modernbert(texts, max_length=16)


def test_calls_that_cannot_be_met(modernbert: Tokenizer) -> None:
    for arguments, message in [
        ({"max_length": 1}, "max_length=1 has no room for the 2 special tokens"),
        ({"max_length": -1, "add_special_tokens": False}, "no room"),
        ({"truncation": "first"}, "truncation='first'; use 'longest_first'"),
        ({"truncation": "only_second"}, "needs pairs"),
        ({"truncation_side": "both"}, "truncation_side='both'; use 'right' or 'left'"),
        ({"pairs": ["b", "c"]}, "there are 1 texts and 2 pairs"),
        ({"pairs": [None]}, r"pairs\[0\] is NoneType"),
    ]:
        with pytest.raises(ValueError, match=message):
            modernbert(["a"], **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"texts\[1\] is str 'ab'; with is_split_into_words"):
        modernbert([["a"], "ab"], is_split_into_words=True)
    with pytest.raises(ValueError, match=r"texts\[0\]\[1\] is int 2"):
        modernbert([["a", 2]], is_split_into_words=True)  # type: ignore[list-item]


def test_decode(modernbert: Tokenizer) -> None:
    for text in ("Hello World!", "def f(x):\n    return x", "שלום 👨‍👩‍👧‍👦 中"):
        assert modernbert.decode(modernbert(text).input_ids[0]) == text
    ids = GOLDEN["the man worked as a [MASK]."]
    assert modernbert.decode(ids) == "the man worked as a."
    everything = modernbert.decode(ids, skip_special_tokens=False)
    assert everything == "[CLS]the man worked as a[MASK].[SEP]"
    assert modernbert.decode([]) == ""
    with pytest.raises(ValueError, match="-100 is no token id; leave out labels"):
        modernbert.decode([1, -100])


# -- files -----------------------------------------------------------------------------------------


def test_saved_files_give_the_same_tokenizer_everywhere(
    modernbert: Tokenizer, bert: Tokenizer, tmp_path: Path
) -> None:
    texts = [*GOLDEN, *PIECES, "foo bar  [MASK]\n"]
    for name, tokenizer in (("modernbert", modernbert), ("bert", bert)):
        folder = tmp_path / name
        tokenizer.save_pretrained(folder)
        expected = tokenizer(texts).input_ids
        again = Tokenizer.from_pretrained(folder)
        assert again(texts).input_ids == expected
        assert again.files() == tokenizer.files()
        assert again.special_tokens == tokenizer.special_tokens
        assert again.model_max_length == tokenizer.model_max_length
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs(texts)["input_ids"] == expected
        assert theirs.mask_token_id == tokenizer.mask_token_id
        assert theirs.pad_token_id == tokenizer.pad_token_id
        assert len(theirs) == tokenizer.vocab_size
        theirs.save_pretrained(tmp_path / "theirs")
        assert Tokenizer.from_pretrained(tmp_path / "theirs")(texts).input_ids == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "modernbert").model_max_length == 8192


def test_saving_drops_code_and_keeps_settings(official: bytes) -> None:
    settings_ = {
        "auto_map": {"AutoTokenizer": "x.Y"},
        "tokenizer_class": "TokenizersBackend",
        "a": 1,
    }
    files = Tokenizer(official, settings=settings_).files()
    written = json.loads(files["tokenizer_config.json"])
    assert "auto_map" not in written and written["a"] == 1
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads(files["special_tokens_map.json"])["mask_token"] == "[MASK]"


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no tokenizer.json; copy it there") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "JSONDecodeError"),
        (b"\xff\xfe", "UnicodeDecodeError"),
        (b"null", "it describes no model"),
        (b'{"model": []}', "it describes no model"),
        (b'{"model": {}, "model": {}}', "a key appears twice"),
        (b"[" * 100_000, "RecursionError"),
        (b'{"model": ' + b'{"a": ' * 200 + b"1" + b"}" * 201, "Exception"),
        (b'{"a": [' + b"[]," * 2_000_000, "4,000,002 entries, more than"),
        (b" " * (64 * 2**20 + 1), "67,108,865 bytes"),
    ],
    ids=["empty", "not utf-8", "null", "no model", "twice", "deep", "nested", "many", "large"],
)
def test_what_is_no_tokenizer(raw: bytes, message: str, tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(raw, source="some/tokenizer.json")
    assert time.process_time() - start < 1
    assert str(caught.value).startswith("some/tokenizer.json ")
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")


def _small(official: bytes) -> dict[str, Any]:
    state = json.loads(official)
    vocabulary = dict(list(state["model"]["vocab"].items())[:300])
    merges = [
        m for m in state["model"]["merges"] if {*m.split(), m.replace(" ", "")} <= {*vocabulary}
    ]
    state["model"] |= {"vocab": vocabulary, "merges": merges}
    return state


def test_faults_that_would_kill_the_process(official: bytes) -> None:
    for keys, value in [
        (("model", "continuing_subword_prefix"), "\0"),
        (("post_processor", "single", 0, "SpecialToken", "id"), "absent"),
        (("post_processor", "pair", 2, "SpecialToken", "id"), "absent"),
        (("post_processor", "single", 1, "Sequence", "id"), "B"),
    ]:
        state: Any = _small(official)
        target = state
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value
        with pytest.raises(ValueError, match=r"tokenizer\.json "):
            Tokenizer(json.dumps(state).encode())
    # 4 GiB of padding for each text, if it were not ignored.
    state = _small(official)
    state["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_id": 0}
    state["padding"] |= {"pad_to_multiple_of": 2**32, "pad_type_id": 0, "pad_token": "x"}
    assert Tokenizer(json.dumps(state).encode())("a").input_ids == [[50281, 66, 50282]]


def test_mutated_files_are_read_or_refused(official: bytes, shared_data: Path) -> None:
    """Each of a thousand broken files loads and works, or is a ValueError."""
    wordpiece = json.loads((shared_data / "tokenizer_bert_uncased/tokenizer.json").read_bytes())
    wordpiece["model"]["vocab"] = dict(list(wordpiece["model"]["vocab"].items())[:300])
    bases = [_small(official), wordpiece]
    values: list[Any] = [
        None,
        -1,
        0,
        2**32,
        1e300,
        "",
        "x",
        "\0",
        "é",
        [],
        {},
        True,
        {"Regex": "("},
    ]
    rng = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(1000):
        state = target = copy.deepcopy(rng.choice(bases))
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            key = rng.choice(keys)
            if not isinstance(target[key], dict | list) or not target[key] or rng.random() < 0.2:
                break
            target = target[key]
        target[key] = rng.choice(values)
        raw = bytearray(json.dumps(state).encode())
        if rng.random() < 0.2:
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        try:
            tokenizer = Tokenizer(bytes(raw))
        except ValueError:
            outcomes["refused"] += 1
        else:
            outcomes["read"] += 1
            batch = tokenizer(["a b [MASK]  x é", ""], ["foo", "b"], max_length=100)
            assert len(batch.offsets) == 2
    assert min(outcomes.values()) > 50


def test_unknown_regular_expressions_are_named(
    official: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    backend = tokenizers.Tokenizer.from_str(json.dumps(_small(official)))
    with caplog.at_level(logging.WARNING, "modernbert"):
        for regex in (*KNOWN_REGEXES, "(a+)+$"):
            assert caplog.messages == []
            backend.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
            backend.pre_tokenizer = pre_tokenizers.Split(Regex(regex), "isolated")
            Tokenizer(backend.to_str().encode(), source="some/tokenizer.json")
    [message] = caplog.messages
    assert message.startswith("some/tokenizer.json searches texts with a regular expression")
    assert "'(a+)+$'" in message


@pytest.mark.hub
def test_the_published_tokenizer() -> None:
    tokenizer = Tokenizer.from_pretrained("answerdotai/ModernBERT-base")
    assert tokenizer(list(GOLDEN)).input_ids == list(GOLDEN.values())
    assert tokenizer.mask_token_id == 50284 and tokenizer.model_max_length == 8192
