"""Token embeddings that start from a sentence model's vectors of the same strings."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from modernbert.heads import ModernBertForMaskedLM
from modernbert.tokenizer import Tokenizer

from .teacher import rotation


@torch.no_grad()
def embeddings_from(teacher: Any, model: ModernBertForMaskedLM, tokenizer: Tokenizer) -> None:
    """Set each token's row to the teacher's vector of the token's string.

    The vectors are rotated to their leading principal directions, D of them, and scaled to the
    length that the random rows have. Tokens that are no text (special tokens, halves of
    characters, white space) keep their random rows.
    """
    table = model.get_input_embeddings().weight
    strings = {i: tokenizer.decode([i]).strip() for i in range(tokenizer.vocab_size)}
    ids = [i for i, text in strings.items() if text and "\ufffd" not in text]
    texts = [strings[i] for i in ids]
    vectors = np.asarray(teacher.encode(texts, batch_size=256, convert_to_numpy=True))
    rows = torch.from_numpy(vectors @ rotation(vectors, table.shape[1]))
    length = table[ids].norm(dim=1).mean()
    table[ids] = F.normalize(rows, dim=1).to(table) * length
