"""A larger model that starts from a tiled smaller one, beside one that starts from random numbers.

    python benchmarks/tiling.py --documents 'wikipedia/*.jsonl.gz' --plot docs/tiling.png

Both are trained for the same steps on the same rows by the same recipe; the held-out masked-LM loss
is taken before the first step and every few steps. Prints a table, then one line of JSON.
"""

import json
import tempfile
from pathlib import Path

import click

from modernbert.training.loop import Trainer
from modernbert.training.recipe import read_recipe
from modernbert.training.report import read_log

RECIPE = """
name = "tiling"
output = "."
tokenizer = "{small}"
micro_tokens = 2048
validation_steps = {every}
checkpoint_steps = 1000000
log_steps = 1

[model]
hidden_size = 384
intermediate_size = 576
num_hidden_layers = 8
num_attention_heads = 6

[start]
{start}

[data.documents]
files = {documents}
validation = 0.01

[[phases]]
name = "start"
tokens = {tokens}
max_length = 512
learning_rate = 1e-3
warmup_tokens = 10240

[[phases.tasks]]
objective = "mlm"
data = "documents"
"""
LOSS = "validation/mlm/documents/loss"


class Observed(Trainer):
    """A trainer that also measures before its first step."""

    def _phase(self, index: int) -> bool:
        task = self._task(self.recipe.phases[index].tasks[0], self.recipe.phases[index])
        scores = self._validate([task])
        self._log({"step": 0, **{f"validation/{name}": x for name, x in scores.items()}})
        return super()._phase(index)

    def _finish(self) -> Path:
        return self.output


def curve(folder: Path, start: str, values: dict[str, object]) -> dict[int, float]:
    """Held-out loss by step of one start."""
    folder.mkdir()
    (folder / "recipe.toml").write_text(RECIPE.format(start=start, **values), "utf-8")
    if Observed(read_recipe(folder / "recipe.toml")).run() is None:
        raise SystemExit("stopped: two runs of different lengths say nothing")
    return {line["step"]: line[LOSS] for line in read_log(folder / "log.jsonl") if LOSS in line}


def draw(curves: dict[str, dict[int, float]], picture: Path) -> None:
    """Both curves in one panel."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for (name, points), color in zip(curves.items(), ("#999999", "#1f4e79"), strict=True):
        axis.plot(list(points), list(points.values()), "o-", color=color, markersize=4)
        axis.annotate(
            f"{name}: {list(points.values())[-1]:.2f}",
            (list(points)[-1], list(points.values())[-1]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="right",
            color=color,
        )
    axis.set_xlabel("step")
    axis.set_ylabel("held-out masked-LM loss (nats)")
    axis.set_title("A larger model, started in two ways")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=130)


@click.command()
@click.option("--documents", required=True, help="Glob pattern of .jsonl(.gz) files of texts.")
@click.option("--small", default="weights/embedded", help="The smaller model, with tokenizer.")
@click.option("--steps", default=50, type=click.IntRange(min=5))
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path))
def main(documents: str, small: str, steps: int, plot: Path | None) -> None:
    """Compare the two starts."""
    small = str(Path(small).resolve())
    values = {
        "small": small,
        "documents": json.dumps([str(Path(documents).absolute())]),
        "every": max(1, steps // 10),
        "tokens": int(steps * 2048 * 0.99),  # rows are never quite full
    }
    starts = {"random": "", "tiled": f'tile = "{small}"'}
    with tempfile.TemporaryDirectory() as folder:
        curves = {name: curve(Path(folder) / name, start, values) for name, start in starts.items()}
    if plot:
        draw(curves, plot)
    print(f"{'step':>5} {'random':>8} {'tiled':>8}")
    for step in sorted(curves["random"].keys() & curves["tiled"].keys()):
        print(f"{step:5} {curves['random'][step]:8.3f} {curves['tiled'][step]:8.3f}")
    last = [list(curves[name].values())[-1] for name in ("random", "tiled")]
    print(json.dumps({"benchmark": "tiling", "curves": curves, "lead": last[0] - last[1]}))


if __name__ == "__main__":
    main()
