"""A plot that compares models: a panel a suite, a group of bars a task, a bar a model."""

from pathlib import Path
from typing import Any

from .files import need
from .scores import Results, short_names

STYLE: Any = {
    "font.size": 13,
    "axes.titlesize": 15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 120,
}
COLOURS = ("#d1495b", "#30638e", "#edae49", "#00798c", "#7fa7c9", "#8d2f3c", "#9a9a9a")


def draw(results: Results, path: str | Path) -> None:
    """Write the plot; the suffix (.png, .svg, .pdf) decides the format.

    Raises `ValueError` when there is no score, `ImportError` without matplotlib.
    """
    if not results.scores:
        raise ValueError("there is no score to plot")
    matplotlib = need("matplotlib", "matplotlib")
    matplotlib.use("Agg")
    pyplot = need("matplotlib.pyplot", "matplotlib")
    with pyplot.rc_context(STYLE):
        suites = results.suites
        bars = [max(len(_rows(results, suite)), 3) * len(results.models) for suite in suites]
        figure, panels = pyplot.subplots(
            len(suites),
            1,
            figsize=(11, 1.2 * len(suites) + 0.3 * sum(bars)),
            height_ratios=bars,
            layout="constrained",
            squeeze=False,
        )
        for panel, suite in zip(panels.flat, suites, strict=True):
            _panel(panel, results, suite)
        if len(results.models) > 1:
            handles, labels = panels[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 4))
        try:
            figure.savefig(path)
        finally:
            pyplot.close(figure)


def _rows(results: Results, suite: str) -> list[str]:
    tasks = results.tasks(suite)
    return [*tasks, "mean"] if results.has_mean(suite) else tasks


def _panel(panel: Any, results: Results, suite: str) -> None:
    rows, models = _rows(results, suite), results.models
    height = 0.8 / len(models)
    for index, (model, label) in enumerate(zip(models, short_names(models), strict=True)):
        values = [
            results.mean(model, suite) if row == "mean" else results.value(model, suite, row)
            for row in rows
        ]
        places = [place + (index - (len(models) - 1) / 2) * height for place in range(len(rows))]
        bars = panel.barh(
            places,
            [value or 0.0 for value in values],
            height,
            label=label,
            color=COLOURS[index % len(COLOURS)],
        )
        texts = ["" if value is None else f"{value:.1f}" for value in values]
        panel.bar_label(bars, texts, padding=3, fontsize=11)
    panel.set_yticks(range(len(rows)), rows)
    panel.invert_yaxis()
    panel.margins(x=0.1)
    metrics = {score.metric: None for score in results.scores if score.suite == suite}
    panel.set_title(f"{suite} ({', '.join(metrics)})", loc="left", fontweight="bold")
