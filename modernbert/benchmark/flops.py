"""Floating-point operations of one forward pass, counted from the config and the lengths.

2 per multiply-add; linear layers and attention of the backbone, no head; every query counts the
keys it is allowed to see, edges included. Norms, activations and RoPE count nothing.
"""

from collections.abc import Iterable

from modernbert.config import SLIDING, ModernBertConfig


def visible_pairs(length: int, window: int | None) -> int:
    """Pairs of query and key in one sequence; `window` is the reach to each side, None for all."""
    if window is None or window >= length - 1:
        return length * length
    return length * (2 * window + 1) - window * (window + 1)


def linear_flops(config: ModernBertConfig) -> int:
    """Of the four linear layers of every block, for one token."""
    hidden, inner = config.hidden_size, config.intermediate_size
    weights = 3 * hidden**2 + hidden**2 + 2 * inner * hidden + inner * hidden
    return 2 * weights * config.num_hidden_layers


def attention_flops(config: ModernBertConfig, length: int) -> int:
    """Of q k^T and of the weighted sum of v in all layers, for one sequence."""
    windows = (config.sliding_window if t == SLIDING else None for t in config.layer_types)
    return sum(4 * config.hidden_size * visible_pairs(length, window) for window in windows)


def forward_flops(config: ModernBertConfig, lengths: Iterable[int]) -> int:
    """Of one forward pass of the backbone over sequences of these lengths."""
    linear = linear_flops(config)
    return sum(length * linear + attention_flops(config, length) for length in lengths)
