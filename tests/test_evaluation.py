"""Evaluation: readers, metrics and protocols against hand-made files and known answers."""

import gzip
import json
import math
import sys
import zipfile
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import tokenizers
import torch
from click.testing import CliRunner
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import paired_cosine_distances
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modernbert import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    SentenceEncoder,
    Tokenizer,
)
from modernbert.console import OneLineErrors
from modernbert.evaluation import (
    Results,
    Score,
    Skipped,
    Subject,
    classification,
    code_retrieval,
    evaluate,
    long_documents,
    masked_lm_accuracy,
    models,
    presets,
    retrieval,
    sts,
    word_similarity,
)
from modernbert.evaluation.command import evaluate as command
from modernbert.evaluation.correlation import Pair, correlate, cosines, spearman
from modernbert.evaluation.masked_lm import mask_tokens
from modernbert.evaluation.models import Unavailable, as_subject, load_subject
from modernbert.evaluation.mteb_adapter import MtebEncoder
from modernbert.evaluation.texts import held_out_articles
from modernbert.training.readers import is_validation

SMALL = ModernBertConfig(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
)


class Letters:
    """Texts to counts of their letters a to z: vectors that can be worked out by hand."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts: list[str]) -> np.ndarray:
        self.seen += texts
        rows = [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
        return np.array(rows, np.float32).reshape(-1, 26)


class Table:
    """A vector for each known text."""

    def __init__(self, vectors: dict[str, Sequence[float]]) -> None:
        self.vectors = vectors

    def encode(self, texts: list[str]) -> np.ndarray:
        return np.array([self.vectors[text] for text in texts])


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = text.encode(encoding)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def points(results: Results) -> dict[str, float]:
    assert results.skipped == [] or all(skip.reason for skip in results.skipped)
    return {score.task: score.value for score in results.scores}


# -- pairs ---------------------------------------------------------------------------------------


def test_cosines_are_those_of_scikit_learn_zero_vectors_included() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 40, 8))
    a[:3] = 0
    b[2:5] = 0
    np.testing.assert_allclose(cosines(a, b), 1 - paired_cosine_distances(a, b), atol=1e-12)
    assert cosines(a, b)[[0, 2, 3]].tolist() == [0.5, 1.0, 0.5]


def test_spearman_with_ties_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 2.0, 4.0]), np.array([10.0, 30.0, 20.0, 40.0])
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, squares 4.5 and 5.
    assert spearman(x, y) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(x, np.ones(4)) == 0.0


def test_every_distinct_text_is_encoded_once() -> None:
    model = Letters()
    pairs = [Pair("ab", "ac", 1), Pair("ab", "b", 2), Pair("ac", "b", 0)]
    found = correlate(as_subject(model), pairs)
    assert sorted(model.seen) == ["ab", "ac", "b"]
    cosine = [0.5, math.sqrt(0.5), 0.0]
    assert found.count == 3
    assert found.points["spearman"] == pytest.approx(
        100 * stats.spearmanr(cosine, [1, 2, 0]).statistic
    )
    assert found.points["pearson"] == pytest.approx(
        100 * stats.pearsonr(cosine, [1, 2, 0]).statistic
    )


def test_leading_dimensions_of_a_model_that_is_opened_once() -> None:
    opened: list[Letters] = []

    def open_encoder() -> Letters:
        opened.append(Letters())
        return opened[-1]

    subject = Subject("letters", open_encoder)
    short = subject.truncated(2)
    assert short.name == "letters [:2]"
    np.testing.assert_array_equal(short.embed(["abc", "c"]), subject.embed(["abc", "c"])[:, :2])
    assert len(opened) == 1
    with pytest.raises(ValueError, match="its vectors have [0-9]+ dimensions"):
        subject.truncated(1000).embed(["a"])
    with pytest.raises(ValueError, match="dims is 0"):
        subject.truncated(0)


@pytest.mark.parametrize("kind", ["tensor", "list", "float16"])
def test_vectors_may_come_in_any_form(kind: str) -> None:
    class Model:
        def encode(self, texts: list[str]) -> Any:
            vectors = Letters().encode(texts)
            if kind == "tensor":
                return torch.from_numpy(vectors).bfloat16().requires_grad_()
            return list(vectors) if kind == "list" else vectors.astype(np.float16)

    vectors = as_subject(Model()).embed(["ab", "c", "ab"])
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, Letters().encode(["ab", "c", "ab"]))


@pytest.mark.parametrize(
    "vectors, message",
    [
        (np.zeros(3), "array of shape"),
        (np.zeros((2, 3)), "array of shape"),
        (np.full((1, 3), np.nan), "NaN"),
    ],
)
def test_vectors_that_cannot_be_judged_are_refused(vectors: np.ndarray, message: str) -> None:
    class Model:
        def encode(self, texts: list[str]) -> np.ndarray:
            return vectors

    with pytest.raises(ValueError, match=message):
        as_subject(Model()).embed(["a"])


# -- word similarity -----------------------------------------------------------------------------


def test_the_seven_sets_are_read_as_model2vec_reads_them(shared_data: Path) -> None:
    sizes = {}
    for name, (file, columns) in word_similarity.SETS.items():
        pairs = list(
            word_similarity.read_pairs(shared_data / word_similarity.FOLDER / file, columns)
        )
        sizes[name] = len(pairs)
        if name == "simverb":
            assert pairs[0] == ("take", "remove", 6.81)
        if name == "Card-660":
            assert pairs[0] == ("Pokemon", "Pocket Monsters", 3.81)
    assert sizes == {
        "RareWord": 2034,
        "MEN": 3000,
        "SimLex": 999,
        "rel353": 252,
        "simverb": 3500,
        "MTurk-771": 771,
        "Card-660": 660,
    }


def test_word_sets_and_pair_files(tmp_path: Path) -> None:
    write(tmp_path / "wordsim_minish/men.txt", "ab\tab\t6\nab\tac\t5\nab\tc\t1\n")
    mine = write(tmp_path / "mine.tsv", "one\ttwo\tscore\r\nab\tc_d\t3\r\nab\tba\t2\r\n")
    results = evaluate(Letters(), "wordsim", tmp_path, pairs=[mine])
    assert points(results) == {"MEN": pytest.approx(100), "mine": pytest.approx(-100)}
    assert [skip.task for skip in results.skipped] == [
        name for name in word_similarity.SETS if name != "MEN"
    ]
    assert results.scores[1].count == 2


@pytest.mark.parametrize(
    "text, message", [("a\tb\n", "2 fields"), ("a\tb\t1\na\tb\tx\n", "line 2")]
)
def test_broken_pair_files_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "pairs.tsv", text)
    with pytest.raises(ValueError, match=message):
        list(word_similarity.read_pairs(path))


# -- STS -----------------------------------------------------------------------------------------


def sts_folder(folder: Path) -> Path:
    year = folder / "sts_senteval/STS12-en-test"
    write(year / "STS.input.A.txt", 'ab\tab\nab\tnot "scored\nab\tac\n')
    write(year / "STS.gs.A.txt", "5.0\n\n3.0\n")
    write(year / "STS.input.B.txt", "ab\tc\n")
    write(year / "STS.gs.B.txt", "4.0\n")
    header = "split\tgenre\tdataset\tyear\tsid\tscore\tsentence1\tsentence2\n"
    rows = [
        "test\tx\tx\tx\t1\t5\tab\tab",
        "dev\tx\tx\tx\t1\t0\tab\tab",
        "dev\tx\tx\tx\t1\t1\tab\tac",
        "test\tx\tx\tx\t1\t1\tab\tc",
        'test\tx\tx\tx\t1\t2\t"ab\tac',
    ]
    write(folder / "sts_benchmark/stsbenchmark.tsv.gz", header + "\n".join(rows) + "\n")
    write(
        folder / "sick/SICK_test_annotated.txt",
        "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
        "1\tab\tab\t5\tNEUTRAL\n2\tab\tc\t1\tNEUTRAL\n",
    )
    return folder


def test_sts_by_hand(tmp_path: Path) -> None:
    results = evaluate(Letters(), "sts", sts_folder(tmp_path))
    # STS12: cosines 1, .5, 0 against 5, 3, 4, both files together.
    assert points(results) == {
        "STS12": pytest.approx(50),
        "STS-B test": pytest.approx(100),
        "SICK-R": pytest.approx(100),
    }
    assert [score.count for score in results.scores] == [3, 3, 2]
    assert [skip.task for skip in results.skipped] == [f"STS{year}" for year in range(13, 18)]
    dev = evaluate(Letters(), "dev", tmp_path)
    assert points(dev) == {"STS-B dev": pytest.approx(-100)}


def test_real_sts_sizes(shared_data: Path) -> None:
    assert len(list(sts.read_year(shared_data / "sts_senteval/STS12-en-test"))) == 3108
    assert len(list(sts.read_year(shared_data / "sts_senteval/STS14-en-test"))) == 3750
    path = shared_data / "sts_benchmark/stsbenchmark.tsv.gz"
    assert len(list(sts.read_benchmark(path, "test"))) == 1379
    assert len(list(sts.read_benchmark(path, "dev"))) == 1500
    assert len(list(sts.read_sick(shared_data / "sick/SICK_test_annotated.txt"))) == 4927


def test_broken_sts_folders(tmp_path: Path) -> None:
    year = tmp_path / "STS12"
    write(year / "STS.input.A.txt", "a\tb\nc\td\n")
    write(year / "STS.gs.A.txt", "1\n")
    with pytest.raises(ValueError, match="2 lines, STS.gs.A.txt 1"):
        list(sts.read_year(year))
    write(year / "STS.gs.A.txt", "1\nx\n")
    with pytest.raises(ValueError, match="STS.gs.A.txt, line 2: 'x'"):
        list(sts.read_year(year))
    path = write(tmp_path / "table.tsv", "split\tscore\tsentence1\n")
    with pytest.raises(ValueError, match="no column 'sentence2'"):
        list(sts.read_benchmark(path, "test"))


# -- classification ------------------------------------------------------------------------------


def test_undersampling_is_mtebs() -> None:
    """A transcription of `AbsTaskClassification._undersample_data`, ten times."""
    labels = [str(i) for i in np.random.default_rng(1).integers(0, 5, 200)]
    expected, indices = [], list(range(200))
    for _ in range(10):
        np.random.RandomState(42).shuffle(indices)
        counts: dict[str, int] = {}
        sampled = []
        for i in indices:
            if counts.get(labels[i], 0) < 8:
                sampled.append(i)
                counts[labels[i]] = counts.get(labels[i], 0) + 1
        expected.append(sampled)
    assert classification.undersample(labels, 8) == expected
    assert len({tuple(draw) for draw in expected}) == 10
    assert classification.undersample(["a", "b", "b"], 8)[0] != []


def classification_folder(folder: Path) -> Path:
    generator = np.random.default_rng(0)
    lines = {"train": [], "test": []}  # type: dict[str, list[str]]
    for split, size in (("train", 60), ("test", 20)):
        for _ in range(size):
            label = int(generator.integers(2))
            text = "".join(generator.choice(list("aabc" if label else "abbc"), 6))
            lines[split].append(f"{text}\t{label}")
    for split, rows in lines.items():
        write(folder / f"cls_sst2/{split}.tsv", "\n".join(rows) + "\n")
    return folder


def test_the_probe_is_scikit_learns(tmp_path: Path) -> None:
    classification_folder(tmp_path)
    train, test = (
        classification.read_tsv(tmp_path / f"cls_sst2/{split}.tsv") for split in ("train", "test")
    )
    encode = Letters().encode
    accuracies = []
    for draw in classification.undersample(train[1], 8):
        probe = LogisticRegression(random_state=42, max_iter=100)
        probe.fit(encode([train[0][i] for i in draw]), [train[1][i] for i in draw])
        accuracies.append(probe.score(encode(test[0]), test[1]))
    results = evaluate(Letters(), ["classification", "classification-full"], tmp_path)
    few, full = results.scores
    assert few.value == pytest.approx(100 * np.mean(accuracies))
    assert few.more["deviation"] == pytest.approx(100 * np.std(accuracies))
    whole = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    whole.fit(encode(train[0]), train[1])
    assert full.value == pytest.approx(100 * whole.score(encode(test[0]), test[1]))
    assert few.count == full.count == 20
    assert {score.suite for score in results.scores} == {"classification", "classification-full"}


def test_classification_files(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'text,category\n"two, ""words""\nhere",x\n')
    assert classification.DATASETS["Banking77"].read(path) == (['two, "words"\nhere'], ["x"])
    path = write(tmp_path / "a.tsv", '"open quote\t1\n')
    assert classification.read_tsv(path) == (['"open quote'], ["1"])
    path = write(tmp_path / "a.label", "NUM:dist How far is Bogotá ?\n", "latin-1")
    assert classification.read_trec(path) == (["How far is Bogotá ?"], ["NUM"])
    with pytest.raises(ValueError, match="line 1 is not"):
        classification.read_trec(write(tmp_path / "b.label", "no label\n"))
    with pytest.raises(ValueError, match="no column 'category'"):
        classification.DATASETS["Banking77"].read(write(tmp_path / "b.csv", "text,label\n"))


def test_real_classification_sizes(shared_data: Path) -> None:
    sizes = {}
    for name, dataset in classification.DATASETS.items():
        train = dataset.read(shared_data / dataset.folder / dataset.train)
        test = dataset.read(shared_data / dataset.folder / dataset.test)
        assert set(test[1]) <= set(train[1])
        sizes[name] = (len(train[0]), len(test[0]), len(set(train[1])))
    assert sizes == {
        "Banking77": (10003, 3080, 77),
        "TREC": (5452, 500, 6),
        "SST-2": (6920, 1821, 2),
        "AmazonCounterfactual": (4018, 670, 2),
    }


# -- retrieval -----------------------------------------------------------------------------------


def test_ndcg_and_recall_by_hand() -> None:
    gains = np.array([0.0, 2.0, 0.0, 1.0] + [0.0] * 20 + [1.0])
    found = retrieval.judge(gains, [2.0, 1.0, 1.0, 0.0])
    ideal = 2 + 1 / math.log2(3) + 1 / 2
    assert found["nDCG@10"] == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / ideal)
    assert found["recall@100"] == 1.0
    assert found["MRR@10"] == 0.5
    assert retrieval.judge(np.zeros(5), [1.0]) == {"nDCG@10": 0, "recall@100": 0, "MRR@10": 0}


def beir_folder(folder: Path) -> Path:
    corpus = [
        {"_id": "d1", "title": "aa", "text": "b"},
        {"_id": "d2", "title": "", "text": "bc"},
        {"_id": "d3", "text": "d"},
    ]
    queries = [{"_id": "q1", "text": "a"}, {"_id": "q2", "text": "c"}, {"_id": "q3", "text": "e"}]
    write(folder / "corpus.jsonl.gz", "\n".join(map(json.dumps, corpus)) + "\n")
    write(folder / "queries.jsonl", "\n".join(map(json.dumps, queries)) + "\n")
    write(
        folder / "qrels/test.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td1\t2\nq2\td2\t1\n"
    )
    return folder


def test_beir_by_hand(tmp_path: Path) -> None:
    beir_folder(tmp_path / "ret_mine")
    results = evaluate(Letters(), "retrieval", tmp_path)
    (score,) = results.scores
    # q1 finds d1 first. q2 finds d2, then d1, whose cosine is 0 but which comes before d3.
    ideal = 2 + 1 / math.log2(3)
    assert score.value == pytest.approx(100 * (1 + (1 + 2 / math.log2(3)) / ideal) / 2)
    assert (score.task, score.metric, score.count) == ("mine", "nDCG@10", 2)
    assert score.more["recall@100"] == 100
    assert {skip.task for skip in results.skipped} == {"scifact", "cisi", "cacm"}


def test_queries_and_documents_are_encoded_as_such(tmp_path: Path) -> None:
    class Model(Letters):
        def encode_query(self, texts: list[str]) -> np.ndarray:
            return self.encode([text + "q" for text in texts])

        def encode_document(self, texts: list[str]) -> np.ndarray:
            return self.encode([text + "z" for text in texts])

    model = Model()
    beir_folder(tmp_path / "ret_mine")
    evaluate(model, "retrieval", tmp_path)
    assert model.seen == ["aa bz", "bcz", "dz", "aq", "cq"]


def test_smart_collection(tmp_path: Path) -> None:
    folder = tmp_path / "ret_tiny"
    text = ".I 1\n.T \nA Title\n.A\nAuthor, A.\n.W\nwords of\n   it.\n.X\n1\t5\t1\n.I 2\n.T\nB\n"
    write(folder / "TINY.ALL.gz", text)
    write(folder / "TINY.QRY", ".I 1\n.W\na title\n.I 2\n.W\nnobody knows\n")
    write(folder / "TINY.REL", "    01    2\t0\t0.000000\n     1     1\t0\t0\n")
    collection = retrieval.read_smart(folder)
    assert collection.documents == {"1": "A Title words of it.", "2": "B"}
    assert collection.queries == {"1": "a title", "2": "nobody knows"}
    assert collection.judgements == {"1": {"1": 1.0, "2": 1.0}}
    assert evaluate(Letters(), "retrieval", tmp_path).scores[0].count == 1


def test_scifact_as_published(tmp_path: Path) -> None:
    folder = tmp_path / "ret_scifact"
    folder.mkdir()
    with zipfile.ZipFile(folder / "scifact.zip", "w") as archive:
        abstract = '"[\'It\'\'s one.\'\n ""Joe\'s two.""]"'
        archive.writestr(
            "corpus_train.csv", f"doc_id,title,abstract,structured\n7,T,{abstract},False\n"
        )
    write(folder / "beir_test_queries.jsonl", '{"_id": "1", "text": "it"}\n')
    write(folder / "beir_test_qrels.tsv", "query-id\tcorpus-id\tcorpus-id\trel\n1\t7\t7\t1\n")
    collection = retrieval.read_scifact(folder)
    assert collection.judgements == {"1": {"7": 1.0}}
    assert retrieval.array_texts("['one.'\n \"Joe's two.\" 'three \\'x\\'']") == [
        "one.",
        "Joe's two.",
        "three 'x'",
    ]
    assert evaluate(Letters(), "retrieval", tmp_path, tasks=["scifact"]).scores[0].value == 100


def test_real_collections(shared_data: Path) -> None:
    scifact = retrieval.read_scifact(shared_data / "ret_scifact")
    assert (len(scifact.documents), len(scifact.queries)) == (5183, 300)
    assert all(len(rels.keys() & scifact.documents) for rels in scifact.judgements.values())
    assert (
        "[" not in scifact.documents["4983"][:200] and "human newborn" in scifact.documents["4983"]
    )
    cisi = retrieval.read_smart(shared_data / "ret_cisi")
    assert (len(cisi.documents), len(cisi.queries), len(cisi.judgements)) == (1460, 112, 76)
    cacm = retrieval.read_smart(shared_data / "ret_cacm")
    assert len(cacm.documents) == 3204 and len(cacm.judgements) == 52
    assert cacm.documents["1"] == "Preliminary Report-International Algebraic Language"


# -- masked LM -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(shared_data / "tokenizer_modernbert")


@pytest.fixture
def masked_lm(tokenizer: Tokenizer) -> ModernBertForMaskedLM:
    return ModernBertForMaskedLM(SMALL)


def test_masking_takes_its_share_and_no_special_token() -> None:
    ids = [1, *range(10, 110), 2]
    masked = mask_tokens(ids, 5, [1, 2, None], 0.15, (0, 3))
    assert int((masked == 5).sum()) == 15
    assert masked[0] == 1 and masked[-1] == 2
    assert torch.equal(masked, mask_tokens(ids, 5, [1, 2, None], 0.15, (0, 3)))
    assert not torch.equal(masked, mask_tokens(ids, 5, [1, 2, None], 0.15, (0, 4)))
    assert mask_tokens([1, 2], 5, [1, 2], 0.15, (0, 0)).tolist() == [1, 2]
    assert mask_tokens([1, 9, 2], 5, [1, 2], 0.15, (0, 0)).tolist() == [1, 5, 2]


def test_accuracy_is_that_of_the_plain_forward(
    masked_lm: ModernBertForMaskedLM, tokenizer: Tokenizer
) -> None:
    texts = ["The weather is lovely today, he said.", "", "A longer text follows. " * 30]
    found = masked_lm_accuracy(masked_lm, tokenizer, texts, max_length=64, batch_tokens=70)
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    correct = total = 0
    loss = 0.0
    for index, ids in enumerate(tokenizer(texts, max_length=64).input_ids):
        inputs = mask_tokens(ids, tokenizer.mask_token_id or 0, special, 0.15, (0, index))
        with torch.no_grad():
            logits = masked_lm.eval()(inputs[None]).logits[0]
        for place, token in enumerate(ids):
            if inputs[place] != token:
                correct += int(logits[place].argmax() == token)
                loss -= logits[place].log_softmax(-1)[token].item()
                total += 1
    assert found.count == total > 9
    assert found.points["accuracy"] == pytest.approx(100 * correct / total)
    assert found.points["loss"] == pytest.approx(loss / total, rel=1e-5)


def test_a_model_that_always_says_the_same(
    masked_lm: ModernBertForMaskedLM, tokenizer: Tokenizer
) -> None:
    masked_lm.decoder.bias.data.zero_()[tokenizer("a").input_ids[0][1]] = 1e4
    assert masked_lm_accuracy(masked_lm, tokenizer, ["a", "b"]).points["accuracy"] == 50


def test_masked_lm_refusals(masked_lm: ModernBertForMaskedLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="rate is 0"):
        masked_lm_accuracy(masked_lm, tokenizer, ["a"], rate=0)
    with pytest.raises(ValueError, match="no token to mask"):
        masked_lm_accuracy(masked_lm, tokenizer, [""])


def test_the_mlm_suite_reads_what_training_holds_out(
    tmp_path: Path, masked_lm: ModernBertForMaskedLM, tokenizer: Tokenizer
) -> None:
    texts = [f"Title\narticle {number}" for number in range(600)]
    lines = "\n".join(json.dumps({"title": "Title", "text": text[6:]}) for text in texts)
    write(tmp_path / "text_wikipedia_en/a.jsonl.gz", lines + "\n")
    kept = [text for text in texts if is_validation(text, 0.01)]
    assert list(held_out_articles(tmp_path)) == kept and 0 < len(kept) < 20
    subject = Subject("mine", open_masked_lm=lambda: (masked_lm, tokenizer))
    results = evaluate([subject, Letters()], "mlm", tmp_path)
    found = masked_lm_accuracy(masked_lm, tokenizer, kept)
    assert results.scores[0].value == found.points["accuracy"]
    assert results.scores[0].count == found.count
    assert results.skipped == [
        Skipped("mlm", "Wikipedia", "it is no masked language model of this library", "Letters")
    ]


# -- code retrieval ------------------------------------------------------------------------------

SOURCE = '''
import os


def documented(a, b=2):
    """Adds two numbers.

    At length.
    """
    # a comment
    total = a + b

    print(total)
    return total


class Thing:
    def method(self):
        """Do what things do,
        and return it."""
        x = 1
        y = 2
        return x + y

    async def short(self):
        """Too short to be asked for."""
        return 1


def undocumented():
    a = 1
    b = 2
    return a + b


def only_words():
    """Nothing but this docstring."""


def brief():
    """Two words"""
    a = 1
    b = 2
    return a + b
'''


def test_functions_are_parted_from_their_docstrings() -> None:
    first, second = code_retrieval.functions_of(SOURCE, "package.module")
    assert first == (
        "package.module",
        "documented",
        "Adds two numbers.",
        "def documented(a, b=2):\n    # a comment\n    total = a + b\n\n    print(total)\n"
        "    return total",
    )
    assert (second.name, second.docstring) == ("method", "Do what things do, and return it.")
    assert second.code == "def method(self):\n    x = 1\n    y = 2\n    return x + y"
    assert list(code_retrieval.functions_of("def broken(:", "x")) == []


def test_the_split_goes_by_module() -> None:
    modules = ("argparse", "asyncio", "collections", "email", "json", "logging", "os", "unittest")
    assert {m for m in modules if code_retrieval.in_test_split(m)} == {
        m for m in modules if is_validation(m, 0.2)
    }
    test = list(code_retrieval.standard_library("test"))
    assert len(test) > 100
    assert all(code_retrieval.in_test_split(f.module.split(".")[0]) for f in test)
    assert len({f.docstring for f in test}) == len(test) == len({f.code for f in test})
    assert not any(f.docstring in f.code for f in test)
    first = next(code_retrieval.standard_library("train"))
    assert not code_retrieval.in_test_split(first.module.split(".")[0])
    with pytest.raises(ValueError, match="split is 'dev'"):
        next(code_retrieval.standard_library("dev"))


def test_code_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = [
        code_retrieval.Function("m", "f", "aaa", "aab"),
        code_retrieval.Function("m", "g", "ccc", "bcc"),
    ]
    monkeypatch.setattr(code_retrieval, "standard_library", lambda split: iter(functions))
    (score,) = evaluate(Letters(), "code", tmp_path).scores
    assert (score.value, score.count, score.metric) == (100, 2, "nDCG@10")


# -- long documents ------------------------------------------------------------------------------


class Cut(Letters):
    """Reads only the first characters of a text."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.characters = characters

    def encode(self, texts: list[str]) -> np.ndarray:
        return super().encode([text[: self.characters] for text in texts])


