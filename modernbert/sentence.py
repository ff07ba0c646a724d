"""SentenceEncoder: texts in, vectors out, from lists or from streams, under a token budget.

Shapes: T = packed tokens of a batch, B = texts of a batch, N = texts, D = hidden size,
d = width of the vectors.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernbert import kernels
from modernbert.encode_options import EncodeOptions
from modernbert.graphs import GraphedModel
from modernbert.int8 import KINDS, quantize_linears
from modernbert.kernels import reference
from modernbert.model import ModernBertModel
from modernbert.packing import PackedBatch, pack
from modernbert.pooling import Dense, Pooling
from modernbert.pretrained import best_device
from modernbert.quantization import Calibration, quantize
from modernbert.sentence_layout import (
    Settings,
    layout_files,
    read_modules_json,
    read_pooling,
    read_settings,
)
from modernbert.similarity import Vectors, check_similarity, similarity, similarity_pairwise
from modernbert.streaming import WINDOW_TEXTS, EncodeReport, NotFinite, Stream, fetch
from modernbert.tokenizer import TokenizedBatch, Tokenizer
from modernbert.weights import (
    Checkpoint,
    CheckpointError,
    open_checkpoint,
    open_folder,
    push_folder,
    save_folder,
)

logger = logging.getLogger("modernbert")


class SentenceEncoder(nn.Module):
    """Texts to vectors: a ModernBERT model, a pooling, and what follows it.

    Load one with `from_pretrained`; the constructor puts one together from parts.

    Args:
        model: the encoder.
        tokenizer: the one the model was trained with.
        pooling: from token states to a vector; the mean by default.
        after: `Dense` and `Normalize` modules that follow.
        settings: prompts, similarity, bounds. Each becomes an attribute that may be changed:
            `encoder.prompts["query"] = "query: "`, `encoder.max_seq_length = 512`.
    """

    def __init__(
        self,
        model: ModernBertModel,
        tokenizer: Tokenizer,
        pooling: Pooling | None = None,
        after: Sequence[nn.Module] = (),
        *,
        settings: Settings | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.pooling = pooling or Pooling(model.config.hidden_size)
        self.after = nn.Sequential(*after)
        settings = settings or Settings()
        self.prompts = dict(settings.prompts)
        self.default_prompt_name = settings.default_prompt_name
        self.similarity_fn_name = settings.similarity_fn_name
        self.truncate_dim = settings.truncate_dim
        self.do_lower_case = settings.do_lower_case
        self.calibration = settings.calibration
        self.graphs: GraphedModel | None = None
        longest = model.config.max_position_embeddings
        self.max_seq_length = settings.max_seq_length or min(
            tokenizer.model_max_length or longest, longest
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | None = None,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        attention: str = "auto",
        quantize: str | None = None,
        cuda_graphs: bool = False,
        truncate_dim: int | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> "SentenceEncoder":
        """Load a sentence-transformers model, in either layout, or a plain model folder.

        Without a name, modernbert-mini, which ships with the package and needs no network. A plain
        folder is pooled as its config says (`classifier_pooling`). `truncate_dim` keeps the leading
        dimensions of a Matryoshka model; `quantize` gives 8-bit linear layers, "int8" or, on
        NVIDIA GPUs from sm_89 on, "fp8"; `cuda_graphs` replays batches of up to 2,048 tokens on a
        GPU; `device` is the GPU if there is one; the other arguments are those of
        `ModernBertModel.from_pretrained`.

        Raises `CheckpointError` (a `ValueError`) for a folder that cannot be loaded exactly.
        """
        if quantize not in (None, *KINDS):
            raise ValueError(f"quantize={quantize!r}; choose from {', '.join(KINDS)}, or None")
        at: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
        at |= {"token": token, "cache_dir": cache_dir}
        folder = open_folder(name_or_path, **at)
        name = folder.name
        modules = read_modules_json(folder)
        transformer = modules[0][1] if modules else ""
        if transformer:
            if folder.revision is not None:
                raise CheckpointError(
                    f"{name} keeps its Transformer in {transformer}/, which is read from a plain "
                    f"folder only: run `hf download {name} --local-dir FOLDER` and load FOLDER"
                )
            checkpoint = Checkpoint(f"{name}/{transformer}", folder.folder / transformer)
        else:
            folder = checkpoint = open_checkpoint(name_or_path, **at)
        if device is None:
            device = best_device()
            if quantize and device.type != "cuda":
                device = "cpu"
        if quantize and dtype is None and torch.device(device).type == "cpu":
            dtype = torch.float32
        model = ModernBertModel.from_checkpoint(
            checkpoint, dtype=dtype, device=device, attention=attention
        )
        if quantize:
            quantize_linears(model, quantize)
        width, pooled = model.config.hidden_size, model.config.classifier_pooling
        if modules:
            pooling, after = read_pooling(folder, modules, width)
        else:
            pooling, after = Pooling(width, (pooled,)), []
            logger.warning(
                "%s has no modules.json: pooling is %r, from its config.json", name, pooled
            )
        settings = read_settings(folder, transformer)
        if truncate_dim is not None:
            settings.truncate_dim = truncate_dim
        tokenizer = Tokenizer.from_checkpoint(checkpoint)
        encoder = cls(model, tokenizer, pooling, after, settings=settings)
        encoder.to(model.device).eval()
        encoder.graphs = GraphedModel(model) if cuda_graphs else None
        return encoder

    def optimize(
        self, *, linears: str = "auto", fp16_accumulate: bool = False
    ) -> "SentenceEncoder":
        """`ModernBertModel.optimize` of the encoder inside; pooling and Dense layers stay."""
        self.model.optimize(linears=linears, fp16_accumulate=fp16_accumulate)
        if self.graphs is not None:  # they run the layers that were there before
            self.graphs = GraphedModel(self.model)
        return self

    # -- properties -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_seq_length(self) -> int:
        """Tokens of the longest text, special tokens and prompt included; the rest is cut off."""
        return self._max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        least = self.tokenizer.num_special_tokens() + 1
        if value < least:
            raise ValueError(f"max_seq_length is {value}; it must be at least {least}")
        self._max_seq_length = value

    @property
    def similarity_fn_name(self) -> str:
        """The name of the similarity: cosine, dot, euclidean or manhattan."""
        return self._similarity_fn_name

    @similarity_fn_name.setter
    def similarity_fn_name(self, value: str) -> None:
        self._similarity_fn_name = check_similarity(value)

    @property
    def truncate_dim(self) -> int | None:
        """How many leading dimensions `encode` keeps; None for all."""
        return self._truncate_dim

    @truncate_dim.setter
    def truncate_dim(self, value: int | None) -> None:
        if value is not None and value < 1:
            raise ValueError(f"truncate_dim is {value}; expected a positive integer or None")
        self._truncate_dim = value

    @property
    def out_features(self) -> int:
        """Width of the vectors before `truncate_dim`."""
        widths = [module.out_features for module in self.after if isinstance(module, Dense)]
        return widths[-1] if widths else self.pooling.out_features

    def get_embedding_dimension(self) -> int:
        """Width of the vectors that `encode` returns by default."""
        return min(self.out_features, self.truncate_dim or self.out_features)

    get_sentence_embedding_dimension = get_embedding_dimension

    @contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Within the `with` block, `encode` keeps the first `truncate_dim` dimensions."""
        before, self.truncate_dim = self.truncate_dim, truncate_dim
        try:
            yield
        finally:
            self.truncate_dim = before

    # -- encoding ---------------------------------------------------------------------------

    def forward(self, batch: PackedBatch, prompt_length: int = 0) -> Tensor:
        """Vectors (B, d) of a packed batch, with gradients, before truncation."""
        if self.graphs is not None and self.graphs.fits(batch):
            return self.after(self.pooling(self.graphs(batch), batch, prompt_length))
        drops = self.training and self.model.config.attention_dropout
        if self.pooling.first_only(prompt_length) and not drops:  # that path drops no weights
            first = self.model(batch, first_only=True).last_hidden_state  # (B, D)
            return self.after(first.to(reference.wide(first.dtype)))
        hidden = self.model(batch).last_hidden_state  # (T, D)
        return self.after(self.pooling(hidden, batch, prompt_length))

    @overload
    def encode(
        self, inputs: str | Iterable[str], *, convert_to_tensor: Literal[True], **options: Any
    ) -> Tensor: ...

    @overload
    def encode(
        self, inputs: str | Iterable[str], *, convert_to_numpy: Literal[False], **options: Any
    ) -> list[Tensor]: ...

    @overload
    def encode(
        self,
        inputs: str | Iterable[str],
        *,
        output_value: Literal["token_embeddings"] | None,
        **options: Any,
    ) -> Any: ...

    @overload
    def encode(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = ...,
        prompt: str | None = ...,
        batch_size: int | None = ...,
        **options: Any,
    ) -> np.ndarray: ...

    def encode(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str | None = "sentence_embedding",
        precision: str = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: torch.device | str | None = None,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        *,
        batch_tokens: int | None = None,
        invariant: bool = False,
        truncation: str = "warn",
        window: int = WINDOW_TEXTS,
        report: EncodeReport | None = None,
        **unknown: Any,
    ) -> Any:
        """The vectors of one text (d,), or of N texts from any iterable (N, d).

        Args:
            inputs: a text, or an iterable of texts: list, generator, file, column...
            prompt_name: a key of `prompts`; its text is put before each input.
            prompt: the text itself; wins over `prompt_name`.
            batch_size: at most this many texts in a batch; no bound by default, see `batch_tokens`.
            show_progress_bar: in tokens; by default when the logger "modernbert" says INFO.
            output_value: "sentence_embedding"; "token_embeddings" for a list of (length, D); None
                for a list of dicts with input_ids, attention_mask and both embeddings.
            precision: float32; int8 or uint8, after `calibrate`; binary or ubinary, (N, d / 8).
            convert_to_numpy: return a numpy array. When False, a list of tensors.
            convert_to_tensor: return one tensor, on the model's device.
            device: move the model there first.
            normalize_embeddings: scale the vectors to length 1.
            truncate_dim: keep that many leading dimensions; wins over the attribute.
            batch_tokens: the token budget of a batch, by default `kernels.token_budget`. When
                memory runs out it is halved and the batch tried again, down to a single text.
            invariant: run every text by itself, so that its vector is the same to the last bit
                whatever its neighbours, the budget and its place. On a CPU, texts of 256 tokens
                take a tenth to a quarter longer, sentences three to five times as long.
            truncation: what to do with texts beyond `max_seq_length`: "cut" them, cut them and
                "warn" once at the end, or raise an "error" before they are encoded.
            window: texts that are sorted by length together.
            report: filled with counts of texts, tokens and what was cut.

        Vectors are float32 whatever the model computes in. Raises `ValueError`, with the text's
        index, for an input that is no text, a text too long (`truncation="error"`), a vector with
        NaN or infinity; `MemoryError` when not even a single text fits.
        """
        options = EncodeOptions.of(
            prompt_name=prompt_name,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            output_value=output_value,
            precision=precision,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
            device=device,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
            batch_tokens=batch_tokens,
            invariant=invariant,
            truncation=truncation,
            window=window,
            report=report,
            **unknown,
        )
        stream = self._stream(options)
        windows = list(stream.windows([inputs] if isinstance(inputs, str) else inputs))
        result: Any
        if not options.one_vector_each:
            result = [item for part in windows for item in part]
        else:
            result = torch.cat(windows) if windows else stream.run([])()
            if options.to_numpy:
                result = result.numpy()
            elif not convert_to_tensor:
                result = list(result)
        return result[0] if isinstance(inputs, str) else result

    def encode_stream(self, inputs: Iterable[str], **options: Any) -> Iterator[Any]:
        """Yield the vector (d,) of each text, in order, in memory that does not grow.

        Reads `window` texts (fewer when they are long), sorts these by length, encodes them under
        the token budget, yields their vectors one by one, and reads on. So the first vector comes
        after the first window; a smaller window brings it sooner. A model on a GPU is fed one
        window ahead, unless `window` is 1: then no text is read before the vector of the last one
        is yielded. Takes the options of `encode` and raises its errors; with
        `convert_to_numpy=False` it yields tensors.
        """
        if isinstance(inputs, str):
            raise ValueError("encode_stream takes an iterable of texts, not one text: use encode")
        checked = EncodeOptions.of(**options)
        return _rows(self._stream(checked).windows(inputs), checked)

    def encode_query(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> Any:
        """`encode` with the prompt called "query"."""
        name = self._prompt_for(prompt_name, prompt, "query")
        return self.encode(inputs, name, prompt, **options)

    def encode_document(
        self,
        inputs: str | Iterable[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        **options: Any,
    ) -> Any:
        """`encode` with the first non-empty prompt of "document", "passage" and "corpus"."""
        name = self._prompt_for(prompt_name, prompt, "document", "passage", "corpus")
        return self.encode(inputs, name, prompt, **options)

    def _prompt_for(self, name: str | None, prompt: str | None, *names: str) -> str | None:
        if name is not None or prompt is not None:
            return name
        return next((n for n in names if self.prompts.get(n)), names[0])

    def _stream(self, options: EncodeOptions) -> Stream:
        """What reads, groups and runs the texts of a call; all that can change is settled here."""
        dimension = min(self.out_features, options.truncate_dim or self.get_embedding_dimension())
        ranges = None
        if options.precision in ("int8", "uint8"):
            ranges = self._ranges(options.precision, dimension, options.normalize_embeddings)
        prompt = self._resolve_prompt(options.prompt_name, options.prompt)
        if options.device is not None:
            self.to(options.device)
        progress = options.show_progress_bar
        if progress is None:
            progress = logger.getEffectiveLevel() in (logging.INFO, logging.DEBUG)
        report = EncodeReport() if options.report is None else options.report
        report.batch_tokens = options.batch_tokens or kernels.token_budget(self.device)
        return Stream(
            tokenize=partial(self._tokenize, prompt),
            run=partial(self._run, options, dimension, ranges, self._prompt_length(prompt)),
            max_length=self.max_seq_length,
            report=report,
            count_cuts=options.report is not None,
            # Matrix products of other sizes round differently, so nothing may share a batch.
            batch_size=1 if options.invariant else options.batch_size,
            window=options.window,
            truncation=options.truncation,
            progress=progress,
            # A CPU has no core to spare, and tokenising takes all of them for a moment anyway.
            overlap=self.device.type != "cpu" and options.window > 1,
        )

    def _ranges(self, precision: str, dimension: int, normalized: bool) -> np.ndarray:
        if self.calibration is None:
            raise ValueError(
                f"precision {precision!r} needs the range of every dimension: run "
                "encoder.calibrate(texts) once with some hundred typical texts (save_pretrained "
                "stores the ranges), so that the codes of all calls can be compared"
            )
        return self.calibration.fitting(dimension, normalized)

    def _resolve_prompt(self, name: str | None, prompt: str | None) -> str:
        if prompt is not None:
            if name is not None:
                logger.warning("both prompt and prompt_name are given: prompt_name is ignored")
            return prompt
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            raise ValueError(f"there is no prompt {name!r}; this model has {list(self.prompts)}")
        return self.prompts[name]

    def _prompt_length(self, prompt: str) -> int:
        """Tokens that a prompt puts before the text: [CLS] counts, the final [SEP] does not."""
        if not prompt or self.pooling.include_prompt:
            return 0
        ids = self._tokenize(prompt, [""]).input_ids[0]
        return len(ids) - (ids[-1] == self.tokenizer.sep_token_id)

    def _tokenize(self, prompt: str, texts: list[str]) -> TokenizedBatch:
        texts = [prompt + text for text in texts]
        if self.do_lower_case:
            texts = [text.lower() for text in texts]
        return self.tokenizer(texts, max_length=self.max_seq_length)

    def _run(
        self,
        options: EncodeOptions,
        dimension: int,
        ranges: np.ndarray | None,
        prompt_length: int,
        ids: list[Tensor],
    ) -> Callable[[], Any]:
        """Start on a batch of B texts.

        What is returned waits for a tensor (B, d) or (B, codes), or a list of B tensors or dicts.
        """
        states: Sequence[Tensor] = ()
        if not ids:
            vectors = torch.zeros(0, dimension, device=self.device)
        else:
            batch = pack(ids, device=self.device)
            with self._inference():
                if options.one_vector_each:
                    vectors = self(batch, prompt_length)
                else:
                    vectors = self.model(batch).last_hidden_state  # (T, D), of tokens
                    states = batch.split(vectors)
                if options.output_value is None:
                    vectors = self.after(self.pooling(vectors, batch, prompt_length))
                if options.output_value != "token_embeddings":
                    vectors = vectors[:, :dimension]  # (B, d)
                    if options.normalize_embeddings:
                        vectors = F.normalize(vectors, dim=-1)
        to_host = options.one_vector_each and (options.to_numpy or options.precision != "float32")
        fetched = fetch(vectors if to_host else torch.isfinite(vectors).all())

        def wait() -> Any:
            found = fetched()
            if not (torch.isfinite(found).all() if to_host else found):
                raise NotFinite(
                    "its vector contains NaN or infinity; float16 overflows in some models, "
                    "load this one with dtype='float32' or 'bfloat16'"
                )
            if options.precision != "float32":
                return torch.from_numpy(quantize(found.numpy(), options.precision, ranges))
            if options.one_vector_each:
                return found if to_host else vectors
            if options.output_value == "token_embeddings":
                return states
            return [
                {
                    "input_ids": row.to(self.device, torch.int64),
                    "attention_mask": torch.ones(len(row), dtype=torch.int64, device=self.device),
                    "token_embeddings": state,
                    "sentence_embedding": vector,
                }
                for row, state, vector in zip(ids, states, vectors, strict=True)
            ]

        return wait

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients and no dropout; then the mode that the caller had."""
        training = self.training
        if training:
            self.eval()
        try:
            # Not inference_mode: its tensors could never take part in a training step.
            with torch.no_grad():
                yield
        finally:
            if training:
                self.train()

    # -- similarity, calibration, saving ----------------------------------------------------

    def similarity(self, embeddings1: Vectors, embeddings2: Vectors) -> Tensor:
        """Scores (n, m) of vectors (n, d) and (m, d) by `similarity_fn_name`."""
        return similarity(self.similarity_fn_name, embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Vectors, embeddings2: Vectors) -> Tensor:
        """Scores (n,) of the rows of (n, d) and (n, d) one by one."""
        return similarity_pairwise(self.similarity_fn_name, embeddings1, embeddings2)

    def calibrate(
        self,
        inputs: Iterable[str] | np.ndarray | Tensor,
        *,
        normalize_embeddings: bool = False,
        **options: Any,
    ) -> Calibration:
        """Measure and keep the range of every dimension, which int8 and uint8 need.

        `inputs` are some hundred typical texts, encoded with `options` (those of `encode`), or
        float vectors (n, d) that were; then `normalize_embeddings` says whether they are scaled.
        `save_pretrained` stores the ranges.
        """
        if isinstance(inputs, Tensor):
            inputs = inputs.float().cpu().numpy()
        batches: Iterable[np.ndarray]
        if isinstance(inputs, np.ndarray) and inputs.dtype.kind == "f":
            if inputs.ndim != 2:
                raise ValueError(f"an array of shape {inputs.shape} holds no float vectors (n, d)")
            batches = [inputs]
        else:
            options["normalize_embeddings"] = normalize_embeddings
            stream = self._stream(EncodeOptions.of(**options))
            batches = (window.numpy() for window in stream.windows(inputs))
        self.calibration = Calibration.measure(batches, normalized=normalize_embeddings)
        return self.calibration

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | str = "5GB") -> None:
        """Write the layout that sentence-transformers 5 and 6, TEI, vLLM and llama.cpp read.

        The folder appears complete or, if anything fails, stays what it was.
        """
        settings = Settings(
            prompts=self.prompts,
            default_prompt_name=self.default_prompt_name,
            similarity_fn_name=self.similarity_fn_name,
            truncate_dim=self.truncate_dim,
            max_seq_length=self.max_seq_length,
            do_lower_case=self.do_lower_case,
            calibration=self.calibration,
        )
        layout, tensors = layout_files(settings, self.pooling, list(self.after))
        save_folder(
            folder,
            files={**self.model.files_to_save(), **self.tokenizer.files(), **layout},
            tensors=self.model.tensors_to_save(),
            max_shard_size=max_shard_size,
            extra_tensors=tensors,
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes; the commit's URL. Options: see `push_folder`."""
        return push_folder(self.save_pretrained, repo_id, **options)


def _rows(windows: Iterator[Any], options: EncodeOptions) -> Iterator[Any]:
    """The results one by one."""
    for window in windows:
        for row in window:
            if options.one_vector_each:
                row = row.clone()  # a view would keep the memory of its whole window
                row = row.numpy() if options.to_numpy else row
            yield row
