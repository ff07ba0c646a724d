import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from modernbert import ModernBertConfig, ModernBertModel, SentenceEncoder, Tokenizer
from modernbert.distillation import PRESETS, Recipe, distill
from modernbert.distillation.command import distill as command
from modernbert.distillation.frequencies import (
    head_probabilities,
    is_mark,
    random_texts,
    token_probabilities,
    word_frequencies,
)
from modernbert.distillation.postprocess import (
    pca,
    principal_axes,
    rank_probabilities,
    rogue_dimensions,
    sif_weights,
    solve_rows,
    standardize,
)
from modernbert.distillation.teacher import Input, open_teacher, pool
from modernbert.heads import ModernBertForMaskedLM
from modernbert.static import StaticModel
from modernbert.vocabulary import Vocabulary

COUNTS = {"the": 50, "of": 30, "and": 20, "cat": 5, "paris": 4, "house": 3, "hyrule": 1, "zelda": 1}
TEXTS = [
    "The cat of the house and Paris, the paris of cats",
    "Paris and the house of the CAT (and cats)",
] * 5


def small_tokenizer() -> tokenizers.Tokenizer:
    """ModernBERT's pipeline, cased and byte-level, with 400 tokens."""
    made = tokenizers.Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[unused0]"],
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    frame = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=frame
    )
    return made


def spread(model: torch.nn.Module) -> None:
    """Weights large enough for words to differ."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, 0, 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random ModernBERT of 32 dimensions."""
    made = small_tokenizer()
    config = ModernBertConfig.from_dict(
        {
            "model_type": "modernbert",
            "vocab_size": made.get_vocab_size(),
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "pad_token_id": made.token_to_id("[PAD]"),
            "cls_token_id": made.token_to_id("[CLS]"),
            "sep_token_id": made.token_to_id("[SEP]"),
            "bos_token_id": made.token_to_id("[CLS]"),
            "eos_token_id": made.token_to_id("[SEP]"),
        }
    )
    model = ModernBertForMaskedLM(config)
    spread(model)
    path = tmp_path_factory.mktemp("teacher") / "m"
    model.save_pretrained(path)
    Tokenizer(made.to_str().encode()).save_pretrained(path)
    return path


def quietly(teacher: Any, **options: Any) -> Any:
    defaults = {"frequencies": COUNTS, "dims": 16, "dtype": "float32", "mixtures": 50}
    options = defaults | options
    return distill(teacher, show_progress_bar=False, **options)


def cosines(rows: np.ndarray) -> np.ndarray:
    unit = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + 1e-32)
    return unit @ unit.T


# -- the whole --------------------------------------------------------------------------------


