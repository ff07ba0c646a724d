import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from modernbert.static import StaticModel
from modernbert.vocabulary import Vocabulary
from modernbert.weights import CheckpointError

WORDS = ("[PAD]", "[UNK]", "the", "cat", "sat", "mat", "play", "##ing", "##s", "(", ")", ",", "!")
LETTERS = tuple("abcdefghijklmnopqrstuvwxyz")
PIECES = tuple(dict.fromkeys([*WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]))
TEXTS = ["the cat sat", "Playing cats, the mat!", "", "日本 cat", "  the  cat\n(sat)", "a" * 120]


def wordpiece(pieces: tuple[str, ...] = PIECES) -> tokenizers.Tokenizer:
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens(["[PAD]", "[UNK]"])
    return made


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat, playing with cats"] * 9, trainer)
    return made


def unigram() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    made.train_from_iterator(["the cat sat on the mat, playing with cats"] * 9, trainer)
    return made


TOKENIZERS = {"wordpiece": wordpiece, "byte_level": byte_level, "unigram": unigram}


def make(tokenizer: tokenizers.Tokenizer, dims: int = 8, **options: object) -> StaticModel:
    rows = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), dims))
    return StaticModel(rows.astype(np.float32), tokenizer, **options)  # type: ignore[arg-type]


@pytest.fixture(params=TOKENIZERS)
def model(request: pytest.FixtureRequest) -> StaticModel:
    return make(TOKENIZERS[request.param]())


def by_hand(model: StaticModel, text: str) -> np.ndarray:
    """The definition, one text at a time."""
    ids = model.tokenizer.encode(text, add_special_tokens=False).ids
    unknown = model.tokenizer.token_to_id("[UNK]") or model.tokenizer.token_to_id("<unk>")
    rows = [model.embeddings[i].astype(np.float64) for i in ids if i != unknown]
    mean = np.mean(rows, axis=0) if rows else np.zeros(model.dims)
    return mean / (np.linalg.norm(mean) + 1e-32)


# -- encode -----------------------------------------------------------------------------------


def test_encode_is_the_scaled_mean_of_the_rows(model: StaticModel) -> None:
    vectors = model.encode(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), 8)
    np.testing.assert_allclose(vectors, [by_hand(model, text) for text in TEXTS], atol=2e-6)
    np.testing.assert_array_equal(model.encode(TEXTS, batch_size=2), vectors)
    assert model.encode("the cat").shape == (8,)
    assert model.encode([]).shape == (0, 8)
    assert not model.encode("").any()


@given(st.lists(st.text(max_size=30), max_size=4))
def test_parts_between_spaces_have_the_ids_of_the_whole(texts: list[str]) -> None:
    model = make(wordpiece())
    assert model._spaces_separate
    found = model._ids([f"the {text}  cat {text}" for text in texts], None)
    whole = [model._tokenized([f"the {text}  cat {text}"])[0] for text in texts]
    assert found == whole


def cased() -> tokenizers.Tokenizer:
    made = wordpiece()
    made.normalizer = None
    return made


def aligned() -> tokenizers.Tokenizer:
    vocabulary = Vocabulary(byte_level())
    vocabulary.align()
    vocabulary.add(["Mats", "sat", "cats"])
    return vocabulary.build()


def whole_words() -> tokenizers.Tokenizer:
    vocabulary = Vocabulary.of_words()
    vocabulary.add(["the", "cat", "mats"])
    return vocabulary.build()


@pytest.mark.parametrize("made", [wordpiece, cased, aligned, whole_words])
@given(data=st.data())
def test_words_that_are_one_token_are_looked_up(
    made: Callable[[], tokenizers.Tokenizer], data: st.DataObject
) -> None:
    model = make(made())
    known = list(model._whole_words[0])
    assert "cat" in known or "cats" in known
    words = st.sampled_from(known).flatmap(
        lambda word: st.sampled_from([word, word.upper(), word.title(), word + "s", f"({word}),"])
    )
    texts = data.draw(st.lists(st.lists(words | st.text(max_size=5)).map(" ".join), max_size=4))
    assert model._ids(texts, None) == model._tokenized(texts)
    asked: list[str] = []
    plain = model._tokenized
    model._tokenized = lambda texts: asked.extend(texts) or plain(texts)  # type: ignore
    model._remembered.clear()
    model._ids(known, None)
    assert not asked


