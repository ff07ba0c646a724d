"""Predictions for a few texts: what masks hide, and the labels of a classifier.

Shapes: T = packed tokens, D = hidden size, V = vocabulary, N = labels.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch

from modernbert import kernels
from modernbert.heads import ModernBertForMaskedLM, ModernBertForSequenceClassification
from modernbert.packing import pack, token_budget_batches
from modernbert.tokenizer import TokenizedBatch, Tokenizer

logger = logging.getLogger("modernbert")


def fill_mask(
    model: ModernBertForMaskedLM, tokenizer: Tokenizer, texts: Sequence[str], *, top_k: int = 5
) -> list[list[list[dict[str, Any]]]]:
    """For each text, for each of its masks, the `top_k` likeliest tokens.

    A prediction is {"token": text, "id": int, "probability": float}, the likeliest first. Raises
    `ValueError` for a text without a mask.
    """
    mask = tokenizer.mask_token_id
    if mask is None:
        raise ValueError("this tokenizer has no mask token; is the model a masked LM?")
    batch = tokenizer(texts)
    _report_cuts(batch)
    results = []
    for text, ids in zip(texts, batch.input_ids, strict=True):
        places = [place for place, token in enumerate(ids) if token == mask]
        if not places:
            raise ValueError(f"{text[:80]!r} holds no {tokenizer.id_to_token(mask)} to predict")
        with torch.no_grad():
            hidden = model.model(pack([ids], device=model.device)).last_hidden_state  # (T, D)
            logits = model.decoder(model.head(hidden[places]))  # (masks, V)
        best = logits.float().softmax(-1).topk(min(top_k, logits.shape[-1]))
        results.append(
            [
                [
                    {
                        "token": tokenizer.decode([token], skip_special_tokens=False),
                        "id": token,
                        "probability": probability,
                    }
                    for token, probability in zip(*pair, strict=True)
                ]
                for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        )
    return results


def classify(
    model: ModernBertForSequenceClassification,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
) -> list[list[dict[str, Any]]]:
    """For each text, or text and its pair, {"label": name, "score": float}, the highest first.

    Scores are probabilities: of a softmax, or of a sigmoid for several labels at once and for a
    single label; those of a regression are what the model says.
    """
    batch = tokenizer(texts, pairs)
    _report_cuts(batch)
    logits = []
    budget = kernels.token_budget(model.device)
    for rows in token_budget_batches(map(len, batch.input_ids), budget):
        packed = pack([batch.input_ids[row] for row in rows], device=model.device)
        with torch.no_grad():
            logits.append(model(packed).logits.float())
    scores = torch.cat(logits)  # (texts, N)
    config = model.config
    if config.problem_type == "multi_label_classification" or (
        config.num_labels == 1 and config.problem_type != "regression"
    ):
        scores = scores.sigmoid()
    elif config.problem_type != "regression":
        scores = scores.softmax(-1)
    names = config.id2label or {i: f"LABEL_{i}" for i in range(config.num_labels)}
    order = scores.argsort(descending=True, stable=True).tolist()
    return [
        [{"label": names[i], "score": row[i]} for i in ranks]
        for row, ranks in zip(scores.tolist(), order, strict=True)
    ]


def _report_cuts(batch: TokenizedBatch) -> None:
    for index, cut in enumerate(batch.truncated):
        if cut:
            logger.warning("text %d is too long for the model: %d tokens are cut", index, cut)
