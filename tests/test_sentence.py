"""SentenceEncoder: streams, budgets, retries, truncation, precision, similarity."""

import json
import logging
import math
import random
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as hst
from tqdm import tqdm

from modernbert import ModernBertConfig, ModernBertModel, SentenceEncoder, Tokenizer
from modernbert.encode_options import EncodeOptions
from modernbert.packing import pack
from modernbert.pooling import POOLING_FLAGS, Dense, Normalize, Pooling
from modernbert.quantization import Calibration, quantize
from modernbert.similarity import SIMILARITIES
from modernbert.streaming import EncodeReport, NotFinite, Stream
from modernbert.tokenizer import TokenizedBatch

HIDDEN = 32
WORDS = (
    "the a man woman is playing flute guitar slowly in park under old tree with two dogs".split()
)


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(shared_data / "tokenizer_modernbert")


@pytest.fixture
def encoder(tokenizer: Tokenizer) -> SentenceEncoder:
    """Four layers at unit scale, so that every part of the model matters."""
    config = ModernBertConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=16,
    )
    model = ModernBertModel(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
        else:
            parameter.data.normal_(0, 1 if "embeddings" in name else parameter.shape[1] ** -0.5)
    return SentenceEncoder(model, tokenizer).eval()


def sentences(count: int, seed: int = 0) -> list[str]:
    """Sentences of 1 to 60 words."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, 61, count)
    return [" ".join(generator.choice(WORDS, size)) for size in sizes]


def close(actual: Any, expected: Any, tolerance: float = 1e-6) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=tolerance, rtol=0)


# -- pooling --------------------------------------------------------------------------------------


def pooled_alone(mode: str, x: torch.Tensor) -> torch.Tensor:
    """The definition of a mode for one text, (length, D) to (D,)."""
    weights = torch.arange(1, len(x) + 1).to(x)[:, None]
    vectors = {
        "cls": x[0],
        "lasttoken": x[-1],
        "max": x.amax(0),
        "mean": x.mean(0),
        "mean_sqrt_len_tokens": x.sum(0) / len(x) ** 0.5,
        "weightedmean": (x * weights).sum(0) / weights.sum(),
    }
    return vectors[mode]


@settings(max_examples=60, deadline=None)
@given(hst.lists(hst.integers(1, 300), min_size=1, max_size=8), hst.sampled_from([*POOLING_FLAGS]))
def test_every_text_is_pooled_by_itself(lengths: list[int], mode: str) -> None:
    x = torch.randn(sum(lengths), 3, dtype=torch.float64)
    expected = [pooled_alone(mode, part) for part in x.split(lengths)]
    actual = Pooling(3, (mode,))(x, pack([[1] * n for n in lengths]))
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("mode", ["mean", "mean_sqrt_len_tokens", "weightedmean"])
def test_a_long_sum_keeps_its_digits(mode: str) -> None:
    x = torch.rand(8192, 4)
    exact = pooled_alone(mode, x.double())
    error = (Pooling(4, (mode,))(x, pack([[1] * 8192]))[0].double() - exact).abs() / exact
    assert error.max() < 3e-7


@pytest.mark.parametrize("mode", POOLING_FLAGS)
def test_pooling_ignores_the_neighbours_bit_by_bit(mode: str) -> None:
    lengths = [7, 1, 200, 64, 65]
    batch = pack([[1] * n for n in lengths])
    hidden = torch.randn(sum(lengths), 16)
    together = Pooling(16, (mode,))(hidden, batch)
    for part, row, n in zip(batch.split(hidden), together, lengths, strict=True):
        assert torch.equal(Pooling(16, (mode,))(part, pack([[1] * n]))[0], row)


def test_pooling_of_half_precision_is_done_in_float32() -> None:
    hidden = torch.full((3000, 2), 1.001, dtype=torch.bfloat16)
    vector = Pooling(2)(hidden, pack([[1] * 3000]))
    assert vector.dtype == torch.float32
    close(vector, hidden[:1].float())


def test_a_prompt_that_swallows_the_text_leaves_a_token() -> None:
    pooling = Pooling(4, ("mean",), include_prompt=False)
    hidden = torch.randn(5, 4)
    batch = pack([[1, 2], [1, 2, 3]])
    close(pooling(hidden, batch, prompt_length=2), torch.stack((hidden[1], hidden[4])))
    assert torch.isfinite(pooling(hidden, batch, prompt_length=9)).all()


@pytest.mark.parametrize("mode", POOLING_FLAGS)
def test_gradients_flow_through_the_encoder(encoder: SentenceEncoder, mode: str) -> None:
    encoder.pooling = Pooling(HIDDEN, (mode,))
    encoder(pack([[50281, 10, 20, 50282], [50281, 50282]])).pow(3).sum().backward()
    gradient = encoder.model.layers[1].mlp.Wi.weight.grad
    assert gradient is not None and gradient.abs().sum() > 0


@pytest.mark.parametrize(
    ("modes", "include_prompt", "options", "trims"),
    [
        (("cls",), True, {}, True),
        (("cls",), True, {"prompt": "query: "}, True),
        (("cls",), False, {}, True),
        (("cls",), False, {"prompt": "query: "}, False),  # [CLS] belongs to the prompt
        (("cls",), True, {"output_value": None}, False),
        (("cls",), True, {"output_value": "token_embeddings"}, False),
        (("cls", "mean"), True, {}, False),
        (("mean",), True, {}, False),
    ],
)
def test_the_last_layer_computes_what_the_pooling_reads(
    encoder: SentenceEncoder,
    monkeypatch: pytest.MonkeyPatch,
    modes: tuple[str, ...],
    include_prompt: bool,
    options: dict[str, Any],
    trims: bool,
) -> None:
    encoder.pooling = Pooling(HIDDEN, modes, include_prompt=include_prompt)
    batches: list[Any] = []
    forward, trimmed = encoder.model.forward, []

    def watched(batch: Any, first_only: bool = False) -> Any:
        batches.append(batch)
        trimmed.append(first_only)
        return forward(batch, first_only=first_only)

    monkeypatch.setattr(encoder.model, "forward", watched)
    vectors = encoder.encode(sentences(5), batch_size=5, **options)
    assert trimmed == [trims]
    if "output_value" not in options:
        skipped = 4 if options and not include_prompt else 0  # [CLS] and the prompt's three tokens
        with torch.no_grad():
            hidden = forward(batches[0]).last_hidden_state
            expected = encoder.pooling(hidden, batches[0], skipped)
        lengths = encoder.tokenizer([options.get("prompt", "") + t for t in sentences(5)])
        order = sorted(range(5), key=lambda i: -len(lengths.input_ids[i]))
        close(vectors[order], expected, 1e-5)


def test_attention_dropout_is_not_skipped_in_training(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder.pooling = Pooling(HIDDEN, ("cls",))
    trimmed: list[bool] = []
    forward = encoder.model.forward

    def watched(batch: Any, first_only: bool = False) -> Any:
        trimmed.append(first_only)
        return forward(batch, first_only=first_only)

    monkeypatch.setattr(encoder.model, "forward", watched)
    batch = pack([[50281, 10, 50282]])
    encoder.train()(batch)
    encoder.model.config = encoder.model.config.replace(attention_dropout=0.1)
    encoder(batch)
    encoder.eval()(batch)
    assert trimmed == [True, False, True]


# -- encode ---------------------------------------------------------------------------------------


def test_shapes_and_kinds_of_results(encoder: SentenceEncoder) -> None:
    one = encoder.encode("A text.")
    assert isinstance(one, np.ndarray) and one.shape == (HIDDEN,) and one.dtype == np.float32
    two = encoder.encode(["A text.", "Another."])
    assert two.shape == (2, HIDDEN)
    close(two[0], one)
    tensor = encoder.encode(["A text."], convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor) and tensor.shape == (1, HIDDEN)
    rows = encoder.encode(["A text.", "Another."], convert_to_numpy=False)
    assert isinstance(rows, list) and [row.shape for row in rows] == [(HIDDEN,)] * 2
    assert encoder.encode("A text.", convert_to_numpy=False).shape == (HIDDEN,)
    assert encoder.encode([]).shape == (0, HIDDEN)
    assert encoder.encode([], convert_to_tensor=True).shape == (0, HIDDEN)
    assert encoder.encode([], convert_to_numpy=False) == []
    assert encoder.encode([], precision="ubinary", truncate_dim=9).shape == (0, 2)
    assert encoder.encode([], output_value="token_embeddings") == []


def test_any_iterable_will_do(encoder: SentenceEncoder) -> None:
    texts = sentences(20)
    expected = encoder.encode(texts)
    for form in (tuple(texts), np.array(texts), iter(texts), dict.fromkeys(texts)):
        close(encoder.encode(form), expected)


def test_token_embeddings(encoder: SentenceEncoder) -> None:
    texts = sentences(9)
    states = encoder.encode(texts, output_value="token_embeddings")
    lengths = [len(ids) for ids in encoder.tokenizer(texts).input_ids]
    assert [state.shape for state in states] == [(n, HIDDEN) for n in lengths]
    close(torch.stack([state.mean(0) for state in states]), encoder.encode(texts), 1e-5)
    everything = encoder.encode(texts[3], output_value=None)
    assert everything["input_ids"].tolist() == encoder.tokenizer(texts[3:4]).input_ids[0]
    assert everything["attention_mask"].tolist() == [1] * lengths[3]
    close(everything["token_embeddings"], states[3])
    close(everything["sentence_embedding"], encoder.encode(texts[3]))


@pytest.mark.parametrize("text", ["", "x", " ", "\n\n", "\0", "é" * 3000, "👩‍👩‍👧‍👦" * 50])
def test_odd_texts(encoder: SentenceEncoder, text: str) -> None:
    vector = encoder.encode(text, normalize_embeddings=True)
    assert np.isfinite(vector).all() and abs(np.linalg.norm(vector) - 1) < 1e-5


@pytest.mark.parametrize("unit", ["a", "word ", "\u4f60", "- ", "\n"])
def test_a_megabyte(encoder: SentenceEncoder, unit: str) -> None:
    encoder.max_seq_length = 64
    report = EncodeReport(truncated=None)
    text = unit * (2**20 // len(unit))
    vector = encoder.encode(text, report=report)
    assert np.isfinite(vector).all() and report.tokens == 64 and report.truncated is None
    assert report.truncated_texts == 1
    assert report.cut_tokens == len(encoder.tokenizer(text, truncation=False).input_ids[0]) - 64


def test_a_vector_does_not_depend_on_its_batch(encoder: SentenceEncoder) -> None:
    texts = sentences(64)
    together = encoder.encode(texts, normalize_embeddings=True)
    for index in (0, 7, 31, 63):
        alone = encoder.encode(texts[index], normalize_embeddings=True)
        close(alone, together[index])
    assert abs(together[0] - together[1]).max() > 0.01


def test_invariant_vectors_are_the_same_to_the_last_bit(encoder: SentenceEncoder) -> None:
    texts = sentences(24)
    expected = encoder.encode(texts, invariant=True)
    generator = random.Random(0)
    different = 0
    for _ in range(50):
        rows = generator.sample(range(24), generator.randint(1, 24))
        chosen, budget = [texts[i] for i in rows], generator.randint(1, 400)
        actual = encoder.encode(chosen, invariant=True, batch_tokens=budget)
        assert np.array_equal(actual, expected[rows])
        different += not np.array_equal(encoder.encode(chosen), expected[rows])
    assert different > 25  # what the option is for


def test_encode_leaves_no_trace(encoder: SentenceEncoder) -> None:
    encoder.train()
    vector = encoder.encode("A text.", convert_to_tensor=True)
    assert encoder.training and encoder.model.training
    assert not vector.requires_grad and not vector.is_inference()
    encoder(pack([[50281, 50282]])).sum().backward()  # rotary tables are usable in training, too


def test_prompts(encoder: SentenceEncoder, caplog: pytest.LogCaptureFixture) -> None:
    text = "A text."
    encoder.prompts |= {"query": "query: ", "passage": "passage: "}
    close(encoder.encode_query(text), encoder.encode("query: " + text))
    close(encoder.encode_document(text), encoder.encode("passage: " + text))
    close(encoder.encode(text, prompt_name="passage"), encoder.encode("passage: " + text))
    encoder.default_prompt_name = "query"
    close(encoder.encode(text), encoder.encode_query(text))
    close(encoder.encode(text, prompt=""), encoder.encode(text, prompt_name="document"))
    encoder.prompts |= {"document": "document: ", "query": ""}
    close(encoder.encode_document(text), encoder.encode(text, prompt="document: "))
    close(encoder.encode_query(text), encoder.encode(text, prompt=""))
    with caplog.at_level(logging.WARNING, logger="modernbert"):
        encoder.encode(text, prompt_name="query", prompt="p: ")
    assert "prompt_name is ignored" in caplog.text
    with pytest.raises(ValueError, match=r"no prompt 'absent'.*'query'"):
        encoder.encode(text, prompt_name="absent")


def test_truncation_of_dimensions(encoder: SentenceEncoder) -> None:
    full = encoder.encode("A text.")
    close(encoder.encode("A text.", truncate_dim=8), full[:8])
    short = encoder.encode("A text.", truncate_dim=8, normalize_embeddings=True)
    close(short, full[:8] / np.linalg.norm(full[:8]))
    with encoder.truncate_embeddings(5):
        assert encoder.get_embedding_dimension() == encoder.get_sentence_embedding_dimension() == 5
        assert encoder.encode("A text.").shape == (5,)
        assert encoder.encode("A text.", truncate_dim=7).shape == (7,)
        stream = encoder.encode_stream(["A text."])
    assert next(stream).shape == (5,)  # what holds is what held at the call
    assert encoder.get_embedding_dimension() == HIDDEN
    assert encoder.encode("A text.", truncate_dim=1000).shape == (HIDDEN,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"foo": 1}, r"unknown options \['foo'\].*prompt_name.*truncation"),
        ({"sentences": ["x"]}, "encode takes inputs"),
        ({"output_value": "vectors"}, "token_embeddings"),
        ({"precision": "int4"}, "ubinary"),
        ({"precision": "int8"}, "calibrate"),
        ({"precision": "binary", "output_value": None}, "sentence embeddings only"),
        ({"truncation": "loud"}, "warn, cut, error"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_tokens": -1}, "batch_tokens is -1"),
        ({"window": 0}, "window is 0"),
        ({"truncate_dim": 0}, "truncate_dim is 0"),
        ({"device": ["cpu", "cpu"]}, "one process per device"),
    ],
)
def test_wrong_options_are_named(encoder: SentenceEncoder, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encoder.encode(["x"], **options)
    with pytest.raises(ValueError, match=message):
        encoder.encode_stream(["x"], **options)  # at the call, not at the first vector


@pytest.mark.parametrize("wrong", [None, 3, b"bytes", ["list"], float("nan")])
def test_what_is_no_text_is_named_by_its_index(encoder: SentenceEncoder, wrong: Any) -> None:
    with pytest.raises(ValueError, match=f"input 2 is {type(wrong).__name__}"):
        encoder.encode(["a", "b", wrong])
    with pytest.raises(ValueError, match="input 3000 is"):
        list(encoder.encode_stream([*["a"] * 3000, wrong], window=64))


def test_a_lone_surrogate_is_named_by_its_index(encoder: SentenceEncoder) -> None:
    with pytest.raises(ValueError, match="text 1500 has the lone surrogate"):
        encoder.encode([*["a"] * 1500, "b\ud800", "c"])


@pytest.mark.parametrize("wrong", [None, 3, 2.5])
def test_inputs_that_are_no_iterable(encoder: SentenceEncoder, wrong: Any) -> None:
    with pytest.raises(ValueError, match="iterable of texts"):
        encoder.encode(wrong)


def test_settings_are_checked(encoder: SentenceEncoder) -> None:
    with pytest.raises(ValueError, match="max_seq_length is 2"):
        encoder.max_seq_length = 2
    with pytest.raises(ValueError, match="truncate_dim is 0"):
        encoder.truncate_dim = 0
    with pytest.raises(ValueError, match="maxsim"):
        encoder.similarity_fn_name = "maxsim"
    with pytest.raises(ValueError, match="not one text"):
        encoder.encode_stream("text")


# -- streams --------------------------------------------------------------------------------------


def test_a_stream_yields_in_order(encoder: SentenceEncoder) -> None:
    texts = sentences(150)
    expected = encoder.encode(texts)
    rows = list(encoder.encode_stream(iter(texts), window=32, batch_tokens=200))
    assert all(isinstance(row, np.ndarray) and row.shape == (HIDDEN,) for row in rows)
    close(np.stack(rows), expected)
    tensors = list(encoder.encode_stream(texts, convert_to_tensor=True, window=7))
    close(torch.stack(tensors), expected)
    assert list(encoder.encode_stream([])) == []


def test_a_stream_reads_no_more_than_its_window_ahead(encoder: SentenceEncoder) -> None:
    read = 0

    def source() -> Iterator[str]:
        nonlocal read
        for text in sentences(100):
            read += 1
            yield text

    stream = encoder.encode_stream(source(), window=10)
    assert read == 0
    for index, _ in enumerate(stream):
        assert read == 10 * (index // 10 + 1)


def test_an_endless_stream(encoder: SentenceEncoder) -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "again"

    stream = encoder.encode_stream(endless(), window=16)
    assert [next(stream).shape for _ in range(40)] == [(HIDDEN,)] * 40


def test_a_stream_forgets_what_it_has_read(encoder: SentenceEncoder) -> None:
    class Text(str):
        """A text whose life can be watched."""

    alive: weakref.WeakSet[Text] = weakref.WeakSet()

    def source() -> Iterator[str]:
        for number in range(1000):
            text = Text(f"sentence {number}")
            alive.add(text)
            yield text

    most = 0
    for _ in encoder.encode_stream(source(), window=50):
        most = max(most, len(alive))
    assert most <= 51  # one window, and the text at which the source stands


def test_long_texts_end_a_window_early(encoder: SentenceEncoder) -> None:
    read = 0

    def source() -> Iterator[str]:
        nonlocal read
        for _ in range(5000):
            read += 1
            yield "word " * 10

    next(encoder.encode_stream(source(), batch_tokens=200, window=5000))
    assert read == 1024  # 50 characters each, 4 a token: 64 batches of 200 tokens


@pytest.fixture
def overlapping(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams work ahead as they do for a GPU."""
    monkeypatch.setattr(
        "modernbert.sentence.Stream", lambda **options: Stream(**options | {"overlap": True})
    )


def tokenizing_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("modernbert")]