def test_words_are_not_looked_up_where_they_may_be_cut() -> None:
    assert make(wordpiece())._whole_words[0]
    inside = wordpiece()
    inside.add_tokens(["at"])  # "cat" becomes c, at
    merged = aligned()
    merged.model.ignore_merges = False
    short = wordpiece()
    short.model.max_input_chars_per_word = 3
    for made, lost in ((inside, "cat"), (merged, "Mats"), (short, "play")):
        model = make(made)
        assert lost not in model._whole_words[0]
        assert model._ids([lost], None) == model._tokenized([lost])


def test_the_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modernbert.static.MEMORY", 50)
    model = make(wordpiece())
    before = [model.encode(f"cat {'x' * n} the") for n in range(1, 30)]
    assert len(model._remembered) < 30
    after = [make(wordpiece()).encode(f"cat {'x' * n} the") for n in range(1, 30)]
    np.testing.assert_array_equal(before, after)


def test_texts_of_any_length_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["the cat " * n for n in (0, 1, 30, 2, 7, 0, 40)]
    whole = make(wordpiece(), max_length=None).encode(texts)
    monkeypatch.setattr("modernbert.static.GATHERED", 16)
    pieces = make(wordpiece(), max_length=None).encode(texts)
    np.testing.assert_allclose(pieces, whole, atol=1e-6)
    assert not pieces[0].any() and pieces[1].any()


def test_phrases_switch_the_shortcut_off() -> None:
    model = make(wordpiece()).add_words(["the cat"])
    assert not model._spaces_separate
    assert model.tokenizer.encode("the cat sat").tokens == ["the cat", "sat"]
    assert model.tokenizer.encode("the cats").tokens == ["the", "cat", "##s"]


def test_max_length_counts_tokens_and_normalize_scales() -> None:
    model = make(wordpiece(), max_length=3)
    np.testing.assert_array_equal(model.encode("a b c d e"), model.encode("a b c"))
    longer = model.encode("a b c d e", max_length=4)
    assert np.abs(longer - model.encode("a b c")).max() > 1e-3
    plain = model.encode("a b", normalize=False)
    rows = [PIECES.index(letter) for letter in "ab"]
    np.testing.assert_allclose(plain, model.embeddings[rows].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("texts", [None, 5, b"text", [None], ["a", 3]])
def test_what_is_no_text_is_refused(texts: object) -> None:
    with pytest.raises(ValueError, match="text"):
        make(wordpiece()).encode(texts)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"max_length": 0}, {"batch_size": 0}])
def test_numbers_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        make(wordpiece()).encode("cat", **options)  # type: ignore[arg-type]


# -- similarity -------------------------------------------------------------------------------


def test_similarity_is_the_cosine(model: StaticModel) -> None:
    a, b = model.encode(TEXTS[:2], normalize=False), model.encode(TEXTS[1:4], normalize=False)
    scores = model.similarity(a, b)
    assert scores.shape == (2, 3)
    assert scores[1, 0] == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(model.similarity_pairwise(a, b[:2]), scores.diagonal(), atol=1e-6)


def test_most_similar_ranks_other_tokens() -> None:
    rows = np.eye(len(PIECES), 4, dtype=np.float32)
    cat, mat, ing = (PIECES.index(piece) for piece in ("cat", "mat", "##ing"))
    rows[cat], rows[mat], rows[ing] = [1, 1, 0, 0], [1, 0.9, 0, 0], [1, 0.5, 0, 0]
    model = StaticModel(rows, wordpiece())
    (first, score), (second, _) = model.most_similar("cat", 2)
    assert (first, second) == ("mat", "-ing")
    assert score == pytest.approx(1.9 / (2 * 1.81) ** 0.5, abs=1e-6)
    assert model.most_similar(rows[cat], 1)[0][0] == "cat"
    with pytest.raises(ValueError, match="k is 0"):
        model.most_similar("cat", 0)


