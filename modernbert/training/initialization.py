"""Token embeddings that start from a sentence model's vectors of the same strings."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from modernbert.heads import ModernBertForMaskedLM
from modernbert.tokenizer import Tokenizer

from .teacher import rotation


@torch.no_grad()
def embeddings_from(
    teacher: Any, model: ModernBertForMaskedLM, tokenizer: Tokenizer, turn: np.ndarray | None = None
) -> None:
    """Set each token's row to the teacher's vector of the token's string.

    `turn` (D', D) maps the teacher's vectors to the model's width, by default to their leading
    principal directions; the rows get the length that the random ones have. Tokens that are no
    text (special tokens, halves of characters, white space) keep their random rows.
    """
    table = model.get_input_embeddings().weight
    strings = {i: tokenizer.decode([i]).strip() for i in range(tokenizer.vocab_size)}
    ids = [i for i, text in strings.items() if text and "\ufffd" not in text]
    texts = [strings[i] for i in ids]
    vectors = np.asarray(teacher.encode(texts, batch_size=256, convert_to_numpy=True))
    if turn is None:
        turn = rotation(vectors, table.shape[1])
    rows = torch.from_numpy(vectors @ turn)
    length = table[ids].norm(dim=1).mean()
    table[ids] = F.normalize(rows, dim=1).to(table) * length