def test_what_overlaps(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not encoder._stream(EncodeOptions(batch_tokens=9)).overlap
    monkeypatch.setattr(SentenceEncoder, "device", torch.device("cuda"))
    assert encoder._stream(EncodeOptions(batch_tokens=9)).overlap
    assert not encoder._stream(EncodeOptions(batch_tokens=9, window=1)).overlap


def test_a_window_is_tokenised_while_the_one_before_is_run() -> None:
    tokenized = [threading.Event() for _ in range(5)]
    run: list[int] = []

    def tokenize(texts: list[str]) -> TokenizedBatch:
        tokenized[int(texts[0])].set()
        return TokenizedBatch([[int(text)] for text in texts], [], [])

    def compute(ids: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
        number = int(ids[0])
        if number < 4:
            assert tokenized[number + 1].wait(60)
        if number < 3:
            assert not tokenized[number + 2].is_set()  # one window ahead, not more
        run.append(number)
        return lambda: torch.stack(ids)

    report = EncodeReport(batch_tokens=10)
    stream = Stream(tokenize, compute, 10, report, window=1, overlap=True)
    windows = [window.tolist() for window in stream.windows(str(i) for i in range(5))]
    assert windows == [[[i]] for i in range(5)] and run == [0, 1, 2, 3, 4]
    assert not tokenizing_threads()


def batches_of_three(numbers: list[int], trouble: dict[int, Exception]) -> tuple[Any, list[str]]:
    """What a window of numbers gives, three in a batch, and what happened in which order."""
    happened: list[str] = []

    def tokenize(texts: list[str]) -> TokenizedBatch:
        return TokenizedBatch([[int(text)] for text in texts], [], [])

    def start(ids: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
        name = ",".join(str(int(x)) for x in ids)
        happened.append(f"start {name}")
        error = trouble.pop(int(ids[0]), None)
        if isinstance(error, RuntimeError):
            raise error

        def wait() -> torch.Tensor:
            happened.append(f"wait {name}")
            if error is not None:
                raise error
            return torch.stack(ids)

        return wait

    stream = Stream(tokenize, start, 10, EncodeReport(batch_tokens=3))
    (window,) = stream.windows(map(str, numbers))
    return window.flatten().tolist(), happened


def test_the_next_batch_is_started_before_the_last_is_waited_for() -> None:
    """On a GPU there is always work to do; what is waited for is on its way to the host."""
    numbers = list(range(8))
    found, happened = batches_of_three(numbers, {})
    assert found == numbers
    assert happened == [
        *("start 0,1,2", "start 3,4,5", "wait 0,1,2", "start 6,7", "wait 3,4,5", "wait 6,7")
    ]


def test_memory_that_runs_out_leaves_the_batch_under_way_alone() -> None:
    found, happened = batches_of_three(list(range(6)), {3: RuntimeError("CUDA out of memory")})
    assert found == list(range(6))
    assert happened == [
        *("start 0,1,2", "start 3,4,5", "start 3", "wait 0,1,2", "start 4", "wait 3"),
        *("start 5", "wait 4", "wait 5"),
    ]


def test_texts_of_a_bad_batch_run_alone_while_the_next_is_under_way() -> None:
    found, happened = batches_of_three(list(range(6)), {0: NotFinite("NaN")})
    assert found == list(range(6))
    alone = [f"{verb} {i}" for i in range(3) for verb in ("start", "wait")]
    assert happened == ["start 0,1,2", "start 3,4,5", "wait 0,1,2", *alone, "wait 3,4,5"]


@pytest.mark.usefixtures("overlapping")
def test_overlap_changes_no_bit(encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder.max_seq_length = 40
    texts = sentences(150)
    reports = [EncodeReport(), EncodeReport()]
    options: dict[str, Any] = {"window": 16, "batch_tokens": 150, "truncation": "cut"}
    ahead = encoder.encode(iter(texts), report=reports[0], **options)
    streamed = list(encoder.encode_stream(iter(texts), **options))
    empty = encoder.encode([], **options)
    monkeypatch.setattr("modernbert.sentence.Stream", Stream)
    assert np.array_equal(encoder.encode(texts, report=reports[1], **options), ahead)
    assert np.array_equal(np.stack(streamed), ahead) and empty.shape == (0, HIDDEN)
    assert reports[0] == reports[1] and reports[0].truncated_texts
    assert not tokenizing_threads()


@pytest.mark.usefixtures("overlapping")
def test_a_stream_that_is_closed_leaves_no_thread(encoder: SentenceEncoder) -> None:
    readers, read = set(), 0

    def source() -> Iterator[str]:
        nonlocal read
        while True:
            readers.add(threading.current_thread())
            read += 1
            yield "again"

    stream = encoder.encode_stream(source(), window=10)
    for _ in range(11):
        next(stream)
    assert len(tokenizing_threads()) == 1
    stream.close()  # type: ignore[attr-defined]
    assert not tokenizing_threads() and read == 30
    assert readers == {threading.current_thread()}  # a database cursor may belong to it


@pytest.mark.usefixtures("overlapping")
def test_errors_of_the_thread_reach_the_caller(encoder: SentenceEncoder) -> None:
    for wrong, message in (("b\ud800", "text 47 has the lone surrogate"), (3, "input 47 is int")):
        with pytest.raises(ValueError, match=message):
            list(encoder.encode_stream([*["a"] * 47, wrong, "c"], window=8))
    encoder.max_seq_length = 12
    texts = [*["short"] * 20, " ".join(["word"] * 30)]
    with pytest.raises(ValueError, match=r"text 20 has 32 tokens"):
        encoder.encode(texts, truncation="error", window=4)
    encoder.model = Limited(encoder.model, 0, RuntimeError("illegal instruction"))  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="illegal instruction"):
        encoder.encode(texts, truncation="cut", window=4)
    assert not tokenizing_threads()


def test_a_row_does_not_keep_its_window(encoder: SentenceEncoder) -> None:
    row = next(encoder.encode_stream(sentences(50), convert_to_tensor=True))
    assert row.untyped_storage().nbytes() == row.nbytes


def test_batches_hold_the_token_budget(
    encoder: SentenceEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[tuple[int, ...]] = []
    forward = encoder.model.forward

    def watched(batch: Any) -> Any:
        batches.append(batch.lengths)
        return forward(batch)

    monkeypatch.setattr(encoder.model, "forward", watched)
    texts = sentences(100)
    encoder.encode(texts, batch_tokens=90)
    assert sum(map(len, batches)) == 100
    assert all(sum(lengths) <= 90 or len(lengths) == 1 for lengths in batches)
    flat = [n for lengths in batches for n in lengths]
    assert flat == sorted(flat, reverse=True)  # one window: longest first
    batches.clear()
    encoder.encode(texts, batch_size=3)
    assert {len(lengths) for lengths in batches} == {3, 1}


# -- trouble --------------------------------------------------------------------------------------


class Limited(torch.nn.Module):
    """A model that runs out of memory above `limit` tokens."""

    def __init__(self, model: Any, limit: int, error: Exception) -> None:
        super().__init__()
        self.model, self.limit, self.error = model, limit, error
        self.config = model.config
        self.device = model.device
        self.tried: list[int] = []
        self.alive: list[weakref.ref[torch.Tensor]] = []

    def forward(self, batch: Any) -> Any:
        assert all(ref() is None for ref in self.alive), "a failed attempt still holds memory"
        self.tried.append(batch.num_tokens)
        if batch.num_tokens > self.limit:
            activation = torch.zeros(batch.num_tokens)
            self.alive.append(weakref.ref(activation))
            raise type(self.error)(*self.error.args)  # a new one: the old has a traceback
        return self.model(batch)


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 12 bytes."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 12 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=repr)
def test_out_of_memory_halves_the_budget(
    encoder: SentenceEncoder, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    texts = sentences(80)
    expected = encoder.encode(texts, batch_tokens=1000)
    limited = Limited(encoder.model, 300, error)
    encoder.model = limited  # type: ignore[assignment]
    report = EncodeReport()
    with caplog.at_level(logging.WARNING, logger="modernbert"):
        close(encoder.encode(texts, batch_tokens=1000, report=report), expected)
    assert 75 <= report.batch_tokens <= 300
    assert all(tokens <= report.batch_tokens for tokens in limited.tried[3:])
    assert "out of memory" in caplog.text


def test_a_text_that_never_fits_is_named(encoder: SentenceEncoder) -> None:
    texts = ["short"] * 5 + [" ".join(["long"] * 50)] + ["short"] * 3
    encoder.model = Limited(encoder.model, 20, MemoryError())  # type: ignore[assignment]
    with pytest.raises(MemoryError, match="text 5 with 52 tokens"):
        encoder.encode(texts)


def test_other_errors_are_not_retried(encoder: SentenceEncoder) -> None:
    limited = Limited(encoder.model, 0, RuntimeError("illegal instruction"))
    encoder.model = limited  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="illegal instruction"):
        encoder.encode(sentences(5))
    assert len(limited.tried) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("output", ["sentence_embedding", "token_embeddings", None])
def test_a_result_that_is_not_finite_raises(
    encoder: SentenceEncoder, bad: float, output: str | None
) -> None:
    texts = sentences(40) + ["zebra"] + sentences(9)
    row = encoder.tokenizer(["zebra"]).input_ids[0][1]
    encoder.model.get_input_embeddings().weight.data[row] = bad
    with pytest.raises(ValueError, match="text 40: .*NaN or infinity"):
        encoder.encode(texts, output_value=output)
    with pytest.raises(ValueError, match="text 40: "):
        list(encoder.encode_stream(texts, window=8, output_value=output))


def test_truncation_policies(encoder: SentenceEncoder, caplog: pytest.LogCaptureFixture) -> None:
    encoder.max_seq_length = 12
    texts = ["short", " ".join(["word"] * 30), "short", " ".join(["word"] * 20)]
    with caplog.at_level(logging.WARNING, logger="modernbert"):
        report = EncodeReport()
        cut = encoder.encode(texts, truncation="cut", report=report)
        assert not caplog.records
        close(encoder.encode(texts), cut)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 texts were cut to 12 tokens; report=EncodeReport() says which"
    ]
    assert report.truncated == {1: 20, 3: 10}
    assert (report.texts, report.truncated_texts, report.cut_tokens) == (4, 2, 30)
    assert report.tokens == 3 + 12 + 3 + 12
    close(cut[1], encoder.encode(" ".join(["word"] * 10)))
    with pytest.raises(ValueError, match=r"text 1 has 32 tokens, the bound is 12"):
        encoder.encode(texts, truncation="error")
    with pytest.raises(ValueError, match=r"text 1 has 32 tokens"):
        list(encoder.encode_stream(texts, truncation="error", window=1))
    assert encoder.encode(["short"], truncation="error").shape == (1, HIDDEN)
    with pytest.raises(ValueError, match="new EncodeReport"):
        encoder.encode(texts, report=report)


def test_progress_counts_tokens(encoder: SentenceEncoder, capsys: pytest.CaptureFixture) -> None:
    texts = sentences(30)
    encoder.encode(texts)
    assert capsys.readouterr().err == ""
    report = EncodeReport()
    encoder.encode(texts, show_progress_bar=True, report=report)
    size = tqdm.format_sizeof(report.tokens)
    shown = capsys.readouterr().err
    assert "100%" in shown and f"{size}/{size} [" in shown and "tok/s]" in shown


# -- precision ------------------------------------------------------------------------------------


@pytest.fixture
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, 19)).astype(np.float32)


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_codes_are_those_of_sentence_transformers(vectors: np.ndarray, precision: str) -> None:
    oracle = pytest.importorskip("sentence_transformers.util.quantization")
    vectors[:, 3] = 0.5  # a dimension without any range
    ranges = Calibration.measure([vectors[:50], vectors[50:120]]).ranges
    expected = oracle.quantize_embeddings(vectors, precision, ranges=ranges)
    actual = quantize(vectors, precision, ranges)
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("precision", ["int8", "uint8"])
def test_calibrated_codes_are_comparable_and_saved(
    tmp_path: Path, encoder: SentenceEncoder, precision: str
) -> None:
    texts = sentences(120)
    encoder.calibrate(texts, window=50)
    vectors = encoder.encode(texts)
    codes = encoder.encode(texts, precision=precision)
    assert codes.dtype == np.dtype(precision) and codes.shape == vectors.shape
    ranges = np.stack((vectors.min(0), vectors.max(0)))
    close(encoder.calibration.ranges, ranges)
    offset = 128 if precision == "int8" else 0
    steps = (ranges[1] - ranges[0]) / 255
    restored = (codes.astype(np.float32) + offset + 0.5) * steps + ranges[0]
    assert (abs(restored - vectors) <= 0.51 * steps + 1e-6).mean() > 0.99
    # A text alone has the codes it has among others: nothing is measured on the batch.
    assert (abs(encoder.encode(texts[5], precision=precision).astype(int) - codes[5]) <= 1).all()
    stream = list(encoder.encode_stream(texts, precision=precision, window=9))
    assert (abs(np.stack(stream).astype(int) - codes) <= 1).all()
    encoder.save_pretrained(tmp_path)
    again = SentenceEncoder.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.encode(texts, precision=precision), codes)
    np.testing.assert_array_equal(again.calibration.ranges, encoder.calibration.ranges)
    # Saving an encoder without ranges over it forgets them.
    encoder.calibration = None
    encoder.save_pretrained(tmp_path)
    assert SentenceEncoder.from_pretrained(tmp_path).calibration is None