# -- parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embeddings": np.zeros((3, 8), np.float32)}, "3 rows"),
        ({"embeddings": np.zeros(8, np.float32)}, "shape"),
        ({"embeddings": np.zeros((len(PIECES), 8), np.int32)}, "dtype"),
        ({"embeddings": np.full((len(PIECES), 8), np.nan, np.float32)}, "NaN"),
        ({"mapping": np.zeros(3, np.int32)}, "mapping"),
        ({"mapping": np.full(len(PIECES), 999)}, "999"),
        ({"mapping": np.full(len(PIECES), -1)}, "-1"),
        ({"weights": np.ones(2)}, "weights"),
        ({"weights": np.full(len(PIECES), np.inf)}, "NaN or infinity"),
        ({"max_length": 0}, "max_length is 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    parts = {"embeddings": np.zeros((len(PIECES), 8), np.float32), "tokenizer": wordpiece()}
    with pytest.raises(ValueError, match=message):
        StaticModel(**(parts | changes))  # type: ignore[arg-type]


def test_truncate_and_quantize_keep_the_directions(model: StaticModel) -> None:
    half = model.truncate(4)
    np.testing.assert_array_equal(half.embeddings, model.embeddings[:, :4])
    with pytest.raises(ValueError, match="this model has 8"):
        model.truncate(9)
    with pytest.raises(ValueError, match="dtype='int4'"):
        model.quantize("int4")
    vectors = model.encode(TEXTS[:2], normalize=False)
    for dtype, tolerance in (("float16", 2e-3), ("float64", 1e-6), ("int8", 2e-2)):
        small = model.quantize(dtype)
        assert small.embeddings.dtype == dtype
        np.testing.assert_allclose(
            small.encode(TEXTS[:2], normalize=False), vectors, atol=tolerance
        )
    again = model.quantize("int8").quantize("float32")
    np.testing.assert_allclose(again.embeddings, model.embeddings, atol=2e-2)


def test_clusters_share_rows() -> None:
    model = make(wordpiece())
    small = model.quantize(clusters=len(model.tokens))
    np.testing.assert_allclose(small.encode(TEXTS), model.encode(TEXTS), atol=1e-3)
    shared = model.quantize(clusters=10)
    assert shared.embeddings.shape == (10, 8) and shared.mapping is not None
    with pytest.raises(ValueError, match="clusters is 0"):
        model.quantize(clusters=0)


# -- words ------------------------------------------------------------------------------------


def test_added_words_are_single_tokens_with_their_vectors(model: StaticModel) -> None:
    words = ["hyrule", "zelda-like", "star wars"]
    vectors = np.arange(24, dtype=np.float32).reshape(3, 8)
    more = model.add_words(words, vectors)
    np.testing.assert_allclose(more.encode(words, normalize=False), vectors, rtol=1e-6)
    for text in ("the {}", "({})", "cat\n{} cat"):
        for word in words:
            frame = more.tokenizer.encode(text.format("")).tokens
            inside = more.tokenizer.encode(text.format(word)).tokens
            assert sum("y" in t or "z" in t or "w" in t for t in inside) == 1, (inside, frame)
    plain = ["the cat sat", "playing cats", "hyrules cat", "mat, the!"]
    np.testing.assert_allclose(more.encode(plain), model.encode(plain), atol=1e-6)
    assert len(model.tokens) < len(more.tokens)


def test_words_without_vectors_keep_what_they_mean() -> None:
    model = make(wordpiece())
    more = model.add_words(["playing"])
    np.testing.assert_allclose(more.encode("playing"), model.encode("playing"), atol=1e-6)
    assert more.tokenizer.encode("playing").tokens == ["playing"]
    new = more.add_words(["playing"], np.ones((1, 8)))
    assert len(new.tokens) == len(more.tokens)
    np.testing.assert_allclose(new.encode("playing", normalize=False), np.ones(8))


def test_removed_words_are_spelled_with_smaller_tokens() -> None:
    model = make(wordpiece())
    less = model.remove_words(["play"])
    assert less.tokenizer.encode("playing").tokens == ["p", "##l", "##a", "##y", "##ing"]
    others = ["the cat sat", "(mat)"]
    np.testing.assert_allclose(less.encode(others), model.encode(others), atol=1e-6)
    with pytest.raises(ValueError, match="no token"):
        less.remove_words(["play"])
    with pytest.raises(ValueError, match="character"):
        model.remove_words(["a"])
    back = model.add_words(["star wars"]).remove_words(["star wars"])
    assert back.tokens == model.tokens


def test_words_can_be_edited_in_any_dtype() -> None:
    for dtype in ("float16", "int8"):
        small = make(wordpiece()).quantize(dtype)
        more = small.add_words(["hyrule"], np.ones((1, 8)))
        assert more.embeddings.dtype == dtype
        np.testing.assert_allclose(more.encode("the cat"), small.encode("the cat"), atol=2e-2)
    shared = make(wordpiece()).quantize(clusters=10)
    more = shared.add_words(["hyrule"], np.ones((1, 8)))
    np.testing.assert_allclose(more.encode("the cat"), shared.encode("the cat"), atol=1e-6)


@pytest.mark.parametrize("words", [[""], ["  "]])
def test_words_of_nothing_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="nothing is left"):
        make(wordpiece()).add_words(words)


