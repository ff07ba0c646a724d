"""A teacher: token ids in, one vector each out, whichever library the model comes from.

Shapes: B = inputs of a batch, T = their tokens, D = hidden size, d = width of the vectors.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import tokenizers
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from modernbert import kernels
from modernbert.model import ModernBertModel
from modernbert.packing import pack, token_budget_batches
from modernbert.pooling import Normalize
from modernbert.pretrained import PreTrainedModel, best_device
from modernbert.sentence import SentenceEncoder
from modernbert.tokenizer import Tokenizer
from modernbert.tokenizer_file import special_frame
from modernbert.vocabulary import Vocabulary
from modernbert.weights import open_folder

POOLINGS = ("own", "mean", "span", "first", "last", "pooler")


@dataclass(frozen=True)
class Input:
    """Ids for the teacher, special tokens included, and where among them the word stands."""

    ids: list[int]
    start: int
    stop: int


class Network(Protocol):
    """What differs between libraries."""

    def states(self, ids: list[list[int]], layers: Sequence[int]) -> Tensor:
        """The mean of the layers' states (T, D), one input after the other."""

    def own(self, states: Tensor, ids: list[list[int]]) -> Tensor:
        """The model's own vectors (B, d) of these states, before they are scaled to length 1."""

    def pooler(self, first: Tensor) -> Tensor:
        """The pooler's output (B, D) for the states (B, D) of the first tokens."""


class Ours:
    """A ModernBertModel, or the one inside a SentenceEncoder with what follows it."""

    def __init__(self, model: ModernBertModel, encoder: SentenceEncoder | None = None) -> None:
        self.model = model.eval()
        self.encoder = encoder

    def states(self, ids: list[list[int]], layers: Sequence[int]) -> Tensor:
        batch = pack(ids, device=self.model.device)
        if tuple(layers) == (-1,):
            return self.model(batch).last_hidden_state.float()
        hidden = self.model(batch, output_hidden_states=True).hidden_states
        return torch.stack([hidden[layer].float() for layer in layers]).mean(0)

    def own(self, states: Tensor, ids: list[list[int]]) -> Tensor:
        if self.encoder is None:
            return pool("mean", states, [Input(row, 0, len(row)) for row in ids])
        batch = pack(ids, device=self.model.device)
        vectors = self.encoder.pooling(states, batch)
        for module in self.encoder.after:
            vectors = vectors if isinstance(module, Normalize) else module(vectors)
        return vectors

    def pooler(self, first: Tensor) -> Tensor:
        raise ValueError("pooling='pooler': ModernBERT has no pooler; use 'mean' or 'first'")


