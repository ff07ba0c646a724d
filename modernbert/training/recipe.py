"""The recipe of a training run: one TOML file, read strictly into frozen dataclasses."""

import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OBJECTIVES = (
    "mlm",
    "distillation",
    "contrastive",
    "sequence-classification",
    "token-classification",
)
SHAPES = ("1-sqrt", "linear", "cosine")


@dataclass(frozen=True)
class Data:
    """One collection of records.

    Attributes:
        files: glob patterns of .jsonl(.gz), .txt(.gz) or .parquet files, relative to the recipe.
        fields: the texts of a record; for contrastive training anchor, positive, any negatives.
        prompts: what is put before each of the fields, for example ["query: ", "passage: "]; a
            teacher reads the texts without them.
        label: the field that holds a class; in token classification a list of classes, one for
            each word of the list of words that the text then is.
        validation: share of the records, chosen by the hash of the first field, that is never
            trained on.
        teacher: sentence-transformers name or folder whose vectors a distillation follows.
    """

    files: tuple[str, ...]
    fields: tuple[str, ...] = ("text",)
    prompts: tuple[str, ...] = ()
    label: str | None = None
    validation: float = 0.0
    teacher: str | None = None


@dataclass(frozen=True)
class Task:
    """One objective on one collection; a step of a phase does every task of the phase.

    Attributes:
        objective: "mlm", "distillation", "contrastive" or a head.
        data: name of a [data.NAME] table.
        weight: of this task's loss among the phase's tasks.
        every: the task is part of every n-th step only.
        rows: packed rows of `micro_tokens` tokens in a step (mlm).
        texts: records in a step (all others).
        mask_rate: share of the tokens to predict (mlm).
        mask_special: mask [CLS] and [SEP], too (mlm).
        temperature: of the InfoNCE softmax.
        similarity_weight: of the in-batch similarity matrix against the vectors' own cosine.
        dims: leading dimensions that are trained as vectors of their own (Matryoshka).
    """

    objective: str
    data: str
    weight: float = 1.0
    every: int = 1
    rows: int = 1
    texts: int = 64
    mask_rate: float = 0.3
    mask_special: bool = False
    temperature: float = 0.02
    similarity_weight: float = 1.0
    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own lengths, schedule and tasks.

    Attributes:
        name: appears in the log.
        tokens: trained tokens after which the phase ends.
        tasks: what each step does.
        max_length: tokens of the longest sequence, special tokens included.
        learning_rate: its peak.
        warmup_tokens, decay_tokens: length of the linear warm-up and of the final decay.
        decay: shape of the decay, "1-sqrt", "linear" or "cosine".
        final_learning_rate: at the end of the decay, as a share of the peak.
        batch_warmup_tokens: over these the rows of the mlm task grow from 1 to `rows`.
        weight_decay: fully decoupled; multiplied by learning rate / peak only.
        global_rope_theta: new theta of the global layers from here on.
    """

    name: str
    tokens: int
    tasks: tuple[Task, ...]
    max_length: int = 1024
    learning_rate: float = 8e-4
    warmup_tokens: int = 0
    decay_tokens: int = 0
    decay: str = "1-sqrt"
    final_learning_rate: float = 0.001
    batch_warmup_tokens: int = 0
    weight_decay: float = 1e-5
    global_rope_theta: float | None = None


@dataclass(frozen=True)
class Start:
    """Where the weights come from; random ones where nothing is said.

    Attributes:
        checkpoint: folder or name of a model to go on from.
        tile: folder or name of a smaller model, or one of the same size, that is tiled into this
            one; where its tokenizer is another, its embeddings are carried over to the recipe's.
        embeddings_from: sentence-transformers name or folder; each token embedding starts at its
            vector of the token's string.
        directions: the data/directions.npy of an earlier run, which the weights come from: the
            teacher's vectors are turned as they were there, instead of by their own directions.
    """

    checkpoint: str | None = None
    tile: str | None = None
    embeddings_from: str | None = None
    directions: str | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run.

    Attributes:
        name: of the model.
        output: folder of checkpoints, log, plots and the finished model, relative to the recipe.
        tokenizer: folder or name.
        data: collections by name.
        phases: in order.
        model: fields of ModernBertConfig.
        start: where the weights come from.
        seed: of everything random.
        micro_tokens: tokens of one forward and backward pass; a row of packed text is as long.
        dtype: of the arithmetic; weights and optimizer are float32.
        device: "auto", "cpu", "cuda".
        betas, eps: of StableAdamW.
        threads: CPU threads of this process; 0 for one per core. Going on with another number is
            allowed, and changes the last bits.
        gradient_checkpointing: recompute layers in the backward pass.
        parallel: "ddp" or "fsdp" where torchrun starts several processes.
        checkpoint_steps: between checkpoints.
        keep: last checkpoints that are kept.
        average: the finished weights are the mean of this many last checkpoints, the end included.
        log_steps, validation_steps: between lines of the log, between validations.
        early_stopping: validations without a better loss (of the first task that has one) after
            which a phase ends; however it ends, its best weights are kept. 0 for neither.
        workers: processes that tokenise.
        max_seq_length: tokens of the longest text of the finished sentence encoder.
        prompt: what the finished sentence encoder puts before every text.
    """

    name: str
    output: str
    tokenizer: str
    data: dict[str, Data]
    phases: tuple[Phase, ...]
    model: dict[str, Any] = field(default_factory=dict)
    start: Start = Start()
    seed: int = 17
    micro_tokens: int = 8192
    dtype: str = "float32"
    device: str = "auto"
    betas: tuple[float, ...] = (0.9, 0.98)
    eps: float = 1e-6
    threads: int = 0
    gradient_checkpointing: bool = False
    parallel: str = "ddp"
    checkpoint_steps: int = 1000
    keep: int = 2
    average: int = 1
    log_steps: int = 10
    validation_steps: int = 500
    early_stopping: int = 0
    workers: int = 1
    max_seq_length: int = 8192
    prompt: str = ""
    folder: str = "."  # of the recipe file; set by read_recipe

    def path(self, relative: str) -> Path:
        """A path of the recipe, relative to its file."""
        return Path(self.folder) / Path(relative).expanduser()


