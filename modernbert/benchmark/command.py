"""The command `modernbert bench`. What it needs is imported when it runs."""

import dataclasses
import json
import os
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from modernbert.console import option

from .presets import DTYPES, PARTS, PEERS, PRESETS, SIZES

if TYPE_CHECKING:
    from .runner import Options

POSITIVE = click.IntRange(min=1)


@click.command(short_help="Measure speed and memory here, beside other implementations.")
@option("--preset", type=click.Choice(list(PRESETS)), default="cpu", help="The kind of machine.")
@option("--size", type=click.Choice(SIZES), default="base", help="Of the model.")
@option("--docs", type=POSITIVE, help="Texts of the N(256, 64) workload; others in proportion.")
@option("--layers", type=POSITIVE, help="Of the model; default: all, on slow CPUs six.")
@option("--dtype", type=click.Choice(DTYPES), help="Default: the preset's.")
@option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Time for the whole run.")
@option("--rounds", type=POSITIVE, help="Alternating pairs at most.")
@option("--threads", type=POSITIVE, help="CPU threads; default: one per core.")
@option("--peer", "peers", type=click.Choice(PEERS), multiple=True, help="Compare with it.")
@option("--only", "parts", type=click.Choice(PARTS), multiple=True, help="Run this part.")
@option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of real texts: sts_benchmark/, ret_scifact/, text_wikipedia_en/.",
)
@option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results"),
    help="Folder for the JSON, the tables and the plots.",
)
@option("--pretend", metavar="sm_75", help="Take the GPU for one of this architecture.")
@option("--files/--no-files", default=True, help="Write files, or print only.")
@option(
    "--revisions",
    nargs=2,
    metavar="OLD NEW",
    help='Compare two git revisions of this library instead; "." is the working tree.',
)
def bench(
    preset: str,
    size: str,
    docs: int | None,
    layers: int | None,
    dtype: str | None,
    minutes: float | None,
    rounds: int | None,
    threads: int | None,
    peers: tuple[str, ...],
    parts: tuple[str, ...],
    data: Path | None,
    out: Path,
    pretend: str | None,
    files: bool,
    revisions: tuple[str, str] | None,
) -> None:
    """Measure ModernBERT on this machine beside other implementations.

    Random weights of the chosen size, padded batches in, alternating passes. Prints tables; the
    last line is the whole report as JSON. --peer and --only may be repeated; without them, the
    preset's implementations and all parts.
    """
    from modernbert.kernels.dispatch import pretended

    from .machine import short_name
    from .runner import Options, run
    from .tables import markdown, revisions_table

    changes: dict[str, Any] = {
        "docs": docs,
        "layers": layers,
        "dtype": dtype,
        "minutes": minutes,
        "rounds": rounds,
        "peers": peers,
    }
    if pretend:
        # Read wherever a backend is chosen, also in the processes that measure memory.
        os.environ["MODERNBERT_PRETEND"] = pretend
        if (pretended() or (8, 0)) < (8, 0) and not dtype:
            changes["dtype"] = "float16"
    given = {name: value for name, value in changes.items() if value}
    settings = dataclasses.replace(PRESETS[preset], **given)
    options = Options(preset, settings, size, threads, data or beside_checkout(), parts or PARTS)
    stem = f"{short_name(settings.device)}-{date.today().isoformat()}"
    stem += f"-as-{pretend}" if pretend else ""
    report: dict[str, Any]
    if revisions:
        report, stem = compare(options, revisions), f"{stem}-revisions"
        text = revisions_table(report)
    else:
        report = run(options, say)
        text = markdown(report)
    if files:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{stem}.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        (out / f"{stem}.md").write_text(text)
        if not revisions:
            draw_plots(report, out, stem)
    click.echo(text)
    click.echo(json.dumps(report, allow_nan=False))


def compare(options: "Options", revisions: tuple[str, str]) -> dict[str, Any]:
    """Two revisions on the workloads that `options` choose."""
    from .regression import compare_revisions
    from .runner import choose_workloads, make_setting
    from .workloads import Skipped

    setting = make_setting(options)
    jobs = [job for job in choose_workloads(options) if not isinstance(job, Skipped)]
    return compare_revisions(
        revisions,
        jobs,
        setting,
        batch_tokens=options.settings.batch_tokens,
        rounds=options.settings.rounds,
        say=say,
    )


def draw_plots(report: dict[str, Any], out: Path, stem: str) -> None:
    """Plots beside the JSON, or one line that says why there are none."""
    from .plots import draw

    try:
        paths = draw(report, out, stem)
    except ImportError as error:
        say(f"no plots: {error}; pip install 'modernbert[bench]'")
        return
    say(f"plots: {', '.join(str(path) for path in paths)}")


def beside_checkout() -> Path | None:
    """The folder of real texts beside a checkout of this project, where there is one."""
    from .machine import repository

    root = repository()
    folder = root.parent / "shared" / "data" if root else None
    return folder if folder and folder.is_dir() else None


def say(line: str) -> None:
    """Progress; standard output is for the result."""
    click.echo(line, err=True)
