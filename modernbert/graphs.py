"""CUDA graphs for small batches, where launching kernels takes longer than running them.

A graph replays the launches it was captured from: same shapes, same addresses. So batches are
rounded up to buckets, of tokens and of sequences, and each bucket has a graph. What a batch is goes
into one static tensor that the graph reads: ids, positions, and where sequences end. Tokens that
fill up a bucket are one more sequence, at the end, so that no real token attends to them; sequences
that fill it up are empty. All else is derived on the device, inside of the graph: attention is
planned for whatever lengths, and no sequence is longer than the bucket.

Shapes: T = packed tokens of a batch, B = its sequences, D = hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from modernbert.kernels import dispatch
from modernbert.model import ModernBertModel
from modernbert.packing import PackedBatch

MOST_TOKENS = 2048  # beyond, kernels run for longer than launching the next one takes
LEAST_TOKENS = 32


@dataclass(frozen=True)
class Bucket:
    """Sizes that a graph is captured for: tokens, and sequences, with those that fill up."""

    tokens: int
    sequences: int


def bucket_of(tokens: int, sequences: int) -> Bucket:
    """The smallest bucket for a batch: tokens 32, 48, 64, 96, 128, ..., sequences 2, 4, 8, ...

    Less than a third of its tokens fill up, except in the smallest. It has room for the sequence
    that they form.
    """
    power = 1 << max(tokens - 1, LEAST_TOKENS - 1).bit_length()
    between = power * 3 // 4
    rounded = between if between >= max(tokens, LEAST_TOKENS) else power
    return Bucket(rounded, 1 << sequences.bit_length())


def describe(batch: PackedBatch, bucket: Bucket) -> Tensor:
    """A batch as its graph reads it: ids, positions, where sequences start; one int64 tensor."""
    assert batch.input_ids is not None and len(batch) < bucket.sequences
    spare = bucket.tokens - batch.num_tokens
    starts = batch.cu_seqlens.long()
    starts = F.pad(starts, (0, bucket.sequences - len(batch)), value=bucket.tokens)
    ids, positions = F.pad(batch.input_ids, (0, spare)), F.pad(batch.positions, (0, spare))
    return torch.cat((ids, positions, starts))


def described(numbers: Tensor, bucket: Bucket, max_position: int) -> PackedBatch:
    """The batch that `describe` wrote down, with lengths that only the device knows."""
    ids, positions, starts = numbers.split((bucket.tokens, bucket.tokens, bucket.sequences + 1))
    unknown = cast(tuple[int, ...], None)  # as `kernels.plan_attention` has it
    return PackedBatch(unknown, starts.int(), positions, max_position, ids)


class Capture:
    """How functions become graphs on one device, all in one pool of memory.

    They may share it: the result of a graph is copied before any other runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """What `function` returns, and what computes it again in the same place."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # compiles kernels, chooses products, builds tables
                function()
        here.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            result = function()
        return result, graph.replay


@dataclass(frozen=True)
class Graph:
    """A captured forward pass.

    Attributes:
        numbers: what it reads, as `describe` makes them.
        hidden: what it writes, (tokens, D).
        replay: runs it.
        kept: what else it reads: the tables of the rotary embedding, which may be replaced.
    """

    numbers: Tensor
    hidden: Tensor
    replay: Callable[[], None]
    kept: list[Tensor]


class GraphedModel:
    """A model whose small batches run as CUDA graphs, each captured when its bucket is first met.

    What a graph cannot hold runs as ever: larger batches, gradients, training mode, autocast, other
    devices, query-only tokens, and attention that must know the lengths. Weights may change in
    place; after a move to another device or dtype graphs are captured anew. Replace layers
    (`quantize_linears`, `optimize`) before.

    Args:
        model: the encoder.
        most_tokens: of a batch that runs as a graph.
        capture: makes what captures graphs on a device; for tests.
    """

    def __init__(
        self,
        model: ModernBertModel,
        most_tokens: int = MOST_TOKENS,
        *,
        capture: Callable[[torch.device], Any] = Capture,
    ) -> None:
        self.model, self.most_tokens, self.capture = model, most_tokens, capture
        self.lock = Lock()
        self._start_anew()

    def __call__(self, batch: PackedBatch) -> Tensor:
        """The last hidden state (T, D) of a packed batch, which may lie on the host."""
        if not self.fits(batch):
            return self.model(batch.to(self.model.device)).last_hidden_state
        bucket = bucket_of(batch.num_tokens, len(batch))
        with self.lock:  # a graph holds one batch at a time
            if [p.data_ptr() for p in self.parameters] != [p.data_ptr() for p in self.weights]:
                self._start_anew()
            if bucket not in self.graphs:
                self.graphs[bucket] = self._captured(bucket)
            graph = self.graphs[bucket]
            graph.numbers.copy_(describe(batch, bucket), non_blocking=True)
            graph.replay()
            return graph.hidden[: batch.num_tokens].clone()

    def fits(self, batch: PackedBatch) -> bool:
        """Whether a batch runs as a graph."""
        model = self.model
        if torch.is_grad_enabled() or model.training or torch.compiler.is_compiling():
            return False
        if model.device.type != "cuda" or torch.is_autocast_enabled("cuda"):
            return False
        if batch.input_ids is None or batch.query_only is not None:
            return False
        if not 0 < batch.num_tokens <= self.most_tokens:
            return False
        attention = model.attention
        if attention == "auto":
            where = model.device.type, model.device.index
            attention = dispatch.backend_for(*where, model.dtype, False, model.config.head_dim)
        known = batch.max_position < model.config.max_position_embeddings
        return known and attention in dispatch.CAPTURABLE

    def _start_anew(self) -> None:
        self.parameters = list(self.model.parameters())
        self.weights = [p.detach() for p in self.parameters]  # keeps the memory that graphs read
        self.graphs: dict[Bucket, Graph] = {}
        self.run: Any = None

    def _captured(self, bucket: Bucket) -> Graph:
        model = self.model
        self.run = self.run or self.capture(model.device)
        # Not inference tensors, into which nothing could be copied in another mode.
        with torch.inference_mode(False), torch.no_grad():
            size = 2 * bucket.tokens + bucket.sequences + 1
            numbers = torch.zeros(size, dtype=torch.int64, device=model.device)
            numbers[2 * bucket.tokens + 1 :] = bucket.tokens  # one sequence, for the warm-up
            longest = model.config.max_position_embeddings - 1

            def forward() -> Tensor:
                return model(described(numbers, bucket, longest)).last_hidden_state

            hidden, replay = self.run(forward)
        kept = [table for rotary in model.rotary.values() for table in rotary.tables.values()]
        return Graph(numbers, hidden, replay, kept)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy captures its own graphs."""
        return type(self), (self.model, self.most_tokens)
