"""ModernBERT encoders in pure PyTorch. Names are loaded when they are first used."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ModernBertConfig": "config",
    "PackedBatch": "packing",
    "pack": "packing",
    "ModernBertModel": "model",
    "ModernBertForMaskedLM": "heads",
    "ModernBertForMultipleChoice": "heads",
    "ModernBertForQuestionAnswering": "heads",
    "ModernBertForSequenceClassification": "heads",
    "ModernBertForTokenClassification": "heads",
    "SentenceEncoder": "sentence",
    "StaticModel": "static",
    "Tokenizer": "tokenizer",
    "distill": "distillation",
}
__all__ = [*_HOMES]

if TYPE_CHECKING:
    from modernbert.config import ModernBertConfig as ModernBertConfig
    from modernbert.distillation import distill as distill
    from modernbert.heads import ModernBertForMaskedLM as ModernBertForMaskedLM
    from modernbert.heads import ModernBertForMultipleChoice as ModernBertForMultipleChoice
    from modernbert.heads import ModernBertForQuestionAnswering as ModernBertForQuestionAnswering
    from modernbert.heads import (
        ModernBertForSequenceClassification as ModernBertForSequenceClassification,
    )
    from modernbert.heads import (
        ModernBertForTokenClassification as ModernBertForTokenClassification,
    )
    from modernbert.model import ModernBertModel as ModernBertModel
    from modernbert.packing import PackedBatch as PackedBatch
    from modernbert.packing import pack as pack
    from modernbert.sentence import SentenceEncoder as SentenceEncoder
    from modernbert.static import StaticModel as StaticModel
    from modernbert.tokenizer import Tokenizer as Tokenizer


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'modernbert' has no attribute {name!r}")
    return getattr(importlib.import_module(f"modernbert.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
