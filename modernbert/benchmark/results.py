"""Measured passes as entries of the report: plain dicts that `json.dumps` takes."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from modernbert.config import ModernBertConfig

from . import published
from .batches import Split
from .flops import forward_flops
from .measure import Timing, spread
from .workloads import Workload

BASIS = ("modernbert", "SentenceEncoder.encode")  # what ratios refer to


def model_name(report: dict[str, Any], layers: int | None = None) -> str:
    """What was measured, for titles: "ModernBERT-base, 6 of 22 layers, float32"."""
    settings = report["settings"]
    layers, full = layers or settings["layers"], settings["layers_of_size"]
    cut = "" if layers == full else f", {layers} of {full} layers"
    return f"ModernBERT-{settings['size']}{cut}, {settings['dtype']}"


def entry(peer: str, split: Split | None, workload: Workload, timing: Timing) -> dict[str, Any]:
    """One implementation on one workload; every figure is None where nothing was measured."""
    seconds = timing.median
    ratio = asdict(spread(timing.seconds, timing.partner)) if timing.partner else None
    return {
        "peer": peer,
        "split": None if split is None else str(split),
        "as_given": split is None or not split.by_length,
        "tokens_per_second": None if seconds is None else workload.tokens / seconds,
        "texts_per_second": None if seconds is None else len(workload.lengths) / seconds,
        "ceiling_share": None,
        "ours_is_faster_by": ratio,
        "passes": [round(s, 6) for s in timing.seconds],
        "first_pass": timing.first,
        "note": timing.note,
    }


def result(
    workload: Workload, entries: list[dict[str, Any]], config: ModernBertConfig, size: str
) -> dict[str, Any]:
    """One workload with everything measured on it, and the best peers of each way to batch."""
    return {
        "name": workload.name,
        "kind": workload.kind,
        "skipped": None,
        "texts": len(workload.lengths),
        "tokens": workload.tokens,
        "longest": workload.longest,
        # Seeded lengths can be drawn again, those of real texts only where the texts are.
        "lengths": list(workload.lengths) if workload.kind == "real" else None,
        "flops": forward_flops(config, workload.lengths),
        "published_tokens_per_second": published.published_speed(size, workload.name),
        "entries": entries,
        "best_as_given": best(entries, as_given=True),
        "best": best(entries, as_given=False),
    }


def skipped(name: str, reason: str) -> dict[str, Any]:
    """A workload that could not run."""
    return {"name": name, "skipped": reason, "entries": []}


def is_ours(peer: str) -> bool:
    """Whether that is this library, in whatever form."""
    return peer.startswith(("modernbert", "SentenceEncoder", "our "))


def best(entries: list[dict[str, Any]], *, as_given: bool) -> dict[str, Any] | None:
    """The fastest that is not ours, with the batches as given or with any, and our lead on it."""
    rivals = [
        e
        for e in entries
        if not is_ours(e["peer"])
        and e["tokens_per_second"] is not None
        and (e["as_given"] or not as_given)
    ]
    if not rivals:
        return None
    first = max(rivals, key=lambda e: e["tokens_per_second"])
    ratio = first["ours_is_faster_by"]
    return {
        "peer": first["peer"],
        "split": first["split"],
        "ours_is_faster_by": ratio and ratio["median"],
    }


def add_shares(workload: Mapping[str, Any], ceiling: float, counted: Mapping[str, bool]) -> None:
    """Write into each entry which share of the matmul ceiling its operations per second are.

    `counted` says by peer whether the operations of ModernBERT are its own.
    """
    for item in workload["entries"]:
        speed = item["tokens_per_second"]
        if speed is not None and counted.get(item["peer"], False):
            item["ceiling_share"] = workload["flops"] / workload["tokens"] * speed / ceiling
