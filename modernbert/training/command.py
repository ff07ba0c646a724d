"""The command `modernbert train`. What it needs is imported when it runs."""

from pathlib import Path

import click

from modernbert.console import option


@click.command(short_help="Train or fine-tune a model by a recipe.")
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help='Replace a value of the recipe: "phases.0.tokens=1e6". May be repeated.',
)
def train(recipe: Path, settings: tuple[str, ...]) -> None:
    """Train by the TOML file RECIPE, going on at the last checkpoint if there is one.

    Writes checkpoints, log.jsonl, training.png and the finished model/ into the recipe's output
    folder. Ctrl-C, or SIGTERM, ends it after the step at hand with a checkpoint; the same command
    goes on. Several processes: torchrun --nproc-per-node N -m modernbert train RECIPE
    """
    from .loop import Trainer
    from .recipe import read_recipe

    trainer = Trainer(read_recipe(recipe, settings))
    folder = trainer.run()
    if not trainer.first:
        return
    if folder is None:
        click.echo(f"stopped at step {trainer.state['step']}; run the same command to go on")
    else:
        click.echo(f"{folder} after {trainer.state['tokens']:,} tokens; log and plot beside it")
