"""Any encoder as a model of `mteb` (version 2): `mteb.evaluate(MtebEncoder(encoder, name), tasks)`.

`mteb` itself is imported only when it asks for the model's metadata.
"""

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from modernbert.similarity import similarity, similarity_pairwise

from .models import Encoder, Subject


class MtebEncoder:
    """mteb's `EncoderProtocol` around an object with `encode(texts)`.

    Where the encoder has `encode_query` and `encode_document`, mteb's prompt types choose them.

    Args:
        encoder: a `SentenceEncoder`, a static model, or anything else that encodes texts.
        name: the name in mteb's results, such as "organisation/model".
        revision: the version of the model in mteb's results.
    """

    def __init__(
        self, encoder: Encoder, name: str = "modernbert/unnamed", revision: str | None = None
    ) -> None:
        self._subject = Subject(name, lambda: encoder)
        self._revision = revision
        self._similarity = getattr(encoder, "similarity_fn_name", None) or "cosine"

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """Vectors (N, d) of the texts of all batches, each a mapping with a list under "text"."""
        texts = [text for batch in inputs for text in batch["text"]]
        role = str(getattr(prompt_type, "value", prompt_type))
        role = "document" if role == "passage" else role  # its name before version 2
        return self._subject.embed(texts, role if role in ("query", "document") else "text")

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Scores (n, m) of vectors (n, d) and (m, d), by the encoder's own similarity."""
        return similarity(self._similarity, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Scores (n,) of the rows of (n, d) and (n, d) one by one."""
        return similarity_pairwise(self._similarity, embeddings1, embeddings2)

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's `ModelMeta`, empty but for name, revision and similarity."""
        meta = importlib.import_module("mteb.models.model_meta")
        return meta.ModelMeta.create_empty(
            {
                "name": self._subject.name,
                "revision": self._revision or "no_revision_available",
                "similarity_fn_name": meta.ScoringFunction(self._similarity),
            }
        )
