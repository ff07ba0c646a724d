"""Masked-LM accuracy: how often the likeliest token for a mask is the one that stood there.

Shapes: T = packed tokens, M = masked tokens of a batch, D = hidden size, V = vocabulary.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from modernbert.heads import ModernBertForMaskedLM
from modernbert.packing import pack, token_budget_batches
from modernbert.tokenizer import Tokenizer

from .models import Subject
from .scores import Skipped
from .task import Measured, Task
from .texts import MISSING, has_articles, held_out_articles

SUITE = "mlm"
DOCUMENTS = 300
BATCH_TOKENS = 8192


def tasks(data: Path) -> Iterator[Task | Skipped]:
    """Held-out articles of `data`, the first 512 tokens of each."""
    if has_articles(data):
        yield Task(SUITE, "Wikipedia", partial(_run, data))
    else:
        yield Skipped(SUITE, "Wikipedia", MISSING)


def _run(data: Path, subject: Subject) -> Measured:
    model, tokenizer = subject.masked_lm
    texts = list(islice(held_out_articles(data), DOCUMENTS))
    return masked_lm_accuracy(model, tokenizer, texts)


def masked_lm_accuracy(
    model: ModernBertForMaskedLM,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    rate: float = 0.15,
    max_length: int = 512,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
) -> Measured:
    """Accuracy in points, and the mean cross-entropy ("loss") in nats, over the masked tokens.

    Of each text the first `max_length` tokens are read, special tokens included. A `rate` of the
    others, at least one, is replaced by [MASK], all at once and the same for a given seed and
    tokenizer: nothing of what is predicted is left in place. Raises `ValueError` for a tokenizer
    without a mask token, a rate outside (0, 1] and when there is nothing to mask.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("this tokenizer has no mask token; is the model a masked LM?")
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; give a share above 0 and up to 1")
    rows = tokenizer(texts, max_length=max_length, add_special_tokens=True).input_ids
    special = [tokenizer.token_to_id(token) for token in tokenizer.special_tokens.values()]
    masked = [
        mask_tokens(ids, tokenizer.mask_token_id, special, rate, (seed, index))
        for index, ids in enumerate(rows)
    ]
    correct, loss, count = 0, 0.0, 0
    training = model.training
    model.eval()
    try:
        for group in token_budget_batches(map(len, rows), batch_tokens):
            ids = torch.cat([masked[row] for row in group])
            labels = torch.tensor([token for row in group for token in rows[row]])
            places = ids != labels
            if not places.any():
                continue
            labels = labels[places].to(model.device)  # (M,)
            batch = pack([masked[row] for row in group], device=model.device)
            with torch.no_grad():
                hidden = model.model(batch).last_hidden_state  # (T, D)
                logits = model.decoder(model.head(hidden[places.to(model.device)]))  # (M, V)
                loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            correct += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
    finally:
        model.train(training)
    if not count:
        raise ValueError("there is no token to mask in these texts")
    return Measured(count, {"accuracy": 100 * correct / count, "loss": loss / count})


def mask_tokens(
    ids: Sequence[int],
    mask_id: int,
    special: Sequence[int | None],
    rate: float,
    seed: Sequence[int],
) -> torch.Tensor:
    """The ids (length,) with a `rate` of those that are not special replaced by `mask_id`."""
    places = np.flatnonzero(~np.isin(ids, [number for number in special if number is not None]))
    size = min(max(round(rate * len(places)), 1), len(places))
    chosen = np.random.default_rng(seed).choice(places, size, replace=False)
    masked = torch.tensor(ids)
    masked[torch.from_numpy(chosen)] = mask_id
    return masked
