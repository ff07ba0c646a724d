"""Text to token ids on the `tokenizers` library: in parallel, exact, and open about what it cut."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cutting import Cutter
from .tokenized import Part, TokenizedBatch, shares, weave
from .tokenizer_file import MAX_BYTES, find_special_tokens, load_backend, shown, special_frame

if TYPE_CHECKING:
    from modernbert.weights import ModelFolder

__all__ = ["TokenizedBatch", "Tokenizer"]

CHARACTERS_PER_TOKEN = 8  # more than nearly all text has, so that the first attempt is enough


def _read(
    texts: Any, name: str, is_split_into_words: bool
) -> list[tuple[str, Sequence[str] | None]]:
    """(text, words) of each text, checked; words are None for texts that are not split."""
    if isinstance(texts, bytes | bytearray) or not isinstance(texts, Iterable):
        raise ValueError(f"{name} is {shown(texts)}; give a string or a sequence of strings")
    items = [texts] if isinstance(texts, str) else list(texts)
    if not is_split_into_words:
        return [(_checked(item, f"{name}[{i}]"), None) for i, item in enumerate(items)]
    if items and all(isinstance(item, str) for item in items):
        items = [items]
    read: list[tuple[str, Sequence[str] | None]] = []
    for i, item in enumerate(items):
        if not isinstance(item, list | tuple):
            raise ValueError(
                f"{name}[{i}] is {shown(item)}; with is_split_into_words a text is a list of words"
            )
        words = [_checked(word, f"{name}[{i}][{j}]") for j, word in enumerate(item)]
        read.append((" ".join(words), words))
    return read


def _checked(text: Any, place: str) -> str:
    if not isinstance(text, str):
        advice = "give its text, or leave it out"
        if isinstance(text, bytes):
            advice = "decode it first"
        elif isinstance(text, list | tuple):
            advice = "pass second texts as pairs=, or set is_split_into_words for lists of words"
        raise ValueError(f"{place} is {shown(text)}, not a string; {advice}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} has the lone surrogate {text[error.start]!r} at character {error.start}, "
            "which is no text; replace it, for example with "
            "text.encode('utf-8', 'replace').decode()"
        ) from None
    return text


def _dump(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


class Tokenizer:
    """A model's tokenizer, as its tokenizer.json defines it.

    Attributes: `vocab_size` with the added tokens; `model_max_length`, the most tokens the model
    takes, None when no file says; `special_tokens`, such as {"mask": "[MASK]"}; and their ids
    `bos_token_id`, `eos_token_id`, `unk_token_id`, `sep_token_id`, `pad_token_id`, `cls_token_id`,
    `mask_token_id`, each None when the model has no such token.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        *,
        settings: Mapping[str, Any] | None = None,
        special_tokens: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        source: str = "tokenizer.json",
    ) -> None:
        """The contents of tokenizer.json and, where there are any, of tokenizer_config.json,
        special_tokens_map.json and config.json, of which the first to name a token counts.

        Truncation and padding that tokenizer.json stores are ignored; calls decide. Raises
        `ValueError`, with `source`, for what is no tokenizer.
        """
        self._settings = dict(settings or {})
        self._backend = load_backend(tokenizer_json, source)
        self._frames = [special_frame(self._backend, pair, source) for pair in (False, True)]
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        self.special_tokens = find_special_tokens(
            self._backend, self._settings, special_tokens or {}, config or {}, source
        )
        ids = {kind: self.token_to_id(token) for kind, token in self.special_tokens.items()}
        self.bos_token_id: int | None = ids.get("bos")
        self.eos_token_id: int | None = ids.get("eos")
        self.unk_token_id: int | None = ids.get("unk")
        self.sep_token_id: int | None = ids.get("sep")
        self.pad_token_id: int | None = ids.get("pad")
        self.cls_token_id: int | None = ids.get("cls")
        self.mask_token_id: int | None = ids.get("mask")
        self.model_max_length: int | None = None
        for length in (
            (config or {}).get("max_position_embeddings"),
            self._settings.get("model_max_length"),
        ):
            # transformers writes 1e30 for "unknown".
            if isinstance(length, int | float) and 1 < length < 1e9:
                self.model_max_length = int(length)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "Tokenizer":
        """The tokenizer of a Hub repository or local folder; no weights are downloaded.

        Without a name, that of modernbert-mini, which ships with the package.
        """
        from modernbert.weights import open_folder

        return cls.from_checkpoint(
            open_folder(
                name_or_path,
                revision=revision,
                local_files_only=local_files_only,
                token=token,
                cache_dir=cache_dir,
            )
        )

    @classmethod
    def from_checkpoint(cls, checkpoint: "ModelFolder") -> "Tokenizer":
        """The tokenizer of an opened model folder; `ValueError` when it has none."""
        raw = checkpoint.read_bytes("tokenizer.json")
        if raw is None:
            raise ValueError(
                f"{checkpoint.folder} has no tokenizer.json; copy it there from the model that "
                "this one was made from, or write it with `Tokenizer.save_pretrained`"
            )
        files = [
            checkpoint.read_json(name)
            for name in ("tokenizer_config.json", "special_tokens_map.json", "config.json")
        ]
        settings, special_tokens, config = (f if isinstance(f, dict) else {} for f in files)
        return cls(
            raw,
            settings=settings,
            special_tokens=special_tokens,
            config=config,
            source=str(checkpoint.folder / "tokenizer.json"),
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """The tokenizer of a tokenizer.json alone."""
        if (size := os.path.getsize(path)) > MAX_BYTES:
            raise ValueError(f"{path} has {size:,} bytes, more than the {MAX_BYTES:,} allowed")
        return cls(Path(path).read_bytes(), source=os.fspath(path))

    def __call__(
        self,
        texts: str | Sequence[str] | Sequence[Sequence[str]],
        pairs: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        max_length: int | None = None,
        truncation: str | bool = "longest_first",
        truncation_side: str = "right",
        is_split_into_words: bool = False,
        add_special_tokens: bool = True,
    ) -> TokenizedBatch:
        """Tokenise a text or many, on all cores (TOKENIZERS_PARALLELISM=false: on one).

        `pairs` holds as many second texts. Texts that are split into words give the ids of their
        words joined by spaces; a single list of words is one text.

        At most `max_length` tokens are kept of each text, special tokens included
        (`model_max_length` when None, all when that is None too, or with truncation=False). Of a
        pair, "longest_first" shortens the longer until both are as long, then both; "only_first"
        and "only_second" shorten that one. `truncation_side` is the end that is cut.

        Raises `ValueError` for what is no text, for text with lone surrogates, and when nothing of
        the text fits.
        """
        strategy = "longest_first" if truncation is True else truncation
        if strategy not in ("longest_first", "only_first", "only_second", False):
            raise ValueError(
                f"truncation={truncation!r}; use 'longest_first', 'only_first', 'only_second' "
                "or False"
            )
        if truncation_side not in ("right", "left"):
            raise ValueError(f"truncation_side={truncation_side!r}; use 'right' or 'left'")
        given = {"texts": texts} if pairs is None else {"texts": texts, "pairs": pairs}
        columns = [_read(column, name, is_split_into_words) for name, column in given.items()]
        if len(columns[0]) != len(columns[-1]):
            raise ValueError(
                f"there are {len(columns[0])} texts and {len(columns[1])} pairs; give one second "
                "text for each text"
            )
        if strategy == "only_second" and pairs is None:
            raise ValueError("truncation='only_second' needs pairs; use 'longest_first'")
        frame = self._frames[pairs is not None]
        if not add_special_tokens:
            frame = [[] for _ in frame]
        max_length = self.model_max_length if max_length is None else max_length
        room = None
        if strategy and max_length is not None:
            room = max_length - sum(map(len, frame))
            if room < 0:
                raise ValueError(
                    f"max_length={max_length} has no room for the {max_length - room} special "
                    "tokens; raise it, or pass add_special_tokens=False"
                )
        rows = list(
            zip(*(self._parts(column, room, truncation_side) for column in columns), strict=True)
        )
        for index, row in enumerate(rows):
            for part, share in zip(row, shares(row, room, str(strategy), index), strict=True):
                part.keep(share, truncation_side)
        return TokenizedBatch([weave(frame, [p.ids for p in row]) for row in rows], rows, frame)

    def _parts(
        self, column: Sequence[tuple[str, Sequence[str] | None]], room: int | None, side: str
    ) -> list[Part]:
        """Each text tokenised, as a whole or until it has more than `room` tokens."""
        parts: dict[int, Part] = {}
        size = None if room is None else CHARACTERS_PER_TOKEN * (room + 32)
        pending = list(range(len(column)))
        while pending:
            windows = [self._window(column[i][0], size, side) for i in pending]
            encodings = self._backend.encode_batch(
                [column[i][0][a:b] for i, (a, b, _) in zip(pending, windows, strict=True)],
                add_special_tokens=False,
            )
            for i, (start, stop, loose), encoding in zip(pending, windows, encodings, strict=True):
                text, words = column[i]
                count = len(encoding)
                if loose:
                    count, stop = self._cutter.settle(text, 0, encoding)
                cutter = None if (start, stop) == (0, len(text)) else self._cutter
                parts[i] = Part(text, words, start, stop, encoding, count, cutter)
            pending = [i for i in pending if parts[i].cutter and parts[i].size <= (room or 0)]
            size = 4 * (size or 0)
        return [parts[i] for i in range(len(column))]

    def _window(self, text: str, size: int | None, side: str) -> tuple[int, int, bool]:
        """(start, stop, loose): about `size` characters of the end of `text` that is kept.

        Loose when the window ends within a word, so that its last ids are not those of the text.
        """
        if size is None or len(text) <= size:
            return 0, len(text), False
        if side == "left":
            at = len(text) - size
            start = self._cutter.find(text, at) if self._cutter.numbers_words else 0
            return start, len(text), False
        stop = self._cutter.find(text, size)
        loose = stop > 2 * size and self._cutter.settles
        return 0, size if loose else stop, loose

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self._backend)

    def num_special_tokens(self, pair: bool = False) -> int:
        """How many special tokens a text, or a pair, is given."""
        return sum(map(len, self._frames[pair]))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it ("Ġworld"), None when it has none."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token with this id as the vocabulary spells it, None when there is none."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; ids that the vocabulary does not have add nothing."""
        numbers = [int(token_id) for token_id in ids]
        for number in numbers:
            if not 0 <= number < 1 << 32:
                raise ValueError(f"{number} is no token id; leave out labels that are ignored")
        return self._backend.decode(numbers, skip_special_tokens=skip_special_tokens)

    def files(self) -> dict[str, bytes]:
        """The files that make a folder's tokenizer, for us and for transformers, by name."""
        added = {
            str(number): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for number, token in sorted(self._backend.get_added_tokens_decoder().items())
        }
        names = {f"{kind}_token": token for kind, token in self.special_tokens.items()}
        settings = {key: self._settings[key] for key in self._settings if key != "auto_map"}
        # transformers 4 does not know the name that transformers 5 gives this class.
        if settings.get("tokenizer_class") in (None, "TokenizersBackend"):
            settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
        settings["model_max_length"] = self.model_max_length or int(1e30)
        settings |= {"added_tokens_decoder": added, **names}
        return {
            "tokenizer.json": self._backend.to_str(pretty=True).encode(),
            "tokenizer_config.json": _dump(settings),
            "special_tokens_map.json": _dump(names),
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `files` to a folder; a crash leaves the old ones or the new ones."""
        from modernbert.weights import save_folder

        save_folder(folder, files=self.files())
