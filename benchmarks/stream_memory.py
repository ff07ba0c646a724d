"""Peak memory of `encode_stream` over many sentences from a generator: it must not grow.

    python benchmarks/stream_memory.py --tokenizer FOLDER --texts sentences.csv

Sentences of 4 to 30 words are drawn, with a fixed seed, from the words of the file `--texts`, one
at a time; nothing holds them. The model is small and random: what is measured is the stream, not
the layers. Growth is the high-water mark of the resident set above the set after 2,000 sentences
of warm-up. The last line is one JSON document.
"""

import gzip
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch

from modernbert import ModernBertConfig, ModernBertModel, SentenceEncoder, Tokenizer

WARM_UP = 2_000


def sentences(words: list[str], count: int, seed: int) -> Iterator[str]:
    """`count` sentences, made when they are asked for."""
    generator = random.Random(seed)
    for _ in range(count):
        yield " ".join(generator.choices(words, k=generator.randint(4, 30)))


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (highest so far), in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}; this benchmark needs Linux")


@click.command()
@click.option("--tokenizer", "folder", required=True, type=click.Path(exists=True))
@click.option("--texts", required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--counts", default="10000,100000", show_default=True)
@click.option("--hidden", default=64, show_default=True)
@click.option("--layers", default=4, show_default=True)
@click.option("--window", default=4096, show_default=True)
@click.option("--batch-tokens", default=16384, show_default=True)
def main(
    folder: str, texts: str, counts: str, hidden: int, layers: int, window: int, batch_tokens: int
) -> None:
    """Stream sentences through a small encoder and print how its memory grows."""
    with (gzip.open if texts.endswith(".gz") else open)(texts, "rt", encoding="utf-8") as file:
        words = file.read().split()
    milestones = sorted(int(count) for count in counts.split(","))
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_pretrained(folder)
    config = ModernBertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden,
        intermediate_size=3 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
    )
    encoder = SentenceEncoder(ModernBertModel(config), tokenizer).eval()

    def stream(count: int, seed: int) -> Iterator[object]:
        source = sentences(words, count, seed)
        return encoder.encode_stream(source, window=window, batch_tokens=batch_tokens)

    for _ in stream(WARM_UP, seed=1):
        pass
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    start = time.perf_counter()
    rows = []
    print(f"{'sentences':>10s} {'peak growth':>14s} {'growth now':>14s} {'sentences/s':>12s}")
    for done, _ in enumerate(stream(milestones[-1], seed=2), start=1):
        if done in milestones:
            row = {
                "sentences": done,
                "peak_growth_bytes": resident("VmHWM") - before,
                "growth_bytes": resident("VmRSS") - before,
                "sentences_per_second": done / (time.perf_counter() - start),
            }
            rows.append(row)
            peak, now = (row[key] / 2**20 for key in ("peak_growth_bytes", "growth_bytes"))
            print(
                f"{done:10d} {peak:10.1f} MiB {now:10.1f} MiB {row['sentences_per_second']:12.0f}"
            )
    report = {
        "benchmark": "stream_memory",
        "rows": rows,
        "hidden_size": hidden,
        "layers": layers,
        "window": window,
        "batch_tokens": batch_tokens,
        "warm_up_sentences": WARM_UP,
        "resident_before_bytes": before,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
