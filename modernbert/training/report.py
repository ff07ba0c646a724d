"""The picture of a run: losses, learning rate and batch size over the tokens seen."""

import json
from pathlib import Path
from typing import Any

import numpy as np


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.jsonl, oldest first."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over up to `width` values before and including each."""
    sums = np.concatenate([[0.0], values.cumsum()])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot_run(log: Path, picture: Path, title: str) -> None:
    """Draw a log into a PNG: one panel for each task's loss, then learning rate and tokens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    lines = read_log(log)
    losses = sorted(
        {k for line in lines for k in line if k.endswith("/loss") and k.count("/") == 2}
    )
    panels = [*losses, "lr", "step_tokens"]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 2.2 * len(panels)), sharex=True, squeeze=False
    )
    labels = {"lr": "learning rate", "step_tokens": "tokens per step"}
    boundaries = [
        (after["tokens"] / 1e6, after["phase"])
        for before, after in zip([{"phase": None}, *lines], lines, strict=False)
        if before["phase"] != after["phase"]
    ]
    for axis, key in zip(axes[:, 0], panels, strict=True):
        tokens, values = _series(lines, key)
        axis.plot(tokens, values, color="#9db7d5" if key in losses else "#1f4e79", linewidth=0.8)
        if key in losses:
            axis.plot(tokens, smooth(values, 25), color="#1f4e79", label="training")
            tokens, values = _series(lines, f"validation/{key}")
            if len(values):
                axis.plot(tokens, values, "o-", color="#c8553d", markersize=3, label="held out")
            axis.legend(frameon=False)
            # The first steps would squeeze everything after them.
            axis.set_ylim(*_limits(_series(lines, key)[1]))
        axis.set_ylabel(labels.get(key, key.removesuffix("/loss").replace("/", "\n")))
        for position, _ in boundaries[1:]:
            axis.axvline(position, color="#999999", linestyle=":", linewidth=1)
        axis.spines[["top", "right"]].set_visible(False)
    for position, phase in boundaries:
        axes[0, 0].annotate(
            phase, (position, 1.02), xycoords=("data", "axes fraction"), fontsize=8, color="#666666"
        )
    axes[-1, 0].set_xlabel("million tokens")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(picture, dpi=130)
    pyplot.close(figure)


def _series(lines: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(million tokens, values) of the lines that have `key`."""
    pairs = [(line["tokens"] / 1e6, line[key]) for line in lines if key in line]
    table = np.asarray(pairs, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _limits(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    margin = 0.05 * (high - low) + 1e-9
    return low - margin, high + margin
