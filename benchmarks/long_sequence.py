"""One long text through a base-sized model in float32: peak extra memory and time, side by side.

    python benchmarks/long_sequence.py --tokens 8192 --rounds 3

Memory is the growth of the resident set's high-water mark during one forward pass, each
implementation in a process of its own; times alternate in one process. Random weights: neither
figure depends on their values. The last line is one JSON document.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

import modernbert

NAMES = ("transformers sdpa", "modernbert")


def build(name: str, layers: int) -> torch.nn.Module:
    """A base-sized encoder with random weights in float32."""
    if name == "modernbert":
        return modernbert.ModernBertModel(
            modernbert.ModernBertConfig(num_hidden_layers=layers)
        ).eval()
    import transformers

    config = transformers.ModernBertConfig(num_hidden_layers=layers)
    return transformers.ModernBertModel._from_config(config, attn_implementation="sdpa").eval()


def run(model: torch.nn.Module, tokens: int) -> float:
    """Seconds of one forward pass."""
    ids = torch.randint(100, 16000, (1, tokens))
    start = time.perf_counter()
    with torch.inference_mode():
        model(ids)
    return time.perf_counter() - start


def peak_memory(name: str, tokens: int, layers: int) -> int:
    """Bytes by which one forward pass raises the resident set above the loaded model's."""
    model = build(name, layers)
    run(model, 64)  # libraries and thread pools are not the pass's own
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    run(model, tokens)
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


@click.command()
@click.option("--tokens", default=8192, show_default=True)
@click.option("--layers", default=22, show_default=True)
@click.option("--rounds", default=3, show_default=True, help="Alternating pairs of timed passes.")
@click.option("--memory-of", type=click.Choice(NAMES), hidden=True)
def main(tokens: int, layers: int, rounds: int, memory_of: str | None) -> None:
    """Compare with transformers on one long text."""
    if memory_of is not None:
        print(peak_memory(memory_of, tokens, layers))
        return
    memory = {name: _memory_in_a_process(name, tokens, layers) for name in NAMES}
    models = {name: build(name, layers) for name in NAMES}
    for model in models.values():
        run(model, 64)
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(run(model, tokens))
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    print(f"{'':20s} {'peak extra memory':>18s} {'seconds (median)':>18s} {'tokens/s':>10s}")
    for name in NAMES:
        seconds = statistics.median(times[name])
        print(
            f"{name:20s} {memory[name] / 2**20:14.0f} MiB {seconds:18.2f} {tokens / seconds:10.0f}"
        )
    share = memory["modernbert"] / memory["transformers sdpa"]
    print(
        f"memory {share:.2f} of transformers'; "
        f"speed {statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    report: dict[str, Any] = {
        "benchmark": "long_sequence",
        "tokens": tokens,
        "layers": layers,
        "dtype": "float32",
        "memory_bytes": memory,
        "memory_share": share,
        "seconds": times,
        "speed_ratio_median": statistics.median(ratios),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    print(json.dumps(report))


def _memory_in_a_process(name: str, tokens: int, layers: int) -> int:
    command = [sys.executable, __file__, "--memory-of", name]
    command += ["--tokens", str(tokens), "--layers", str(layers)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
