"""Plots for a slide, drawn from a report: speed by workload, speed by length, memory by length."""

from pathlib import Path
from typing import Any

from .results import is_ours, model_name

COLOURS = {
    "modernbert": "#d1495b",
    "SentenceEncoder.encode": "#d1495b",
    "our backbone alone, tokens ready": "#e5a3ad",
    "modernbert + torch.compile": "#8d2f3c",
    "modernbert, int8": "#c77986",
    "transformers sdpa": "#30638e",
    "transformers + torch.compile": "#003d5b",
    "transformers eager": "#7fa7c9",
    "transformers flash-attn": "#4f8fc0",
    "OpenVINO": "#00798c",
    "ONNX Runtime": "#edae49",
}
OTHER = "#9a9a9a"
PUBLISHED = "published, RTX 4090"
LABEL: Any = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
STYLE: Any = {
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.dpi": 120,
    "legend.frameon": False,
}


def draw(report: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write the PNG files that the report has figures for; returns their paths.

    Raises `ImportError` without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    with pyplot.rc_context(STYLE):
        for name, make in FIGURES.items():
            figure = make(report, pyplot)
            if figure is not None:
                path = folder / f"{stem}-{name}.png"
                figure.savefig(path)
                pyplot.close(figure)
                drawn.append(path)
    return drawn


def fastest(workload: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The entry of each implementation with the batches that suit it, fastest first."""
    measured = [e for e in workload["entries"] if e["tokens_per_second"] is not None]
    measured.sort(key=lambda entry: -entry["tokens_per_second"])
    found: dict[str, dict[str, Any]] = {}
    for entry in measured:
        found.setdefault(entry["peer"], entry)
    return found


def _paper(report: dict[str, Any], pyplot: Any) -> Any:
    names = report["published"]["workloads"]
    return _workloads(report, pyplot, [w for w in report["workloads"] if w["name"] in names])


def _real(report: dict[str, Any], pyplot: Any) -> Any:
    return _workloads(report, pyplot, [w for w in report["workloads"] if w.get("kind") == "real"])


def _workloads(report: dict[str, Any], pyplot: Any, shown: list[dict[str, Any]]) -> Any:
    """One panel a workload, one bar an implementation; the dashed line is the matmul ceiling."""
    shown = [workload for workload in shown if not workload["skipped"] and fastest(workload)]
    if not shown:
        return None
    rows, columns = -(-len(shown) // 2), min(len(shown), 2)
    size = (8.0 * columns, 4.4 * rows + 0.4)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False
    )
    for panel, workload in zip(panels.flat, shown, strict=False):
        _bars(panel, workload, report)
    for panel in list(panels.flat)[len(shown) :]:
        panel.set_visible(False)
    figure.suptitle(_title(report), fontsize=17)
    return figure


def _bars(panel: Any, workload: dict[str, Any], report: dict[str, Any]) -> None:
    entries = fastest(workload)
    speeds = {name: entry["tokens_per_second"] for name, entry in entries.items()}
    published = workload["published_tokens_per_second"]
    if published and report["machine"]["gpu"]:
        speeds[PUBLISHED] = published
    bars = panel.barh(list(speeds), list(speeds.values()), color=[_colour(n) for n in speeds])
    panel.invert_yaxis()
    for bar, (name, speed) in zip(bars, speeds.items(), strict=True):
        text = f"{speed:,.0f}"
        ratio = entries[name]["ours_is_faster_by"] if name in entries else None
        if ratio and not is_ours(name):
            text += f"  (ours {ratio['median']:.2f}x)"
        middle = bar.get_y() + bar.get_height() / 2
        place = {"textcoords": "offset points", "va": "center", "fontsize": 12}
        panel.annotate(text, (speed, middle), (5, 0), bbox=LABEL, zorder=5, **place)
    reach = max(speeds.values())
    limit = report["ceiling"]["matmul_flops"] * workload["tokens"] / workload["flops"]
    panel.set_xlim(0, 1.5 * max(reach, min(limit / 1.4, 1.5 * reach)))
    if limit <= panel.get_xlim()[1]:
        panel.axvline(limit, color="black", linestyle="--", linewidth=1)
        panel.annotate(
            "matmul ceiling",
            (limit, 0.02),
            (-3, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="bottom",
            fontsize=11,
        )
    panel.set_title(workload["name"], loc="left", fontweight="bold")
    panel.set_xlabel(f"tokens/s, {_texts(workload)}, {workload['tokens']:,} tokens")
    panel.locator_params(axis="x", nbins=4)
    panel.xaxis.set_major_formatter(_thousands)


def _lengths(report: dict[str, Any], pyplot: Any) -> Any:
    """Lines over the fixed lengths; the dashed line is the matmul ceiling."""
    fixed = [w for w in report["workloads"] if not w["skipped"] and w["kind"] == "fixed"]
    fixed = sorted((w for w in fixed if fastest(w)), key=lambda w: w["longest"])
    if len(fixed) < 2:
        return None
    figure, panel = pyplot.subplots(figsize=(11, 6.2), layout="constrained")
    limit = [report["ceiling"]["matmul_flops"] * w["tokens"] / w["flops"] for w in fixed]
    lengths = [w["longest"] for w in fixed]
    panel.plot(lengths, limit, color="black", linestyle="--", label="matmul ceiling")
    for name in {name: None for w in fixed for name in fastest(w)}:
        entries = [(w["longest"], fastest(w).get(name)) for w in fixed]
        points = [(length, entry["tokens_per_second"]) for length, entry in entries if entry]
        wide, colour = 3.0 if name == "modernbert" else 1.8, _colour(name)
        panel.plot(*zip(*points, strict=True), "o-", color=colour, linewidth=wide, label=name)
    _length_axis(panel, lengths)
    panel.set_ylim(bottom=0)
    panel.yaxis.set_major_formatter(_thousands)
    panel.set_ylabel("tokens per second")
    panel.grid(axis="y", color="#dddddd")
    panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    panel.set_title(f"{_title(report)}: speed by length", loc="left")
    return figure


def _memory(report: dict[str, Any], pyplot: Any) -> Any:
    """Lines over the length of a single text."""
    rows = [r for r in report["memory"] if r["bytes"] and r["texts"] == 1]
    if not rows:
        return None
    figure, panel = pyplot.subplots(figsize=(11, 6.2), layout="constrained")
    for name in {row["peer"]: None for row in rows}:
        points = [(r["tokens_each"], r["bytes"] / 2**20) for r in rows if r["peer"] == name]
        panel.plot(*zip(*points, strict=True), "o-", color=_colour(name), linewidth=3, label=name)
        for length, size in points:
            place = {"textcoords": "offset points", "ha": "center", "va": "center"}
            below = name == "modernbert"
            panel.annotate(f"{size:,.0f}", (length, size), (0, -15 if below else 15), **place)
    panel.margins(y=0.15)
    _length_axis(panel, sorted({row["tokens_each"] for row in rows}))
    panel.set_yscale("log", base=2)
    panel.yaxis.set_major_formatter(_thousands)
    panel.set_ylabel("MiB above the loaded model")
    panel.grid(axis="y", color="#dddddd")
    panel.legend(loc="upper left")
    title = f"{_title(report, rows[0]['layers'])}: peak memory, one text"
    panel.set_title(title, loc="left")
    return figure


def _length_axis(panel: Any, lengths: list[int]) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(lengths, [f"{length:,}" for length in lengths])
    panel.minorticks_off()
    panel.set_xlabel("tokens per text")


def _colour(name: str) -> str:
    return COLOURS.get(name, OTHER)


def _texts(workload: dict[str, Any]) -> str:
    return "1 text" if workload["texts"] == 1 else f"{workload['texts']:,} texts"


def _thousands(value: float, _: int) -> str:
    return f"{value:,.0f}"


def _title(report: dict[str, Any], layers: int | None = None) -> str:
    machine, settings = report["machine"], report["settings"]
    where = machine["gpu"]["name"] if machine["gpu"] else machine["cpu"]
    if not machine["gpu"]:
        where += f", {settings['threads']} threads"
    return f"{model_name(report, layers)}, {where}"


FIGURES = {"paper": _paper, "real-text": _real, "length": _lengths, "memory": _memory}
