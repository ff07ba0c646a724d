"""From an iterator of texts to results in the same order: token budgets, retries, counts.

Texts are read in windows. The texts of a window are sorted by length, grouped into batches that
hold a budget of tokens, run, and put back in order; then the next window is read, or, with
`overlap`, has been tokenised by then. Nothing here knows what is computed.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from modernbert.packing import token_budget_batches
from modernbert.tokenizer import TokenizedBatch

logger = logging.getLogger("modernbert")

T = TypeVar("T")
R = TypeVar("R")

WINDOW_TEXTS = 4096
# A window of long texts ends early, after about 64 full batches, at 4 characters a token.
WINDOW_CHARACTERS = 64 * 4
# What the tokenizer gets at once: enough for all its threads, little enough to be forgotten.
CHUNK_TEXTS, CHUNK_CHARACTERS = 1024, 2**20
TRUNCATIONS = ("warn", "cut", "error")
NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


@dataclass
class EncodeReport:
    """What happened to the texts of one call: pass one as `report=` and read it afterwards.

    Attributes:
        texts: texts read so far.
        tokens: tokens of these texts that the model sees.
        truncated_texts: texts longer than the model's bound.
        cut_tokens: tokens that these texts lost (what was cut off is tokenised to count them).
        truncated: tokens lost by the index of the text, truncated texts only. It grows with their
            number; `EncodeReport(truncated=None)` goes without.
        batch_tokens: the token budget in force; smaller than asked for once memory ran out.
    """

    texts: int = 0
    tokens: int = 0
    truncated_texts: int = 0
    cut_tokens: int = 0
    truncated: dict[int, int] | None = field(default_factory=dict)
    batch_tokens: int = 0


class NotFinite(ValueError):
    """A batch has a result with NaN or infinity."""


@dataclass(frozen=True)
class Stream:
    """How texts become results.

    Attributes:
        tokenize: texts to ids, cut at `max_length`.
        run: starts on the ids of a batch, B tensors (length,) int32. What it returns waits for
            the results, a tensor (B, ...) or a list of B; waiting may raise `NotFinite`.
        max_length: tokens of the longest text, for messages.
        report: counts, and the token budget, which shrinks when memory runs out.
        count_cuts: count the tokens that were cut, not only the texts.
        batch_size: at most this many texts in a batch, or None.
        window: texts that are sorted by length together.
        truncation: "warn", "cut" or "error".
        progress: show a bar that counts tokens.
        overlap: read a window ahead and let a thread tokenise it, while the one before is run.
    """

    tokenize: Callable[[list[str]], TokenizedBatch]
    run: Callable[[list[Tensor]], Callable[[], Any]]
    max_length: int
    report: EncodeReport
    count_cuts: bool = True
    batch_size: int | None = None
    window: int = WINDOW_TEXTS
    truncation: str = "warn"
    progress: bool = False
    overlap: bool = False

    def windows(self, texts: Iterable[str]) -> Iterator[Any]:
        """The results of one window of texts after the other, in order: tensors or lists.

        Raises `ValueError` for an input that is no text, a text too long under "error", and a
        result that is not finite; `MemoryError` when a single text does not fit. All name the
        index of the text.
        """
        if not isinstance(texts, Iterable):
            raise ValueError(f"got {texts!r:.80}; expected a text or an iterable of texts")
        return self._generate(texts)

    def _generate(self, texts: Iterable[str]) -> Iterator[Any]:
        report = self.report
        known = len(texts) if isinstance(texts, Sized) else 0
        bar = tqdm(desc="Encoding", unit="tok", unit_scale=True, disable=not self.progress)
        try:
            source, work = enumerate(texts), self._tokenized
            windows = iter(partial(self._read, source), [])
            for first, ids in _ahead(work, windows) if self.overlap else map(work, windows):
                if known:  # an estimate until all texts are read
                    bar.total = report.tokens * known // report.texts
                yield self._run_window(first, ids, bar)
        finally:
            bar.close()
            if report.truncated_texts and self.truncation == "warn":
                logger.warning(
                    "%d of %d texts were cut to %d tokens; report=EncodeReport() says which",
                    report.truncated_texts,
                    report.texts,
                    self.max_length,
                )

    def _read(self, source: Iterator[tuple[int, str]]) -> list[str]:
        """The texts of the next window, none at the end."""
        return _take(source, self.window, WINDOW_CHARACTERS * self.report.batch_tokens)

    def _tokenized(self, window: list[str]) -> tuple[int, list[Tensor]]:
        """The ids of each text of a window, and the index of its first text."""
        first, source, ids = self.report.texts, enumerate(window), list[Tensor]()
        for texts in iter(partial(_take, source, CHUNK_TEXTS, CHUNK_CHARACTERS), []):
            ids += self._counted(texts)
        return first, ids

    def _counted(self, texts: list[str]) -> list[Tensor]:
        """The ids of each text, after they are counted."""
        report = self.report
        try:
            batch = self.tokenize(texts)
        except ValueError:
            # The tokenizer knows the place in this chunk; the caller wants the one in the stream.
            for index, text in enumerate(texts, start=report.texts):
                try:
                    self.tokenize([text])
                except ValueError as error:
                    message = str(error).replace("texts[0]", f"text {index}")
                    raise ValueError(message) from None
            raise
        if True in batch.was_truncated:
            self._count_cuts(batch)
        report.texts += len(batch)
        report.tokens += sum(map(len, batch.input_ids))
        # By way of numpy, which reads a list of integers three times as fast.
        return [torch.from_numpy(np.array(ids, np.int32)) for ids in batch.input_ids]

    def _count_cuts(self, batch: TokenizedBatch) -> None:
        report, flags = self.report, batch.was_truncated
        if self.truncation == "error":
            place = flags.index(True)
            tokens = len(batch.input_ids[place]) + batch.truncated[place]
            raise ValueError(
                f"text {report.texts + place} has {tokens} tokens, the bound is "
                f"{self.max_length}: split it, raise max_seq_length, or pass truncation='cut'"
            )
        report.truncated_texts += sum(flags)
        if self.count_cuts:
            report.cut_tokens += sum(batch.truncated)
            if report.truncated is not None:
                cuts = enumerate(batch.truncated, start=report.texts)
                report.truncated |= {index: cut for index, cut in cuts if cut}

    def _run_window(self, first: int, ids: Sequence[Tensor], bar: tqdm) -> Any:
        """The results of a window whose first text has the index `first`."""
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]), reverse=True)
        pending, parts = deque(order), []
        under_way: list[Callable[[], list[Any]]] = []  # one batch: the device is never idle
        while pending:
            lengths = (len(ids[i]) for i in pending)
            budget = self.report.batch_tokens
            batches = token_budget_batches(lengths, budget, max_sequences=self.batch_size)
            rows = list(islice(pending, len(next(batches))))
            tokens = sum(len(ids[i]) for i in rows)
            try:
                started = self.run([ids[i] for i in rows])
                trouble = None
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                trouble = str(error)
            # The exception is gone by now, and with it the tensors of the failed attempt.
            if trouble is not None:
                self._shrink(first + rows[0], tokens, len(rows), trouble)
                continue
            for _ in rows:
                pending.popleft()
            parts += [part for wait in under_way for part in wait()]
            under_way = [partial(self._finished, first, ids, rows, started)]
            bar.update(tokens)
        parts += [part for wait in under_way for part in wait()]
        return _in_order(parts, order)

    def _finished(
        self, first: int, ids: Sequence[Tensor], rows: list[int], started: Callable[[], Any]
    ) -> list[Any]:
        """The results of a batch, in one part or in as many as it has texts."""
        try:
            return [started()]
        except NotFinite:
            return [self._run_alone(first + i, ids[i]) for i in rows]

    def _run_alone(self, index: int, ids: Tensor) -> Any:
        """A text by itself, after its batch failed: attention weighs neighbours by zero, and zero
        times NaN is NaN, so the row that was not finite need not be the one to blame."""
        try:
            return self.run([ids])()
        except NotFinite as error:
            raise ValueError(f"text {index}: {error}") from None

    def _shrink(self, index: int, tokens: int, texts: int, trouble: str) -> None:
        """Halve the budget after a batch of `tokens` did not fit, or give up on a single text."""
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if texts == 1:
            raise MemoryError(
                f"text {index} with {tokens} tokens does not fit into memory, even alone: lower "
                f"max_seq_length ({self.max_length}) or use a narrower dtype ({trouble})"
            )
        self.report.batch_tokens = tokens // 2
        logger.warning(
            "out of memory with %d tokens in a batch: going on with %d", tokens, tokens // 2
        )


def fetch(x: Tensor) -> Callable[[], Tensor]:
    """Start to copy x to the host; what is returned waits for it, not for work given later."""
    if x.device.type != "cuda":
        return x.cpu
    copy = x.to("cpu", non_blocking=True)  # into pinned memory
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def wait() -> Tensor:
        copied.synchronize()
        return copy

    return wait


def _take(source: Iterator[tuple[int, str]], limit: int, characters: int) -> list[str]:
    """Up to `limit` texts of a numbered source, fewer when they are long."""
    chunk: list[str] = []
    for index, text in source:
        if not isinstance(text, str):
            raise ValueError(f"input {index} is {type(text).__name__}, not a text: {text!r:.80}")
        chunk.append(text)
        characters -= len(text)
        if len(chunk) == limit or characters <= 0:
            break
    return chunk


def _ahead(work: Callable[[T], R], items: Iterator[T]) -> Iterator[R]:
    """`map(work, items)`, where a thread works on an item while the last result is in use.

    The items are taken in the thread of the caller: a database cursor may belong to it.
    """
    with ThreadPoolExecutor(1, "modernbert") as thread:
        under_way: Future[R] | None = None
        for item in items:
            done, under_way = under_way, thread.submit(work, item)
            if done is not None:
                yield done.result()
        if under_way is not None:
            yield under_way.result()


def _out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    text = str(error)
    return isinstance(error, MemoryError) or any(phrase in text for phrase in NO_MEMORY)


def _in_order(parts: list[Any], order: list[int]) -> Any:
    """Results that came as `order` says, back in the order of the texts."""
    places = torch.tensor(order).argsort()
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)[places.to(parts[0].device)]
    results = [result for part in parts for result in part]
    return [results[place] for place in places.tolist()]
