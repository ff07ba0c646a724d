"""StaticModel: a table with a vector per token; a text is the mean of its tokens' vectors.

Needs numpy and tokenizers, never torch. Reads what model2vec and sentence-transformers write, and
writes both layouts. Shapes: V = tokens, R = rows of the table (V, or fewer when tokens share rows),
N = texts, d = width.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import ArrayLike
from tokenizers import AddedToken, models
from tqdm import tqdm

from modernbert.weights import CheckpointError, ModelFolder

from .cutting import steps
from .static_dtypes import DTYPES
from .static_files import (
    MAX_LENGTH,
    TABLE,
    TOKENIZER,
    onnx_bytes,
    read_parts,
    safetensors_bytes,
)
from .tokenizer_file import load_backend
from .vocabulary import PADDING, Vocabulary

MODULE = "sentence_transformers.models."
MEMORY = 1 << 22  # characters of remembered words, some 100 MB
GATHERED = 4096  # rows that are summed at a time
ENDS = ",.;:!?)"
TINY = 1e-32


class StaticModel:
    """Texts to vectors without a network: tokenise, look rows up, average, scale to length 1.

    Models are not changed: what edits one (`add_words`, `quantize`, ...) returns another.

    Args:
        embeddings: the table (R, d) of float16, float32, float64 or int8.
        tokenizer: a `tokenizers.Tokenizer`, or the contents of a tokenizer.json; ids 0 to V - 1.
        mapping: the row of each token (V,); None when R = V and each has its own.
        weights: a factor for each token (V,), or None.
        scale: what int8 rows are multiplied by.
        normalize: scale vectors to length 1; 0 stays 0.
        max_length: tokens of a text that are used, None for all. May be changed.
        config: further fields of config.json.
        card: README.md, None for one that is made up from the config.

    Raises `ValueError` for parts that do not fit each other, and for NaN and infinity.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        tokenizer: tokenizers.Tokenizer | bytes,
        *,
        mapping: np.ndarray | None = None,
        weights: np.ndarray | None = None,
        scale: float = 1.0,
        normalize: bool = True,
        max_length: int | None = MAX_LENGTH,
        config: Mapping[str, Any] | None = None,
        card: str | None = None,
    ) -> None:
        raw = tokenizer if isinstance(tokenizer, bytes) else tokenizer.to_str().encode()
        self.tokenizer = load_backend(raw, TOKENIZER)
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        self.embeddings = embeddings
        self.mapping = mapping
        self.weights = weights
        self.scale = float(scale)
        self.normalize = normalize
        self.max_length = max_length
        self.config = dict(config or {})
        self.card = card
        self._check(list(vocabulary.values()))
        # Long texts are cut before they are tokenised, as model2vec does it.
        self._characters = int(np.median([len(token) for token in self.tokens]))
        self._unknown = _unknown_id(self.tokenizer)
        self._remembered: dict[str, list[int]] = {}

    def _check(self, ids: list[int]) -> None:
        rows, tokens = self.embeddings, len(self.tokens)
        if rows.ndim != 2 or rows.dtype.name not in DTYPES or 0 in rows.shape:
            raise ValueError(
                f"the table has shape {rows.shape} and dtype {rows.dtype}; expected (rows, width) "
                f"of {', '.join(DTYPES)}"
            )
        if max(ids) != tokens - 1:
            raise ValueError(
                f"the tokenizer has {tokens} tokens and the highest id {max(ids)}; ids must be "
                "0, 1, 2, ... without a gap"
            )
        if self.mapping is None and len(rows) != tokens:
            raise ValueError(
                f"the table has {len(rows)} rows and the tokenizer {tokens} tokens; give a row for "
                "each token, or a mapping"
            )
        if self.mapping is not None:
            mapping = np.asarray(self.mapping)
            if mapping.shape != (tokens,) or mapping.dtype.kind not in "iu":
                raise ValueError(f"mapping must be {tokens} integers, one for each token")
            if mapping.min() < 0 or mapping.max() >= len(rows):
                raise ValueError(
                    f"mapping goes from {mapping.min()} to {mapping.max()}; the table has "
                    f"{len(rows)} rows"
                )
        if self.weights is not None and np.shape(self.weights) != (tokens,):
            raise ValueError(f"weights has shape {np.shape(self.weights)}; expected ({tokens},)")
        for name, values in (("the table", rows), ("weights", self.weights)):
            if values is not None and not np.isfinite(values).all():
                raise ValueError(f"{name} holds NaN or infinity; distil or download it again")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length is {self.max_length}; give a positive number or None")

    # -- loading and saving -----------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        normalize: bool | None = None,
        dims: int | None = None,
        dtype: str | None = None,
    ) -> "StaticModel":
        """Load a Hub id or folder that model2vec, sentence-transformers or this library wrote.

        `normalize` overrides what the folder says; `dims` keeps the leading dimensions; `dtype`
        converts the table. Raises `CheckpointError` (a `ValueError`) for what is no static model.
        """
        from modernbert.weights.folder import METADATA_PATTERNS, WEIGHT_PATTERNS, locate

        path = locate(
            name_or_path,
            [*METADATA_PATTERNS, *WEIGHT_PATTERNS, "README.md"],
            revision=revision,
            local_files_only=local_files_only,
            token=token,
            cache_dir=cache_dir,
        )
        folder = ModelFolder(os.fspath(name_or_path), path)
        try:
            model = cls(**read_parts(folder))
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{folder.name}: {error}") from None
        if normalize is not None:
            model.normalize = normalize
        if dims is not None:
            model = model.truncate(dims)
        return model if dtype is None else model.quantize(dtype)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        layout: str = "model2vec",
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Write the folder that model2vec and sentence-transformers read.

        `layout="sentence-transformers"` writes sentence-transformers' own, which model2vec reads,
        too: a float32 row for each token. It is larger, but for readers that know neither int8 nor
        shared rows, and sentence-transformers gives NaN for empty texts when a table is float16.
        `scores` are shown in the model card, beside the recipe. The folder appears complete or, if
        anything fails, stays what it was.
        """
        from modernbert.weights.swap import replaced_folder, write_file

        files = self._files(layout, scores or {})

        def stale(relative: str) -> bool:
            return relative in files or os.path.basename(relative) == TABLE

        with replaced_folder(folder, stale=stale) as fresh:
            for relative, content in files.items():
                path = fresh / relative
                path.parent.mkdir(exist_ok=True)
                write_file(path, [content])

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; the commit's URL. Options: see `push_folder`."""
        from modernbert.weights import push_folder

        return push_folder(self.save_pretrained, repo_id, **options)

    def _files(self, layout: str, scores: Mapping[str, float]) -> dict[str, bytes]:
        if layout not in ("model2vec", "sentence-transformers"):
            raise ValueError(f"layout={layout!r}; choose 'model2vec' or 'sentence-transformers'")
        plain = layout == "model2vec"
        inside = "" if plain else "0_StaticEmbedding"
        modules = [
            {"idx": 0, "name": "0", "path": inside or ".", "type": f"{MODULE}StaticEmbedding"}
        ]
        if self.normalize:
            modules.append(
                {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{MODULE}Normalize"}
            )
        config = self._config()
        if not plain:
            config |= {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
            config |= {"prompts": {"query": "", "document": ""}, "default_prompt_name": None}
            del config["architectures"]
        jsons = {
            "modules.json": modules,
            "config.json" if plain else "config_sentence_transformers.json": config,
        }
        files = {
            name: json.dumps(value, indent=2).encode() + b"\n" for name, value in jsons.items()
        }
        card = self._card(scores) if scores or self.card is None else self.card
        files["README.md"] = card.encode()
        prefix = f"{inside}/" if inside else ""
        files[prefix + TOKENIZER] = self._tokenizer_file()
        files[prefix + TABLE] = safetensors_bytes(
            self._tensors() if plain else {"embedding.weight": self._baked()}
        )
        return files

    def _config(self) -> dict[str, Any]:
        config = {key: self.config[key] for key in self.config if key != "apply_zipf"}
        config |= {
            "model_type": "model2vec",
            "architectures": ["StaticModel"],
            "hidden_dim": self.dims,
            "seq_length": 1_000_000,
            "normalize": self.normalize,
            "max_length": self.max_length,
            "embedding_dtype": self.embeddings.dtype.name,
        }
        for name, value in (
            ("vocabulary_quantization", None if self.mapping is None else len(self.embeddings)),
            ("embedding_scale", self.scale if self.scale != 1 else None),  # ours
        ):
            config.pop(name, None)
            if value is not None:
                config[name] = value
        return config

    def _tensors(self) -> dict[str, np.ndarray]:
        tensors = {"embeddings": self.embeddings}
        if self.mapping is not None:
            tensors["mapping"] = np.asarray(self.mapping, np.int32)
        if self.weights is not None:
            tensors["weights"] = np.asarray(self.weights, np.float64)
        return tensors

    def _baked(self) -> np.ndarray:
        """A float32 row for each token (V, d), multiplied out; unknown text counts nothing."""
        rows = self._rows.copy()
        if self._unknown is not None:
            rows[self._unknown] = 0
        return rows

    def _tokenizer_file(self) -> bytes:
        # A copy: calls decide about truncation, other programs read it from the file.
        copy = tokenizers.Tokenizer.from_str(self.tokenizer.to_str())
        if self.max_length is not None:
            copy.enable_truncation(self.max_length)
        if (padding := copy.token_to_id(PADDING)) is not None:
            copy.enable_padding(pad_id=padding, pad_token=PADDING, length=0)
        return copy.to_str().encode()

    def _card(self, scores: Mapping[str, float]) -> str:
        base = self.config.get("tokenizer_name", "")
        recipe = self.config.get("recipe")
        rows = {"Recipe": recipe if isinstance(recipe, dict) else {}, "Scores": scores}
        tables = "".join(
            f"\n## {title}\n\n| | |\n|---|---|\n"
            + "".join(f"| {name} | {_cell(value)} |\n" for name, value in values.items())
            for title, values in rows.items()
            if values
        )
        return f"""\
---
library_name: model2vec
{f"base_model: {json.dumps(base)}" if base else "tags:"}
{"tags:" if base else "- model2vec"}
- embeddings
- static-embeddings
- sentence-transformers
---

# Static embeddings

{len(self.tokens):,} tokens, {self.dims} dimensions. The vector of a text is the mean of its tokens.

```python
from modernbert import StaticModel  # or: from model2vec import StaticModel

model = StaticModel.from_pretrained("this folder or repository")
vectors = model.encode(["The weather is lovely today.", "He drove to the stadium."])
```
{tables}"""

    # -- encoding ---------------------------------------------------------------------------

    @property
    def dims(self) -> int:
        """Width of the vectors."""
        return int(self.embeddings.shape[1])

    def get_embedding_dimension(self) -> int:
        """Width of the vectors, under the name that sentence-transformers gives it."""
        return self.dims

    get_sentence_embedding_dimension = get_embedding_dimension

    @cached_property
    def _rows(self) -> np.ndarray:
        """A float32 row for each token (V, d)."""
        return self._read(slice(None))

    def _read(self, ids: np.ndarray | slice) -> np.ndarray:
        """The float32 rows of tokens, (n, d)."""
        rows = self.embeddings[ids if self.mapping is None else self.mapping[ids]]
        rows = rows.astype(np.float32, copy=False)
        if self.weights is not None:
            rows = rows * np.asarray(self.weights)[ids].astype(np.float32)[:, None]
        return rows if self.scale == 1 else rows * np.float32(self.scale)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        normalize: bool | None = None,
        max_length: int | None = None,
        batch_size: int = 512,
        show_progress_bar: bool = False,
        **_: Any,
    ) -> np.ndarray:
        """The vector of a text (d,), or of N texts (N, d); float32.

        `normalize` and `max_length` win over the attributes. A text of which nothing is known is
        all zeros. Other keywords, such as `prompt_name`, are taken and ignored, so that calls
        written for other encoders work. Raises `ValueError` for what is no text.
        """
        single = isinstance(texts, str)
        rows = self._checked([texts] if isinstance(texts, str) else texts)
        limit = self.max_length if max_length is None else max_length
        if limit is not None and limit < 1:
            raise ValueError(f"max_length is {limit}; give a positive number")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give a positive number")
        vectors = np.zeros((len(rows), self.dims), np.float32)
        for start in tqdm(
            range(0, len(rows), batch_size), desc="Encoding", disable=not show_progress_bar
        ):
            batch = rows[start : start + batch_size]
            self._mean(self._ids(batch, limit), vectors[start : start + batch_size])
        if self.normalize if normalize is None else normalize:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + TINY
        return vectors[0] if single else vectors

    def encode_query(self, texts: str | Sequence[str], **options: Any) -> np.ndarray:
        """`encode`; a static model has no prompts."""
        return self.encode(texts, **options)

    encode_document = encode_query

    @staticmethod
    def _checked(texts: Iterable[str]) -> list[str]:
        if isinstance(texts, bytes) or not isinstance(texts, Iterable):
            raise ValueError(f"got {texts!r:.80}; expected a text or a sequence of texts")
        rows = list(texts)
        for index, text in enumerate(rows):
            if not isinstance(text, str):
                raise ValueError(f"text {index} is {type(text).__name__}, not a text: {text!r:.80}")
        return rows

    def _ids(self, texts: list[str], limit: int | None) -> list[list[int]]:
        if limit is not None:
            texts = [text[: limit * self._characters] for text in texts]
        ids = self._by_words(texts) if self._spaces_separate else self._tokenized(texts)
        return ids if limit is None else [row[:limit] for row in ids]

    def _tokenized(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _by_words(self, texts: list[str]) -> list[list[int]]:
        """Ids through a memory of what stands between spaces: most of a text is frequent words."""
        split = [text.split(" ") for text in texts]
        remembered = self._remembered
        fresh = set(chain.from_iterable(split)) - remembered.keys()
        if fresh:
            remembered.update(self._looked_up(fresh))
            others = [word for word in fresh if word not in remembered]
            remembered.update(zip(others, self._tokenized(others), strict=True))
        look_up = remembered.__getitem__
        ids = [list(chain.from_iterable(map(look_up, words))) for words in split]
        self._characters_remembered += sum(map(len, fresh))
        if self._characters_remembered > MEMORY:
            self._remembered, self._characters_remembered = {}, 0
        return ids

    _characters_remembered = 0

    def _looked_up(self, words: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
        """Those that are a token of ASCII letters, or one and a full stop, with their ids."""
        tokens, ends, lowers = self._whole_words
        for word in words:
            end = ends.get(word[-1:])
            body = word if end is None else word[:-1]
            if body.isascii() and body.isalpha():
                number = tokens.get(body.lower() if lowers else body)
                if number is not None:
                    yield word, [number] if end is None else [number, end]

    @cached_property
    def _whole_words(self) -> tuple[dict[str, int], dict[str, int], bool]:
        """The ids of such words and of what may end them, and whether words are lower-cased first.

        Empty where a word that is in the vocabulary could still become something else: in Unigram,
        in BPE with merges, and next to added tokens that may stand inside of words.
        """
        model, split = self.tokenizer.model, self.tokenizer.pre_tokenizer.pre_tokenize_str
        certain = isinstance(model, models.WordLevel | models.WordPiece)
        added: Iterable[AddedToken] = self.tokenizer.get_added_tokens_decoder().values()
        beside = "".join(token.content for token in added)
        if any(token.content.isalpha() for token in added) or not (
            certain or getattr(model, "ignore_merges", False)
        ):
            return {}, {}, False
        ids = {token: number for number, token in enumerate(self.tokens)}
        ((alone, _),) = split("a")
        marker = alone.removesuffix("a")
        longest = getattr(model, "max_input_chars_per_word", sys.maxsize)
        words = {
            body: number
            for token, number in ids.items()
            if token.startswith(marker)
            and (body := token[len(marker) :]).isascii()
            and body.isalpha()
            and len(body) <= longest
        }
        ends = {}
        for mark in set(ENDS).difference(beside):
            first, *rest = [piece for piece, _ in split(f"a{mark}")]
            if first == alone and len(rest) == 1 and rest[0] in ids:
                ends[mark] = ids[rest[0]]
        normalizer = self.tokenizer.normalizer
        return words, ends, normalizer is not None and normalizer.normalize_str("A") == "a"

    @cached_property
    def _spaces_separate(self) -> bool:
        """Whether the ids of a text are those of its parts between spaces, one after the other."""
        known = ("NFC", "NFD", "Lowercase", "BertNormalizer", "StripAccents")
        normal = all(step["type"] in known for step in steps(self.tokenizer.normalizer))
        match [step["type"] for step in steps(self.tokenizer.pre_tokenizer)]:
            case ["BertPreTokenizer" | "Whitespace" | "WhitespaceSplit", *rest]:
                words = rest in ([], ["ByteLevel"], ["Punctuation"])
            case _:
                words = False
        added: Iterable[AddedToken] = self.tokenizer.get_added_tokens_decoder().values()
        return (
            normal
            and words
            and not any(token.lstrip or token.rstrip or " " in token.content for token in added)
        )

    def _mean(self, ids: list[list[int]], out: np.ndarray) -> None:
        """Write the mean row of each list of ids; unknown ids are left out."""
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum()))
        if self._unknown is not None and not (keep := flat != self._unknown).all():
            texts = np.repeat(np.arange(len(ids)), lengths)
            lengths = np.bincount(texts[keep], minlength=len(ids))
            flat = flat[keep]
        tokens, places = np.unique(flat, return_inverse=True)
        rows = self._read(tokens)  # what is frequent is converted once
        end = 0
        for number, length in enumerate(lengths.tolist()):
            begin, end = end, end + length
            for at in range(begin, end, GATHERED):
                out[number] += rows[places[at : min(at + GATHERED, end)]].sum(axis=0)
        out /= np.maximum(lengths, 1)[:, None]

    # -- similarity -------------------------------------------------------------------------

    def similarity(self, a: ArrayLike, b: ArrayLike) -> np.ndarray:
        """Cosines (n, m) of vectors (n, d) and (m, d); a single vector counts as one row."""
        return _unit(a) @ _unit(b).T

    def similarity_pairwise(self, a: ArrayLike, b: ArrayLike) -> np.ndarray:
        """Cosines (n,) of the rows of (n, d) and (n, d) one by one."""
        return np.einsum("nd,nd->n", _unit(a), _unit(b))

    def most_similar(self, text: str | ArrayLike, k: int = 10) -> list[tuple[str, float]]:
        """The `k` tokens closest to a text or vector (d,), as text, with their cosines.

        Tokens of the text itself are left out, and tokens without a text ([PAD], parts of
        characters). A piece from inside a word starts with "-": "-ing".
        """
        if k < 1:
            raise ValueError(f"k is {k}; give a positive number")
        vector = self.encode(text) if isinstance(text, str) else np.asarray(text, np.float32)
        if vector.shape != (self.dims,):
            raise ValueError(f"the vector has shape {vector.shape}; expected ({self.dims},)")
        scores = self._unit_rows @ (vector / (np.linalg.norm(vector) + TINY))
        own = self._ids([text], None)[0] if isinstance(text, str) else []
        scores[own] = -np.inf
        found: list[tuple[str, float]] = []
        for number in np.argsort(-scores):
            name = self._names[number]
            if name is not None and np.isfinite(scores[number]):
                found.append((name, float(scores[number])))
            if len(found) == k:
                break
        return found

    @cached_property
    def _unit_rows(self) -> np.ndarray:
        return _unit(self._rows)

    @cached_property
    def _names(self) -> list[str | None]:
        texts = dict(Vocabulary(self.tokenizer).texts())
        pieces = [texts[token] for token in self.tokens]
        return [None if p is None else p[0] if p[1] else f"-{p[0]}" for p in pieces]

    # -- editing ----------------------------------------------------------------------------

    def add_words(self, words: Sequence[str], vectors: ArrayLike | None = None) -> "StaticModel":
        """A model in which each word or phrase is one token with its own vector.

        `vectors` (n, d) are in the space of the table: a row counts in a text by its length. When
        None, a word gets the mean of the tokens it has now. Other words keep their tokens. A word
        that the model has gets the new vector.
        """
        words = self._checked([words] if isinstance(words, str) else words)
        rows = self.encode(words, normalize=False) if vectors is None else np.asarray(vectors)
        if rows.shape != (len(words), self.dims):
            raise ValueError(
                f"vectors has shape {rows.shape}; expected ({len(words)}, {self.dims})"
            )
        vocabulary = Vocabulary(self.tokenizer)
        added = vocabulary.add(words, whole_words=True)
        if empty := [word for word in words if word not in added]:
            raise ValueError(f"nothing is left of {empty[0]!r} after the tokenizer's normalizer")
        new: dict[str, np.ndarray] = {}
        for word, row in zip(words, rows, strict=True):
            new |= dict.fromkeys([added[word], *vocabulary.find(word)], row)
        return self._edited(vocabulary, new)

    def remove_words(self, words: Sequence[str]) -> "StaticModel":
        """A model without tokens for these words, which are then spelled with smaller ones.

        Raises `ValueError` for a word that is no token, and for single characters.
        """
        words = self._checked([words] if isinstance(words, str) else words)
        vocabulary = Vocabulary(self.tokenizer)
        gone = []
        for word in words:
            tokens = vocabulary.find(word)
            if not tokens:
                raise ValueError(f"{word!r} is no token of this model; it is made of smaller ones")
            gone += tokens
        if kept := vocabulary.remove(gone):
            raise ValueError(f"{kept[0]!r} is a character that other words are spelled with")
        return self._edited(vocabulary, {})

    def _edited(self, vocabulary: Vocabulary, new: Mapping[str, np.ndarray]) -> "StaticModel":
        """The model with another vocabulary; tokens keep their rows by name."""
        places = {token: number for number, token in enumerate(self.tokens)}
        rows = self._rows
        table = np.stack(
            [new[t] if t in new else rows[places[t]] for t in vocabulary.tokens], dtype=np.float32
        )
        model = self._replaced(table, tokenizer=vocabulary.build(), mapping=None, weights=None)
        return model.quantize(self.embeddings.dtype.name)

    def _replaced(self, embeddings: np.ndarray, **changes: Any) -> "StaticModel":
        parts: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "mapping": self.mapping,
            "weights": self.weights,
            "scale": 1.0,
            "normalize": self.normalize,
            "max_length": self.max_length,
            "config": self.config,
            "card": self.card,
        }
        return StaticModel(embeddings, **{**parts, **changes})

    def truncate(self, dims: int) -> "StaticModel":
        """A model with the leading `dims` dimensions; after a PCA they matter most."""
        if not 1 <= dims <= self.dims:
            raise ValueError(f"dims is {dims}; this model has {self.dims}")
        return self._replaced(np.ascontiguousarray(self.embeddings[:, :dims]), scale=self.scale)

    def quantize(
        self, dtype: str | None = None, *, clusters: int | None = None, seed: int = 42
    ) -> "StaticModel":
        """A smaller model: a table in `dtype` (float16, float32, float64, int8), or shared rows.

        With `clusters`, tokens share that many rows (k-means on directions; each token keeps its
        length as its weight). Needs scikit-learn. int8 has one scale for the whole table.
        """
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}; choose from {', '.join(DTYPES)}")
        if clusters is not None:
            rows, mapping, weights = cluster_rows(self._rows, clusters, seed=seed)
            model = self._replaced(rows, mapping=mapping, weights=weights)
            return model.quantize(dtype or self.embeddings.dtype.name)
        if dtype in (None, self.embeddings.dtype.name):
            return self
        rows, scale = self.embeddings, self.scale
        if rows.dtype == np.int8:
            rows, scale = rows.astype(np.float32) * np.float32(scale), 1.0
        if dtype == "int8":
            scale = float(np.abs(rows).max()) / 127 or 1.0
            rows = np.rint(rows.astype(np.float32) / np.float32(scale)).clip(-127, 127)
        converted = rows.astype(dtype)
        if not np.isfinite(converted).all():
            raise ValueError(
                f"the table has numbers up to {np.abs(rows).max():g}, too much for {dtype}"
            )
        return self._replaced(converted, scale=scale)

    # -- ONNX -------------------------------------------------------------------------------

    def export_onnx(self, folder: str | os.PathLike[str]) -> None:
        """Write model.onnx and tokenizer.json into a folder. Needs the package `onnx`.

        The graph takes `input_ids` and `attention_mask` (N, L) of int64 and gives `embeddings`
        (N, d) of float32, as `encode` does.
        """
        from modernbert.weights.swap import replaced_folder, write_file

        files = {
            "model.onnx": onnx_bytes(self._baked(), self._unknown, self.normalize),
            TOKENIZER: self._tokenizer_file(),
        }
        with replaced_folder(folder, stale=files.__contains__) as fresh:
            for name, content in files.items():
                write_file(fresh / name, [content])


