"""Masked language modelling: which tokens the model must predict, and what it sees instead."""

import numpy as np

IGNORED = -100  # the label of tokens that are not predicted


def mask_tokens(
    ids: np.ndarray,
    rng: np.random.Generator,
    *,
    mask_id: int,
    vocab_size: int,
    special: np.ndarray,
    rate: float = 0.3,
    mask: float = 0.8,
    random: float = 0.1,
    mask_special: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Choose `rate` of the tokens for prediction; of these, `mask` become the mask token and
    `random` another token, and the rest stay.

    Args:
        ids: token ids of any shape and integer dtype; not changed.
        rng: gives one uniform number a token, then the random tokens.
        special: (vocab_size,) bool, the ids of special tokens. They are never drawn as random
            tokens, and never chosen for prediction without `mask_special`.

    Returns the ids that the model sees and the labels, both int64 of the shape of `ids`; labels
    are the ids before where they are to be predicted and -100 elsewhere. Raises `ValueError` for
    rates that are no shares and for `special` of another shape.
    """
    if not (0 <= rate <= 1 and mask >= 0 and random >= 0 and mask + random <= 1):
        raise ValueError(
            f"rate={rate}, mask={mask}, random={random}; give a rate from 0 to 1, and shares of at "
            "least 0 that sum to at most 1"
        )
    if special.shape != (vocab_size,) or special.dtype != np.bool_:
        raise ValueError(
            f"special is {special.dtype} of shape {special.shape}; give one bool for each of the "
            f"{vocab_size} ids"
        )
    original = ids.astype(np.int64)
    r = rng.random(original.shape)
    chosen = r < rate
    masked = r < rate * mask
    replaced = (r < rate * (mask + random)) & ~masked
    if not mask_special:
        ordinary = ~special[original]
        chosen, masked, replaced = chosen & ordinary, masked & ordinary, replaced & ordinary
    seen = np.where(masked, mask_id, original)
    seen[replaced] = rng.choice(np.flatnonzero(~special), size=np.count_nonzero(replaced))
    return seen, np.where(chosen, original, IGNORED)
