"""Masked-LM training side by side: our packed rows against transformers' padded batches.

    python benchmarks/training_speed.py --data FOLDER --threads 1

The same model, weights and documents in the same shuffled order, 30 % masked by the same function,
one optimizer step a micro-batch. Ours: rows of --micro-tokens tokens, packed best-fit, StableAdamW.
transformers': sdpa, as many documents a batch as ours has on average, padded to the longest of
them, fused AdamW. Making the batches is timed, too. Counted are real tokens, without padding. The
last line is one JSON document.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from modernbert import ModernBertConfig, ModernBertForMaskedLM, Tokenizer
from modernbert.packing import pack
from modernbert.training.masking import IGNORED, mask_tokens
from modernbert.training.objectives import masked_lm
from modernbert.training.optimizer import StableAdamW, parameter_groups
from modernbert.training.packing import BestFitPacker, permutation
from modernbert.training.readers import read_records

VOCABULARY, PAD, CLS, SEP, MASK = 16384, 0, 1, 2, 3
SPECIAL = np.arange(VOCABULARY) < 4
SEED = 17
Step = tuple[int, float]  # real tokens, filled share


def documents(
    folder: Path | None, tokenizer: Path | None, split: bool, count: int, max_length: int
) -> list[np.ndarray]:
    """Token ids with special tokens, cut into pieces of at most `max_length`.

    `split` takes each paragraph for a text of its own.
    """
    rng = np.random.default_rng(SEED)
    if folder is None:  # a log-normal with the mean of paragraphs and the tail of articles
        lengths = rng.lognormal(4.3, 1.0, count).astype(int) + 1
    else:
        records = read_records(str(folder / "*.jsonl.gz"))
        parts = (record["text"].split("\n\n") if split else [record["text"]] for record in records)
        texts = list(islice(filter(str.strip, chain.from_iterable(parts)), count))
        if tokenizer is None:  # speed depends on how many tokens there are, not on which
            lengths = np.array([len(text.encode()) // 4 + 1 for text in texts])
        else:
            encode = Tokenizer.from_pretrained(tokenizer)
            rows = encode(texts, truncation=False, add_special_tokens=False).input_ids
            lengths = np.array([len(row) for row in rows])
    body = max_length - 2
    pieces = [min(body, n - at) for n in lengths.tolist() for at in range(0, n, body)]
    return [np.array([CLS, *rng.integers(4, VOCABULARY, n), SEP]) for n in pieces]


def masked(ids: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What the model sees, and the labels."""
    return mask_tokens(ids, rng, mask_id=MASK, vocab_size=VOCABULARY, special=SPECIAL)


def packed_steps(
    model: ModernBertForMaskedLM, texts: list[np.ndarray], micro_tokens: int
) -> Iterator[Step]:
    """Train without end, one row a step."""
    optimizer = StableAdamW(parameter_groups(model, 1e-5), lr=1e-4)
    lengths = np.array([len(text) for text in texts])
    count = len(texts)
    packer = BestFitPacker(lengths, lambda epoch: permutation(count, SEED, epoch), micro_tokens)
    rng = np.random.default_rng(SEED)
    while True:
        (row,) = packer.next_rows(1)
        seen, labels = masked(np.concatenate([texts[i] for i in row]), rng)
        batch = pack(torch.from_numpy(seen).split([len(texts[i]) for i in row]))
        loss, _ = masked_lm(model, batch, torch.from_numpy(labels))
        (loss / max(1, (labels != IGNORED).sum())).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield len(seen), len(seen) / micro_tokens


def padded_steps(model: Any, texts: list[np.ndarray], size: int) -> Iterator[Step]:
    """Train without end, `size` documents a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-5, fused=True)
    rng = np.random.default_rng(SEED)
    epoch = 0
    while True:
        order = permutation(len(texts), SEED, epoch)
        for start in range(0, len(order) - size + 1, size):
            chosen = [texts[i] for i in order[start : start + size]]
            ids = np.full((size, max(map(len, chosen))), PAD)
            mask = np.zeros_like(ids)
            for i, text in enumerate(chosen):
                ids[i, : len(text)] = text
                mask[i, : len(text)] = 1
            seen, labels = (torch.from_numpy(x) for x in masked(ids, rng))
            attention_mask = torch.from_numpy(mask)
            model(input_ids=seen, attention_mask=attention_mask, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield int(mask.sum()), float(mask.mean())
        epoch += 1


def peer(model: ModernBertForMaskedLM, sparse: bool) -> Any:
    """transformers' model with the same weights; `ValueError` if it computes something else."""
    import transformers

    values = {**model.config.to_dict(), "sparse_prediction": sparse}
    config = transformers.ModernBertConfig.from_dict(values)
    other = transformers.ModernBertForMaskedLM._from_config(config, attn_implementation="sdpa")
    missing, extra = other.load_state_dict(model.tensors_to_save(), strict=False)
    if extra or set(missing) - {"decoder.weight"}:
        raise ValueError(f"transformers' model has other weights: {missing}, {extra}")
    other.tie_weights()
    ids = torch.randint(4, VOCABULARY, (2, 40))
    with torch.no_grad():
        ours, theirs = model(ids, labels=ids).loss, other(ids, labels=ids).loss
    if not torch.allclose(ours, theirs, rtol=1e-4):
        raise ValueError(f"the models differ: losses {ours.item()} and {theirs.item()}")
    return other.train()