class SentenceTransformers:
    """A `SentenceTransformer` whose first module is a transformer."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.network = model[0].auto_model

    def _mask(self, ids: list[list[int]]) -> Tensor:
        lengths = torch.tensor([len(row) for row in ids])
        return (torch.arange(int(lengths.max())) < lengths[:, None]).to(self.model.device)

    def states(self, ids: list[list[int]], layers: Sequence[int]) -> Tensor:
        mask = self._mask(ids)
        padded = torch.zeros(mask.shape, dtype=torch.int64)
        for row, numbers in zip(padded, ids, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)
        last_only = tuple(layers) == (-1,)
        output = self.network(
            input_ids=padded.to(mask.device),
            attention_mask=mask.long(),
            output_hidden_states=not last_only,
        )
        if last_only:
            return output.last_hidden_state.float()[mask]
        hidden = [output.hidden_states[layer].float() for layer in layers]
        return torch.stack(hidden).mean(0)[mask]

    def own(self, states: Tensor, ids: list[list[int]]) -> Tensor:
        mask = self._mask(ids)
        padded = states.new_zeros((*mask.shape, states.shape[-1]))
        padded[mask] = states
        features: dict[str, Any] = {"token_embeddings": padded, "attention_mask": mask.long()}
        for module in list(self.model)[1:]:
            if type(module).__name__ != "Normalize":
                features = module(features)
        return features["sentence_embedding"].float()

    def pooler(self, first: Tensor) -> Tensor:
        pooler = getattr(self.network, "pooler", None)
        if pooler is None:
            raise ValueError("pooling='pooler': this model has no pooler; use 'mean' or 'first'")
        return pooler(first[:, None].to(self.network.dtype)).float()


def pool(pooling: str, states: Tensor, inputs: Sequence[Input]) -> Tensor:
    """Vectors (B, D) of token states (T, D) by one of `POOLINGS` that needs no module."""
    lengths = [len(item.ids) for item in inputs]
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    if pooling == "first":
        return states[starts.to(states.device)]
    if pooling == "last":
        return states[(ends - 1).to(states.device)]
    if pooling == "span":
        kept = [
            place
            for begin, item in zip(starts.tolist(), inputs, strict=True)
            for place in range(begin + item.start, begin + item.stop)
        ]
        states = states[torch.tensor(kept, device=states.device)]
        lengths = [item.stop - item.start for item in inputs]
    offsets = F.pad(torch.tensor(lengths, device=states.device).cumsum(0), (1, 0))
    return kernels.mean_pool(states, offsets)


class Teacher:
    """A model that gives a vector for any word.

    Attributes:
        name: what the user called it.
        backend: its tokenizer, and `vocabulary`, the same taken apart.
        prompt: text that stands before every word.
    """

    def __init__(
        self, name: str, network: Network, backend: tokenizers.Tokenizer, prompt: str = ""
    ) -> None:
        self.name = name
        self.network = network
        self.backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.prompt = prompt
        self._frame = special_frame(self.backend, False, name)
        self._ids = self.backend.get_vocab(with_added_tokens=True)
        self.vocabulary = words = Vocabulary(self.backend)
        # What a word is in running text needs a space before it where the tokenizer keeps spaces.
        self.space = " " if words.words(" a") != words.words("a") else ""
        if words.marker and words.words("a")[0].startswith(words.marker):
            self.space = ""

    def token(self, token: str) -> Input | None:
        """The input for a token of the teacher's own vocabulary, by its id; None when unknown."""
        if token not in self._ids:
            return None
        before, after = self._frame
        start = [*before, *self._encode(self.prompt)] if self.prompt else list(before)
        return Input([*start, self._ids[token], *after], len(start), len(start) + 1)

    def word(self, word: str, template: str = "{}") -> Input:
        """The input for a word as it stands in running text, in a template such as "the {}"."""
        before, _, after = template.partition("{}")
        lead = self.prompt + before
        text = (lead.rstrip(" ") + " " if lead else self.space) + word + after
        encoding = self.backend.encode(text)
        first = len(text) - len(word) - len(after)
        last = first + len(word)
        inside = [
            place
            for place, ((a, b), sequence) in enumerate(
                zip(encoding.offsets, encoding.sequence_ids, strict=True)
            )
            if sequence is not None and a < last and b > first
        ]
        if not inside:  # characters that the tokenizer does not know at all
            inside = [0, len(encoding.ids) - 1]
        return Input(encoding.ids, inside[0], inside[-1] + 1)

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids if text else []

    @torch.inference_mode()
    def embed(
        self,
        inputs: Sequence[Input],
        poolings: Sequence[str] = ("own",),
        *,
        layers: Sequence[int] = (-1,),
        batch_tokens: int = 4096,
        progress: bool = False,
        unit: str = " words",
    ) -> list[np.ndarray]:
        """For each pooling one float32 vector (n, d) of each input; what is not finite becomes 0.

        Raises `ValueError` for an unknown pooling or layer.
        """
        if unknown := set(poolings) - set(POOLINGS):
            raise ValueError(f"pooling {min(unknown)!r}: choose from {', '.join(POOLINGS)}")
        if not inputs:
            raise ValueError("there is no word to embed; the vocabulary is empty")
        order = sorted(range(len(inputs)), key=lambda i: len(inputs[i].ids))
        tables: list[np.ndarray] = []
        lengths = (len(inputs[i].ids) for i in order)
        done = 0
        with tqdm(total=len(inputs), desc="Teacher", unit=unit, disable=not progress) as bar:
            for group in token_budget_batches(lengths, batch_tokens, max_sequences=1024):
                places = order[done : done + len(group)]
                done += len(group)
                batch = [inputs[i] for i in places]
                states = self._states([item.ids for item in batch], layers)
                parts = [self._pooled(pooling, states, batch).cpu().numpy() for pooling in poolings]
                if not tables:
                    tables = [np.empty((len(inputs), p.shape[1]), np.float32) for p in parts]
                for table, part in zip(tables, parts, strict=True):
                    table[places] = part
                bar.update(len(batch))
        return [np.nan_to_num(table) for table in tables]

    def _states(self, ids: list[list[int]], layers: Sequence[int]) -> Tensor:
        try:
            return self.network.states(ids, layers)
        except IndexError:
            raise ValueError(f"layers={tuple(layers)}: this model has fewer layers") from None

    def _pooled(self, pooling: str, states: Tensor, batch: list[Input]) -> Tensor:
        if pooling == "own":
            return self.network.own(states, [item.ids for item in batch])
        if pooling == "pooler":
            return self.network.pooler(pool("first", states, batch))
        return pool(pooling, states, batch)