def test_ranges_belong_to_one_kind_of_vector(encoder: SentenceEncoder) -> None:
    texts = sentences(50)
    encoder.calibrate(encoder.encode(texts))
    whole = encoder.encode(texts, precision="uint8")
    np.testing.assert_array_equal(
        encoder.encode(texts, precision="uint8", truncate_dim=8), whole[:, :8]
    )
    with pytest.raises(ValueError, match="normalize_embeddings=False, this call"):
        encoder.encode(texts, precision="int8", normalize_embeddings=True)
    encoder.calibrate(texts, normalize_embeddings=True, truncate_dim=8)
    for options in ({"truncate_dim": 4}, {}):
        with pytest.raises(ValueError, match="ranges of 8 dimensions"):
            encoder.encode(texts, precision="int8", normalize_embeddings=True, **options)
    codes = encoder.encode(texts, precision="int8", normalize_embeddings=True, truncate_dim=8)
    assert codes.min() == -128 and codes.max() == 127


def test_calibration_needs_vectors(encoder: SentenceEncoder) -> None:
    with pytest.raises(ValueError, match="at least 2 vectors"):
        encoder.calibrate(["one"])
    with pytest.raises(ValueError, match="NaN or infinity"):
        encoder.calibrate(np.full((3, HIDDEN), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="no float vectors"):
        encoder.calibrate(np.ones(HIDDEN, dtype=np.float32))
    assert encoder.calibration is None
    for raw in (
        {},
        {"minimum": [1], "maximum": [0], "normalize_embeddings": False},
        {"minimum": 3},
    ):
        with pytest.raises(ValueError, match="file: "):
            Calibration.from_json(raw, source="file")


# -- similarity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_similarities_are_those_of_sentence_transformers(
    encoder: SentenceEncoder, vectors: np.ndarray, name: str
) -> None:
    oracle = pytest.importorskip("sentence_transformers").SimilarityFunction
    encoder.similarity_fn_name = name
    a, b = vectors[:6], vectors[6:12]
    expected = oracle.to_similarity_fn(name)(a, b)
    for left, right in ((a, b), (torch.tensor(a), b), (list(a), list(torch.tensor(b)))):
        torch.testing.assert_close(encoder.similarity(left, right), expected)
    torch.testing.assert_close(encoder.similarity(a[0], b)[0], expected[0])
    pairs = oracle.to_similarity_pairwise_fn(name)(a, b)
    torch.testing.assert_close(encoder.similarity_pairwise(a, b), pairs)
    torch.testing.assert_close(encoder.similarity_pairwise(a, b), expected.diagonal())
    half = encoder.similarity(torch.tensor(a).bfloat16(), torch.tensor(b).bfloat16())
    assert half.dtype == torch.float32


