"""A report as tables for people: Markdown that also reads well in a terminal."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from .attention import attention_rows, failures
from .linears import linear_rows
from .results import BASIS, model_name


def markdown(report: dict[str, Any]) -> str:
    """The whole report: conditions, every workload, memory, largest batches, what is missing."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: dict[str, Any]) -> Iterator[str]:
    machine, ceiling = report["machine"], report["ceiling"]
    yield f"# {model_name(report)}, {report['started'][:10]}"
    yield ""
    yield from _conditions(report)
    yield ""
    yield (
        f"Matmul ceiling {ceiling['matmul_flops'] / 1e12:.3g} TFLOP/s (reached with "
        f"{' x '.join(map(str, ceiling['shape']))}), copy {ceiling['copy_bytes'] / 1e9:.3g} GB/s, "
        f"threads {machine['threads']}."
    )
    for warning in [*report["warnings"], *failures(report)]:
        yield from ("", f"**{warning}**")
    yield from ("", *table(_summary(report)))
    for workload in report["workloads"]:
        yield ""
        yield from _workload(workload, report)
    for title, rows in (
        ("Peak memory of one pass above the loaded model", _memory(report)),
        ("Largest batch that fits", _largest(report)),
        ("Attention alone, one layer", attention_rows(report)),
        ("Linear layers alone", linear_rows(report)),
        ("Implementations", _states(report)),
        (f"Published, not measured here: {report['published']['source']}", _published(report)),
    ):
        if len(rows) > 1:
            yield from ("", f"## {title}", "")
            yield from table(rows)


def revisions_table(report: dict[str, Any]) -> str:
    """A comparison of two revisions; above 1 the second is faster."""
    first, second = report["revisions"]
    rows = [["workload", "tokens", f"{first}, s", f"{second}, s", f"{second} is faster by"]]
    rows[0] += ["(quartiles; extremes)", "pairs", "results differ by"]
    for work in report["workloads"]:
        ratio = work["second_is_faster_by"]
        seconds = [f"{median(passes):.3f}" for passes in work["passes"]]
        row = [work["name"], str(work["tokens"]), *seconds, f"{ratio['median']:.3f}"]
        change = f"{work['relative_difference_of_results']:.1e}"
        rows.append([*row, spread_text(ratio), str(ratio["pairs"]), change])
    return "\n".join(table(rows)) + "\n"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Aligned lines of a Markdown table; the first row is the head, numbers stand right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    right = [_numbers([row[column] for row in rows[1:]]) for column in range(len(widths))]
    for number, row in enumerate(rows):
        cells = [
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ]
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            rules = (
                "-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)
            )
            yield f"| {' | '.join(rules)} |"


def _numbers(cells: Sequence[str]) -> bool:
    return any(cells) and all(cell[0].isdigit() for cell in cells if cell)


def _conditions(report: dict[str, Any]) -> Iterator[str]:
    machine, versions = report["machine"], report["machine"]["versions"]
    gpu = machine["gpu"]
    memory = machine["memory_bytes"]
    revision = machine["revision"]
    if gpu:
        yield f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB;"
    yield (
        f"{machine['cpu']} ({', '.join(machine['cpu_features'])}), "
        f"{machine['usable_cores']} cores, "
        + (f"{memory / 2**30:.0f} GiB, " if memory else "")
        + f"others used {machine['cores_in_use']} cores before and {report['cores_in_use_after']} "
        + "after;"
    )
    yield ", ".join(f"{name} {version}" for name, version in versions.items() if version) + ";"
    if revision:
        yield f"revision {revision['commit'][:12]}{' with changes' if revision['dirty'] else ''}."


def _workload(workload: dict[str, Any], report: dict[str, Any]) -> Iterator[str]:
    yield f"## {workload['name']}"
    yield ""
    if workload["skipped"]:
        yield f"Skipped: {workload['skipped']}."
        return
    each = workload["flops"] / workload["tokens"]
    yield (
        f"{workload['texts']} texts, {workload['tokens']} tokens, longest {workload['longest']}, "
        f"{each / 1e6:.1f} MFLOP a token."
    )
    yield ""
    head = ["implementation", "batches", "tokens/s", "texts/s", "of ceiling"]
    rows = [[*head, "ours is faster by", "(quartiles; extremes)", "pairs", "remark"]]
    fastest_first = sorted(workload["entries"], key=lambda e: -(e["tokens_per_second"] or 0))
    rows += [_entry(entry) for entry in fastest_first]
    measured = {"ModernBERT", *(entry["peer"] for entry in workload["entries"])}
    for model, speed in published_row(workload["name"], report).items():
        if speed is not None and model in measured:
            cells = [f"{model}, published", "", f"{1000 * speed:.0f}", *[""] * 5]
            rows.append([*cells, "the paper, on one RTX 4090"])
    yield from table(rows)