def open_teacher(
    teacher: Any, *, device: str | torch.device | None = None, prompt: str | None = None
) -> Teacher:
    """The teacher in anything that `distill` takes.

    `prompt` is a text, or the name of one of the model's prompts. Raises `ValueError` for what is
    no encoder, with what can be one.
    """
    if isinstance(teacher, str | os.PathLike):
        return _named(os.fspath(teacher), device, prompt)
    if isinstance(teacher, Teacher):
        return teacher
    if device is not None and hasattr(teacher, "to"):
        teacher = teacher.to(device)
    prompts = getattr(teacher, "prompts", None) or {}
    text = prompts.get(prompt, prompt) or ""
    if isinstance(teacher, SentenceEncoder):
        if teacher.do_lower_case:
            raise ValueError("a teacher that lower-cases its texts itself is not supported")
        files = teacher.tokenizer.files()
        name = getattr(teacher.model.checkpoint, "name", "")
        return Teacher(name, Ours(teacher.model, teacher), _backend(files["tokenizer.json"]), text)
    if isinstance(teacher, PreTrainedModel):
        folder = teacher.checkpoint
        if folder is None:
            raise ValueError("this model was not loaded from a folder, so its tokenizer is unknown")
        files = Tokenizer.from_checkpoint(folder).files()
        encoder = teacher.encoder()
        assert isinstance(encoder, ModernBertModel)
        return Teacher(folder.name, Ours(encoder), _backend(files["tokenizer.json"]), text)
    if hasattr(teacher, "encode") and hasattr(teacher, "modules") and hasattr(teacher, "tokenizer"):
        backend = getattr(teacher.tokenizer, "backend_tokenizer", None)
        if backend is not None and hasattr(teacher[0], "auto_model"):
            name = getattr(teacher.model_card_data, "base_model", None) or ""
            return Teacher(name, SentenceTransformers(teacher), backend, text)
    raise ValueError(
        f"{type(teacher).__name__} is no teacher; give a name, a folder, a SentenceEncoder, a "
        "ModernBertModel or a SentenceTransformer with a fast tokenizer"
    )


def _named(name: str, device: Any, prompt: str | None) -> Teacher:
    from modernbert.training.teacher import load_teacher

    device = device or best_device()
    if not name.startswith("package:") and _is_modernbert(name):
        folder = open_folder(name)
        kind = SentenceEncoder if folder.path("modules.json") else ModernBertModel
        model: Any = kind.from_pretrained(name, device=device)
    else:
        model = load_teacher(name, str(device))
    found = open_teacher(model, prompt=prompt)
    found.name = name
    return found


def _is_modernbert(name: str) -> bool:
    folder = open_folder(name)
    config = folder.read_json("config.json")
    if config is None and isinstance(modules := folder.read_json("modules.json"), list):
        inside = str(modules[0].get("path", "")) if isinstance(modules[0], dict) else ""
        config = folder.read_json(f"{inside}/config.json") if inside else None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return kind in ("modernbert", "flex_bert")


def _backend(raw: bytes) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(raw.decode())
