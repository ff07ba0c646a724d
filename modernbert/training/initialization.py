"""Token embeddings that start from a sentence model's vectors, or from another vocabulary's."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modernbert.pretrained import PreTrainedModel
from modernbert.tokenizer import Tokenizer

from .teacher import rotation

ROW_STD = 0.25


@torch.no_grad()
def embeddings_from(
    teacher: Any, model: PreTrainedModel, tokenizer: Tokenizer, turn: np.ndarray | None = None
) -> None:
    """Set each token's row to the teacher's vector of the token's string.

    `turn` (D', D) maps the teacher's vectors to the model's width, by default to their leading
    principal directions. Tokens that are no text (special tokens, halves of characters, white
    space) keep their random direction.

    All rows get a standard deviation of `ROW_STD`, much more than random tables have. The norm
    that follows does not see the difference, but a step of Adam moves a row by about the learning
    rate whatever its length: short rows would forget their start in a few steps. The masked LM's
    norm before the tied decoder is scaled down by as much, so that its logits do not change.
    """
    table = model.get_input_embeddings().weight
    strings = {i: tokenizer.decode([i]).strip() for i in range(tokenizer.vocab_size)}
    ids = [i for i, text in strings.items() if text and "\ufffd" not in text]
    texts = [strings[i] for i in ids]
    vectors = np.asarray(teacher.encode(texts, batch_size=256, convert_to_numpy=True))
    if turn is None:
        turn = rotation(vectors, table.shape[1])
    rows = torch.from_numpy(vectors @ turn)
    before = table.std()
    table[ids] = rows.to(table)
    table.copy_(F.normalize(table, dim=1) * ROW_STD * table.shape[1] ** 0.5)
    padding = model.config.pad_token_id
    if padding is not None:
        table[padding] = 0
    if model.get_output_embeddings() is not None and model.config.tie_word_embeddings:
        model.get_parameter("head.norm.weight").mul_(before / ROW_STD)


@torch.no_grad()
def transplant(model: PreTrainedModel, old: Tokenizer, new: Tokenizer) -> None:
    """Give a model of the tokenizer `old` the rows of `new` in its embeddings and decoder.

    A token that both have keeps its row. Any other gets the mean of the rows of the old tokens of
    its string, or of all old rows where it is no text. The config keeps its token ids. Source:
    Gee et al. 2022, Fast Vocabulary Transfer for Language Model Compression.
    """
    pieces = [_pieces(old, new, i) for i in range(new.vocab_size)]
    before = [table.clone() for table in _tables(model)]
    model.resize_token_embeddings(new.vocab_size)
    for table, rows in zip(_tables(model), before, strict=True):
        everything = rows.mean(0)
        for i, ids in enumerate(pieces):
            table[i] = rows[ids].mean(0) if ids else everything


def _tables(model: PreTrainedModel) -> list[Tensor]:
    """What has a row for each token."""
    decoder = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight]
    if decoder is not None:
        found += [table for table in (decoder.weight, decoder.bias) if table is not None]
    return found


def _pieces(old: Tokenizer, new: Tokenizer, token_id: int) -> list[int]:
    """The old ids of a new token: its own where there is one, else those of its string."""
    token = new.id_to_token(token_id)
    same = None if token is None else old.token_to_id(token)
    if same is not None:
        return [same]
    text = new.decode([token_id], skip_special_tokens=False)
    if not text or "\ufffd" in text:
        return []
    return old(text, add_special_tokens=False).input_ids[0]