def test_a_needle_moves_only_what_reads_so_far() -> None:
    documents = [["zzzz " * 20] * 10, ["yyyy xxxx " * 10] * 10]
    reads_all = long_documents.needle_test(as_subject(Letters()), documents)
    assert reads_all.count == 10
    assert reads_all.points["towards"] == reads_all.points["moved"] == 100
    assert reads_all.points["shift"] > 0.01
    first_half = long_documents.needle_test(as_subject(Cut(450)), documents)
    assert first_half.points["towards"] == first_half.points["moved"] == 40
    by_depth = [first_half.points[f"towards at {depth}%"] for depth in (0, 25, 50, 75, 100)]
    assert by_depth == [100, 100, 0, 0, 0]
    with pytest.raises(ValueError, match="too short"):
        long_documents.needle_test(as_subject(Letters()), [])


def test_haystacks_fill_the_context(tokenizer: Tokenizer) -> None:
    subject = Subject("x", open_tokenizer=lambda: tokenizer)
    articles = ["A sentence of this article. " * 60 + "\n\n" + "Another. " * 90] * 60
    stacks = list(long_documents.haystacks(iter(articles), subject))
    assert len(stacks) >= 2
    for stack in stacks:
        for needle in long_documents.NEEDLES:
            (ids,) = tokenizer("\n".join([*stack, needle]), truncation=False).input_ids
            assert long_documents.TOKENS - 400 < len(ids) <= long_documents.TOKENS