def published_row(workload: str, report: dict[str, Any]) -> dict[str, float | None]:
    """Thousand tokens per second of the paper's models on one workload; empty for others."""
    published = report["published"]
    cut = report["settings"]["layers"] < report["settings"]["layers_of_size"]
    if cut or workload not in published["workloads"]:
        return {}
    column = published["workloads"].index(workload)
    speeds = published["thousand_tokens_per_second"]
    return {model: row[column] for model, row in speeds.items()}


def _summary(report: dict[str, Any]) -> list[list[str]]:
    """One row a workload: ours, and the best of the others with each way to batch."""
    head = ["workload", "ours, tokens/s", "of ceiling"]
    rows = [[*head, "best other, as given", "ours is faster by", "best other, tuned", "by"]]
    for workload in report["workloads"]:
        if workload["skipped"]:
            continue
        ours = next(e for e in workload["entries"] if e["peer"] in BASIS)
        row = [workload["name"], _number(ours["tokens_per_second"], ".0f")]
        row.append(_number(ours["ceiling_share"], ".0%"))
        for key in ("best_as_given", "best"):
            rival = workload[key] or {}
            row += [rival.get("peer", ""), _number(rival.get("ours_is_faster_by"), ".2f")]
        rows.append(row)
    return rows


def _published(report: dict[str, Any]) -> list[list[str]]:
    published = report["published"]
    rows = [["model, thousand tokens/s", *published["workloads"]]]
    for model, speeds in published["thousand_tokens_per_second"].items():
        rows.append([model, *(_number(speed, ".1f") for speed in speeds)])
    return rows


def _entry(entry: dict[str, Any]) -> list[str]:
    ratio = entry["ours_is_faster_by"]
    cells = [
        entry["peer"],
        entry["split"] or "",
        _number(entry["tokens_per_second"], ".0f"),
        _number(entry["texts_per_second"], ".2f"),
        _number(entry["ceiling_share"], ".0%"),
    ]
    if ratio is None:
        return [*cells, "", "", "", entry["note"]]
    middle = f"{ratio['median']:.2f}"
    return [*cells, middle, spread_text(ratio), str(ratio["pairs"]), entry["note"]]


def spread_text(ratio: dict[str, Any]) -> str:
    """Quartiles and extremes of a `measure.Spread` as a dict."""
    quartiles = f"{ratio['first_quartile']:.2f} to {ratio['third_quartile']:.2f}"
    return f"{quartiles}; {ratio['low']:.2f} to {ratio['high']:.2f}"


def _memory(report: dict[str, Any]) -> list[list[str]]:
    rows = [["implementation", "texts x tokens", "MiB", "layers", "remark"]]
    for row in report["memory"]:
        size = "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.0f}"
        shape = f"{row['texts']} x {row['tokens_each']}"
        rows.append([row["peer"], shape, size, str(row["layers"]), row["note"]])
    return rows


def _largest(report: dict[str, Any]) -> list[list[str]]:
    published = report["published"]["largest_batch_512_8192"].get("ModernBERT", (None, None))
    rows = [["implementation", "tokens each", "texts", "remark"]]
    for row in report["largest_batch"]:
        size = "" if row["texts"] is None else str(row["texts"])
        rows.append([row["peer"], str(row["tokens_each"]), size, row["note"]])
    for length, texts in zip((512, 8192), published, strict=True):
        if len(rows) > 1 and texts:
            rows.append(
                ["ModernBERT, published", str(length), str(texts), "the paper, on one RTX 4090"]
            )
    return rows


def _states(report: dict[str, Any]) -> list[list[str]]:
    rows = [["implementation", "state", "smallest cosine to ours", "best batches", "remark"]]
    for state in report["peers"]:
        cosine = _number(state["agreement"], ".5f")
        rows.append(
            [state["name"], state["state"], cosine, state.get("best_split", ""), state["reason"]]
        )
    return rows


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
