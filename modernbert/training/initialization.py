"""Token embeddings that start from a sentence model's vectors of the same strings."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

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
