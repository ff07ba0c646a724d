"""Texts in, vectors out: our SentenceEncoder against sentence-transformers on the same folder."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from modernbert import kernels
from modernbert.model import ModernBertModel
from modernbert.packing import pack, token_budget_batches
from modernbert.sentence import SentenceEncoder
from modernbert.tokenizer import Tokenizer

from .measure import Contestant
from .peers import Setting, absent, quiet_transformers
from .workloads import Workload

BATCH_SIZES = (8, 32)  # of sentence-transformers, which sorts by length itself
NAME = "SentenceEncoder.encode"
INVARIANT = "SentenceEncoder.encode(invariant=True)"
BARE = "our backbone alone, tokens ready"
THEIRS = "sentence-transformers"


@dataclass(frozen=True)
class EndToEnd:
    """What is timed, and how near their vectors are to ours (smallest cosine)."""

    ours: Contestant
    others: list[Contestant]
    agreement: float | None
    missing: str | None


def end_to_end(setting: Setting, workload: Workload, vocabulary: Path) -> EndToEnd:
    """Both sides load the same folder: random weights, the real tokenizer, mean pooling."""
    with torch.device("meta"):
        model = ModernBertModel(setting.config)
    model.load_state_dict(setting.weights, assign=True)
    encoder = SentenceEncoder(model.eval(), Tokenizer.from_file(vocabulary))
    texts = list(workload.texts)
    missing = absent("sentence_transformers")
    theirs = None if missing else _sentence_transformer(encoder, setting)
    encoder = encoder.to(setting.device, setting.dtype)
    encode = partial(encoder.encode, texts, show_progress_bar=False)
    others = [
        Contestant(BARE, _backbone(encoder, texts)),
        Contestant(INVARIANT, partial(encode, invariant=True)),
    ]
    agreement = None
    if theirs is not None:
        others += [
            Contestant(
                f"{THEIRS}, batch {size}",
                partial(theirs.encode, texts, batch_size=size, show_progress_bar=False),
            )
            for size in BATCH_SIZES
        ]
        few = texts[:4]
        a, b = (torch.as_tensor(side.encode(few)).float() for side in (encoder, theirs))
        agreement = float(F.cosine_similarity(a, b).min())
    return EndToEnd(Contestant(NAME, encode), others, agreement, missing)


def _sentence_transformer(encoder: SentenceEncoder, setting: Setting) -> Any:
    quiet_transformers()
    kind = import_module("sentence_transformers").SentenceTransformer
    options = {"dtype": setting.dtype, "attn_implementation": "sdpa"}
    with tempfile.TemporaryDirectory() as folder:
        encoder.save_pretrained(folder)
        model = kind(
            folder, device=str(setting.device), model_kwargs=options, local_files_only=True
        )
    return model


def _backbone(encoder: SentenceEncoder, texts: list[str]) -> Callable[[], object]:
    """The batches that `encode` makes, tokenised and packed beforehand."""
    ids = sorted(encoder.tokenizer(texts).input_ids, key=len, reverse=True)
    groups = token_budget_batches(map(len, ids), kernels.token_budget(encoder.device))
    batches = [pack([ids[i] for i in group], device=encoder.device) for group in groups]

    def run() -> None:
        with torch.inference_mode():
            for batch in batches:
                encoder.model(batch)

    return run
