"""Small batches as CUDA graphs: buckets, what a graph reads, and when there is one.

No GPU: a graph is a function that runs again in the same memory.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modernbert import (
    ModernBertConfig,
    ModernBertModel,
    PackedBatch,
    SentenceEncoder,
    Tokenizer,
    kernels,
    pack,
)
from modernbert.graphs import Capture, GraphedModel, bucket_of, describe, described
from modernbert.kernels import dispatch

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=9).filter(lambda n: sum(n) > 0)


@cache
def small(attention: str, dtype: torch.dtype = torch.float32, layers: int = 4) -> ModernBertModel:
    torch.manual_seed(1)
    config = ModernBertConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        pad_token_id=0,
        local_attention=12,
        max_position_embeddings=256,
        initializer_range=0.15,
    )
    return ModernBertModel(config, attention=attention).to(dtype).eval()


def texts(lengths: list[int]) -> PackedBatch:
    return pack([torch.randint(1, 100, (n,)) for n in lengths])


class Rerun:
    """In place of a graph: the function again, on what its static tensors hold now."""

    captures = 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        Rerun.captures += 1
        result = function()
        result.fill_(float("nan"))
        return result, lambda: result.copy_(function())


class Graphed(GraphedModel):
    """On the CPU, with the size of a batch as the only condition."""

    def __init__(self, model: ModernBertModel, most_tokens: int = 2048, **_: Any) -> None:
        super().__init__(model, most_tokens, capture=Rerun)

    def fits(self, batch: PackedBatch) -> bool:
        return batch.num_tokens <= self.most_tokens


# -- buckets ----------------------------------------------------------------------------------


@given(tokens=st.integers(1, 5000), sequences=st.integers(1, 300))
def test_buckets(tokens: int, sequences: int) -> None:
    bucket = bucket_of(tokens, sequences)
    assert bucket.tokens >= max(tokens, 32) and bucket.sequences > sequences
    if tokens > 32:
        assert 3 * (bucket.tokens - tokens) < bucket.tokens
    assert bucket.sequences <= 2 * sequences
    # Powers of two and halves between, each of them its own bucket.
    odd = bucket.tokens // (bucket.tokens & -bucket.tokens)
    assert odd in (1, 3)
    assert bucket_of(bucket.tokens, bucket.sequences - 1) == bucket
    assert bucket_of(tokens + 1, sequences).tokens >= bucket.tokens


def test_the_number_of_graphs_is_small() -> None:
    tokens = {bucket_of(n, 1).tokens for n in range(1, 2049)}
    assert sorted(tokens) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert [bucket_of(1, n).sequences for n in (1, 2, 3, 4, 7, 8)] == [2, 4, 4, 8, 8, 16]


@given(lengths=LENGTHS)
def test_what_a_graph_reads(lengths: list[int]) -> None:
    batch = texts(lengths)
    bucket = bucket_of(batch.num_tokens, len(batch))
    numbers = describe(batch, bucket)
    assert numbers.dtype == torch.int64
    static = described(numbers, bucket, 255)
    assert static.input_ids is not None and static.input_ids.shape == (bucket.tokens,)
    total, texts_ = batch.num_tokens, len(batch)
    assert torch.equal(static.input_ids[:total], batch.input_ids)
    assert torch.equal(static.positions[:total], batch.positions)
    ends = static.cu_seqlens
    assert ends.dtype == torch.int32 and ends.shape == (bucket.sequences + 1,)
    assert torch.equal(ends[: texts_ + 1], batch.cu_seqlens)
    assert (ends[texts_ + 1 :] == bucket.tokens).all()  # one sequence of filling, then empty ones
    assert static.positions.max() < 256 and static.input_ids.max() < 100


# -- the same vectors -------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["blocked", "turing"])
@settings(max_examples=20)
@given(first=LENGTHS, second=LENGTHS)
def test_a_graph_gives_the_vectors_of_the_eager_batch(
    attention: str, first: list[int], second: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setenv("MODERNBERT_PRETEND", "sm_75")
        patch.delenv("TRITON_INTERPRET", raising=False)
        model = small(attention)
        graphed = Graphed(model)
        for lengths in (first, second, first):
            batch = texts(lengths)
            expected = model(batch).last_hidden_state
            torch.testing.assert_close(graphed(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[1], [31, 1], [5, 64, 0, 17], [40, 70]])
def test_flash_attention_in_a_graph(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What its implementations are told of the lengths bounds them, and holds for all batches."""
    from test_flash import install

    from modernbert.kernels import flash

    install("flash_attn_2", monkeypatch)
    model, plain = small("flash"), small("blocked")
    monkeypatch.setattr(dispatch, "obstacle_to", lambda *_: "")
    monkeypatch.setattr(dispatch, "flash_kind", lambda *_: "flash_attn_2")
    longest = []
    call = flash.CALLS["flash_attn_2"]

    def noting(*args: Any, **options: Any) -> Tensor:
        longest.append(args[5:7])
        return call(*args, **options)

    monkeypatch.setitem(flash.CALLS, "flash_attn_2", noting)
    batch = texts(lengths)
    with torch.no_grad():
        expected = plain(batch).last_hidden_state
        torch.testing.assert_close(Graphed(model)(batch), expected, rtol=1e-4, atol=1e-5)
    tokens = bucket_of(sum(lengths), len(lengths)).tokens
    assert set(longest) == {(tokens, tokens)}


