"""Running suites on models: `evaluate`."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import (
    classification,
    code_retrieval,
    long_documents,
    retrieval,
    sts,
    tokenizer_report,
    word_similarity,
)
from .models import Subject, Unavailable, as_subject
from .scores import Results, Score, Skipped
from .task import Task

Tasks = Iterator[Task | Skipped]


def _development(data: Path) -> Tasks:
    """What choices may be made on; the other sets judge the result."""
    for task in word_similarity.tasks(data):
        if _name(task) in ("RareWord", "SimLex"):
            yield dataclasses.replace(task, suite="dev")
    yield sts.benchmark(data, "dev", "dev")


def _masked_lm(data: Path) -> Tasks:
    from . import masked_lm  # the only suite that needs torch

    return masked_lm.tasks(data)


SUITES: dict[str, Callable[[Path], Tasks]] = {
    "wordsim": word_similarity.tasks,
    "sts": sts.tasks,
    "classification": classification.tasks,
    "retrieval": retrieval.tasks,
    "classification-full": partial(classification.tasks, full=True),
    "code": code_retrieval.tasks,
    "long": long_documents.tasks,
    "mlm": _masked_lm,
    "tokenizer": tokenizer_report.tasks,
    "dev": _development,
}
DEFAULT = ("wordsim", "sts", "classification", "retrieval")


def evaluate(
    models: Any,
    suites: str | Sequence[str] = DEFAULT,
    data: str | Path = ".",
    *,
    tasks: Iterable[str] | None = None,
    pairs: Iterable[str | Path] = (),
    progress: bool | None = None,
    after_task: Callable[[Results], Any] | None = None,
) -> Results:
    """Score one or several models.

    Args:
        models: an object with `encode(texts) -> (N, d)`; a name, as `load_subject` takes it; a
            `Subject`; a list of these; or a mapping from the names for the table.
        suites: keys of `SUITES`, or "all".
        data: the folder with the evaluation sets. What is not there is skipped, with the reason.
        tasks: only tasks of these names, such as "STS-B test".
        pairs: files of (word, word, score), tab-separated, scored with the suite "wordsim".
        progress: show a bar; by default on a terminal.
        after_task: called with what there is after each task, for example to save it.

    A suite that a model cannot do is skipped for it. Raises `ValueError` for unknown suites and
    tasks and for broken files, `ImportError` when scipy or scikit-learn is needed and absent.
    """
    chosen = choose(suites, Path(data), tasks, [Path(path) for path in pairs])
    subjects = _subjects(models)
    results = Results(skipped=[task for task in chosen if isinstance(task, Skipped)])
    jobs = [(s, task) for s in subjects for task in chosen if isinstance(task, Task)]
    hidden = not (sys.stderr.isatty() if progress is None else progress)
    with tqdm(jobs, unit="task", disable=hidden) as bar:
        for subject, task in bar:
            bar.set_description(f"{subject.name}: {task.name}")
            _run(subject, task, results)
            if after_task is not None:
                after_task(results)
    if any(score.suite == tokenizer_report.SUITE for score in results.scores):
        for subject in subjects:
            with suppress(Unavailable):  # said already, for each task of the suite
                results.splits[subject.name] = tokenizer_report.splits(subject)
    return results


def choose(
    suites: str | Sequence[str],
    data: Path,
    names: Iterable[str] | None = None,
    pairs: Sequence[Path] = (),
) -> list[Task | Skipped]:
    """The tasks of suites, those of the given names only; checked before anything runs."""
    if not data.is_dir():
        raise ValueError(f"there is no folder {data}; give the one that holds the evaluation sets")
    wanted = [suites] if isinstance(suites, str) else list(suites)
    if "all" in wanted:
        wanted = list(SUITES)
    if unknown := sorted(set(wanted) - set(SUITES)):
        raise ValueError(f"there is no suite {unknown[0]!r}; choose from {', '.join(SUITES)}, all")
    if missing := [path for path in pairs if not path.is_file()]:
        raise ValueError(f"there is no file {missing[0]}")
    found: list[Task | Skipped] = []
    for suite in dict.fromkeys(wanted):
        if suite == "wordsim":
            found += word_similarity.tasks(data, pairs)
        else:
            found += SUITES[suite](data)
    if names is None:
        return found
    only, known = set(names), {_name(task) for task in found}
    if unknown := sorted(only - known):
        raise ValueError(f"there is no task {unknown[0]!r}; choose from {', '.join(sorted(known))}")
    return [task for task in found if _name(task) in only]


def _name(task: Task | Skipped) -> str:
    return task.name if isinstance(task, Task) else task.task


def _subjects(models: Any) -> list[Subject]:
    if isinstance(models, Mapping):
        subjects = []
        for name, model in models.items():
            subject = as_subject(model, name)
            subject.name = name
            subjects.append(subject)
    else:
        several = isinstance(models, list | tuple)
        subjects = [as_subject(model) for model in (models if several else [models])]
    names = [subject.name for subject in subjects]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two models are called {twice[0]!r}; pass a mapping from names to models")
    return subjects


def _run(subject: Subject, task: Task, results: Results) -> None:
    begin = time.perf_counter()
    try:
        found = task.run(subject)
    except Unavailable as reason:
        results.skipped.append(Skipped(task.suite, task.name, str(reason), subject.name))
        return
    (metric, value), *more = found.points.items()
    seconds = time.perf_counter() - begin
    results.scores.append(
        Score(subject.name, task.suite, task.name, metric, value, found.count, seconds, dict(more))
    )
