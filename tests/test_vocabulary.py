import functools
import gzip
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from modernbert.vocabulary import BYTES, Vocabulary

SENTENCES = [
    "The cat sat on the mat, and Amsterdam is in the Netherlands.",
    "Playing with CATS (and mats) is what cats like; NASA plays, too!",
    "amsterdam has 800 bridges\nand the naïve visitor counts them.",
] * 4


@functools.cache
def trained(kind: str) -> tokenizers.Tokenizer:
    """A small tokenizer of each type."""
    trainer: Any
    options: dict[str, Any] = {
        "show_progress": False,
        "special_tokens": ["[UNK]", "[PAD]", "[CLS]", "[SEP]"],
    }
    if kind == "byte-level":
        made = tokenizers.Tokenizer(models.BPE())
        made.normalizer = normalizers.NFC()
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, **options)
    elif kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=False)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=150, **options)
    elif kind == "unigram":
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, unk_token="[UNK]", **options)
    else:
        made = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=150, **options)
    made.train_from_iterator(SENTENCES, trainer)
    return made


KINDS = ("byte-level", "wordpiece", "unigram", "metaspace")
FRAMES = ("{}", "the {}", "({})", "cat\n{}", "{}, too", "mats-{}!")


@pytest.fixture(params=KINDS)
def vocabulary(request: pytest.FixtureRequest) -> Vocabulary:
    return Vocabulary(trained(request.param))