# -- parts ----------------------------------------------------------------------------------------


def test_save_and_load_from_parts(tmp_path: Path, encoder: SentenceEncoder) -> None:
    encoder.pooling = Pooling(HIDDEN, ("max", "cls"))
    encoder.after = torch.nn.Sequential(Dense(2 * HIDDEN, 10), Normalize())
    assert encoder.get_embedding_dimension() == 10
    encoder.save_pretrained(tmp_path / "folder")
    again = SentenceEncoder.from_pretrained(tmp_path / "folder")
    texts = sentences(10)
    np.testing.assert_array_equal(again.encode(texts), encoder.encode(texts))
    assert not again.training


def test_bfloat16_model_gives_float32_vectors(encoder: SentenceEncoder) -> None:
    texts = sentences(20)
    expected = encoder.encode(texts, normalize_embeddings=True)
    encoder.after = torch.nn.Sequential(Dense(HIDDEN, 8, activation_function=torch.nn.Identity()))
    wide = encoder.encode(texts)
    encoder.model.to(torch.bfloat16)
    narrow = encoder.encode(texts)
    assert narrow.dtype == np.float32 and abs(narrow - wide).max() < 0.5
    encoder.after = torch.nn.Sequential()
    close((encoder.encode(texts, normalize_embeddings=True) * expected).sum(1), 1, 0.02)


def test_the_folder_of_a_hub_snapshot(tmp_path: Path, encoder: SentenceEncoder) -> None:
    """The Hub's cache keeps files as links to blobs beside the snapshots, Dense folders too."""
    encoder.after = torch.nn.Sequential(Dense(HIDDEN, 8))
    encoder.save_pretrained(tmp_path / "plain")
    snapshot = tmp_path / "models--me--model" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--me--model" / "blobs"
    blobs.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "plain").rglob("*"))):
        if path.is_file():
            shutil.move(path, blobs / str(number))
            link = snapshot / path.relative_to(tmp_path / "plain")
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blobs / str(number))
    again = SentenceEncoder.from_pretrained(snapshot)
    close(again.encode("A text."), encoder.encode("A text."))
    assert json.loads((snapshot / "modules.json").read_text())[2]["path"] == "2_Dense"
