"""The names of tensors and config fields in other dialects, as tables.

`{}` stands for the rest of the name. The canonical names are those of the published MLM and
classification files (`model.layers.3.attn.Wqkv.weight`, `head.dense.weight`, `decoder.bias`).
"""

from collections.abc import Mapping

# A base model's own file, as `ModernBertModel` is saved (gte, nomic, sentence-transformers).
BARE = {
    "embeddings.{}": "model.embeddings.{}",
    "layers.{}": "model.layers.{}",
    "final_norm.{}": "model.final_norm.{}",
}

# FlexBERT, the code ModernBERT was trained with.
FLEXBERT = {
    "bert.embeddings.{}": "model.embeddings.{}",
    "bert.encoder.layers.{}": "model.layers.{}",
    "bert.final_norm.{}": "model.final_norm.{}",
    "head.{}": "head.{}",
    "decoder.{}": "decoder.{}",
    "classifier.{}": "classifier.{}",
}

# FlexBERT's encoder alone.
FLEXBERT_BARE = {stored.removeprefix("bert."): ours for stored, ours in list(FLEXBERT.items())[:3]}

# FlexBERT inside Composer's wrapper, as its .pt files hold it.
COMPOSER = {f"model.{stored}": ours for stored, ours in FLEXBERT.items()}

TABLES = {
    "bare": BARE,
    "flexbert": FLEXBERT,
    "flexbert-bare": FLEXBERT_BARE,
    "composer": COMPOSER,
}

# FlexBERT's config fields -> Hugging Face's. A dot steps into a nested object. Where two lines name
# one field the later wins: `head_class_act` says silu by default even in checkpoints whose stored
# head is the MLM head, which was trained with `head_pred_act`.
FLEXBERT_CONFIG = {
    "rotary_emb_base": "global_rope_theta",
    "local_attn_rotary_emb_base": "local_rope_theta",  # -1 means: same as global
    "sliding_window": "local_attention",
    "hidden_act": "hidden_activation",
    "mlp_dropout_prob": "mlp_dropout",
    "embed_dropout_prob": "embedding_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "attn_out_bias": "attention_bias",
    "mlp_in_bias": "mlp_bias",
    "head_class_act": "classifier_activation",
    "head_class_bias": "classifier_bias",
    "head_class_dropout": "classifier_dropout",
    "head_pred_act": "classifier_activation",
    "head_pred_bias": "classifier_bias",
    "pooling_type": "classifier_pooling",
    "init_cutoff_factor": "initializer_cutoff_factor",
    "deterministic_fa2": "deterministic_flash_attn",
    "norm_kwargs.eps": "norm_eps",
    "norm_kwargs.bias": "norm_bias",
}


def inverse(table: Mapping[str, str]) -> dict[str, str]:
    """The table read backwards; every table here maps one to one."""
    backwards = {ours: stored for stored, ours in table.items()}
    assert len(backwards) == len(table), "two stored names share one canonical name"
    return backwards


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """`name` after the first line of `table` that fits it; None when no line does."""
    for pattern, target in table.items():
        prefix = pattern.removesuffix("{}")
        if name.startswith(prefix):
            return target.format(name[len(prefix) :])
    return None


def canonical_name(stored: str) -> str:
    """The canonical name of a tensor stored under any dialect; unknown names stay as they are."""
    for table in TABLES.values():
        renamed = rename(stored, table)
        if renamed is not None:
            return renamed
    return stored
