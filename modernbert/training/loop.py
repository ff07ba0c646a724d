"""The training loop: a recipe in, a model folder out; stops and goes on at any step."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from modernbert.accounting import flops_of_decoder, flops_per_token
from modernbert.benchmark.ceiling import measure_ceiling
from modernbert.config import FULL, ModernBertConfig
from modernbert.heads import ClassifierModel, HeadModel, ModernBertForMaskedLM
from modernbert.model import RotaryTable
from modernbert.pooling import Normalize, Pooling
from modernbert.pretrained import best_device
from modernbert.sentence_layout import Settings, layout_files
from modernbert.tokenizer import Tokenizer
from modernbert.weights import open_checkpoint, save_folder

from .checkpoints import (
    average,
    checkpoint_name,
    checkpoints,
    load_checkpoint,
    load_weights,
    prune,
    save_checkpoint,
)
from .classification import (
    HEADS,
    PER_WORD,
    Classification,
    Examples,
    class_names,
    label_ids,
    read_examples,
)
from .initialization import embeddings_from, transplant
from .optimizer import StableAdamW, parameter_groups
from .readers import find_files, is_validation, read_file
from .recipe import Data, Phase, Recipe, Task
from .schedule import learning_rate
from .sharding import is_sharded, shard, whole
from .store import TokenStore, build_store
from .tasks import Context, MaskedLM, Metrics, TrainingTask, VectorTask
from .teacher import (
    load_teacher,
    read_directions,
    rotation,
    teacher_vectors,
    write_directions,
)
from .tiling import tile_model

logger = logging.getLogger("modernbert")


class Trainer:
    """A run of a recipe; `run` trains to the end, from the last checkpoint if there is one.

    Started by torchrun, every process trains on its share of each global batch and the gradients
    are summed, so that the result does not depend on their number but for rounding. With
    `parallel = "fsdp"` each keeps a slice of the layers only (see `shard`); checkpoints are whole.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.device = self._device()
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        self.output = recipe.path(recipe.output)
        self.tokenizer = Tokenizer.from_pretrained(_name_or_folder(recipe, recipe.tokenizer))
        self.context = Context(recipe, self.tokenizer, self.device, self.rank, self.world)
        self.stores: dict[tuple[str, str], TokenStore] = {}
        self.examples: dict[str, tuple[Examples, Examples | None]] = {}
        self.stopping = False

    def _device(self) -> torch.device:
        device = best_device() if self.recipe.device == "auto" else torch.device(self.recipe.device)
        if self.world > 1 and not dist.is_initialized():
            if device.type == "cuda":
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
                torch.cuda.set_device(device)
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return device

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def run(self) -> Path | None:
        """Train; the folder of the finished model, or None when a signal stopped the run early."""
        self.output.mkdir(parents=True, exist_ok=True)
        self.model = self._model()
        if self.context.sharded:
            shard(self.model)
        optimizer = StableAdamW(
            parameter_groups(self.model, 0.0),
            lr=self.recipe.phases[0].learning_rate,
            betas=(self.recipe.betas[0], self.recipe.betas[1]),
            eps=self.recipe.eps,
        )
        self.optimizer = optimizer
        state: dict[str, Any] = {
            "phase": 0,
            "step": 0,
            "tokens": 0,
            "phase_tokens": 0,
            "tasks": [],
            "seconds": 0.0,
        }
        saved = checkpoints(self.output / "checkpoints")
        if saved:
            state = load_checkpoint(saved[-1], self.model, optimizer)
            logger.info("going on at %s", saved[-1].name)
            if state["recipe"] != self._identity():
                raise ValueError(
                    f"{saved[-1]} was trained with another recipe: give another output folder, or "
                    "go back to the old one"
                )
        self.state = state
        self._cut_log()
        with self._signals():
            for index in range(state["phase"], len(self.recipe.phases)):
                if not self._phase(index):
                    return None
        return self._finish()

    # -- what there is before the first step ------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What of the recipe must not change between a checkpoint and going on."""
        recipe = dataclasses.asdict(self.recipe)
        for free in ("output", "folder", "workers", "log_steps", "device", "keep", "threads"):
            recipe.pop(free)
        return json.loads(json.dumps(recipe))

    def _model(self) -> HeadModel:
        start = self.recipe.start
        checkpoint = None
        if start.checkpoint:
            checkpoint = open_checkpoint(_name_or_folder(self.recipe, start.checkpoint))
        tasks = [task for phase in self.recipe.phases for task in phase.tasks]
        objective = tasks[0].objective
        kind: type[HeadModel] = HEADS.get(objective, ModernBertForMaskedLM)
        options = dict(self.recipe.model)
        if objective in HEADS:
            found = [self._examples(task) for task in tasks]
            names = class_names(each for pair in found for each in pair if each)
            options["id2label"] = label_ids(names, checkpoint)
            options["num_labels"] = len(options["id2label"])
            if objective != PER_WORD:
                options["problem_type"] = "single_label_classification"
        torch.manual_seed(self.recipe.seed)
        if checkpoint:
            model = kind.from_checkpoint(checkpoint, dtype=torch.float32, **options)
        else:
            known = {f.name for f in dataclasses.fields(ModernBertConfig)}
            for name in options.keys() - known:
                raise ValueError(f"model.{name} is no field of ModernBertConfig")
            ids = {
                f"{kind}_token_id": getattr(self.tokenizer, f"{kind}_token_id")
                for kind in ("pad", "cls", "sep")
            }
            ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
            size = {"vocab_size": self.tokenizer.vocab_size}
            model = kind(ModernBertConfig(**{**size, **ids, **options}))
        resumed = bool(checkpoints(self.output / "checkpoints"))  # its weights replace these
        if start.tile and not resumed:
            folder = _name_or_folder(self.recipe, start.tile)
            small, old = kind.from_pretrained(folder).float(), Tokenizer.from_pretrained(folder)
            if old.files()["tokenizer.json"] != self.tokenizer.files()["tokenizer.json"]:
                transplant(small, old, self.tokenizer)
            tile_model(small, model)
        if start.embeddings_from and not resumed:
            teacher = load_teacher(start.embeddings_from)
            embeddings_from(teacher, model, self.tokenizer, self._turn(model.config.hidden_size))
        if self.recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model.to(self.device).train()

    def _store(self, name: str, split: str) -> TokenStore | None:
        data = self.recipe.data[name]
        if split == "validation" and not data.validation:
            return None
        key = (name, split)
        if key not in self.stores:
            arguments: dict[str, Any] = dict(
                fields=data.fields,
                prompts=data.prompts,
                split=split,
                validation=data.validation,
                workers=self.recipe.workers,
                progress=self.first,
            )
            folder, sources = self.output / "data" / f"{name}-{split}", self._patterns(data)
            with self._first_alone():
                self.stores[key] = build_store(folder, sources, self.tokenizer, **arguments)
        return self.stores[key]

    def _examples(self, task: Task) -> tuple[Examples, Examples | None]:
        """The labelled records of a task: to train on, and held out."""
        if task.data not in self.examples:
            data = self.recipe.data[task.data]
            self.examples[task.data] = read_examples(data, self._patterns(data), task.objective)
        return self.examples[task.data]

    def _patterns(self, data: Data) -> list[str]:
        return [str(self.recipe.path(pattern)) for pattern in data.files]

    @contextlib.contextmanager
    def _first_alone(self) -> Iterator[None]:
        """The first process runs the block while the others wait, then they do."""
        if self.world > 1 and not self.first:
            dist.barrier()
        yield
        if self.world > 1 and self.first:
            dist.barrier()

    def _targets(self, name: str, split: str) -> np.ndarray | None:
        """The teacher's vectors of a collection's texts."""
        data, store = self.recipe.data[name], self._store(name, split)
        if store is None or data.teacher is None:
            return None

        def texts() -> Iterator[str]:
            for pattern in self._patterns(data):
                for path in find_files(pattern):
                    for _, record in read_file(path):
                        key = record[data.fields[0]]
                        if is_validation(key, data.validation) == (split == "validation"):
                            yield from (record[field] for field in data.fields)

        folder = self.output / "data" / f"{name}-{split}-vectors"
        with self._first_alone():
            return teacher_vectors(folder, texts, len(store), data.teacher)

    @functools.cached_property
    def _directions(self) -> np.ndarray | None:
        """(D', D') the teacher's principal directions: the student takes the first ones."""
        tasks = (task for phase in self.recipe.phases for task in phase.tasks)
        name = next((task.data for task in tasks if task.objective == "distillation"), None)
        targets = None if name is None else self._targets(name, "train")
        if targets is None:
            return None
        given, path = self.recipe.start.directions, self.output / "data" / "directions.npy"
        with self._first_alone():
            if given:
                return read_directions(self.recipe.path(given), targets.shape[1])
            if not path.is_file():
                write_directions(path, rotation(targets, targets.shape[1]))
        return read_directions(path, targets.shape[1])

    def _turn(self, width: int) -> np.ndarray | None:
        """From the teacher's vectors to the student's: one rotation for the whole run."""
        return None if self._directions is None else self._directions[:, :width]

    def _task(self, spec: Task, phase: Phase) -> TrainingTask:
        if isinstance(self.model, ClassifierModel):
            return Classification(self.context, self.model, spec, phase, *self._examples(spec))
        assert isinstance(self.model, ModernBertForMaskedLM)
        store, validation = (self._store(spec.data, s) for s in ("train", "validation"))
        assert store is not None
        if spec.objective == "mlm":
            return MaskedLM(self.context, self.model, spec, phase, store, validation)
        extra: tuple[np.ndarray | None, ...] = ()
        if spec.objective == "distillation":
            targets = self._targets(spec.data, "train")
            assert targets is not None
            turn = self._turn(self.model.config.hidden_size)
            extra = (targets, self._targets(spec.data, "validation"), turn)
        return VectorTask(self.context, self.model, spec, phase, store, validation, *extra)

    # -- training ---------------------------------------------------------------------------

    def _phase(self, index: int) -> bool:
        """Train one phase from where the state stands; False when a signal asked to stop."""
        phase, state = self.recipe.phases[index], self.state
        self._retheta(index)
        tasks = [self._task(spec, phase) for spec in phase.tasks]
        for task, saved in zip(tasks, state["tasks"], strict=False):
            task.load_state_dict(saved)
        for group in self.optimizer.param_groups:
            group["max_lr"] = phase.learning_rate
            group["weight_decay"] = phase.weight_decay if group["decays"] else 0.0
        peak = self._peak()
        line: dict[str, Any] = {"step": state["step"], "tokens": state["tokens"]}
        line["phase"] = phase.name
        description = f"{phase.name} {index + 1}/{len(self.recipe.phases)}"
        with tqdm(
            total=phase.tokens,
            initial=state["phase_tokens"],
            desc=description,
            unit="tok",
            unit_scale=True,
            disable=not self.first,
            smoothing=0.05,
            mininterval=1,
        ) as bar:
            while state["phase_tokens"] < phase.tokens and not self._out_of_patience():
                tokens, line = self._step(tasks, phase, peak)
                bar.update(tokens)
                bar.set_postfix_str(" ".join(_short(line)))
                step, scores = state["step"], {}
                if step % self.recipe.validation_steps == 0:
                    scores = self._validate(tasks)
                    line |= {f"validation/{name}": value for name, value in scores.items()}
                    if self.recipe.early_stopping and scores:
                        self._remember_best(index, tasks, next(iter(scores.values())))
                if step % self.recipe.log_steps == 0 or scores:
                    self._log(line)
                stop = self._agree_to_stop()
                if step % self.recipe.checkpoint_steps == 0 or stop:
                    self._save(index, tasks)
                if stop:
                    return False
        if best := state.pop("best", None):
            logger.info("the best validation was at step %d: its weights stay", best["step"])
            path = self.output / "best" / checkpoint_name(best["step"])
            load_checkpoint(path, self.model, self.optimizer)
        scores = self._validate(tasks)
        self._log(line | {f"validation/{name}": value for name, value in scores.items()})
        state.update(phase=index + 1, phase_tokens=0, tasks=[])
        self._save(index + 1, [])
        return True

    def _remember_best(self, index: int, tasks: list[TrainingTask], loss: float) -> None:
        """Count validations since the best one, whose weights and moments are kept aside."""
        loss = self.context.total(loss) / self.world  # one number, or processes might part ways
        best = self.state.get("best")
        if best and not loss < best["loss"]:
            best["waited"] += 1
            return
        self.state["best"] = {"step": self.state["step"], "loss": loss, "waited": 0}
        self._write_checkpoint(index, tasks, self.output / "best")

    def _out_of_patience(self) -> bool:
        best = self.state.get("best")
        return best is not None and best["waited"] >= self.recipe.early_stopping

    def _step(self, tasks: list[TrainingTask], phase: Phase, peak: float) -> tuple[int, Metrics]:
        state, started = self.state, time.perf_counter()
        rate = learning_rate(
            state["phase_tokens"],
            peak=phase.learning_rate,
            total=phase.tokens,
            warmup=phase.warmup_tokens,
            decay=phase.decay_tokens,
            shape=phase.decay,
            final=phase.final_learning_rate,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        state["step"] += 1
        line: dict[str, Any]
        tokens, line = 0, {"step": state["step"], "lr": rate}
        for task, spec in zip(tasks, phase.tasks, strict=True):
            if state["step"] % spec.every:
                continue
            seen, metrics = task.backward(state["step"], state["phase_tokens"])
            tokens += seen
            line |= {f"{task.name}/{key}": value for key, value in metrics.items()}
        losses = [value for key, value in line.items() if key.endswith("/loss")]
        if not np.isfinite(losses).all():
            raise ValueError(
                f"the loss is {losses} at step {state['step']}: lower learning_rate, or warm up "
                "for longer; the last checkpoint is whole"
            )
        self._sum_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - started
        state["tokens"] += tokens
        state["phase_tokens"] += tokens
        state["seconds"] += seconds
        line |= {
            "tokens": state["tokens"],
            "step_tokens": tokens,
            "tokens_per_second": tokens / seconds,
        }
        line |= {"utilisation": self._flops(phase) * tokens / seconds / peak, "phase": phase.name}
        return tokens, line

    def _sum_gradients(self) -> None:
        """Add up the gradients of all processes, but for sharded ones: they have been."""
        if self.world == 1:
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad and not is_sharded(p)]
        # What no process has a gradient of stays without one: the optimizer leaves it alone.
        has = torch.tensor([p.grad is not None for p in parameters], device=self.device).int()
        dist.all_reduce(has, dist.ReduceOp.MAX)
        parameters = [p for p, any_has in zip(parameters, has.tolist(), strict=True) if any_has]
        if not parameters:
            return
        # A process without a row of its own has none.
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in own])
        dist.all_reduce(flat)
        for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            p.grad = part.view_as(p).clone()

    def _validate(self, tasks: list[TrainingTask]) -> Metrics:
        self.model.eval()
        scores = {
            f"{task.name}/{key}": value for task in tasks for key, value in task.validate().items()
        }
        self.model.train()
        return scores

    def _retheta(self, index: int) -> None:
        """The RoPE theta of the global layers that holds in a phase."""
        thetas = [p.global_rope_theta for p in self.recipe.phases[: index + 1]]
        theta = next((t for t in reversed(thetas) if t), None)
        if theta is not None and theta != self.model.config.global_rope_theta:
            config = self.model.config.replace(global_rope_theta=theta)
            self.model.config = self.model.model.config = config
            table = RotaryTable(theta, config.head_dim, config.max_position_embeddings)
            self.model.model.rotary[FULL] = table

    def _peak(self) -> float:
        """FLOP/s of matrix products in the dtype of the arithmetic, all processes together."""
        dtype = getattr(torch, self.recipe.dtype)
        return measure_ceiling(dtype, self.device, seconds=1.0).matmul_flops * self.world

    def _flops(self, phase: Phase) -> float:
        """Of training on one token, estimated: three forward passes, decoder on the masked ones.

        Texts are taken to be as long as documents are on average, and tasks to be of one size.
        """
        config = self.model.config
        masked = [t.mask_rate for t in phase.tasks if t.objective == "mlm"]
        share = sum(masked) / len(phase.tasks)
        length = min(phase.max_length, 128)
        return 3 * (flops_per_token(config, length).total + share * flops_of_decoder(config))

    def _agree_to_stop(self) -> bool:
        return self.context.total(float(self.stopping)) > 0

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step at hand, with a checkpoint."""

        def stop(number: int, frame: object) -> None:
            logger.warning("stopping after this step; run the same command to go on")
            self.stopping = True

        old = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    # -- files ------------------------------------------------------------------------------

    def _log(self, line: dict[str, Any]) -> None:
        if self.first:
            with open(self.output / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")

    def _cut_log(self) -> None:
        """Drop what was logged, and kept aside, after the checkpoint that the run goes on from."""
        path = self.output / "log.jsonl"
        if self.first and path.is_file():
            lines = path.read_text("utf-8").splitlines(keepends=True)
            kept = [
                x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= self.state["step"]
            ]
            path.write_text("".join(kept), "utf-8")
        if self.first:
            later = checkpoint_name(self.state["step"] + 1)
            prune(self.output / "best", 0, since=later)

    def _save(self, phase: int, tasks: list[TrainingTask]) -> None:
        folder = self.output / "checkpoints"
        self._write_checkpoint(phase, tasks, folder)
        if self.first:
            prune(folder, max(self.recipe.keep, self.recipe.average))
            # No earlier than this: a run may go on at the checkpoint before, and need its best.
            prune(self.output / "best", 1 if "best" in self.state else 0)

    def _write_checkpoint(self, phase: int, tasks: list[TrainingTask], folder: Path) -> None:
        """Rank 0 writes; the others wait, so that all may read it."""
        self.state.update(phase=phase, tasks=[task.state_dict() for task in tasks])
        state = {**self.state, "recipe": self._identity()}
        step = state.pop("step")
        save_checkpoint(folder, step, self.model, self.optimizer, state, write=self.first)
        if self.world > 1:
            dist.barrier()

    def _finish(self) -> Path:
        """Average, write the finished model, and plot."""
        folder = self.output / "model"
        self._retheta(len(self.recipe.phases) - 1)  # a run may go on after its last phase
        last = checkpoints(self.output / "checkpoints")[-self.recipe.average :]
        if len(last) > 1:
            load_weights(self.model, average(last), last[-1])
        weights = whole(self.model.tensors_to_save(), keep=self.first)
        if self.first:
            save_model(self.model, weights, self.tokenizer, folder, settings_of(self.recipe))
            from .report import plot_run

            plot_run(self.output / "log.jsonl", self.output / "training.png", self.recipe.name)
        return folder


def settings_of(recipe: Recipe) -> Settings:
    """What the finished sentence encoder does to a text."""
    settings = Settings(max_seq_length=recipe.max_seq_length)
    if recipe.prompt:
        settings.prompts = dict.fromkeys(("query", "document", "text"), recipe.prompt)
        settings.default_prompt_name = "text"
    return settings


def save_model(
    model: HeadModel,
    weights: dict[str, Tensor],
    tokenizer: Tokenizer,
    folder: Path,
    settings: Settings,
) -> None:
    """One folder for everyone: a classifier, or a masked LM that is a sentence encoder, too.

    The sentence encoder takes the mean of the tokens. `weights` are all of the model's.
    """
    files = {**model.files_to_save(), **tokenizer.files()}
    extra: Mapping[str, Mapping[str, Tensor]] = {}
    if not isinstance(model, ClassifierModel):
        layout, extra = layout_files(settings, Pooling(model.config.hidden_size), [Normalize()])
        files |= layout
    save_folder(folder, files=files, tensors=weights, extra_tensors=extra)


def _name_or_folder(recipe: Recipe, name: str) -> str:
    """A folder beside the recipe where there is one, else a name for the Hub."""
    path = recipe.path(name)
    return str(path) if path.is_dir() else name


def _short(line: Metrics) -> Iterator[str]:
    """The numbers of a log line that a progress bar has room for."""
    for key, value in line.items():
        if key.endswith("/loss"):
            yield f"{key.removesuffix('/loss')} {value:.3f}"
    yield f"lr {line['lr']:.1e} mfu {line['utilisation']:.0%}"