@pytest.mark.parametrize("lengths", [[1], [33, 0, 20], [3] * 7])
def test_our_triton_kernels_in_a_graph(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from modernbert.kernels import triton_attention

    cut = triton_attention.Tiling(16, 16, 4, 2, split=True)
    monkeypatch.setattr(triton_attention, "tiling", lambda *_: cut)
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_80")
    model = small("triton", layers=2)
    batch = texts(lengths)
    with torch.no_grad():
        expected = model(batch).last_hidden_state
        torch.testing.assert_close(Graphed(model)(batch), expected, rtol=1e-4, atol=1e-5)


@given(first=LENGTHS, second=LENGTHS)
@settings(max_examples=20)
def test_nothing_of_a_batch_is_left_for_the_next(first: list[int], second: list[int]) -> None:
    with torch.no_grad():
        model = small("blocked", torch.float64)
        graphed, fresh = Graphed(model), Graphed(model)
        before, after = texts(first), texts(second)
        earlier = graphed(before)
        kept = earlier.clone()
        result = graphed(after)
        assert torch.equal(result, fresh(after))  # to the last bit
        assert torch.equal(earlier, kept)  # a result is the caller's: no later batch touches it
        assert result.shape == (sum(second), 64)


def test_one_capture_for_all_batches_of_a_bucket() -> None:
    with torch.no_grad():
        model = small("blocked")
        graphed = Graphed(model, most_tokens=100)
        Rerun.captures = 0
        for lengths in ([20, 20], [48], [34, 0, 1], [10]):
            graphed(texts(lengths))
        assert Rerun.captures == 3  # (48, 4), (48, 2), (32, 2)
        for lengths in ([47, 1], [33], [2]):
            graphed(texts(lengths))
        assert Rerun.captures == 3
        graphed(texts([101]))  # above the bound: as ever
        assert Rerun.captures == 3
        other = copy.deepcopy(graphed)
        assert other.most_tokens == 100 and other.model is not model and not other.graphs


def test_weights_change_in_place_or_start_anew() -> None:
    with torch.no_grad():
        model, batch = copy.deepcopy(small("blocked")), texts([30, 9])
        graphed = Graphed(model)
        graphed(batch)
        (before,) = graphed.graphs.values()
        model.final_norm.weight.mul_(2.0)
        torch.testing.assert_close(graphed(batch), model(batch).last_hidden_state)
        assert list(graphed.graphs.values()) == [before]
        model.double()
        result = graphed(batch)
        assert result.dtype == torch.float64
        torch.testing.assert_close(result, model(batch).last_hidden_state)
        (after,) = graphed.graphs.values()
        assert after is not before and after.hidden.dtype == torch.float64


def test_a_graph_outlives_inference_mode_and_the_tables_it_reads() -> None:
    model, batch = small("blocked"), texts([30, 9])
    graphed = Graphed(model)
    with torch.inference_mode():
        first = graphed(batch)
    with torch.no_grad():
        torch.testing.assert_close(graphed(batch), first)
        (graph,) = graphed.graphs.values()
        tables = [table for rotary in model.rotary.values() for table in rotary.tables.values()]
        assert len(tables) == 2 and all(table.shape[1] == 256 for table in tables)
        assert all(any(kept is table for kept in graph.kept) for table in tables)


# -- when there is a graph --------------------------------------------------------------------


def test_what_runs_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModernBertConfig(max_position_embeddings=256)
    model: Any = SimpleNamespace(
        training=False, device=torch.device("cuda", 0), dtype=torch.bfloat16, attention="triton",
        config=config, parameters=lambda: [],
    )  # fmt: skip
    graphed = GraphedModel(model, 64)
    batch = texts([30, 20])

    def fits(batch: PackedBatch = batch, **changes: Any) -> bool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in changes.items():
                patch.setattr(model, name, value)
            return graphed.fits(batch)

    assert not fits()  # gradients
    with torch.no_grad():
        assert fits()
        assert not fits(training=True)
        assert not fits(device=torch.device("cpu"))
        assert not fits(texts([65])) and not fits(texts([0])) and fits(texts([64]))
        assert not fits(attention="blocked") and not fits(attention="reference")
        assert fits(attention="flash") and fits(attention="turing")
        marked = pack([[1, 2, 3]], query_only=[[False, True, False]])
        assert not fits(marked)
        assert not fits(PackedBatch((2,), batch.cu_seqlens, batch.positions, 256, batch.input_ids))
        assert not fits(PackedBatch((2,), batch.cu_seqlens, batch.positions, 1))  # embeddings
        asked = []
        for choice in ("triton", "blocked"):
            monkeypatch.setattr(
                dispatch, "backend_for", lambda *facts, c=choice: asked.append(facts) or c
            )
            assert fits(attention="auto") is (choice == "triton")
        assert asked[0] == ("cuda", 0, torch.bfloat16, False, 64)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        assert not fits()


def test_what_runs_as_ever_gives_the_same() -> None:
    model, batch = copy.deepcopy(small("blocked")), texts([5, 30])
    graphed = GraphedModel(model)  # on a CPU
    with torch.no_grad():
        assert torch.equal(graphed(batch), model(batch).last_hidden_state)
    graphed(batch).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_sentence_encoder_runs_its_graphs(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, "w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = SentenceEncoder(copy.deepcopy(small("blocked")), Tokenizer(backend.to_str().encode()))
    words = ["w1 w2 w3", "w4", "w5 w6"]
    plain = encoder.encode(words)
    encoder.save_pretrained(tmp_path)
    assert encoder.graphs is None
    assert SentenceEncoder.from_pretrained(tmp_path).graphs is None
    graphed = SentenceEncoder.from_pretrained(tmp_path, cuda_graphs=True)
    assert graphed.graphs is not None and graphed.graphs.model is graphed.model
    graphed.graphs, before = Graphed(graphed.model), Rerun.captures
    torch.testing.assert_close(graphed.encode(words), plain, rtol=1e-5, atol=1e-6)
    assert Rerun.captures == before + 1
    graphed.optimize()  # a new start: what was captured runs the old layers
    assert isinstance(graphed.graphs, GraphedModel) and not graphed.graphs.graphs


def test_how_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warm-up on a stream of its own, between two waits; then once, into the shared pool."""
    said: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = "ours" if name == "cuda:0" else name

        def wait_stream(self, other: "Stream") -> None:
            said.append(f"{self.name} waits for {other.name}")

    class CudaGraph:
        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def on(what: str) -> Iterator[None]:
        said.append(f"{what} {{")
        yield
        said.append("}")

    def capturing(graph: CudaGraph, pool: str, stream: Stream, capture_error_mode: str) -> Any:
        assert isinstance(graph, CudaGraph) and capture_error_mode == "thread_local"
        return on(f"capture into {pool} on {stream.name}")

    fakes = {
        "graph_pool_handle": lambda: "pool",
        "Stream": Stream,
        "current_stream": lambda device: Stream("theirs"),
        "stream": lambda stream: on(f"stream {stream.name}"),
        "CUDAGraph": CudaGraph,
        "graph": capturing,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    result = torch.zeros(1)
    found, replay = Capture("cuda:0")(lambda: said.append("forward") or result)  # type: ignore
    assert found is result
    replay()
    assert said == [
        *("ours waits for theirs", "stream ours {", "forward", "forward", "}"),
        *("theirs waits for ours", "capture into pool on ours {", "forward", "}", "replay"),
    ]


# -- what a graph may hold --------------------------------------------------------------------


class OneDevice(TorchDispatchMode):
    """Every operation stays on the device: a copy from the host would be captured as it is now."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(x, Tensor) and x.dim():
                assert x.device.type == "meta", f"{func} has a tensor on {x.device}"
        return out


def without_values(attention: str, pretence: str, query_only: bool = False) -> None:
    """The function that a graph is captured from, on tensors whose values nobody can ask for."""
    bucket = bucket_of(300, 5)
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"), torch.no_grad():
        patch.setenv("MODERNBERT_PRETEND", pretence)
        patch.setattr(dispatch, "obstacle_to", lambda *_: "")  # that the device is none
        patch.setattr(dispatch, "fuses_on", lambda *_: attention == "triton")
        patch.setattr(torch, "is_autocast_enabled", lambda kind: False)
        patch.setattr(dispatch, "runs_plainly", lambda x: False)  # operators, not launches
        for name in ("triton_elementwise", "triton_attention"):
            if name in vars(kernels):
                patch.setattr(getattr(kernels, name), "runs_plainly", lambda x: False)
        config = ModernBertConfig(
            vocab_size=100, hidden_size=128, intermediate_size=64, num_hidden_layers=4,
            num_attention_heads=2, pad_token_id=0, max_position_embeddings=512,
        )  # fmt: skip
        model = ModernBertModel(config, attention=attention).eval().half()
        numbers = torch.zeros(2 * bucket.tokens + bucket.sequences + 1, dtype=torch.int64)
        batch = described(numbers, bucket, 511)
        if query_only:
            batch = replace(batch, query_only=torch.zeros(bucket.tokens, dtype=torch.bool))
        model(batch)  # builds the tables of angles
        with OneDevice():
            hidden = model(batch).last_hidden_state
        assert hidden.shape == (bucket.tokens, 128) and hidden.device.type == "meta"


@pytest.mark.parametrize(
    ("attention", "pretence"), [("triton", "sm_90"), ("flash", "sm_80"), ("turing", "sm_75")]
)
def test_a_captured_pass_asks_the_host_nothing(attention: str, pretence: str) -> None:
    assert attention in dispatch.CAPTURABLE
    if attention == "triton":
        pytest.importorskip("triton")
        from modernbert.kernels import triton_attention, triton_elementwise  # noqa: F401
    without_values(attention, pretence)


def test_query_only_tokens_ask_the_host() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        without_values("turing", "sm_75", query_only=True)
