"""The published speeds: Warner et al. 2024, arXiv 2412.13663, table 2; nothing measured here."""

from typing import Any

SOURCE = "Warner et al. 2024, arXiv 2412.13663, table 2, one RTX 4090"
WORKLOADS = ("fixed 512", "variable 512", "fixed 8192", "variable 8192")

# Thousand tokens per second in the order of WORKLOADS.
TABLE = {
    "base": {
        "BERT": (180.4, 90.2, None, None),
        "RoBERTa": (179.9, 89.9, None, None),
        "DeBERTaV3": (70.2, 35.1, None, None),
        "NomicBERT": (117.1, 58.5, 46.1, 23.1),
        "GTE-en-MLM": (123.7, 61.8, 46.8, 23.4),
        "GTE-en-MLM xformers": (122.5, 128.6, 47.5, 67.3),
        "ModernBERT": (148.1, 147.3, 123.7, 133.8),
    },
    "large": {
        "BERT": (54.4, 27.2, None, None),
        "RoBERTa": (42.0, 21.0, None, None),
        "DeBERTaV3": (24.6, 12.3, None, None),
        "GTE-en-MLM": (38.7, 19.3, 16.2, 8.1),
        "GTE-en-MLM xformers": (38.5, 40.4, 16.5, 22.8),
        "ModernBERT": (52.3, 52.9, 46.8, 49.8),
    },
}
# Largest batches that fitted: at 512 tokens and at 8192.
LARGEST_BATCH = {
    "base": {
        "BERT": (1096, None),
        "RoBERTa": (664, None),
        "DeBERTaV3": (236, None),
        "NomicBERT": (588, 36),
        "GTE-en-MLM": (640, 38),
        "GTE-en-MLM xformers": (640, 38),
        "ModernBERT": (1604, 98),
    },
    "large": {
        "BERT": (792, None),
        "RoBERTa": (460, None),
        "DeBERTaV3": (134, None),
        "GTE-en-MLM": (472, 28),
        "GTE-en-MLM xformers": (472, 28),
        "ModernBERT": (770, 48),
    },
}


def published_speed(size: str, workload: str, model: str = "ModernBERT") -> float | None:
    """Tokens per second of the paper, or None where it has none."""
    row = TABLE.get(size, {}).get(model)
    if row is None or workload not in WORKLOADS:
        return None
    speed = row[WORKLOADS.index(workload)]
    return None if speed is None else 1000 * speed


def as_dict(size: str) -> dict[str, Any]:
    """The published figures of one size, for a report."""
    return {
        "source": SOURCE,
        "workloads": list(WORKLOADS),
        "thousand_tokens_per_second": TABLE.get(size, {}),
        "largest_batch_512_8192": LARGEST_BATCH.get(size, {}),
    }