def test_buried_paragraphs() -> None:
    paragraphs = [f"{letter}{number} " * 132 for letter in "abcde" for number in range(20)]
    articles = ["\n".join(paragraphs[start : start + 20])[:8000] for start in range(0, 100, 20)]
    collection = long_documents.buried_paragraphs([*articles, "short"])
    assert list(collection.documents) == ["0"]
    assert list(collection.queries) == ["0.1", "0.2", "0.3", "0.4", "1.1"]
    assert collection.queries["0.2"] == paragraphs[29]
    assert collection.judgements["0.2"] == {"0": 1.0}
    assert paragraphs[29] not in collection.documents["0"]
    assert paragraphs[28] in collection.documents["0"]
    assert 4 * 7500 < len(collection.documents["0"]) < 4 * 8000


def test_long_suite(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = []
    for number in range(3000):
        mine = f"{chr(97 + number % 13)}{chr(110 + number // 13 % 13)} "
        record = {"title": str(number), "text": "\n".join([mine * 90] * 70)}
        if is_validation("\n".join(record.values()), 0.01):
            lines.append(json.dumps(record))
    write(tmp_path / "text_wikipedia_en/a.jsonl.gz", "\n".join(lines) + "\n")
    subject = Subject("x", Letters, open_tokenizer=lambda: tokenizer)
    results = evaluate([subject, Letters(), Cut(8000)], "long", tmp_path)
    assert results.value("x", "long", "needle") == 100
    whole, first_part = (
        next(s for s in results.scores if (s.model, s.task) == (name, "buried paragraph"))
        for name in ("Letters", "Cut")
    )
    assert whole.count == first_part.count > 20
    parts = [f"nDCG@10 of part {part}" for part in (1, 2, 3, 4)]
    assert all(whole.more[part] > 60 for part in parts)
    assert first_part.more[parts[0]] > 60
    assert all(first_part.more[part] < whole.more[part] for part in parts[1:])
    assert ("needle", "it shows no tokenizer", "Letters") in [
        (skip.task, skip.reason, skip.model) for skip in results.skipped
    ]


# -- tokenizers ----------------------------------------------------------------------------------


def test_tokenizer_report(tmp_path: Path, shared_data: Path) -> None:
    write(tmp_path / "wordsim_minish/rw.txt", "squishing\tsquirt\t5\nhouse\tthe\t1\n")
    names = ("tokenizer_modernbert", "tokenizer_bert_uncased")
    results = evaluate([f"tokenizer:{shared_data / name}" for name in names], "tokenizer", tmp_path)
    modern, bert = (results.splits[str(shared_data / name)] for name in names)
    assert (modern["init"], modern[" init"], bert["init"]) == (["init"], ["Ġinit"], ["in", "##it"])
    assert modern["    return init"] == ["    ", "return", "Ġinit"]
    assert modern["        return init"] == ["        ", "return", "Ġinit"]
    assert bert["        return init"] == ["return", "in", "##it"]
    assert "".join(modern[" naïve"]).startswith("Ġna")
    words = results.scores[1]
    assert (words.task, words.metric, words.count) == ("rare words", "tokens/word", 4)
    assert words.value == sum(len(t) for t in (modern[" squishing"], "a", "bb", "c")) / 4
    assert "mean" not in results.table() and '"        return init"' in results.table()


def test_pieces_of_every_kind_of_tokenizer(shared_data: Path) -> None:
    file = shared_data / "tokenizer_modernbert/tokenizer.json"

    class Transformers:
        def tokenize(self, text: str) -> list[str]:
            return text.split()

    kinds = (Tokenizer.from_file(file), tokenizers.Tokenizer.from_file(str(file)), Transformers())
    pieces = [Subject("x", open_tokenizer=lambda k=kind: k).pieces("ab cd") for kind in kinds]
    assert pieces == [["ab", "Ġcd"], ["ab", "Ġcd"], ["ab", "cd"]]
    with pytest.raises(Unavailable, match="a int, is of no known kind"):
        Subject("x", open_tokenizer=lambda: 3).pieces("a")


# -- mteb ----------------------------------------------------------------------------------------


def test_the_mteb_adapter() -> None:
    class Model(Letters):
        similarity_fn_name = "dot"

        def encode_query(self, texts: list[str]) -> np.ndarray:
            return 2 * self.encode(texts)

    adapter = MtebEncoder(Model(), "org/letters")
    batches = [{"text": ["ab", "b"]}, {"text": ["ab"]}]
    plain = Letters().encode(["ab", "b", "ab"])
    options: dict[str, Any] = {"task_metadata": None, "hf_split": "test", "hf_subset": "en"}
    found = adapter.encode(batches, **options, batch_size=32, show_progress_bar=False)
    np.testing.assert_array_equal(found, plain)

    class PromptType(str, Enum):
        query = "query"
        document = "document"

    for kind, factor in ((PromptType.query, 2), (PromptType.document, 1), ("query", 2)):
        found = adapter.encode(batches, **options, prompt_type=kind)
        np.testing.assert_array_equal(found, factor * plain)
    assert adapter.similarity(plain, plain).tolist() == (plain @ plain.T).tolist()
    assert adapter.similarity_pairwise(plain, plain).tolist() == [2, 1, 2]


def test_mteb_itself_takes_the_adapter() -> None:
    mteb = pytest.importorskip("mteb", reason="mteb is not installed")
    adapter = MtebEncoder(Letters(), "org/letters", "1")
    assert isinstance(adapter, mteb.EncoderProtocol)
    assert (adapter.mteb_model_meta.name, adapter.mteb_model_meta.revision) == ("org/letters", "1")


# -- presets -------------------------------------------------------------------------------------


def test_presets_print_published_beside_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = presets.PRESETS["blog-model2vec"]
    assert preset.suites == ["sts", "wordsim", "classification"]

    def fail(name: str, **options: Any) -> Subject:
        raise OSError(f"{name} cannot be\nreached")

    monkeypatch.setitem(models.LOADERS, "distill", fail)
    subjects, unavailable = presets.open_rows(preset)
    assert subjects == [] and len(unavailable) == 3
    assert unavailable[preset.rows[0].source] == "BAAI/bge-base-en-v1.5 cannot be reached"
    results = evaluate({"mine": Letters()}, preset.suites, sts_folder(tmp_path))
    text = presets.comparison(preset, results, unavailable)
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert rows[0][:3] == ["model", "STS (p)", "STS (m)"]
    assert rows[3] == ["gte-modernbert-base, distilled", "66.50", "-", "25.60", "-", "60.40", "-"]
    assert rows[5] == ["mine", "-", "83.33", "-", "-", "-", "-"]
    assert "- bge-base-en-v1.5, distilled: BAAI/bge-base-en-v1.5 cannot be reached" in text

    monkeypatch.setitem(models.LOADERS, "distill", lambda name, **_: Subject(name, Letters))
    subjects, unavailable = presets.open_rows(preset)
    assert not unavailable
    text = presets.comparison(preset, evaluate(subjects, "sts", tmp_path), {})
    assert text.count("83.33") == 3 and "cannot be had" not in text


# -- evaluate, results, command ------------------------------------------------------------------


def test_what_is_measured_can_be_kept_as_it_comes(tmp_path: Path) -> None:
    sizes: list[int] = []
    evaluate(
        Letters(),
        "sts",
        sts_folder(tmp_path),
        after_task=lambda found: sizes.append(len(found.scores)),
    )
    assert sizes == [1, 2, 3]


def test_arguments_are_checked_before_anything_runs(tmp_path: Path) -> None:
    model = Letters()
    for arguments, message in (
        ({"suites": "nonsense"}, "no suite 'nonsense'; choose from wordsim"),
        ({"data": tmp_path / "absent"}, "there is no folder"),
        ({"tasks": ["STS11"]}, "no task 'STS11'"),
        ({"pairs": [tmp_path / "absent.tsv"]}, "there is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, **({"data": tmp_path} | arguments))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="int has no method encode"):
        evaluate(3, data=tmp_path)
    with pytest.raises(ValueError, match="two models are called 'Letters'"):
        evaluate([Letters(), Letters()], data=tmp_path)
    assert model.seen == []


def test_names_of_every_kind(shared_data: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = shared_data / "model2vec_rs_fixtures"
    wanted = json.loads((folder / "embeddings_short.json").read_text())
    for kind in ("float32", "sentence-transformers"):
        subject = load_subject(str(folder / f"test-model-{kind}"))
        np.testing.assert_allclose(subject.embed(["hello world"])[0], np.ravel(wanted), rtol=1e-5)
        assert subject.pieces("hello") == ["hello"]
        with pytest.raises(Unavailable, match="static model"):
            subject.masked_lm  # noqa: B018
    with pytest.raises(Unavailable, match="encodes no texts"):
        load_subject("tokenizer:anything").embed(["a"])
    with pytest.raises(ValueError, match="no kind of model is called 'xy'; known are st,"):
        load_subject("xy:anything")
    SentenceEncoder(ModernBertModel(SMALL), tokenizer).save_pretrained(tmp_path)
    subject = load_subject(str(tmp_path), device="cpu", dtype="float32")
    assert len(subject.embed(["one", "two"])) == 2 and subject.pieces("a")
    with pytest.raises(Unavailable, match="no masked-LM head"):
        subject.masked_lm  # noqa: B018


def test_a_masked_lm_by_name(
    tmp_path: Path, masked_lm: ModernBertForMaskedLM, tokenizer: Tokenizer
) -> None:
    masked_lm.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, its_tokenizer = load_subject(str(tmp_path), device="cpu").masked_lm
    texts = ["Some words to be masked."]
    found = masked_lm_accuracy(loaded, its_tokenizer, texts)
    assert found == masked_lm_accuracy(masked_lm, tokenizer, texts)


def test_an_absent_library_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"scipy: pip install 'modernbert\[evaluate\]'"):
        evaluate(Letters(), "sts", sts_folder(tmp_path))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    for name in ("st:any", "package:any"):
        with pytest.raises(ImportError, match="any needs sentence-transformers"):
            load_subject(name).embed(["a"])


def test_a_model_that_a_package_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `distill` takes it; only installed packages are looked into."""
    opened = []

    def transformer(name: str, **options: Any) -> Letters:
        opened.append((name, options["device"]))
        return Letters()

    pytest.importorskip("sentence_transformers")
    monkeypatch.setattr("sentence_transformers.SentenceTransformer", transformer)
    folder = "/site-packages/carried/model"
    monkeypatch.setattr("modernbert.training.teacher._folder_in_package", lambda name: folder)
    subject = load_subject("package:carrier", device="cpu")
    assert subject.name == "package:carrier" and not opened
    assert len(subject.embed(["a", "b"])) == 2
    assert opened == [(folder, "cpu")]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no installed package 'no-such-thing' holds a model"):
        load_subject("package:no-such-thing").embed(["a"])


def test_results_table_and_json(tmp_path: Path) -> None:
    scores = [
        Score("org/a", "sts", "STS12", "spearman", 50.0, 3, 0.5, {"pearson": 1.0}),
        Score("org/a", "sts", "STS13", "spearman", 60.126, 1200, 0.5),
        Score("b", "sts", "STS12", "spearman", 70.0, 3, 0.5),
    ]
    results = Results(scores, [Skipped("mlm", "Wikipedia", "no data")])
    assert results.mean("org/a", "sts") == pytest.approx(55.063)
    assert results.mean("b", "sts") is None
    assert results.mean("b", "sts", ["STS12"]) == 70
    table = results.table().splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == [
        "sts",
        "metric",
        "over",
        "a",
        "b",
    ]
    assert [cell.strip() for cell in table[3].split("|")[4:-1]] == ["60.13", "-"]
    assert [cell.strip() for cell in table[4].split("|")[1:-1]] == [
        "mean of 2",
        "",
        "",
        "55.06",
        "-",
    ]
    assert table[-1] == "- mlm: Wikipedia: no data"
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    assert (results + Results(scores[:1])).scores == [*scores, scores[0]]
    with pytest.raises(ValueError, match="no results of an evaluation"):
        Results.from_dict({"scores": [{}], "skipped": []})


@click.group(cls=OneLineErrors)
@click.option("--debug", is_flag=True)
def group(debug: bool) -> None:
    pass


group.add_command(command)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def letters(name: str, **options: Any) -> Subject:
        return Subject(name, Letters)

    monkeypatch.setitem(models.LOADERS, "letters", letters)
    sts_folder(tmp_path)
    arguments = ["evaluate", "letters:a", "letters:b", "--data", str(tmp_path), "--suite", "sts"]
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    result = CliRunner().invoke(group, [*arguments, *files])
    assert result.exit_code == 0, result.output
    assert "| SICK-R" in result.stdout and "mean of 3" in result.stdout
    assert len(Results.load(tmp_path / "out.json").scores) == 6
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    again = CliRunner().invoke(group, ["evaluate", "--with", str(tmp_path / "out.json")])
    assert again.stdout == result.stdout
    more = [*arguments[:1], "letters:c", *arguments[3:], *files[:2], "--with", files[1]]
    assert CliRunner().invoke(group, more).exit_code == 0
    both = Results.load(tmp_path / "out.json")
    assert (both.models, len(both.scores)) == (["a", "b", "c"], 9)
    short = CliRunner().invoke(group, [*arguments, "--dims", "2", "--dims", "1"])
    columns = [cell.strip() for cell in short.stdout.split("\n")[0].split("|")]
    assert [c for c in columns if "[" in c] == ["a [:2]", "a [:1]", "b [:2]", "b [:1]"]
    for wrong, message in (
        (["evaluate"], "name a MODEL"),
        (["evaluate", "letters:a"], "--data is missing"),
        ([*arguments, "--suite", "nonsense"], "choose from wordsim"),
    ):
        failed = CliRunner().invoke(group, wrong)
        assert failed.exit_code == 2 and message in failed.stderr
