"""The tasks of a step: which texts come next, packed, and the gradients of their loss.

A task draws the global batch of a step in an order fixed by the seed and takes this process's
share. All randomness of a step comes from (seed, step), so that a run that was interrupted, or
that is spread over other processes, sees the same texts and the same masks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from modernbert.heads import ModernBertForMaskedLM
from modernbert.packing import PackedBatch, pack, token_budget_batches
from modernbert.tokenizer import Tokenizer

from . import objectives
from .masking import IGNORED, mask_tokens
from .packing import BestFitPacker, permutation
from .recipe import Phase, Recipe, Task
from .schedule import BatchWarmup
from .store import TokenStore

EVALUATION_MASK_RATE = 0.15
EVALUATION_ROWS, EVALUATION_TEXTS = 16, 1024  # of a validation
PHASE = 1_000_000  # epochs between the seeds of two phases
Metrics = dict[str, float]


@dataclass(frozen=True)
class Context:
    """What every task needs: the run, and which part of a global batch is this process's."""

    recipe: Recipe
    tokenizer: Tokenizer
    device: torch.device
    rank: int = 0
    world: int = 1

    def total(self, value: float) -> float:
        """The sum over all processes."""
        if self.world == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(number)
        return number.item()

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the layers only."""
        return self.world > 1 and self.recipe.parallel == "fsdp"

    def rounds(self, count: int) -> int:
        """Of how many micro-batches this process, which has `count`, makes its step.

        Sharded layers are gathered from all processes, so that all must run them equally often.
        """
        if not self.sharded:
            return count
        number = torch.tensor(count, device=self.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def rng(self, *key: int) -> np.random.Generator:
        """Random numbers for one place of the run."""
        return np.random.Generator(np.random.PCG64DXSM([self.recipe.seed, *key]))

    def order(self, count: int, phase: Phase) -> Callable[[int], np.ndarray]:
        """The order (count,) of an epoch; each phase has others, or it would repeat the first."""
        index = next(i for i, other in enumerate(self.recipe.phases) if other is phase)
        return lambda epoch: permutation(count, self.recipe.seed + PHASE * index, epoch)

    def autocast(self) -> torch.autocast:
        """Arithmetic in the recipe's dtype."""
        dtype = getattr(torch, self.recipe.dtype)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def wrap(self, ids: np.ndarray) -> list[int]:
        """One text with its special tokens."""
        return [self.tokenizer.cls_token_id, *ids.tolist(), self.tokenizer.sep_token_id]


