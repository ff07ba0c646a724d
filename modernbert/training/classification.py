"""Fine-tuning of a head that sorts texts, pairs of texts, or the words of a text into classes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.heads import (
    ClassifierModel,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
)
from modernbert.packing import PackedBatch
from modernbert.pretrained import read_config
from modernbert.tables import listed
from modernbert.tokenizer import Tokenizer
from modernbert.weights import Checkpoint

from .masking import IGNORED
from .readers import find_files, is_validation, read_file
from .recipe import Data, Phase, Task
from .store import _text
from .tasks import Context, Metrics, TextTask, seed_step

PER_WORD = "token-classification"
HEADS: dict[str, type[ClassifierModel]] = {
    "sequence-classification": ModernBertForSequenceClassification,
    PER_WORD: ModernBertForTokenClassification,
}
AT_ONCE = 1000  # texts that are tokenised together


@dataclass
class Examples:
    """Labelled records: `columns[f][i]` is field f of record i, `labels[i]` its class names.

    A field is a text, or a list of words; there is one name a text, or one a word.
    """

    columns: list[list[Any]]
    labels: list[list[str]] = field(default_factory=list)


def read_examples(
    data: Data, patterns: Iterable[str], objective: str
) -> tuple[Examples, Examples | None]:
    """The records of a collection that are trained on, and those held out, if any are to be.

    A class is a string or an integer. For token classification the one field holds a list of
    words, and the label a list of as many classes. Raises `ValueError` with the file and line.
    """
    train, held_out = (Examples([[] for _ in data.fields]) for _ in range(2))
    for path in (path for pattern in patterns for path in find_files(pattern)):
        for place, record in read_file(path):
            texts = [_field(record, name, place, objective) for name in data.fields]
            names = _names(record, data, place, objective)
            if objective == PER_WORD and len(names) != len(texts[0]):
                raise ValueError(
                    f"{place}: {len(names)} labels in {data.label!r} for {len(texts[0])} words in "
                    f"{data.fields[0]!r}; give one label a word"
                )
            key = " ".join(texts[0]) if objective == PER_WORD else texts[0]
            chosen = held_out if is_validation(key, data.validation) else train
            for column, text in zip(chosen.columns, texts, strict=True):
                column.append(text)
            chosen.labels.append(names)
    return train, held_out if held_out.labels else None


def _field(record: dict[str, Any], name: str, place: str, objective: str) -> Any:
    if objective != PER_WORD:
        return _text(record, name, place)
    words = record.get(name)
    if not isinstance(words, list):
        raise ValueError(
            f"{place}: field {name!r} holds {type(words).__name__}, not a list of words; "
            f"there are {listed(record)}"
        )
    return [_text({name: word}, name, place) for word in words]


def _names(record: dict[str, Any], data: Data, place: str, objective: str) -> list[str]:
    value = record.get(data.label or "")
    values = value if objective == PER_WORD else [value]
    if not isinstance(values, list) or any(type(label) not in (str, int) for label in values):
        wanted = "a list of strings or integers" if objective == PER_WORD else "a string or integer"
        raise ValueError(
            f"{place}: label {data.label!r} is {value!r:.80}, not {wanted}; "
            f"there are {listed(record)}"
        )
    return [str(label) for label in values]


def class_names(collections: Iterable[Examples]) -> list[str]:
    """The classes of all examples, sorted, as numbers where all of them are.

    Raises `ValueError` where there are fewer than two.
    """
    names = sorted({name for each in collections for names in each.labels for name in names})
    if len(names) < 2:
        raise ValueError(f"the labels name the classes {names}; there must be two at least")
    try:
        return sorted(names, key=int)
    except ValueError:
        return names


def label_ids(names: Sequence[str], checkpoint: Checkpoint | None) -> dict[int, str]:
    """The `id2label` of a model: that of a checkpoint with a trained classifier, or a new one.

    Raises `ValueError` for a classifier that does not know all of the classes.
    """
    if checkpoint is None or not any(n.startswith("classifier.") for n in checkpoint.tensors):
        return dict(enumerate(names))
    known = read_config(checkpoint).label2id
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"the classifier of {checkpoint.name} knows {', '.join(known)}, not {unknown[0]!r}: "
            "start from a model without one, or rename the labels"
        )
    return {number: name for name, number in known.items()}


def tokenized(
    examples: Examples, tokenizer: Tokenizer, ids: dict[str, int], objective: str, max_length: int
) -> tuple[list[list[int]], list[np.ndarray]]:
    """The token ids of each record, cut to `max_length`, and its targets, int64.

    A text has one target, (1,); in token classification each token has one, (length,): the first
    of a word has the word's, the others -100. A word that is cut off, or that the tokenizer makes
    no token of, has none.
    """
    texts: list[list[int]] = []
    targets: list[np.ndarray] = []
    for start in range(0, len(examples.labels), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        batch = tokenizer(
            *(column[part] for column in examples.columns),
            max_length=max_length,
            is_split_into_words=objective == PER_WORD,
        )
        texts += batch.input_ids
        labels = [np.array([ids[name] for name in names]) for names in examples.labels[part]]
        if objective == PER_WORD:
            labels = [_spread(*pair) for pair in zip(labels, batch.word_ids, strict=True)]
        targets += labels
    return texts, targets


def _spread(labels: np.ndarray, words: list[int | None]) -> np.ndarray:
    """A label a word to a label a token."""
    before = [None, *words]
    first = (word is not None and word != last for word, last in zip(words, before, strict=False))
    return np.array(
        [labels[word] if new else IGNORED for word, new in zip(words, first, strict=True)],
        dtype=np.int64,
    )


def macro_f1(confusion: np.ndarray) -> float:
    """The mean F1 over the classes that occur, from counts (true class, predicted class)."""
    right, both = confusion.diagonal(), confusion.sum(0) + confusion.sum(1)
    return float((2 * right[both > 0] / both[both > 0]).mean()) if both.any() else 0.0


class Classification(TextTask):
    """Cross-entropy of the classes of texts or, for token classification, of words."""

    model: ClassifierModel

    def __init__(
        self,
        context: Context,
        model: ClassifierModel,
        spec: Task,
        phase: Phase,
        train: Examples,
        held_out: Examples | None,
    ) -> None:
        super().__init__(context, model, spec, phase, len(train.labels))
        self.name = f"{spec.objective}/{spec.data}"
        ids = model.config.label2id
        arguments = (context.tokenizer, ids, spec.objective, phase.max_length)
        self.inputs, self.targets = tokenized(train, *arguments)
        self.held_out = None if held_out is None else tokenized(held_out, *arguments)

    def backward(self, step: int, phase_tokens: int) -> tuple[int, Metrics]:
        records = self.next_records()
        labelled = max(1, sum(int((self.targets[i] >= 0).sum()) for i in records.tolist()))
        mine = self.share(records).tolist()
        inputs, targets = [self.inputs[i] for i in mine], [self.targets[i] for i in mine]
        loss = right = 0.0
        for index, (batch, labels) in enumerate(self.batches(inputs, targets)):
            seed_step(self.context, step, index)
            logits, wanted = self.scores(batch, labels)
            total = F.cross_entropy(logits, wanted, reduction="sum")
            (self.spec.weight * total / labelled).backward()
            loss += total.item()
            right += int((logits.argmax(-1) == wanted).sum())
        tokens = self.context.total(sum(map(len, inputs)))
        return int(tokens), {
            "loss": self.context.total(loss) / labelled,
            "accuracy": self.context.total(right) / labelled,
        }

    def batches(
        self, inputs: list[list[int]], targets: list[np.ndarray]
    ) -> Iterator[tuple[PackedBatch, Tensor]]:
        """Micro-batches with their targets, (B,) of texts or (T,) of tokens."""
        done = 0
        for batch in self.micro_batches(inputs):
            part = np.concatenate(targets[done : done + len(batch)])
            done += len(batch)
            yield batch, torch.from_numpy(part).to(self.context.device)

    def scores(self, batch: PackedBatch, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, classes) in float32 of whatever has a target, and these targets (n,)."""
        with self.context.autocast():
            if self.spec.objective == PER_WORD:
                x = self.model.model(batch).last_hidden_state[targets >= 0]
                targets = targets[targets >= 0]
            else:
                x, _ = self.model.pooled((batch, None, None, None, None), False, False)
            return self.model.classify(x).float(), targets

    @torch.no_grad()
    def validate(self) -> Metrics:
        """Loss, accuracy and macro F1 over all that is held out; of words, not of entities."""
        if self.held_out is None:
            return {}
        classes = self.model.config.num_labels
        confusion = np.zeros((classes, classes), dtype=np.int64)
        loss = 0.0
        for batch, labels in self.batches(*self.held_out):
            logits, wanted = self.scores(batch, labels)
            loss += F.cross_entropy(logits, wanted, reduction="sum").item()
            pairs = wanted * classes + logits.argmax(-1)
            confusion += (
                torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu().numpy()
            )
        count = max(1, int(confusion.sum()))
        return {
            "loss": loss / count,
            "accuracy": float(confusion.trace()) / count,
            "macro_f1": macro_f1(confusion),
        }