def test_vectors_must_fit_the_words() -> None:
    with pytest.raises(ValueError, match=r"expected \(1, 8\)"):
        make(wordpiece()).add_words(["hyrule"], np.ones((1, 4)))


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["model2vec", "sentence-transformers"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_both_layouts_round_trip(
    model: StaticModel, dtype: str, layout: str, tmp_path: Path
) -> None:
    saved = model.quantize(dtype)
    saved.max_length = 7
    saved.save_pretrained(tmp_path / "m", layout=layout)
    read = StaticModel.from_pretrained(tmp_path / "m")
    assert read.tokens == saved.tokens and read.max_length == 7 and read.normalize
    np.testing.assert_allclose(read.encode(TEXTS), saved.encode(TEXTS), atol=1e-6)
    assert (tmp_path / "m" / "README.md").read_text().startswith("---\nlibrary_name")
    if layout == "model2vec":
        assert read.embeddings.dtype == dtype
        raw = read.encode(TEXTS, normalize=False)
        np.testing.assert_allclose(raw, saved.encode(TEXTS, normalize=False), rtol=1e-5)


def test_saving_replaces_what_was_there_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    make(wordpiece(), dims=4).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("my card")
    read = StaticModel.from_pretrained(folder)
    read.truncate(2).save_pretrained(folder)
    assert StaticModel.from_pretrained(folder).dims == 2
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "README.md").read_text() == "my card"
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with pytest.raises(ValueError, match="layout='other'"):
        read.save_pretrained(folder, layout="other")


def test_the_card_shows_recipe_and_scores(tmp_path: Path) -> None:
    model = make(wordpiece(), config={"tokenizer_name": "a/b", "recipe": {"sif": 1e-5}})
    model.save_pretrained(tmp_path / "m", scores={"WordSim": 51.586})
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'base_model: "a/b"' in card
    assert "| sif | `1e-05` |" in card and "| WordSim | `51.59` |" in card


def test_options_of_loading(tmp_path: Path) -> None:
    make(wordpiece()).save_pretrained(tmp_path / "m")
    read = StaticModel.from_pretrained(tmp_path / "m", dims=3, dtype="float16", normalize=False)
    assert read.embeddings.dtype == np.float16 and read.dims == 3 and not read.normalize


def spoiled(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", None),
        ("model.safetensors", b"nonsense"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", None),
        ("config.json", b"[]"),
        ("config.json", b"{"),
        ("config.json", b'{"max_length": "many"}'),
        ("config.json", b'{"max_length": -3}'),
        ("config.json", b'{"embedding_scale": []}'),
    ],
)
def test_broken_folders_are_refused(name: str, content: bytes | None, tmp_path: Path) -> None:
    make(wordpiece()).save_pretrained(tmp_path / "m")
    spoiled(tmp_path / "m", name, content)
    with pytest.raises(CheckpointError):
        StaticModel.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize(
    ("name", "short", "long"),
    [
        ("float32", "short", "long"),
        ("sentence-transformers", "short", "long"),
        ("vocab-quantized", None, "vocab_quantized"),
    ],
)
def test_fixtures_of_model2vec_rs(
    name: str, short: str | None, long: str, shared_data: Path
) -> None:
    folder = shared_data / "model2vec_rs_fixtures"
    model = StaticModel.from_pretrained(folder / f"test-model-{name}")
    texts = {short: "hello world", long: "hello " * 1000}
    if short is None:
        texts = {long: None}
    for key, text in texts.items():
        if key is None:
            continue
        wanted = np.array(json.loads((folder / f"embeddings_{key}.json").read_text())[0])
        found = [model.encode(t) for t in ([text] if text else ["hello world", "hello " * 1000])]
        assert min(np.abs(vector - wanted).max() for vector in found) < 1e-5