def spelled(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


def test_untouched_it_builds_the_same_tokenizer(vocabulary: Vocabulary) -> None:
    built = vocabulary.build()
    for text in [*SENTENCES, "unseen wörds 日本"]:
        assert spelled(built, text) == spelled(Vocabulary(built).build(), text)
    assert sorted(built.get_vocab(), key=built.get_vocab().__getitem__) == vocabulary.tokens
    assert tokenizers.Tokenizer.from_str(built.to_str()).to_str() == built.to_str()


@pytest.mark.parametrize("fold", [False, True])
def test_added_words_are_one_token_everywhere(vocabulary: Vocabulary, fold: bool) -> None:
    vocabulary.drop_added()
    vocabulary.align()
    if fold:
        vocabulary.fold_case()
    vocabulary.prune()
    words = ["hyrule", "supervillain", "zelda", "straße"]
    added = vocabulary.add(words)
    built = vocabulary.build()
    assert sorted(added) == sorted(words)
    for word in words:
        for frame in FRAMES:
            tokens = spelled(built, frame.format(word))
            assert added[word] in tokens
            others = spelled(built, frame.format("the"))
            assert len(tokens) == len(others), (tokens, others)


def test_words_keep_two_tokens_where_the_pipeline_sees_two_words() -> None:
    vocabulary = Vocabulary(trained("byte-level"))
    vocabulary.add(["hyrule"])
    assert vocabulary.find("hyrule") == ["Ġhyrule", "hyrule"]
    built = vocabulary.build()
    assert spelled(built, "hyrule (hyrule) hyrule")[0] == "hyrule"
    assert spelled(built, "hyrule (hyrule) hyrule")[-1] == "Ġhyrule"


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_word_changes(kind: str) -> None:
    plain, more = (Vocabulary(trained(kind)) for _ in range(2))
    for each in (plain, more):
        each.align()
    more.add(["cat", "play", "amster", "vis"], whole_words=True)
    before, after = plain.build(), more.build()
    for word in ("cats", "playing", "amsterdam", "visitor", "catalogue", "plays"):
        assert spelled(before, f"the {word}") == spelled(after, f"the {word}")
    for word in ("cat", "play", "amster", "vis"):
        assert len(spelled(after, f"the {word}")) == len(spelled(after, "the")) + 1


def test_phrases_match_whole_words_only(vocabulary: Vocabulary) -> None:
    vocabulary.align()
    added = vocabulary.add(["star wars", "mother-in-law"])
    assert set(added.values()) == {"star wars", "mother-in-law"} == vocabulary.phrases
    built = vocabulary.build()
    assert "star wars" in spelled(built, "the star wars!")
    assert "star wars" not in spelled(built, "the star warship")
    assert "mother-in-law" in spelled(built, "(mother-in-law)")
    assert vocabulary.find("star wars") == ["star wars"]
    loose = Vocabulary(trained("wordpiece"))
    loose.add(["star wars"], loose=True)
    found = loose.build()
    assert found.token_to_id("star wars") in found.encode("the star warship").ids


def test_empty_words_are_left_out(vocabulary: Vocabulary) -> None:
    assert vocabulary.add(["", " "]) == {}


def test_case_folds_onto_one_token(vocabulary: Vocabulary) -> None:
    before = dict(vocabulary.texts())
    vocabulary.align()
    vocabulary.fold_case()
    built = vocabulary.build()
    for text in SENTENCES:
        assert spelled(built, text) == spelled(built, text.upper().lower())
    starts = {p[0] for p in before.values() if p and p[1] and p[0].isalpha()}
    for text in starts:
        (token,) = vocabulary.find(text)
        own = vocabulary.text(token)
        assert own is not None and text in vocabulary.forms.get(token, [own[0]])
    assert vocabulary.forms
    assert not any(p[0] != p[0].lower() for _, p in vocabulary.texts() if p and len(p[0]) > 1)


def test_folding_twice_changes_nothing(vocabulary: Vocabulary) -> None:
    vocabulary.align()
    vocabulary.fold_case()
    tokens, forms = vocabulary.tokens, dict(vocabulary.forms)
    vocabulary.fold_case()
    assert (vocabulary.tokens, vocabulary.forms) == (tokens, forms)


def test_removal_keeps_every_text_encodable(vocabulary: Vocabulary) -> None:
    vocabulary.align()
    the = vocabulary.find("the")
    assert vocabulary.remove(the) == []
    built = vocabulary.build()
    assert vocabulary.find("the") == []
    tokens = spelled(built, "the cat")
    assert "[UNK]" not in tokens and len(tokens) > 2
    letters = [token for token in vocabulary.tokens if token.strip("#Ġ▁") == "t"]
    assert set(vocabulary.remove(letters)) == set(letters)
    with pytest.raises(ValueError, match="no token 'Nothing'"):
        vocabulary.remove(["Nothing"])


def test_dropped_and_pruned_tokens_are_those_no_text_reaches(vocabulary: Vocabulary) -> None:
    vocabulary.drop_added()
    assert not {"[CLS]", "[SEP]"} & set(vocabulary.tokens)
    vocabulary.align()
    before = vocabulary.build()
    texts = [f"{text} mat's end" for text in SENTENCES]
    pieces = [spelled(before, text) for text in texts]
    vocabulary.prune()
    after = vocabulary.build()
    assert [spelled(after, text) for text in texts] == pieces


def test_words_alone() -> None:
    vocabulary = Vocabulary.of_words()
    vocabulary.add(["cat", "star wars", "The"])
    built = vocabulary.build()
    assert vocabulary.tokens == ["[PAD]", "[UNK]", "cat", "the", "star wars"]
    assert spelled(built, "THE cat: star wars, hyrule") == [
        *("the", "cat", "[UNK]", "star wars", "[UNK]", "[UNK]")
    ]


@given(st.text(max_size=12))
def test_byte_symbols_are_those_of_the_library(text: str) -> None:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = "".join(word for word, _ in split.pre_tokenize_str(text))
    assert bytes(BYTES[symbol] for symbol in symbols) == text.encode()


@given(st.text(alphabet="abcdhtAT '.(,\n\u00e9\u65e5", max_size=20))
def test_any_text_survives_folding_and_pruning(text: str) -> None:
    vocabulary = Vocabulary(BYTE_LEVEL)
    vocabulary.align()
    vocabulary.fold_case()
    vocabulary.prune()
    built = vocabulary.build()
    decoded = built.decode(built.encode(text, add_special_tokens=False).ids)
    assert decoded.split() == " ".join(vocabulary_words(text)).split()


BYTE_LEVEL = trained("byte-level")


def vocabulary_words(text: str) -> list[str]:
    clean = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    split = pre_tokenizers.BertPreTokenizer()
    return [word for word, _ in split.pre_tokenize_str(clean.normalize_str(text))]


# -- the real tokenizer -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def frequent(shared_data: Path) -> list[str]:
    with gzip.open(shared_data / "wordfreq" / "large_en.msgpack.gz") as file:
        msgpack = pytest.importorskip("msgpack")
        buckets = msgpack.unpackb(file.read(), raw=False)[1:]
    return [word for bucket in buckets for word in bucket if word.isalpha()]


@pytest.fixture(scope="module")
def modernbert(shared_data: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(
        str(shared_data / "tokenizer_modernbert" / "tokenizer.json")
    )


def test_ten_thousand_words_on_the_real_tokenizer(
    modernbert: tokenizers.Tokenizer, frequent: list[str]
) -> None:
    known = modernbert.get_vocab()
    new = [word for word in frequent if word.isascii() and f"Ġ{word}" not in known][:10_000]
    others = random.Random(0).sample(sorted(set(frequent) - set(new)), 20_000)
    vocabulary = Vocabulary(modernbert)
    vocabulary.drop_added()
    vocabulary.align()
    vocabulary.prune()
    vocabulary.add(new)
    built = vocabulary.build()
    ids = [built.token_to_id(f"Ġ{word}") for word in new]
    assert None not in ids
    for frame, tokens in (("{}", 1), ("the {}", 2), ("({})", 3), ("\n{}", 1)):
        encoded = built.encode_batch_fast([frame.format(word) for word in new])
        assert [encoding.ids[tokens // 2] for encoding in encoded] == ids
        assert {len(encoding.ids) for encoding in encoded} == {tokens}
    before = modernbert.encode_batch([f" {word}" for word in others], add_special_tokens=False)
    after = built.encode_batch([f" {word}" for word in others])
    assert sum(a.tokens != b.tokens for a, b in zip(before, after, strict=True)) == 0
    assert tokenizers.Tokenizer.from_str(built.to_str()).to_str() == built.to_str()
    vocabulary.fold_case()
    built = vocabulary.build()
    lowered = [word.lower() for word in others]
    encoded = built.encode_batch(others)
    assert [built.decode(encoding.ids).strip() for encoding in encoded] == lowered


def test_a_hundred_thousand_words_take_seconds(
    modernbert: tokenizers.Tokenizer, frequent: list[str]
) -> None:
    begin = time.process_time()
    vocabulary = Vocabulary(modernbert)
    vocabulary.add(frequent[:100_000])
    tokens = vocabulary.build().get_vocab_size()
    assert time.process_time() - begin < 20
    assert tokens > 150_000


def test_skeletoken_parses_the_result(modernbert: tokenizers.Tokenizer) -> None:
    skeletoken = pytest.importorskip("skeletoken")
    vocabulary = Vocabulary(modernbert)
    vocabulary.drop_added()
    vocabulary.align()
    vocabulary.fold_case()
    vocabulary.prune()
    vocabulary.add(["hyrule", "star wars"])
    built = vocabulary.build()
    parsed = skeletoken.TokenizerModel.from_tokenizer(built)
    assert set(parsed.sorted_vocabulary) == set(vocabulary.tokens)
    text = "The (Hyrule) of star wars!"
    assert parsed.to_tokenizer().encode(text).tokens == built.encode(text).tokens


def test_files_are_json(modernbert: tokenizers.Tokenizer) -> None:
    state = json.loads(Vocabulary(modernbert).build().to_str())
    assert state["post_processor"] is None and state["truncation"] is None