def timed(stream: Iterator[Step], steps: int, clock: Callable[[], float]) -> tuple[float, float]:
    """(real tokens a second, filled share) of `steps` steps."""
    start = clock()
    done = [next(stream) for _ in range(steps)]
    tokens = sum(tokens for tokens, _ in done)
    slots = sum(tokens / filled for tokens, filled in done)
    return tokens / (clock() - start), tokens / slots


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Folder of jsonl.gz.")
@click.option("--tokenizer", type=click.Path(exists=True, path_type=Path), help="Default: bytes/4.")
@click.option("--paragraphs/--articles", default=True, show_default=True, help="What a text is.")
@click.option("--texts", "count", default=20000, show_default=True, help="At most so many.")
@click.option("--max-length", default=1024, show_default=True, help="Longer texts are cut.")
@click.option("--micro-tokens", default=2048, show_default=True)
@click.option("--hidden", default=256, show_default=True)
@click.option("--intermediate", default=384, show_default=True)
@click.option("--layers", default=6, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--rounds", default=5, show_default=True, help="Alternating pairs of timed blocks.")
@click.option("--steps", default=4, show_default=True, help="Steps of a block.")
@click.option("--threads", default=1, show_default=True)
@click.option("--sparse", is_flag=True, help="transformers' sparse_prediction: its default is off.")
@click.option("--cpu-time", is_flag=True, help="Processor seconds: for a machine that is shared.")
def main(
    data: Path | None,
    tokenizer: Path | None,
    paragraphs: bool,
    count: int,
    max_length: int,
    micro_tokens: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    rounds: int,
    steps: int,
    threads: int,
    sparse: bool,
    cpu_time: bool,
) -> None:
    """Compare packed training with transformers' padded training."""
    if not 3 <= max_length <= micro_tokens:
        raise click.UsageError(f"--max-length {max_length} is not 3 to {micro_tokens}, a row")
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    texts = documents(data, tokenizer, paragraphs, count, max_length)
    config = ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        pad_token_id=PAD,
        cls_token_id=CLS,
        bos_token_id=CLS,
        sep_token_id=SEP,
        eos_token_id=SEP,
    )
    ours = ModernBertForMaskedLM(config)
    mean = sum(map(len, texts)) / len(texts)
    size = max(1, round(micro_tokens / mean))
    streams = {
        "transformers padded": padded_steps(peer(ours, sparse), texts, size),
        "modernbert packed": packed_steps(ours.train(), texts, micro_tokens),
    }
    clock = time.process_time if cpu_time else time.perf_counter
    for stream in streams.values():
        next(stream)
    speeds: dict[str, list[float]] = {name: [] for name in streams}
    filled: dict[str, list[float]] = {name: [] for name in streams}
    for _ in range(rounds):
        for name, stream in streams.items():
            speed, share = timed(stream, steps, clock)
            speeds[name].append(speed)
            filled[name].append(share)
            click.echo(f"{name}: {speed:.0f} tokens/s, {share:.1%} filled", err=True)
    ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
    print(f"{len(texts)} texts of {mean:.0f} tokens on average, {size} in a padded batch")
    print(f"{'':20s} {'real tokens/s (median)':>24s} {'filled':>8s}")
    for name in streams:
        share = statistics.mean(filled[name])
        print(f"{name:20s} {statistics.median(speeds[name]):24.0f} {share:8.1%}")
    middle = statistics.median(ratios)
    print(f"packed is {middle:.2f}x as fast ({min(ratios):.2f} to {max(ratios):.2f})")
    report: dict[str, Any] = {
        "benchmark": "training_speed",
        "data": "synthetic" if data is None else data.name,
        "unit": "paragraph" if paragraphs else "article",
        "texts": len(texts),
        "mean_tokens": mean,
        "max_length": max_length,
        "micro_tokens": micro_tokens,
        "padded_batch": size,
        "parameters": ours.num_parameters(),
        "dtype": "float32",
        "sparse_prediction": sparse,
        "clock": "processor" if cpu_time else "wall",
        "tokens_per_second": speeds,
        "filled": {name: statistics.mean(shares) for name, shares in filled.items()},
        "speed_ratio_median": middle,
        "speed_ratios": ratios,
        "torch": torch.__version__,
        "threads": threads,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
