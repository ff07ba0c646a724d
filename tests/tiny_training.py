"""What the tests of training share: a folder with all that a tiny run needs, the run, its log."""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, processors

from modernbert.training.loop import Trainer
from modernbert.training.recipe import read_recipe

SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


def write_material(
    folder: Path, recipe: str, words: Iterable[str], /, **collections: list[dict]
) -> Path:
    """A word tokenizer, the collections as JSONL files and recipe.toml; the folder."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    (folder / "tokenizer").mkdir()
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    names = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("unk", "cls", "sep", "pad", "mask")}
    (folder / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(names))
    for name, records in collections.items():
        write_records(folder / f"{name}.jsonl", records)
    (folder / "recipe.toml").write_text(recipe)
    return folder


def write_records(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def train(folder: Path, output: Path, *settings: str) -> Path | None:
    recipe = read_recipe(folder / "recipe.toml", [f"output={str(output)!r}", *settings])
    return Trainer(recipe).run()


def log(output: Path) -> list[dict]:
    """The log without the figures that depend on the clock."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "utilisation")}
        for line in lines
    ]
