"""The options of `SentenceEncoder.encode`, in sentence-transformers' order, and their checks."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from modernbert.quantization import PRECISIONS
from modernbert.streaming import TRUNCATIONS, WINDOW_TEXTS, EncodeReport


@dataclass(frozen=True)
class EncodeOptions:
    """The arguments of `SentenceEncoder.encode` after the inputs; see there.

    Raises `ValueError` with the name, the value and the choices.
    """

    prompt_name: str | None = None
    prompt: str | None = None
    batch_size: int | None = None
    show_progress_bar: bool | None = None
    output_value: str | None = "sentence_embedding"
    precision: str = "float32"
    convert_to_numpy: bool = True
    convert_to_tensor: bool = False
    device: torch.device | str | None = None
    normalize_embeddings: bool = False
    truncate_dim: int | None = None
    batch_tokens: int | None = None
    invariant: bool = False
    truncation: str = "warn"
    window: int = WINDOW_TEXTS
    report: EncodeReport | None = None

    def __post_init__(self) -> None:
        for name, choices in (
            ("output_value", ("sentence_embedding", "token_embeddings", None)),
            ("precision", PRECISIONS),
            ("truncation", TRUNCATIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; choose from {', '.join(map(str, choices))}"
                )
        for name in ("batch_size", "truncate_dim", "batch_tokens", "window"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | np.integer) or value < 1):
                raise ValueError(f"{name} is {value!r}; expected a positive integer")
        if self.precision != "float32" and not self.one_vector_each:
            raise ValueError(f"precision {self.precision!r} is for sentence embeddings only")
        if isinstance(self.device, list | tuple):
            raise ValueError("encode runs on one device; start one process per device")
        if self.report is not None and self.report.texts:
            raise ValueError("this report belongs to an earlier call; pass a new EncodeReport()")

    @classmethod
    def of(cls, **options: Any) -> "EncodeOptions":
        """Options from keywords; `ValueError` for one that does not exist."""
        known = [spec.name for spec in fields(cls)]
        if unknown := sorted(options.keys() - set(known)):
            raise ValueError(f"unknown options {unknown}; encode takes inputs, {', '.join(known)}")
        return cls(**options)

    @property
    def one_vector_each(self) -> bool:
        """Whether the result is a sentence vector, not token states or a dict."""
        return self.output_value == "sentence_embedding"

    @property
    def to_numpy(self) -> bool:
        """Whether vectors leave as numpy arrays."""
        return self.convert_to_numpy and not self.convert_to_tensor