class TrainingTask(Protocol):
    """One objective on one collection; `name` is its prefix in the log."""

    name: str

    def backward(self, step: int, phase_tokens: int) -> tuple[int, Metrics]:
        """Add the gradients of a global batch's share; (its tokens, numbers for the log)."""

    def validate(self) -> Metrics:
        """Losses on texts that are never trained on; empty where there are none."""

    def state_dict(self) -> dict[str, Any]:
        """Where the data stand, as JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


@dataclass(frozen=True)
class Pieces:
    """Documents cut into pieces of at most `size` tokens: piece i is `size` tokens from a start."""

    store: TokenStore
    size: int
    document: np.ndarray
    start: np.ndarray
    lengths: np.ndarray  # without special tokens

    @classmethod
    def cut(cls, store: TokenStore, size: int) -> "Pieces":
        counts = -(-store.lengths // size)
        document = np.repeat(np.arange(len(store)), counts)
        first = np.repeat(counts.cumsum() - counts, counts)
        start = (np.arange(len(document)) - first) * size
        return cls(store, size, document, start, np.minimum(size, store.lengths[document] - start))

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(self.start[index])
        return self.store[int(self.document[index])][start : start + self.size]


class MaskedLM:
    """Masked language modelling on rows of whole documents, packed best-fit."""

    def __init__(
        self,
        context: Context,
        model: ModernBertForMaskedLM,
        spec: Task,
        phase: Phase,
        store: TokenStore,
        validation: TokenStore | None,
    ) -> None:
        self.context, self.model, self.spec = context, model, spec
        self.name = f"mlm/{spec.data}"
        capacity, size = context.recipe.micro_tokens, phase.max_length - 2
        self.pieces = Pieces.cut(store, size)
        order = context.order(len(self.pieces.lengths), phase)
        self.packer = BestFitPacker(self.pieces.lengths + 2, order, capacity)
        self.warmup = BatchWarmup(1, spec.rows, phase.batch_warmup_tokens)
        self.held_out = None if validation is None else Pieces.cut(validation, size)
        self.special = special_ids(context.tokenizer)
        mask = context.tokenizer.mask_token_id
        if mask is None:
            raise ValueError(f"the tokenizer {context.recipe.tokenizer} has no mask token for mlm")
        self.mask_id = mask

    def backward(self, step: int, phase_tokens: int) -> tuple[int, Metrics]:
        context = self.context
        rows = self.packer.next_rows(self.warmup(phase_tokens))
        mine = [
            self.masked_row(self.pieces, row, context.rng(step, index), self.spec.mask_rate)
            for index, row in enumerate(rows)
            if index % context.world == context.rank
        ]
        mine += [self.empty_row()] * (context.rounds(len(mine)) - len(mine))
        labelled = context.total(sum(int((labels >= 0).sum()) for _, labels in mine))
        loss, right = 0.0, 0.0
        for index, (batch, labels) in enumerate(mine):
            seed_step(context, step, index)
            with context.autocast():
                total, hits = objectives.masked_lm(self.model, batch, labels)
            (self.spec.weight * total / max(1.0, labelled)).backward()
            loss, right = loss + total.item(), right + hits.item()
        tokens = int(sum(self.pieces.lengths[row].sum() + 2 * len(row) for row in rows))
        filled = tokens / (len(rows) * context.recipe.micro_tokens)
        return tokens, {
            "loss": context.total(loss) / max(1.0, labelled),
            "accuracy": context.total(right) / max(1.0, labelled),
            "filled": filled,
            "rows": len(rows),
        }

    def masked_row(
        self, pieces: Pieces, row: list[int], rng: np.random.Generator, rate: float
    ) -> tuple[PackedBatch, Tensor]:
        """A packed row of pieces as the model sees it, and its labels (T,)."""
        texts = [self.context.wrap(pieces[i]) for i in row]
        ids = np.concatenate([np.asarray(text) for text in texts])
        seen, labels = mask_tokens(
            ids,
            rng,
            mask_id=self.mask_id,
            vocab_size=len(self.special),
            special=self.special,
            rate=rate,
            mask_special=self.spec.mask_special,
        )
        parts = torch.from_numpy(seen).split([len(text) for text in texts])
        device = self.context.device
        return pack(parts).to(device), torch.from_numpy(labels).to(device)

    def empty_row(self) -> tuple[PackedBatch, Tensor]:
        """A row with nothing to predict: its loss and its gradients are 0."""
        ids, device = self.context.wrap(np.empty(0, dtype=np.int64)), self.context.device
        return pack([ids]).to(device), torch.full((len(ids),), IGNORED, device=device)

    @torch.no_grad()
    def validate(self) -> Metrics:
        if self.held_out is None:
            return {}
        order = np.arange(len(self.held_out.lengths))
        packer = BestFitPacker(
            self.held_out.lengths + 2, lambda epoch: order, self.context.recipe.micro_tokens
        )
        loss = right = labelled = 0.0
        for index, row in enumerate(packer.rest_of_epoch()):
            if index >= EVALUATION_ROWS:
                break
            rng = self.context.rng(index)
            batch, labels = self.masked_row(self.held_out, row, rng, EVALUATION_MASK_RATE)
            with self.context.autocast():
                total, hits = objectives.masked_lm(self.model, batch, labels)
            loss, right = loss + total.item(), right + hits.item()
            labelled += int((labels >= 0).sum())
        return {"loss": loss / max(1.0, labelled), "accuracy": right / max(1.0, labelled)}

    def state_dict(self) -> dict[str, Any]:
        return self.packer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.packer.load_state_dict(state)


class TextTask:
    """Whole records, `spec.texts` a step, in a new order each epoch."""

    def __init__(
        self, context: Context, model: Any, spec: Task, phase: Phase, records: int
    ) -> None:
        if spec.texts % context.world:
            raise ValueError(
                f"texts = {spec.texts} of task {spec.objective} on {spec.data} is not a multiple "
                f"of the {context.world} processes"
            )
        self.context, self.model, self.spec = context, model, spec
        self.records = records
        if records < spec.texts:
            raise ValueError(
                f"data.{spec.data} has {records} records, fewer than texts = {spec.texts}"
            )
        self.order_of = context.order(records, phase)
        self.epoch = self.position = 0
        self.order = self.order_of(0)

    def next_records(self) -> np.ndarray:
        """(texts,) indices of the next global batch; an epoch's rest that fills none is left."""
        if self.position + self.spec.texts > self.records:
            self.epoch, self.position = self.epoch + 1, 0
            self.order = self.order_of(self.epoch)
        self.position += self.spec.texts
        return self.order[self.position - self.spec.texts : self.position]

    def share(self, records: np.ndarray) -> np.ndarray:
        """This process's part of a global batch: a contiguous one, so that parts concatenate."""
        size = len(records) // self.context.world
        return records[self.context.rank * size : (self.context.rank + 1) * size]

    def micro_batches(self, texts: list[list[int]]) -> list[PackedBatch]:
        """The texts in order, at most `micro_tokens` tokens at a time."""
        budget = self.context.recipe.micro_tokens
        groups = list(token_budget_batches([len(text) for text in texts], budget))
        rounds = self.context.rounds(len(groups))
        while len(groups) < rounds:  # every process has as many texts, so there is one to split
            at = max(range(len(groups)), key=lambda i: len(groups[i]))
            half = len(groups[at]) // 2
            groups[at : at + 1] = [groups[at][:half], groups[at][half:]]
        return [pack([texts[i] for i in group]).to(self.context.device) for group in groups]

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self.order = self.order_of(self.epoch)


