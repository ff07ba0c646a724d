"""Times one revision of this library; fed to a Python of its own by `regression.py`.

Uses only names that every revision has. Standard input holds one JSON document, the job, and then
the number of a workload for each pass; standard output gets one JSON line in return for each.
"""

import json
import os
import sys
import time
from typing import Any, TextIO

import torch

import modernbert

Batch = tuple[torch.Tensor, torch.Tensor]


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints must not disturb the answers
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = modernbert.ModernBertModel(modernbert.ModernBertConfig(**job["config"]))
    device = torch.device(job["device"])
    model = model.to(device, getattr(torch, job["dtype"])).eval()
    workloads = [[_batch(lengths, device) for lengths in work] for work in job["workloads"]]
    with torch.inference_mode():
        _serve(model, workloads, device, answers)


def _batch(lengths: list[int], device: torch.device) -> Batch:
    width = max(lengths)
    ids = torch.randint(100, 16_000, (len(lengths), width))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return ids.to(device), mask.to(device)


def _serve(model: Any, workloads: list[list[Batch]], device: torch.device, out: TextIO) -> None:
    checksums = [
        sum(model(*batch).last_hidden_state.double().abs().sum().item() for batch in batches)
        for batches in workloads
    ]  # warms up as well
    print(json.dumps({"file": modernbert.__file__, "checksums": checksums}), file=out)
    for line in sys.stdin:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for batch in workloads[int(line)]:
            model(*batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(json.dumps({"seconds": time.perf_counter() - start}), file=out)


if __name__ == "__main__":
    main()