def test_words_get_the_vectors_of_running_text(folder: Path) -> None:
    model = ModernBertModel.from_pretrained(folder)
    static = quietly(
        model,
        preset="model2vec",
        frequencies=None,
        vocabulary=["hyrule", "house cat"],
        pooling="mean",
        dims=None,
        sif=None,
    )
    made = small_tokenizer()
    for word in ("hyrule", "house cat"):
        batch = torch.tensor([made.encode(f" {word}").ids])
        with torch.no_grad():
            wanted = model(batch).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(static.encode(word, normalize=False), wanted.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", ["name", "base", "encoder", "masked"])
def test_every_kind_of_teacher(folder: Path, kind: str) -> None:
    teacher: Any = {
        "name": lambda: str(folder),
        "base": lambda: ModernBertModel.from_pretrained(folder),
        "encoder": lambda: SentenceEncoder.from_pretrained(folder),
        "masked": lambda: ModernBertForMaskedLM.from_pretrained(folder),
    }[kind]()
    static = quietly(teacher, device="cpu", mixtures=0)  # their own poolings differ
    assert static.dims == 16 and static.config["tokenizer_name"] == str(folder)
    reference = quietly(str(folder), device="cpu", mixtures=0)
    np.testing.assert_allclose(static.encode(TEXTS), reference.encode(TEXTS), atol=1e-5)


def test_the_default_recipe(folder: Path) -> None:
    static = quietly(str(folder), dtype="float16")
    assert static.embeddings.dtype == np.float16 and static.max_length is None
    for word in COUNTS:
        for frame in ("{}", "({})", "\n{}", "the {}"):
            tokens = static.tokenizer.encode(frame.format(word.title())).tokens
            assert f"Ġ{word}" in tokens
    assert not static.embeddings[static.tokens.index("[PAD]")].any()
    np.testing.assert_array_equal(static.encode("PARIS"), static.encode("\nparis"))
    recipe = static.config["recipe"]
    assert Recipe(**{**recipe, "layers": tuple(recipe["layers"])}).pooling == "first+span"


def test_folded_rows_come_from_the_cased_spellings(folder: Path) -> None:
    static = quietly(
        str(folder), dims=None, sif=None, ridge=None, pooling="mean", rogue=False, mixtures=0
    )
    teacher = open_teacher(str(folder), device="cpu")
    student = Vocabulary(teacher.backend)
    student.drop_added()
    student.align()
    student.fold_case()
    forms = student.forms["Ġparis"]
    (vectors,) = teacher.embed([teacher.word(form) for form in forms], ["mean"])
    shares = 1 / np.arange(1, len(forms) + 1)
    wanted = shares @ vectors / shares.sum()
    np.testing.assert_allclose(static.encode("paris", normalize=False), wanted, atol=1e-5)


def test_other_students(folder: Path) -> None:
    words = quietly(str(folder), subwords=False, vocabulary=["zelda", "star wars"])
    assert type(words.tokenizer.model).__name__ == "WordLevel"
    assert not words.encode("qqqq").any()
    assert words.encode("zelda (star wars)").any()
    cased = quietly(str(folder), fold_case=False)
    assert np.abs(cased.encode("Paris") - cased.encode("paris")).max() > 1e-3
    shared = quietly(str(folder), clusters=20)
    assert shared.embeddings.shape == (20, 16) and shared.mapping is not None
    whole = quietly(str(folder), dtype="int8")
    assert whole.embeddings.dtype == np.int8


@pytest.mark.parametrize(
    "switches",
    [
        {"layers": (-1, -2)},
        {"templates": ("{}", "the {} of", "what is {}?")},
        {"prompt": "search_query: "},
        {"pooling": "last+mean"},
        {"frequencies": "head"},
        {"drop": 0, "whiten": 0.5, "pca_sif": None},
        {"mixtures": 0},
        {"mixture_ridge": 100.0},
        {"dims": 0.9},
        {"dims": "auto"},
    ],
)
def test_switches_change_the_model(folder: Path, switches: dict[str, Any]) -> None:
    model = ModernBertForMaskedLM.from_pretrained(folder)
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    switches = {"vocabulary": ["hyrule"], **switches}
    static, plain = quietly(model, **switches), quietly(model, vocabulary=["hyrule"])
    assert np.isfinite(static.encode(TEXTS)).all()
    a, b = (cosines(each.encode(list(COUNTS))) for each in (static, plain))
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compat": "fasttext"}, "compat='fasttext'"),
        ({"preset": "best"}, "preset='best'"),
        ({"dims": 0}, "dims is 0"),
        ({"dims": 1.5}, "dims is 1.5"),
        ({"dims": "all"}, "dims is 'all'"),
        ({"sif": 2.0}, "sif is 2.0"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"layers": (-9,)}, "fewer layers"),
        ({"layers": ()}, "layers is empty"),
        ({"templates": ("the",)}, "template 'the'"),
        ({"remove": "("}, "no pattern"),
        ({"drop": -1}, "drop is -1"),
        ({"dtype": "int4"}, "dtype is 'int4'"),
        ({"mixtures": -1}, "mixtures is -1"),
        ({"marks": -0.5}, "marks is -0.5"),
        ({"colour": 3}, r"unknown options \['colour'\]"),
        ({"vocabulary": [3]}, r"vocabulary\[0\]"),
        ({"vocabulary": "absent.txt"}, "no word list"),
        ({"frequencies": {}}, "empty"),
        ({"pooling": "pooler"}, "no pooler"),
    ],
)
def test_bad_arguments_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quietly(str(folder), **options)