def test_fixtures_in_other_dtypes_agree(shared_data: Path) -> None:
    folder = shared_data / "model2vec_rs_fixtures"
    reference, half, whole = (
        StaticModel.from_pretrained(folder / f"test-model-{kind}").encode("hello world")
        for kind in ("float32", "float16", "int8")
    )
    np.testing.assert_allclose(half, reference, atol=1e-3)
    np.testing.assert_allclose(whole, reference, atol=2e-2)


def test_loading_and_encoding_never_import_torch(tmp_path: Path) -> None:
    make(wordpiece()).save_pretrained(tmp_path / "m")
    code = (
        "import sys; from modernbert.static import StaticModel; "
        f"m = StaticModel.from_pretrained({str(tmp_path / 'm')!r}); m.encode(['the cat']); "
        "m.most_similar('cat'); m.add_words(['hyrule']).quantize('int8'); "
        f"m.save_pretrained({str(tmp_path / 'n')!r}); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- other programs ---------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["model2vec", "sentence-transformers"])
def test_model2vec_reads_the_same_vectors(model: StaticModel, layout: str, tmp_path: Path) -> None:
    import model2vec

    more = model.add_words(["hyrule", "star wars"])
    for kind in ("float32", "float16", "int8"):
        saved = more.quantize(kind)
        saved.save_pretrained(tmp_path / kind, layout=layout)
        theirs = model2vec.StaticModel.from_pretrained(tmp_path / kind)
        texts = [*TEXTS, "hyrule (star wars)"]
        np.testing.assert_allclose(
            theirs.encode(texts).astype(np.float32), saved.encode(texts), atol=1e-3
        )
    model.quantize(clusters=9).save_pretrained(tmp_path / "shared", layout=layout)
    theirs = model2vec.StaticModel.from_pretrained(tmp_path / "shared")
    ours = StaticModel.from_pretrained(tmp_path / "shared")
    np.testing.assert_allclose(theirs.encode(TEXTS), ours.encode(TEXTS), atol=1e-5)


def test_model2vec_models_are_read(model: StaticModel, tmp_path: Path) -> None:
    import model2vec

    theirs = model2vec.StaticModel(model.embeddings, model.tokenizer, normalize=True)
    theirs.save_pretrained(tmp_path / "m")
    ours = StaticModel.from_pretrained(tmp_path / "m")
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.encode(TEXTS), atol=1e-6)


def test_sentence_transformers_reads_the_same_vectors(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = make(wordpiece(), max_length=None).add_words(["hyrule", "star wars"])
    texts = [*TEXTS, "hyrule (star wars)", "日本"]
    for name, saved in (
        ("half", model.quantize("float16")),
        ("shared", model.quantize(clusters=9)),
    ):
        saved.save_pretrained(tmp_path / name, layout="sentence-transformers")
        theirs = SentenceTransformer(str(tmp_path / name), device="cpu").encode(texts)
        known = [i for i, text in enumerate(texts) if "日" not in text]
        np.testing.assert_allclose(theirs, saved.encode(texts), atol=1e-3)
        assert len(known) == len(texts) - 2


def test_onnx_computes_the_same(model: StaticModel, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    for normalize in (True, False):
        model.normalize = normalize
        model.export_onnx(tmp_path / "o")
        session = runtime.InferenceSession(tmp_path / "o" / "model.onnx")
        tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "o" / "tokenizer.json"))
        tokenizer.enable_padding(pad_id=0)
        texts = [text for text in TEXTS if text]
        encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
        (found,) = session.run(
            None,
            {
                "input_ids": np.array([e.ids for e in encoded]),
                "attention_mask": np.array([e.attention_mask for e in encoded]),
            },
        )
        np.testing.assert_allclose(found, model.encode(texts), atol=1e-5)


def test_skeletoken_parses_edited_tokenizers(model: StaticModel) -> None:
    skeletoken = pytest.importorskip("skeletoken")
    more = model.add_words(["hyrule", "star wars"])
    parsed = skeletoken.TokenizerModel.from_tokenizer(more.tokenizer)
    assert set(more.tokens) <= set(parsed.sorted_vocabulary)
    again = parsed.to_tokenizer()
    for text in ("the hyrule cat", "star wars (hyrule)"):
        assert again.encode(text).tokens == more.tokenizer.encode(text).tokens
