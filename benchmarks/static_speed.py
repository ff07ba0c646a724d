"""StaticModel beside model2vec on the same folder: texts per second, and how long loading takes.

    python benchmarks/static_speed.py --model FOLDER --data FOLDER

--model is a folder that both read, as `modernbert distill` writes it; --data has .jsonl.gz files
whose "text" is cut into sentences. "cold" is a model that has encoded two words since it was
loaded, "warm" the same call once more, when ours remembers the words. The two libraries take turns
in one process, the order swapped each round, and cold is compared with cold; each number of
tokenizer threads has a process of its own, and each load, too. Wall clock. The last line is one
JSON document.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import click

LOAD = """
import sys, time
begin = time.perf_counter()
from {package} import StaticModel
model = StaticModel.from_pretrained(sys.argv[1])
print(time.perf_counter() - begin, "torch" in sys.modules, len(model.tokens))
"""
TOKENIZER = "the tokenizer alone, as model2vec calls it"
# By what each is compared with.
LABELS = {
    "modernbert, cold": "model2vec, cold",
    "modernbert, warm": "model2vec, warm",
    "model2vec, cold": "model2vec, cold",
    "model2vec, warm": "model2vec, warm",
    TOKENIZER: "model2vec, warm",
}


def sentences(folder: Path, count: int) -> list[str]:
    """The first `count` sentences of 20 to 400 characters."""
    from modernbert.training.readers import read_records

    texts = (record["text"].replace("\n", " ") for record in read_records(folder / "*.jsonl.gz"))
    found = (s for text in texts for s in re.split(r"(?<=[.!?]) ", text) if 20 < len(s) < 400)
    return list(islice(found, count))


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def encoding(folder: Path, texts: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds by what ran, a figure a round; the first round, which warms up, is dropped."""
    import model2vec

    import modernbert

    took: dict[str, list[float]] = {name: [] for name in LABELS}

    def first_and_second(package: Any, options: dict[str, Any]) -> None:
        model = package.StaticModel.from_pretrained(folder)
        model.encode(["A word."], **options)
        for when in ("cold", "warm"):
            name = f"{package.__name__}, {when}"
            took[name].append(seconds(lambda: model.encode(texts, **options)))
        if package is model2vec:
            tokenize = model.tokenizer.encode_batch_fast
            took[TOKENIZER].append(seconds(lambda: tokenize(texts, add_special_tokens=False)))

    runs = (modernbert, {}), (model2vec, {"use_multiprocessing": False})
    for turn in range(rounds + 1):
        for package, options in runs if turn % 2 else reversed(runs):
            first_and_second(package, options)
    return {name: times[1:] for name, times in took.items()}


def loading(package: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds from the import to the loaded model, in a fresh process each."""
    times, torch, tokens = [], False, 0
    for _ in range(rounds):
        command = [sys.executable, "-c", LOAD.format(package=package), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        took, loaded, count = done.stdout.split()
        times.append(float(took))
        torch, tokens = loaded == "True", int(count)
    return {"seconds": times, "torch": torch, "tokens": tokens}


@click.command()
@click.option("--model", "folder", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--texts", "count", default=3000, type=click.IntRange(min=1))
@click.option("--rounds", default=9, type=click.IntRange(min=1))
@click.option("--threads", multiple=True, default=(1, 2), type=click.IntRange(min=1))
@click.option("--worker", is_flag=True, hidden=True)
def main(
    folder: Path, data: Path, count: int, rounds: int, threads: tuple[int, ...], worker: bool
) -> None:
    """Print a table for each number of threads."""
    texts = sentences(data, count)
    if worker:
        print(json.dumps(encoding(folder, texts, rounds)))
        return
    import torch

    from modernbert.benchmark.machine import conditions
    from modernbert.benchmark.measure import spread
    from modernbert.benchmark.tables import spread_text, table

    report: dict[str, Any] = {
        "benchmark": "static_speed",
        "texts": len(texts),
        "characters": sum(map(len, texts)),
        "machine": conditions(torch.device("cpu")),
        "encode": {},
        "load": {},
    }
    rows = [["threads", "", "texts/s", "beside model2vec", "(quartiles; extremes)"]]
    for number in threads:
        command = [sys.executable, __file__, "--worker", "--model", str(folder)]
        command += ["--data", str(data), "--texts", str(count), "--rounds", str(rounds)]
        switches = {"RAYON_NUM_THREADS": number, "TOKENIZERS_PARALLELISM": number > 1}
        environment = os.environ | {name: str(value).lower() for name, value in switches.items()}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        took = report["encode"][number] = json.loads(done.stdout)
        for name, basis in LABELS.items():
            speed = f"{len(texts) / median(took[name]):.0f}"
            row = [str(number), name, speed]
            ratio = spread(took[basis], took[name])
            rows.append([*row, f"{ratio.median:.2f}", spread_text(asdict(ratio))])
    print("\n".join(table(rows)))
    rows = [["", "import and load, s", "rows", "torch imported"]]
    for package in ("modernbert", "model2vec"):
        found = report["load"][package] = loading(package, folder, rounds=5)
        cells = f"{median(found['seconds']):.2f}", str(found["tokens"])
        rows.append([package, *cells, "yes" if found["torch"] else "no"])
    print()
    print("\n".join(table(rows)))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