def _cell(value: Any) -> str:
    """A value in a table of the model card."""
    text = f"{value:.2f}" if isinstance(value, float) and value > 1 else json.dumps(value)
    return f"`{text}`".replace("|", "\\|")


def _unit(vectors: ArrayLike) -> np.ndarray:
    rows = np.atleast_2d(np.asarray(vectors))
    rows = rows.astype(np.promote_types(rows.dtype, np.float32), copy=False)
    return rows / (np.linalg.norm(rows, axis=1, keepdims=True) + TINY)


def cluster_rows(
    rows: np.ndarray, clusters: int, *, weights: np.ndarray | None = None, seed: int = 42
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres (clusters, d), the centre of each row (V,), and a weight for each row (V,).

    Without `weights` the rows are scaled to length 1 first and their lengths are the weights. The
    k-means is that of model2vec 0.10.
    """
    if not 1 <= clusters <= len(rows):
        raise ValueError(f"clusters is {clusters}; the table has {len(rows)} rows")
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise ImportError(
            "clusters= needs scikit-learn: pip install 'modernbert[distill]'"
        ) from None
    if weights is None:
        weights = np.linalg.norm(rows, axis=1) + TINY
        rows = rows / weights[:, None]
    points = rows.astype(np.float32)
    means = KMeans(n_clusters=clusters, random_state=seed, init="random").fit(points)
    centres = means.cluster_centers_.astype(rows.dtype)
    return centres, means.predict(points).astype(np.int32), np.asarray(weights, np.float64)


def _unknown_id(backend: tokenizers.Tokenizer) -> int | None:
    """The id of unknown text, which is left out of every mean."""
    model = backend.model
    if hasattr(model, "unk_token"):
        return None if model.unk_token is None else backend.token_to_id(model.unk_token)
    number = json.loads(backend.to_str())["model"].get("unk_id")
    return None if number is None else int(number)