def read_recipe(path: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """Read a TOML recipe; `settings` are "dotted.key=value" that replace values of the file.

    Keys of lists are numbers: "phases.0.tokens=1000". Raises `ValueError` for anything unknown,
    of another type or out of range, with the file and the key.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    for setting in settings:
        _override(raw, setting)
    raw["folder"] = str(path.parent)
    recipe = _build(Recipe, raw, str(path), "")
    _check(recipe, str(path))
    return recipe


def _override(raw: dict[str, Any], setting: str) -> None:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {setting!r}: write key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = key.split(".")
    place: Any = raw
    for part in parents:
        if isinstance(place, list):
            if not part.isdecimal() or int(part) >= len(place):
                raise ValueError(f"--set {setting!r}: {part!r} is not one of {len(place)} entries")
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place.setdefault(part, {})
    if isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ValueError(f"--set {setting!r}: there is no such key")


def _build(kind: Any, value: Any, source: str, key: str) -> Any:
    """`value` of the TOML file as the type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin is types.UnionType:  # X | None: TOML has no null
        return _build(arguments[0], value, source, key)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        for name in value.keys() - hints.keys():
            raise ValueError(f"{source}: unknown key {_join(key, name)}; known: {', '.join(hints)}")
        needed = [f.name for f in dataclasses.fields(kind) if _required(f) and f.name not in value]
        if needed:
            raise ValueError(f"{source}: {_join(key, needed[0])} is missing")
        built = {n: _build(hints[n], v, source, _join(key, n)) for n, v in value.items()}
        return kind(**built)
    if origin is tuple and isinstance(value, list):
        items = enumerate(value)
        return tuple(_build(arguments[0], item, source, _join(key, i)) for i, item in items)
    if origin is list and isinstance(value, list):
        return [_build(arguments[0], v, source, _join(key, i)) for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {n: _build(arguments[1], v, source, _join(key, n)) for n, v in value.items()}
    if kind is float and type(value) is int:
        value = float(value)
    if kind is int and isinstance(value, float) and value.is_integer():  # 1.7e12 tokens
        value = int(value)
    if not isinstance(kind, type) or origin is not None or type(value) is not kind:
        name = getattr(kind, "__name__", str(kind))
        raise ValueError(f"{source}: {key} is {value!r:.80}; expected {name}")
    return value


def _required(spec: dataclasses.Field) -> bool:
    return spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _check(recipe: Recipe, source: str) -> None:
    """Values that a type does not rule out."""
    choices: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("dtype", recipe.dtype, ("float32", "bfloat16", "float16")),
        ("parallel", recipe.parallel, ("ddp", "fsdp")),
    ]
    positive: list[tuple[str, float]] = [
        (name, getattr(recipe, name))
        for name in (
            "micro_tokens",
            "checkpoint_steps",
            "keep",
            "average",
            "log_steps",
            "validation_steps",
            "workers",
        )
    ]
    if not recipe.phases:
        raise ValueError(f"{source}: phases is empty; a run needs one [[phases]] at least")
    for i, phase in enumerate(recipe.phases):
        where = f"phases.{i}"
        choices.append((f"{where}.decay", phase.decay, SHAPES))
        positive += [(f"{where}.{n}", getattr(phase, n)) for n in ("tokens", "learning_rate")]
        if not phase.tasks:
            raise ValueError(f"{source}: {where}.tasks is empty")
        if not 3 <= phase.max_length <= recipe.micro_tokens:
            raise ValueError(
                f"{source}: {where}.max_length is {phase.max_length}; "
                f"expected 3 to micro_tokens = {recipe.micro_tokens}"
            )
        if 0 < phase.tokens < phase.warmup_tokens + phase.decay_tokens:
            raise ValueError(f"{source}: {where} warms up and decays for more than its tokens")
        for j, task in enumerate(phase.tasks):
            place = f"{where}.tasks.{j}"
            choices.append((f"{place}.objective", task.objective, OBJECTIVES))
            choices.append((f"{place}.data", task.data, tuple(recipe.data)))
            positive += [
                (f"{place}.{n}", getattr(task, n)) for n in ("rows", "texts", "weight", "every")
            ]
            positive.append((f"{place}.temperature", task.temperature))
            if not 0 < task.mask_rate < 1:
                raise ValueError(f"{source}: {place}.mask_rate is {task.mask_rate}, not in (0, 1)")
            if task.data in recipe.data:
                _check_task(task, recipe.data[task.data], f"{source}: {place}")
    _check_heads(recipe, source)
    for name, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{source}: {name} is {value!r}; choose {', '.join(allowed)}")
    for name, number in positive:
        if not number > 0:
            raise ValueError(f"{source}: {name} is {number}; expected a number above 0")
    for name, data in recipe.data.items():
        if not 0 <= data.validation < 1:
            raise ValueError(
                f"{source}: data.{name}.validation is {data.validation}, not in [0, 1)"
            )
        if not data.files or not data.fields:
            raise ValueError(f"{source}: data.{name} needs files and fields")
        if data.prompts and (data.label or len(data.prompts) != len(data.fields)):
            raise ValueError(
                f"{source}: data.{name}.prompts needs one prompt for each of the "
                f"{len(data.fields)} fields, and no label"
            )


def _check_heads(recipe: Recipe, source: str) -> None:
    """One head for a run, and what early stopping needs."""
    objectives = {task.objective for phase in recipe.phases for task in phase.tasks}
    heads = {name if name.endswith("classification") else "" for name in objectives}
    if len(heads) > 1:
        raise ValueError(
            f"{source}: the tasks are {', '.join(sorted(objectives))}, of more than one head; "
            "write a recipe for each, the second with start.checkpoint"
        )
    if recipe.early_stopping:
        if not any(data.validation for data in recipe.data.values()):
            raise ValueError(f"{source}: early_stopping needs a data.NAME.validation above 0")
        if recipe.average > 1:
            raise ValueError(
                f"{source}: average is {recipe.average}, and early_stopping keeps the best weights "
                "alone; choose one of them"
            )


def _check_task(task: Task, data: Data, place: str) -> None:
    if task.objective == "distillation" and data.teacher is None:
        raise ValueError(f"{place}: distillation needs data.{task.data}.teacher")
    if task.objective == "contrastive" and len(data.fields) < 2:
        raise ValueError(f"{place}: contrastive training needs two fields in data.{task.data}")
    if task.objective.endswith("classification") and data.label is None:
        raise ValueError(f"{place}: {task.objective} needs data.{task.data}.label")
    most = {"sequence-classification": 2, "token-classification": 1}
    if len(data.fields) > most.get(task.objective, len(data.fields)):
        raise ValueError(
            f"{place}: {task.objective} reads {most[task.objective]} fields at most, "
            f"data.{task.data}.fields has {len(data.fields)}"
        )
