"""What is judged: anything that encodes texts, and how a name on the command line becomes one."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from modernbert.heads import ModernBertForMaskedLM
    from modernbert.tokenizer import Tokenizer

ROLES = {"text": "encode", "query": "encode_query", "document": "encode_document"}


class Encoder(Protocol):
    """Texts in, vectors (N, d) out: an array, a tensor or a list of either.

    Where it has `encode_query` and `encode_document`, retrieval uses them.
    """

    def encode(self, inputs: list[str], /) -> Any: ...


class Unavailable(Exception):
    """A model lacks what a suite needs; the message is the reason."""


class Subject:
    """A model under the name that tables show. Its parts are opened when a suite first asks.

    Args:
        name: shown in tables.
        open_encoder: returns the encoder; None when there is none.
        open_masked_lm: returns the masked LM and its tokenizer; None when there is none.
        open_tokenizer: returns the tokenizer; None when it is the encoder's.
    """

    def __init__(
        self,
        name: str,
        open_encoder: Callable[[], Encoder] | None = None,
        open_masked_lm: "Callable[[], tuple[ModernBertForMaskedLM, Tokenizer]] | None" = None,
        open_tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        self.name = name
        self._open_encoder = open_encoder
        self._open_masked_lm = open_masked_lm
        self._open_tokenizer = open_tokenizer
        self.dims: int | None = None

    def truncated(self, dims: int) -> "Subject":
        """This model with the leading `dims` of its vectors; opened once for both."""
        if dims < 1:
            raise ValueError(f"dims is {dims}; keep at least 1 dimension")
        other = Subject(f"{self.name} [:{dims}]", lambda: self.encoder)
        other.dims = dims
        return other

    @cached_property
    def encoder(self) -> Encoder:
        if self._open_encoder is None:
            raise Unavailable("it encodes no texts")
        return self._open_encoder()

    @cached_property
    def masked_lm(self) -> "tuple[ModernBertForMaskedLM, Tokenizer]":
        if self._open_masked_lm is None:
            raise Unavailable("it is no masked language model of this library")
        return self._open_masked_lm()

    @cached_property
    def tokenizer(self) -> Any:
        if self._open_tokenizer is not None:
            return self._open_tokenizer()
        tokenizer = getattr(self.encoder, "tokenizer", None)
        if tokenizer is None:
            raise Unavailable("it shows no tokenizer")
        return tokenizer

    def pieces(self, text: str) -> list[str]:
        """The tokens of a text as the vocabulary spells them, without special tokens."""
        return _pieces(self.tokenizer, text)

    def embed(self, texts: Sequence[str], role: str = "text") -> np.ndarray:
        """Vectors (N, d) float32, equal texts encoded once; `role` is a key of `ROLES`.

        Raises `ValueError` for vectors of another shape or with NaN or infinity.
        """
        unique = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        encode = getattr(self.encoder, ROLES[role], self.encoder.encode)
        vectors = _array(encode(list(unique)))
        if vectors.ndim != 2 or len(vectors) != len(unique):
            raise ValueError(
                f"{self.name}: encode gave an array of shape {vectors.shape} for {len(unique)} "
                "texts; expected (texts, dimensions)"
            )
        if not np.isfinite(vectors).all():
            raise ValueError(f"{self.name}: encode gave vectors with NaN or infinity")
        if self.dims is not None:
            if self.dims > vectors.shape[1]:
                raise ValueError(f"{self.name}: its vectors have {vectors.shape[1]} dimensions")
            vectors = vectors[:, : self.dims]
        return vectors[[unique[text] for text in texts]]


def _array(vectors: Any) -> np.ndarray:
    if isinstance(vectors, list | tuple):
        return np.stack([_array(vector) for vector in vectors]) if vectors else np.zeros((0, 0))
    if hasattr(vectors, "detach"):
        vectors = vectors.detach().cpu().float().numpy()
    return np.asarray(vectors, dtype=np.float32)


def _pieces(tokenizer: Any, text: str) -> list[str]:
    if hasattr(tokenizer, "encode_batch"):  # of the library tokenizers
        return list(tokenizer.encode(text, add_special_tokens=False).tokens)
    if hasattr(tokenizer, "id_to_token"):  # ours
        ids = tokenizer(text, add_special_tokens=False, truncation=False).input_ids[0]
        return [tokenizer.id_to_token(token) or "" for token in ids]
    if hasattr(tokenizer, "tokenize"):  # of transformers
        return list(tokenizer.tokenize(text))
    raise Unavailable(f"its tokenizer, a {type(tokenizer).__name__}, is of no known kind")


def as_subject(model: Any, name: str | None = None) -> Subject:
    """A `Subject` from a name, a folder, or an object with `encode`.

    Raises `ValueError` for anything else.
    """
    if isinstance(model, Subject):
        return model
    if isinstance(model, str | Path):
        return load_subject(str(model))
    if not callable(getattr(model, "encode", None)):
        raise ValueError(f"{type(model).__name__} has no method encode(texts); it cannot be judged")
    return Subject(name or type(model).__name__, lambda: model)


# -- names ---------------------------------------------------------------------------------------


def load_subject(name: str, *, device: str | None = None, dtype: str | None = None) -> Subject:
    """What a name stands for: PREFIX:NAME with a key of `LOADERS`, else a model of this library,
    static or not.

    Nothing is opened yet, so a name that cannot be opened fails when it is first used. Raises
    `ValueError` for an unknown prefix.
    """
    prefix, colon, rest = name.partition(":")
    if colon and not Path(name).exists():
        if prefix not in LOADERS:
            raise ValueError(
                f"{name}: no kind of model is called {prefix!r}; known are {', '.join(LOADERS)}"
            )
        return LOADERS[prefix](rest, device=device, dtype=dtype)
    return _ours(name, device=device, dtype=dtype)


def _ours(name: str, *, device: str | None, dtype: str | None) -> Subject:
    options = {"device": device, "dtype": dtype}
    return Subject(
        name,
        partial(_encoder, name, options),
        partial(_lm, name, options),
        partial(_tokenizer, name),
    )


def _tokenizer(name: str) -> Any:
    from modernbert.tokenizer import Tokenizer

    return _static(name).tokenizer if _is_static(name) else Tokenizer.from_pretrained(name)


def _encoder(name: str, options: dict[str, Any]) -> Encoder:
    from modernbert.sentence import SentenceEncoder

    return _static(name) if _is_static(name) else SentenceEncoder.from_pretrained(name, **options)


def _static(name: str) -> Any:
    from modernbert.static import StaticModel

    return StaticModel.from_pretrained(name)


def _is_static(name: str) -> bool:
    """Whether a folder holds a static model, in model2vec's layout or sentence-transformers'."""
    from modernbert.weights import open_folder

    folder = open_folder(name)
    config, modules = folder.read_json("config.json"), folder.read_json("modules.json")
    if isinstance(config, dict) and "model_type" in config:
        return config["model_type"] == "model2vec"
    if modules is None:
        return config is None and folder.path("config_sentence_transformers.json") is not None
    return "StaticEmbedding" in str(modules)


def _lm(name: str, options: dict[str, Any]) -> "tuple[ModernBertForMaskedLM, Tokenizer]":
    from modernbert.heads import ModernBertForMaskedLM
    from modernbert.pretrained import best_device
    from modernbert.tokenizer import Tokenizer
    from modernbert.weights import open_checkpoint

    if _is_static(name):
        raise Unavailable("a static model has no masked-LM head")
    checkpoint = open_checkpoint(name)
    if "head.dense.weight" not in checkpoint.tensors or "decoder.bias" not in checkpoint.tensors:
        raise Unavailable("its weights hold no masked-LM head")
    options = {**options, "device": options["device"] or best_device()}
    model = ModernBertForMaskedLM.from_checkpoint(checkpoint, **options)
    return model.eval(), Tokenizer.from_checkpoint(checkpoint)


def _sentence_transformers(name: str, *, device: str | None, dtype: str | None) -> Subject:
    def open_encoder() -> Encoder:
        from modernbert.training.teacher import load_teacher

        model: Any = load_teacher(name, device)
        return model if dtype is None else model.to(dtype=_dtype(dtype))

    return Subject(name, open_encoder)


def _packaged(name: str, **options: Any) -> Subject:
    return _sentence_transformers(f"package:{name}", **options)


def _tokenizer_alone(name: str, **_: Any) -> Subject:
    return Subject(name, open_tokenizer=partial(_tokenizer, name))


def _distilled(name: str, *, device: str | None, **_: Any) -> Subject:
    def open_encoder() -> Encoder:
        from modernbert.distillation import distill

        return distill(name, compat="model2vec", device=device, show_progress_bar=False)

    return Subject(f"{name}, distilled", open_encoder)


def _dtype(name: str) -> Any:
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype is {name!r}; try float32, bfloat16 or float16")
    return dtype


# A new kind of model is one more entry: what stands before the colon, and who opens it.
LOADERS: dict[str, Callable[..., Subject]] = {
    "st": _sentence_transformers,
    "package": _packaged,
    "tokenizer": _tokenizer_alone,
    "distill": _distilled,
}
