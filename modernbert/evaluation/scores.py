"""What an evaluation finds: scores, what was skipped and why; as a table and as JSON."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class Score:
    """One model on one task.

    `value` is in points (100 times a correlation, an accuracy, an nDCG), or what `metric` says for
    the suite "tokenizer"; `more` has the task's other figures. `count` is what the score is taken
    over: pairs, test texts, queries, masked tokens.
    """

    model: str
    suite: str
    task: str
    metric: str
    value: float
    count: int
    seconds: float
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A task without a score, for one model or (`model` empty) for all."""

    suite: str
    task: str
    reason: str
    model: str = ""


@dataclass
class Results:
    """All scores of an evaluation, in the order in which they were measured.

    `splits` is what the suite "tokenizer" shows: by model, the pieces of each example.
    """

    scores: list[Score] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    splits: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(score.model for score in self.scores))

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(score.suite for score in self.scores))

    def tasks(self, suite: str) -> list[str]:
        """The tasks of a suite that have a score."""
        return list(dict.fromkeys(score.task for score in self.scores if score.suite == suite))

    def value(self, model: str, suite: str, task: str) -> float | None:
        """The points of one task, None where there are none."""
        for score in self.scores:
            if (score.model, score.suite, score.task) == (model, suite, task):
                return score.value
        return None

    def mean(self, model: str, suite: str, tasks: Iterable[str] | None = None) -> float | None:
        """The mean over tasks (all of the suite by default); None when one has no score."""
        names = list(self.tasks(suite) if tasks is None else tasks)
        values = [self.value(model, suite, task) for task in names]
        known = [value for value in values if value is not None]
        return fmean(known) if known and len(known) == len(values) else None

    def has_mean(self, suite: str) -> bool:
        """Whether the mean over a suite says something: several tasks by one metric."""
        metrics = {score.metric for score in self.scores if score.suite == suite}
        return len(metrics) == 1 and len(self.tasks(suite)) > 1

    def table(self) -> str:
        """Markdown: a table a suite, a row a task, a column a model; then what was skipped."""
        blocks = [self._suite_table(suite) for suite in self.suites]
        if self.splits:
            blocks.append(self._split_table())
        if self.skipped:
            blocks.append("Skipped:\n" + "\n".join(map(_skip_line, self.skipped)))
        return "\n\n".join(blocks)

    def _suite_table(self, suite: str) -> str:
        scores = [score for score in self.scores if score.suite == suite]
        models, tasks = self.models, self.tasks(suite)
        rows = []
        for task in tasks:
            first = next(score for score in scores if score.task == task)
            values = [self.value(model, suite, task) for model in models]
            rows.append([task, first.metric, f"{first.count:,}", *map(points, values)])
        if self.has_mean(suite):
            means = [self.mean(model, suite) for model in models]
            rows.append([f"mean of {len(tasks)}", "", "", *map(points, means)])
        return markdown([suite, "metric", "over", *short_names(models)], rows)

    def _split_table(self) -> str:
        models = list(self.splits)
        examples = dict.fromkeys(text for split in self.splits.values() for text in split)
        rows = [
            [
                json.dumps(text, ensure_ascii=False),
                *(_pieces(self.splits[model].get(text)) for model in models),
            ]
            for text in examples
        ]
        return markdown(["text", *short_names(models)], rows)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, and JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Results":
        """The results that `to_dict` wrote; `ValueError` for anything else."""
        try:
            return cls(
                [Score(**score) for score in raw["scores"]],
                [Skipped(**skipped) for skipped in raw["skipped"]],
                raw.get("splits", {}),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"these are no results of an evaluation: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write the JSON; what was in the file stays until the new text is complete."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        beside = Path(f"{path}.partial")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Results":
        """Read what `save` wrote, for example to compare with models measured earlier."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def __add__(self, other: "Results") -> "Results":
        return Results(
            self.scores + other.scores,
            self.skipped + other.skipped,
            self.splits | other.splits,
        )


def short_names(names: list[str]) -> list[str]:
    """The last parts of paths and Hub ids; the whole names where two would be the same."""
    short = [Path(name).name or name for name in names]
    return short if len(set(short)) == len(short) else names


def points(value: float | None) -> str:
    """A score for a table."""
    return "-" if value is None else f"{value:.2f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose source is aligned, too."""
    grid = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = [" | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in grid]
    lines.insert(1, " | ".join("-" * max(width, 3) for width in widths))
    return "\n".join(f"| {line} |" for line in lines)


def _pieces(pieces: list[str] | None) -> str:
    return "-" if pieces is None else f"{len(pieces)}: " + " ".join(pieces)


def _skip_line(skipped: Skipped) -> str:
    what = f"{skipped.suite}: {skipped.task}" if skipped.task else skipped.suite
    return f"- {what}{f' ({skipped.model})' if skipped.model else ''}: {skipped.reason}"
