"""tokenizer.json, read from a folder that nobody vouches for, and its special tokens."""

import json
import logging
from collections.abc import Mapping
from typing import Any

import tokenizers

from .cutting import KNOWN_REGEXES, steps

logger = logging.getLogger("modernbert")

MAX_BYTES = 64 * 2**20  # of a tokenizer.json; the largest in use (mmBERT) has 34 MB
MAX_ENTRIES = 4_000_000  # that one has 2 million

# Regular expressions that are not slow on any text: the usual ones, and T5's for runs of spaces.
SAFE_REGEXES = (*KNOWN_REGEXES, " {2,}")

# What the special tokens are called when no file says which they are.
USUAL_NAMES = {
    "bos": ("[CLS]", "<s>", "<bos>"),
    "eos": ("[SEP]", "</s>", "<eos>"),
    "unk": ("[UNK]", "<unk>"),
    "sep": ("[SEP]", "</s>"),
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>"),
    "mask": ("[MASK]", "<mask>"),
}


def shown(value: object) -> str:
    """The value's type and, in at most 40 characters, the value."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def load_backend(raw: bytes, source: str) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json that nobody vouches for; `ValueError` when it is none."""
    entries = sum(map(raw.count, (b",", b"[", b"{")))
    if len(raw) > MAX_BYTES or entries > MAX_ENTRIES:
        raise ValueError(
            f"{source} has {len(raw):,} bytes and about {entries:,} entries, more than the "
            f"{MAX_BYTES:,} and {MAX_ENTRIES:,} of any known tokenizer; check where it comes from"
        )
    try:
        text = raw.decode()
        state = json.loads(text, object_pairs_hook=_unique_keys)
        model = state.get("model") if isinstance(state, dict) else None
        if not isinstance(model, dict):
            raise ValueError("it describes no model")
        # tokenizers 0.23 cuts this prefix off merges unchecked, which can abort the process.
        if model.get("type") != "WordPiece" and model.get("continuing_subword_prefix"):
            raise ValueError("only a WordPiece model may have a continuing_subword_prefix")
        backend = tokenizers.Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()
        # Some faults only show in use.
        backend.encode("a")
        backend.encode("a", "a")
    except BaseException as error:
        # A fault in the Rust code is no Exception, and its class has no importable name.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{source} is no tokenizer that can be read ({type(error).__name__}: "
            f"{str(error)[:200]}); download it again"
        ) from None
    for part in (backend.normalizer, backend.pre_tokenizer, backend.decoder):
        for step in steps(part):
            pattern = step.get("pattern")
            regex = pattern.get("Regex") if isinstance(pattern, dict) else None
            if regex is not None and regex not in SAFE_REGEXES:
                logger.warning(
                    "%s searches texts with a regular expression that is not a known one, %s; "
                    "a badly made one can take very long",
                    source,
                    shown(regex),
                )
    return backend


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise ValueError("a key appears twice in one object")
    return unique


def special_frame(backend: tokenizers.Tokenizer, pair: bool, source: str) -> list[list[int]]:
    """The special tokens before, between and after the texts."""
    encoding = backend.encode("a", "a" if pair else None)
    frame: list[list[int]] = [[]]
    order: list[int] = []
    for token_id, sequence in zip(encoding.ids, encoding.sequence_ids, strict=True):
        if sequence is None:
            frame[-1].append(token_id)
        elif not order or order[-1] != sequence:
            order.append(sequence)
            frame.append([])
    if order != [0, 1][: 1 + pair]:
        raise ValueError(
            f"{source} does not put special tokens around each text, once and in order; its "
            "post-processor is not supported"
        )
    return frame


def find_special_tokens(
    backend: tokenizers.Tokenizer,
    settings: Mapping[str, Any],
    names: Mapping[str, Any],
    config: Mapping[str, Any],
    source: str,
) -> dict[str, str]:
    """Which token is the mask, the padding, ...: the first of the files to say so, else by name."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    found = {}
    for kind, usual in USUAL_NAMES.items():
        number = config.get(f"{kind}_token_id")
        named = [
            entry.get("content") if isinstance(entry, dict) else entry
            for entry in (settings.get(f"{kind}_token"), names.get(f"{kind}_token"))
        ]
        if type(number) is int and 0 <= number < 1 << 32:
            named.append(backend.id_to_token(number))
        named += [name for name in usual if name in added]
        token = next((name for name in named if isinstance(name, str)), None)
        if token is None:
            continue
        if backend.token_to_id(token) is None:
            logger.warning("%s has no token %s, which is named %s_token", source, token, kind)
            continue
        found[kind] = token
    return found
