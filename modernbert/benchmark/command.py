"""The command `modernbert bench`."""

import dataclasses
import json
from datetime import date
from pathlib import Path
from typing import Any

import click

from .catalogue import OURS, PEERS
from .machine import repository, short_name
from .peers import SIZES
from .plots import draw
from .presets import PRESETS, Preset
from .regression import compare_revisions
from .runner import PARTS, Options, choose_workloads, make_setting, run
from .tables import markdown, revisions_table
from .workloads import Skipped

DTYPES = ("auto", "float32", "bfloat16", "float16")


@click.command(short_help="Measure speed and memory here, beside other implementations.")
@click.option("--preset", type=click.Choice(list(PRESETS)), default="cpu", show_default=True)
@click.option("--size", type=click.Choice(list(SIZES)), default="base", show_default=True)
@click.option("--docs", type=click.IntRange(1), help="Texts of the N(256, 64) workload.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Instead of the preset's.")
@click.option("--minutes", type=click.FloatRange(0.1), help="Time the run may take.")
@click.option("--rounds", type=click.IntRange(1), help="Alternating pairs at most.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; by default one per core.")
@click.option(
    "--peer",
    "peers",
    type=click.Choice([name for name in PEERS if name != OURS]),
    multiple=True,
    help="Implementation to compare with; repeat for several. The preset's by default.",
)
@click.option(
    "--only",
    "parts",
    type=click.Choice(PARTS),
    multiple=True,
    help="Part to run; repeat for several. All by default.",
)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with sts_benchmark/, ret_scifact/, text_wikipedia_en/, tokenizer_modernbert/.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder for the JSON, the table and the plots.",
)
@click.option("--no-files", is_flag=True, help="Write no files, print only.")
@click.option(
    "--revisions",
    nargs=2,
    metavar="OLD NEW",
    help='Compare two git revisions of this library instead; "." is the working tree.',
)
def bench(
    preset: str,
    size: str,
    docs: int | None,
    dtype: str | None,
    minutes: float | None,
    rounds: int | None,
    threads: int | None,
    peers: tuple[str, ...],
    parts: tuple[str, ...],
    data: Path | None,
    out: Path,
    no_files: bool,
    revisions: tuple[str, str] | None,
) -> None:
    """Measure ModernBERT on this machine beside other implementations.

    Random weights of the chosen size, padded batches in, alternating passes. Prints a table; the
    last line is the whole report as JSON.
    """
    changes: dict[str, Any] = {
        "docs": docs,
        "dtype": dtype,
        "minutes": minutes,
        "rounds": rounds,
        "peers": peers,
    }
    settings: Preset = dataclasses.replace(
        PRESETS[preset], **{name: value for name, value in changes.items() if value}
    )
    options = Options(preset, settings, size, threads, data or beside_checkout(), parts or PARTS)
    stem = f"{short_name(settings.device)}-{date.today().isoformat()}"
    report: dict[str, Any]
    if revisions:
        report, stem = compare(options, revisions), f"{stem}-revisions"
        text = revisions_table(report)
    else:
        report = run(options, say)
        text = markdown(report)
    if not no_files:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{stem}.json").write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
        (out / f"{stem}.md").write_text(text)
        if not revisions:
            draw_plots(report, out, stem)
    click.echo(text)
    click.echo(json.dumps(report, allow_nan=False))


def compare(options: Options, revisions: tuple[str, str]) -> dict[str, Any]:
    """Two revisions on the workloads that `options` choose."""
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
    try:
        paths = draw(report, out, stem)
    except ImportError as error:
        say(f"no plots: {error}; pip install 'modernbert[bench]'")
        return
    say(f"plots: {', '.join(str(path) for path in paths)}")


def beside_checkout() -> Path | None:
    """The folder of real texts beside a checkout of this project, where there is one."""
    root = repository()
    folder = root.parent / "shared" / "data" if root else None
    return folder if folder and folder.is_dir() else None


def say(line: str) -> None:
    """Progress; standard output is for the result."""
    click.echo(line, err=True)
