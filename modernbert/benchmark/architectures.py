"""The paper's other models, built from their configs with random weights.

Sizes as published: BERT, RoBERTa, DeBERTaV3 and XLM-RoBERTa base and large; NomicBERT base.
"""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from .batches import PaddedBatch
from .peers import Peer, Setting, absent, quiet_transformers, random_weights

BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
}
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}
DISENTANGLED = {
    "vocab_size": 128_100,
    "relative_attention": True,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
}
ROTARY = {"max_position_embeddings": 8192, "pad_token_id": 0}


@dataclass(frozen=True)
class Row:
    """How `transformers` names an architecture, and what its published config sets.

    Attributes:
        stem: of the class names.
        fields: of the config, besides the size.
        longest: tokens of the longest text.
        attention: the best implementation it has there.
        sizes: that were published.
    """

    stem: str
    fields: dict[str, Any]
    longest: int
    attention: str = "sdpa"
    sizes: tuple[str, ...] = ("tiny", "base", "large")


ROWS = {
    "BERT": Row("Bert", {"vocab_size": 30_522}, 512),
    "RoBERTa": Row("Roberta", {"vocab_size": 50_265, "max_position_embeddings": 514}, 512),
    "DeBERTaV3": Row("DebertaV2", DISENTANGLED, 512, attention="eager"),
    "NomicBERT": Row("NomicBert", ROTARY, 8192, sizes=("tiny", "base")),
    "XLM-RoBERTa": Row("XLMRoberta", {"vocab_size": 250_002, "max_position_embeddings": 514}, 512),
}


class Architecture(Peer):
    """Another encoder from `transformers`, at its best attention implementation there."""

    modernbert = False

    def __init__(self, name: str):
        self.name, self.row = name, ROWS[name]

    def missing(self, setting: Setting) -> str | None:
        if setting.size not in self.row.sizes:
            return f"no {setting.size} {self.name} was published"
        if reason := absent("transformers"):
            return reason
        module = f"transformers.models.{_folder(self.row.stem)}"
        return None if find_spec(module) else f"this transformers has no {self.name}"

    def longest(self, setting: Setting) -> int:
        return self.row.longest

    def prepare(self, setting: Setting) -> None:
        transformers = quiet_transformers()
        size = {"base": BASE, "large": LARGE, "tiny": TINY}[setting.size]
        config = getattr(transformers, f"{self.row.stem}Config")(**size, **self.row.fields)
        kind = getattr(transformers, f"{self.row.stem}Model")
        with import_module("transformers.initialization").no_init_weights():
            model = kind._from_config(config, attn_implementation=self.row.attention)
        model.load_state_dict(random_weights(model), strict=False, assign=True)
        self.model = model.to(setting.device, setting.dtype).eval()
        self.remark = f"random weights, transformers {self.row.attention}"

    def forward(self, batch: PaddedBatch) -> Tensor:
        mask = None if batch.full else batch.attention_mask
        return self.model(input_ids=batch.input_ids, attention_mask=mask).last_hidden_state


def _folder(stem: str) -> str:
    """BertModel lives in `bert`, XLMRobertaModel in `xlm_roberta`."""
    return {"DebertaV2": "deberta_v2", "NomicBert": "nomic_bert", "XLMRoberta": "xlm_roberta"}.get(
        stem, stem.lower()
    )
