"""Texts as token ids on disk: made once, by several processes, and memory-mapped for training."""

import hashlib
import json
import logging
import operator
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tqdm import tqdm

from modernbert.tables import listed
from modernbert.tokenizer import Tokenizer
from modernbert.tokenizer_file import load_backend
from modernbert.weights.swap import replaced_folder, write_file

from .readers import find_files, is_validation, read_file

logger = logging.getLogger("modernbert")

FORMAT = 1  # of the folder; a store of another is made again
TOKENS, OFFSETS, MANIFEST = "tokens.npy", "offsets.npy", "manifest.json"
CHUNK_TEXTS, CHUNK_CHARACTERS = 1000, 2**20  # of what a worker is given at once
SPLITS = ("train", "validation", "all")

Tokens = tuple[np.ndarray, np.ndarray]  # the ids of some texts, one after another; their lengths


class TokenStore:
    """The token ids of many sequences in a folder that `build_store` made, memory-mapped.

    `store[i]` is a view (length,) of sequence i, uint16 or uint32, without special tokens. A record
    gives one sequence for each of `fields`, so sequence i is field i % len(fields) of its record.

    Attributes: `lengths` (N,) int64, tokens of each sequence (0 for an empty text); `fields`;
    `manifest`, what the store was made from. Raises `ValueError` for a folder that holds no store.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_bytes())
            tokens, offsets = (
                np.lib.format.open_memmap(self.folder / name, mode="r")
                for name in (TOKENS, OFFSETS)
            )
            self.fields = tuple(self.manifest["fields"])
            whole = (
                self.manifest["format"] == FORMAT
                and offsets.shape == (self.manifest["sequences"] + 1,)
                and tokens.shape == (self.manifest["tokens"],) == (offsets[-1],)
            )
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{folder} holds no token store ({error}); build it again") from None
        self.lengths: np.ndarray = np.diff(offsets)
        if not whole or self.lengths.min(initial=0) < 0:
            raise ValueError(f"{folder} holds a token store that is broken; build it again")
        # Slices of a memmap are far slower to make than those of a plain array.
        self._tokens, self._offsets = np.asarray(tokens), np.asarray(offsets)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of a store with {len(self)}")
        index %= len(self)
        return self._tokens[self._offsets[index] : self._offsets[index + 1]]


def build_store(
    folder: str | os.PathLike[str],
    sources: str | Sequence[str],
    tokenizer: Tokenizer,
    *,
    fields: Sequence[str] = ("text",),
    prompts: Sequence[str] = (),
    split: str = "train",
    validation: float = 0.0,
    workers: int = 1,
    progress: bool = True,
) -> TokenStore:
    """Tokenise the `fields` of all records of `sources` into a folder, or reuse what it holds.

    It is reused when it was made from files of the same contents with the same tokenizer and
    arguments; the log says why when not. A crash leaves the old store or the new one.

    Args:
        sources: patterns as `read_records` takes them.
        tokenizer: its special tokens are neither added nor recognised: "[MASK]" in a text is
            ordinary text.
        fields: the texts of a record, for example ("anchor", "positive", "negative").
        prompts: what is put before each of them, for example ("query: ", "passage: ").
        split: "train" or "validation", by the hash of the first field, or "all".
        validation: the share of records that are held out.
        workers: processes that tokenise; with 1 it is this one, on all its cores unless
            TOKENIZERS_PARALLELISM is false. More processes need the calling script to guard its
            start with `if __name__ == "__main__":`.

    Raises `ValueError` for arguments or records that make no store, with the file and line.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose from {', '.join(SPLITS)}")
    if isinstance(fields, str) or not fields:
        raise ValueError(f"fields is {fields!r}; give a list of names, such as ['text']")
    if prompts and len(prompts) != len(fields):
        raise ValueError(f"there are {len(prompts)} prompts for {len(fields)} fields; give as many")
    if workers < 1:
        raise ValueError(f"workers is {workers}; give at least 1")
    patterns = [sources] if isinstance(sources, str | os.PathLike) else sources
    paths = [path for pattern in patterns for path in find_files(pattern)]
    tokenizer_json = tokenizer.files()["tokenizer.json"]
    made_from: dict[str, Any] = {
        "format": FORMAT,
        "fields": list(fields),
        "prompts": list(prompts),
        "split": split,
        "validation": validation,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": hashlib.sha256(tokenizer_json).hexdigest(),
        "sources": [_identity(path) for path in paths],
    }
    if (store := _reusable(folder, made_from)) is not None:
        return store

    def wanted(key: str) -> bool:
        return split == "all" or is_validation(key, validation) == (split == "validation")

    with (
        replaced_folder(folder, stale=lambda relative: False) as fresh,
        tqdm(unit=" tokens", unit_scale=True, desc=f"{split} store", disable=not progress) as bar,
    ):
        lengths: list[np.ndarray] = []
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        with open(fresh / TOKENS, "xb") as file:
            _write_header(file, dtype, 0)
            chunks = _chunks(paths, fields, prompts or [""] * len(fields), wanted)
            with closing(_tokenised(chunks, tokenizer_json, workers)) as results:
                for ids, sizes in results:
                    assert ids.max(initial=0) <= np.iinfo(dtype).max
                    file.write(ids.astype(dtype).data)
                    lengths.append(sizes)
                    bar.update(len(ids))
            offsets = np.concatenate([[0], *lengths]).cumsum(dtype=np.int64)
            file.seek(0)
            _write_header(file, dtype, int(offsets[-1]))
            file.flush()
            os.fsync(file.fileno())
        if not lengths:
            raise ValueError(f"no record of {', '.join(paths)} is in the {split} split; change it")
        with open(fresh / OFFSETS, "xb") as file:
            np.save(file, offsets, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        made = made_from | {
            "sequences": len(offsets) - 1,
            "tokens": int(offsets[-1]),
        }
        write_file(fresh / MANIFEST, [json.dumps(made, indent=2).encode() + b"\n"])
    return TokenStore(folder)


def _identity(path: str) -> dict[str, Any]:
    """What a source file is known by; its folder does not matter."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
        return {"file": Path(path).name, "bytes": file.tell(), "sha256": digest.hexdigest()}


def _reusable(folder: str | os.PathLike[str], made_from: dict[str, Any]) -> TokenStore | None:
    if not (Path(folder) / MANIFEST).exists():
        return None
    try:
        store = TokenStore(folder)
    except ValueError as error:
        logger.warning("%s", error)
        return None
    if other := [key for key, value in made_from.items() if store.manifest.get(key) != value]:
        logger.warning("%s is made again: it has other %s", folder, ", ".join(other))
        return None
    return store


def _chunks(
    paths: Sequence[str],
    fields: Sequence[str],
    prompts: Sequence[str],
    wanted: Callable[[str], bool],
) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for place, record in chain.from_iterable(map(read_file, paths)):
        texts = [_text(record, field, place) for field in fields]
        if not wanted(texts[0]):
            continue
        chunk += map(operator.add, prompts, texts)
        characters += sum(map(len, texts))
        if len(chunk) >= CHUNK_TEXTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _text(record: dict[str, Any], field: str, place: str) -> str:
    text = record.get(field)
    if not isinstance(text, str):
        raise ValueError(
            f"{place}: field {field!r} holds {type(text).__name__}, not a text; "
            f"there are {listed(record)}"
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON has escapes for it
        raise ValueError(f"{place}: field {field!r} has half a surrogate pair") from None
    return text


def _tokenised(
    chunks: Iterator[list[str]], tokenizer_json: bytes, workers: int
) -> Generator[Tokens, None, None]:
    """The tokens of each chunk, in order; with workers, a few chunks ahead of what is taken."""
    if workers == 1:
        backend = _backend(tokenizer_json)
        yield from (_encode(backend, chunk) for chunk in chunks)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_json,),
    )
    try:
        waiting: deque[Future[Tokens]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_worker_backend: Backend  # set in each worker process


def _start_worker(tokenizer_json: bytes) -> None:
    global _worker_backend
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes take a core each
    _worker_backend = _backend(tokenizer_json)


def _work(texts: list[str]) -> Tokens:
    return _encode(_worker_backend, texts)


def _backend(tokenizer_json: bytes) -> Backend:
    backend = load_backend(tokenizer_json, "the tokenizer")
    backend.encode_special_tokens = True
    return backend


def _encode(backend: Backend, texts: list[str]) -> Tokens:
    rows = [row.ids for row in backend.encode_batch_fast(texts, add_special_tokens=False)]
    lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
    ids = np.fromiter(chain.from_iterable(rows), dtype=np.uint32, count=int(lengths.sum()))
    return ids, lengths


def _write_header(file: IO[bytes], dtype: np.dtype, tokens: int) -> None:
    """The header of a flat array; numpy leaves room for its length to grow in place."""
    header = np.lib.format.header_data_from_array_1_0(np.empty(0, dtype))
    header["shape"] = (tokens,)
    np.lib.format.write_array_header_1_0(file, header)