def test_what_is_no_teacher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="int is no teacher"):
        distill(3)
    with pytest.raises(ValueError, match="no folder"):
        distill(tmp_path / "absent")


def test_importing_distillation_never_imports_torch() -> None:
    code = "import modernbert.distillation, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_command(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "counts.txt").write_text("".join(f"{w} {n}\n" for w, n in COUNTS.items()))
    arguments = [str(folder), "-o", str(tmp_path / "s"), "--dims", "8", "--device", "cpu"]
    arguments += ["--frequencies", str(tmp_path / "counts.txt"), "--dtype", "int8", "--cased"]
    arguments += ["--mixtures", "20"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    static = StaticModel.from_pretrained(tmp_path / "s")
    assert static.dims == 8 and static.embeddings.dtype == np.int8
    assert "Ġhyrule" in static.tokens and not static.config["recipe"]["fold_case"]
    bad = CliRunner().invoke(command, [*arguments[:3], "--dims", "wide"])
    assert bad.exit_code == 2 and "give a number" in bad.output


# -- beside model2vec -------------------------------------------------------------------------


def theirs(path: Path, **options: Any) -> Any:
    pytest.importorskip("skeletoken")
    from transformers import AutoModel, AutoTokenizer

    distillation = pytest.importorskip("model2vec.distill.distillation")
    model, tokenizer = (kind.from_pretrained(path) for kind in (AutoModel, AutoTokenizer))
    return distillation.distill_from_model(model, tokenizer, quantize_to="float32", **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pca_dims": None},
        {"pca_dims": "auto"},
        {"pca_dims": 0.9},
        {"sif_coefficient": None},
        {"pooling": "first"},
        {"pooling": "last"},
    ],
)
def test_compat_equals_model2vec(folder: Path, options: dict[str, Any]) -> None:
    options = {"pca_dims": 16, **options}
    wanted = theirs(folder, **options)
    names = {"pca_dims": "dims", "sif_coefficient": "sif", "pooling": "pooling"}
    found = distill(
        str(folder),
        compat="model2vec",
        dtype="float32",
        device="cpu",
        show_progress_bar=False,
        **{names[key]: value for key, value in options.items()},
    )
    assert found.tokens == list(wanted.tokens)
    assert found.embeddings.shape == wanted.embedding.shape
    np.testing.assert_allclose(cosines(found.embeddings), cosines(wanted.embedding), atol=1e-3)
    a, b = found.embeddings, wanted.embedding
    rows = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert rows.min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1), rtol=1e-3)
    np.testing.assert_allclose(found.encode(TEXTS), wanted.encode(TEXTS), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_model2vec_feeds_added_words_as_literal_bytes_and_we_do_not(folder: Path) -> None:
    options: dict[str, Any] = {"pca_dims": None, "sif_coefficient": None}
    wanted = theirs(folder, vocabulary=["hyrule"], **options)
    found = distill(
        str(folder), compat="model2vec", vocabulary=["hyrule"], dims=None, sif=None,
        dtype="float32", device="cpu", show_progress_bar=False,
    )  # fmt: skip
    model = ModernBertModel.from_pretrained(folder)
    made = small_tokenizer()
    with torch.no_grad():
        literal, proper = (
            model(torch.tensor([made.encode(text).ids])).last_hidden_state[0].mean(0).numpy()
            for text in ("Ġhyrule", " hyrule")
        )
    their_row = wanted.embedding[wanted.tokens.index("Ġhyrule")]
    np.testing.assert_allclose(their_row, literal, atol=1e-4)
    our_row = found.embeddings[found.tokens.index("Ġhyrule")]
    np.testing.assert_allclose(our_row, proper, atol=1e-4)
    assert np.abs(literal - proper).max() > 0.1


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of 24 dimensions in sentence-transformers' layout."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"]
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    frame = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=frame
    )
    size = made.get_vocab_size()
    config = BertConfig(
        vocab_size=size, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    model = BertModel(config)
    spread(model)
    path = tmp_path_factory.mktemp("bert")
    model.save_pretrained(path / "plain")
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=False))
    PreTrainedTokenizerFast(
        tokenizer_object=made, **{f"{kind}_token": token for kind, token in names.items()}
    ).save_pretrained(path / "plain")
    transformer = Transformer(str(path / "plain"))
    modules = [transformer, Pooling(24), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(path / "st"))
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pooling", ["mean", "first", "last", "pooler"])
def test_compat_on_wordpiece_with_words(bert: Path, pooling: str) -> None:
    words = ["hyrule", "supercat", "star wars", "the"]
    wanted = theirs(bert / "plain", vocabulary=words, pooling=pooling, pca_dims=12)
    found = distill(
        str(bert / "st"), compat="model2vec", vocabulary=words, pooling=pooling, dims=12,
        dtype="float32", device="cpu", show_progress_bar=False,
    )  # fmt: skip
    assert found.tokens == list(wanted.tokens)
    np.testing.assert_allclose(found.embeddings, wanted.embedding, atol=1e-4)
    texts = [*TEXTS, "hyrule, star wars!", "supercats", ""]
    np.testing.assert_allclose(found.encode(texts), wanted.encode(texts), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers_as_teacher(bert: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(bert / "st"), device="cpu")
    static = quietly(
        model, pooling="own", dims=None, sif=None, ridge=None, rogue=False, mixtures=0,
        vocabulary=["hyrule"],
    )  # fmt: skip
    wanted = model.encode(["hyrule"])[0]
    found = static.encode("hyrule")
    assert found @ wanted == pytest.approx(1, abs=1e-5)
    assert quietly(model).dims == 16


# -- parts ------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.sampled_from([None, 0.5, 1.0]), st.integers(0, 2))
def test_pca_centres_and_whitens(seed: int, whiten: float | None, drop: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(60, 8)) * np.arange(1, 9) + 3
    weights = random.random(60) if whiten is not None else None
    axes = principal_axes(rows, 5, weights=weights, drop=drop, whiten=(whiten or 0) / 2)
    assert axes is not None
    scores = axes(rows)
    share = np.full(60, 1 / 59) if weights is None else weights / weights.sum()
    np.testing.assert_allclose(share @ scores, 0, atol=1e-9)
    covariance = (scores * share[:, None]).T @ scores
    np.testing.assert_allclose(covariance, np.diag(covariance.diagonal()), atol=1e-8)
    if whiten == 1.0:
        np.testing.assert_allclose(covariance, np.eye(5), atol=1e-8)
    assert (scores.max(axis=0) >= -scores.min(axis=0)).all()


def test_pca_is_that_of_scikit_learn_and_model2vec() -> None:
    from sklearn.decomposition import PCA

    rows = np.random.default_rng(0).normal(size=(80, 10)) * np.arange(1, 11)
    wanted = PCA(4).fit_transform(rows)
    found = pca(rows, 4)
    np.testing.assert_allclose(np.abs(found), np.abs(wanted), atol=1e-8)
    assert pca(rows, "auto").shape == (80, 10)
    assert pca(rows, None) is rows
    assert pca(rows, 0.5).shape[1] < 5
    assert pca(rows[:5], 6) is not None and pca(rows[:5], 6).shape == (5, 10)


def test_weights_have_their_known_values() -> None:
    ranks = rank_probabilities(50_256)
    assert ranks[0] == pytest.approx(4.81e-2, rel=1e-3)
    weights = sif_weights(ranks, 1e-4)
    assert weights[251] == pytest.approx(0.208, abs=1e-3)
    assert weights[31_863] == pytest.approx(0.971, abs=1e-3)
    assert sif_weights(ranks, None).sum() == 50_256


def test_rogue_dimensions_are_found_and_tamed() -> None:
    rows = np.random.default_rng(0).normal(size=(500, 16))
    assert rogue_dimensions(rows) == []
    rows[:, 3] += 40
    assert rogue_dimensions(rows) == [3]
    tamed = standardize(rows, [3])
    assert rogue_dimensions(tamed) == [] and tamed[:, 3].std() < 2
    np.testing.assert_array_equal(tamed[:, :3], rows[:, :3])


@pytest.mark.parametrize("mean", [False, True])
def test_solved_rows_are_the_ridge_regression(mean: bool) -> None:
    random = np.random.default_rng(0)
    table = random.normal(size=(12, 3))
    free = np.arange(12) >= 6
    segments = [random.choice(12, size=n, replace=False).tolist() for n in (2, 3, 2, 4, 3, 2, 1)]
    targets = random.normal(size=(7, 3))
    solved = solve_rows(table, segments, targets, free=free, ridge=0.5, mean=mean)
    system = np.zeros((7, 12))
    for row, segment in enumerate(segments):
        system[row, segment] = 1 / len(segment) if mean else 1
    a = system[:, 6:]
    change = np.linalg.solve(a.T @ a + 0.5 * np.eye(6), a.T @ (targets - system @ table))
    np.testing.assert_allclose(solved[6:], table[6:] + change, atol=1e-3)
    np.testing.assert_array_equal(solved[:6], table[:6])


def test_repeated_tokens_count_as_often_as_they_occur() -> None:
    solved = solve_rows(np.zeros((2, 1)), [[0, 0], [1]], np.ones((2, 1)), ridge=0)
    np.testing.assert_allclose(solved, [[0.5], [1]])


def test_solved_texts_come_closer_to_the_teacher(folder: Path) -> None:
    """The mean row of a text against the teacher's own vector, pair by pair."""
    texts = [" ".join(words) for words in random_texts(COUNTS, 300)]
    teacher = open_teacher(str(folder), device="cpu")
    (wanted,) = teacher.embed([teacher.word(text) for text in texts])
    wanted = cosines(wanted - wanted.mean(0))[np.triu_indices(len(texts), 1)]
    agreement = {}
    for name, options in {
        "not": {"mixtures": 0},
        "mixtures": {"mixtures": 300},
        "sentences": {"sentences": iter(texts)},
    }.items():
        static = quietly(str(folder), relax=0, marks=1, vocabulary=list(COUNTS), **options)
        found = static.encode(texts)
        found = cosines(found - found.mean(0))[np.triu_indices(len(texts), 1)]
        agreement[name] = float(np.corrcoef(found, wanted)[0, 1])
    assert agreement["mixtures"] > agreement["not"] + 0.05
    assert agreement["sentences"] > agreement["not"] + 0.05
    with pytest.raises(ValueError, match="sentences must be texts"):
        quietly(str(folder), sentences=[])


def test_random_texts_are_drawn_by_frequency() -> None:
    texts = random_texts(COUNTS | {"0000": 100, "'s": 100}, 2000)
    assert texts == random_texts(COUNTS | {"0000": 100, "'s": 100}, 2000)
    assert {len(words) for words in texts} == set(range(4, 13))
    words = [word for text in texts for word in text]
    for word, count in COUNTS.items():
        share = count / sum(COUNTS.values())
        assert words.count(word) / len(words) == pytest.approx(share, rel=0.3)
    assert set(words) == COUNTS.keys()


def test_relax_and_marks_scale_rows(folder: Path) -> None:
    options = {"ridge": None, "mixtures": 0, "vocabulary": ["the", "cat"]}
    plain = quietly(str(folder), relax=0, marks=1, **options)
    both = quietly(str(folder), relax=0.5, marks=0.25, **options)
    lengths = [np.linalg.norm(static.embeddings, axis=1) for static in (both, plain)]
    ratio = lengths[0] / np.maximum(lengths[1], 1e-9)
    place = plain.tokens.index
    total = sum(COUNTS.values())
    for word in ("the", "cat"):
        weight = (1e-5 / (1e-5 + COUNTS[word] / total)) ** 0.2
        assert ratio[place(f"Ġ{word}")] == pytest.approx(weight**-0.5, rel=1e-3)
    unseen = (1e-5 / (1e-5 + 0.04 * 0.05)) ** 0.2  # "," by the shares of English marks
    assert ratio[place(",")] == pytest.approx(0.25 * unseen**-0.5, rel=1e-3)
    assert is_mark("?!") and not is_mark("a!") and not is_mark("7")


def test_pooling_of_packed_states() -> None:
    states = torch.arange(14, dtype=torch.float32).reshape(7, 2)
    inputs = [Input([1, 2, 3], 1, 2), Input([1, 2, 3, 4], 1, 3)]
    expected = {
        "mean": [[2, 3], [9, 10]],
        "span": [[2, 3], [9, 10]],
        "first": [[0, 1], [6, 7]],
        "last": [[4, 5], [12, 13]],
    }
    for pooling, rows in expected.items():
        assert pool(pooling, states, inputs).tolist() == rows
    assert pool("span", states, [inputs[0], Input([1, 2, 3, 4], 3, 4)]).tolist()[1] == [12, 13]


def test_teacher_inputs(folder: Path) -> None:
    teacher = open_teacher(str(folder), device="cpu", prompt="say: ")
    names = small_tokenizer()
    word = teacher.word("cats", "the {} of")
    tokens = [names.id_to_token(number) or "" for number in word.ids]
    assert "".join(tokens[word.start : word.stop]) == "Ġcats"
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and "say" in "".join(tokens)
    plain = open_teacher(str(folder), device="cpu")
    direct = plain.token("Ġthe")
    assert direct is not None
    assert [names.id_to_token(n) for n in direct.ids] == ["[CLS]", "Ġthe", "[SEP]"]
    assert plain.word("the").ids == direct.ids
    assert plain.token("nothing") is None


def test_frequencies_come_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "counts.txt").write_text("the 60\nof\t30\ncat 10\n")
    (tmp_path / "ranks.txt").write_text("the\nstar wars\ncat\n")
    assert word_frequencies(tmp_path / "counts.txt") == {"the": 0.6, "of": 0.3, "cat": 0.1}
    assert list(word_frequencies(tmp_path / "ranks.txt")) == ["the", "star wars", "cat"]
    texts = word_frequencies(["The cat.", "the dog"])
    assert texts["the"] == pytest.approx(2 / 5) and texts["."] == pytest.approx(1 / 5)
    assert list(word_frequencies({"b": 1, "a": 3})) == ["a", "b"]
    with pytest.raises(ValueError, match="no words of 'xx'"):
        word_frequencies(language="xx")


def test_probabilities_of_tokens() -> None:
    vocabulary = Vocabulary(small_tokenizer())
    vocabulary.align()
    vocabulary.fold_case()
    shares = dict(
        zip(vocabulary.tokens, token_probabilities(vocabulary, {"the": 0.5}), strict=True)
    )
    assert shares["Ġthe"] == 0.5
    assert shares["[PAD]"] == shares["Ġcat"] == 1e-9
    assert shares[","] == pytest.approx(0.04 * 0.05)
    numbers = Vocabulary.of_words()
    numbers.add(["2026", "7"])
    found = token_probabilities(numbers, {"0000": 0.5, "7": 0.25})
    assert found[-2:].tolist() == pytest.approx([0.005, 0.25])


def test_probabilities_of_a_head() -> None:
    made = small_tokenizer()
    bias = np.log(np.arange(1, made.get_vocab_size() + 1))
    shares = head_probabilities(bias, made, Vocabulary(made))
    assert shares.sum() == pytest.approx(1)
    assert shares[-1] / shares[0] == pytest.approx(len(shares))


def test_presets_are_recipes() -> None:
    assert PRESETS["modernbert"] == Recipe()
    assert json.loads(json.dumps(Recipe().to_dict()))["dims"] == 256