class VectorTask(TextTask):
    """Training of the sentence vectors: distillation or contrastive."""

    def __init__(
        self,
        context: Context,
        model: ModernBertForMaskedLM,
        spec: Task,
        phase: Phase,
        store: TokenStore,
        validation: TokenStore | None,
        targets: np.ndarray | None = None,
        validation_targets: np.ndarray | None = None,
        rotation: np.ndarray | None = None,
    ) -> None:
        self.store, self.body = store, phase.max_length - 2
        self.width = len(store.fields)
        super().__init__(context, model, spec, phase, len(store) // self.width)
        self.name = f"{spec.objective}/{spec.data}"
        self.validation, self.targets = validation, targets
        self.validation_targets, self.rotation = validation_targets, rotation
        widest = model.config.hidden_size
        if any(not 0 < d <= widest for d in spec.dims):
            raise ValueError(f"dims {list(spec.dims)} of {self.name}: the model has {widest}")

    def backward(self, step: int, phase_tokens: int) -> tuple[int, Metrics]:
        records = self.next_records()
        loss = self.loss_of(self.store, records, self.targets)
        texts = self.texts(self.store, self.share(records))
        batches = self.micro_batches(texts)

        def encode(index: int) -> Tensor:
            seed_step(self.context, step, index)
            with self.context.autocast():
                return objectives.vectors(self.model, batches[index])

        value = objectives.backward_through_vectors(encode, len(batches), loss, self.spec.weight)
        tokens = self.context.total(sum(map(len, texts)))
        return int(tokens), {"loss": value}

    def texts(self, store: TokenStore, records: np.ndarray) -> list[list[int]]:
        """All fields of the records, cut to the phase's length."""
        indices = (records[:, None] * self.width + np.arange(self.width)).ravel()
        return [self.context.wrap(store[i][: self.body]) for i in indices.tolist()]

    def loss_of(
        self, store: TokenStore, records: np.ndarray, targets: np.ndarray | None
    ) -> objectives.VectorLoss:
        """The loss of the vectors (N * fields, D) of a global batch."""
        spec, device = self.spec, self.context.device
        if targets is not None:
            assert self.rotation is not None
            # Memory-mapped rows are read fastest in the order of the file.
            ascending = np.argsort(records)
            rows = np.empty((len(records), targets.shape[1]), dtype=np.float32)
            rows[ascending] = targets[records[ascending]]
            target = torch.from_numpy(rows @ self.rotation).to(device)
            return objectives.matryoshka(
                lambda x: objectives.distillation(x, target, spec.similarity_weight), spec.dims
            )
        positives = [store[i * self.width + 1].tobytes() for i in records.tolist()]
        numbers = {text: number for number, text in enumerate(positives)}
        keys = torch.tensor([numbers[text] for text in positives], device=device)
        return objectives.matryoshka(
            lambda x: objectives.info_nce(x.unflatten(0, (-1, self.width)), spec.temperature, keys),
            spec.dims,
        )

    @torch.no_grad()
    def validate(self) -> Metrics:
        if self.validation is None:
            return {}
        records = np.arange(min(EVALUATION_TEXTS, len(self.validation) // self.width))
        loss = self.loss_of(self.validation, records, self.validation_targets)
        batches = self.micro_batches(self.texts(self.validation, records))
        with self.context.autocast():
            together = torch.cat([objectives.vectors(self.model, batch) for batch in batches])
        return {"loss": loss(together).item()}


def special_ids(tokenizer: Tokenizer) -> np.ndarray:
    """(vocab_size,) bool: tokens that are never drawn at random and, by default, never masked."""
    special = np.zeros(tokenizer.vocab_size, dtype=bool)
    ids = [tokenizer.token_to_id(token) for token in tokenizer.special_tokens.values()]
    special[[i for i in ids if i is not None]] = True
    return special


def seed_step(context: Context, step: int, index: int) -> None:
    """Seed dropout for one micro-batch: the second pass over it drops what the first did."""
    key = [context.recipe.seed, step, index, context.rank]
    torch.manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1)
