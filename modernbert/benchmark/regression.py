"""Two revisions of this library on one machine, interleaved: has it become slower?

Each revision is unpacked into a folder of its own and imported by a Python process that stays
alive and makes one pass when asked, so that passes alternate A B, B A, A B...
"""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import machine
from .batches import Split
from .measure import spread
from .peers import Setting
from .workloads import Workload

WORKING_TREE = "."
SUB_PACKAGES = ("kernels", "weights")  # folders beside modernbert/ that install inside it
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
WORKER = Path(__file__).with_name("worker.py")


class Worker:
    """A process that has one revision loaded."""

    def __init__(self, revision: str, folder: Path):
        self.revision, self.commit = revision, unpack(revision, folder)
        self.folder = folder.resolve()
        self.checksums: list[float] = []
        self.log = tempfile.TemporaryFile("w+")
        # With `-c` the current folder comes first on the path: the revision's own.
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER.read_text(encoding="utf-8")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=folder,
        )

    def start(self, job: str) -> None:
        """Hand over the job; `ValueError` when the process cannot run it or runs other code."""
        ready = self.ask(job)
        imported = Path(ready["file"]).resolve()
        if not imported.is_relative_to(self.folder):
            raise ValueError(f"revision {self.revision} was not measured: {imported} was imported")
        self.checksums = ready["checksums"]

    def ask(self, line: str) -> dict[str, Any]:
        """Send one line, wait for one answer; `ValueError` with its last words when it died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(line, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.process.wait()
            self.log.seek(0)
            words = "\n".join(self.log.read().strip().splitlines()[-8:])
            raise ValueError(f"revision {self.revision} failed:\n{words}")
        return json.loads(answer)

    def seconds(self, workload: int) -> float:
        """Of one pass over the workload of that number."""
        return self.ask(str(workload))["seconds"]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.log.close()


def unpack(revision: str, folder: Path) -> str:
    """Put `modernbert` as it is in `revision` into `folder`; returns the commit.

    "." is the working tree as it stands. Raises `ValueError` for a revision git does not know, and
    when this package does not run from a checkout.
    """
    root = machine.repository()
    if root is None:
        raise ValueError("comparing revisions needs git and a checkout of this project")
    wanted = ("modernbert", *SUB_PACKAGES)
    if revision == WORKING_TREE:
        commit = WORKING_TREE
        for name in (name for name in wanted if (root / name).is_dir()):
            shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("*.pyc"))
    else:
        commit = machine.git(root, "rev-parse", "--verify", f"{revision}^{{commit}}").strip()
        present = machine.git(root, "ls-tree", "--name-only", commit).split()
        command = ["git", "archive", commit, *(name for name in wanted if name in present)]
        done = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True)
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            # Python 3.10 and 3.11 have filters in their later releases only.
            safely: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(folder, **safely)
    for name in SUB_PACKAGES:
        if (folder / name).is_dir():
            (folder / name).rename(folder / "modernbert" / name)
    return commit


@contextmanager
def worker(revision: str, job: str) -> Iterator[Worker]:
    """A process for `revision`, ended and cleaned up after."""
    with tempfile.TemporaryDirectory() as folder:
        process = Worker(revision, Path(folder))
        try:
            process.start(job)
            yield process
        finally:
            process.close()


def compare_revisions(
    revisions: tuple[str, str],
    workloads: Sequence[Workload],
    setting: Setting,
    *,
    batch_tokens: int,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Time both on the same padded batches; the report is ready for `json.dumps`."""
    split = Split(batch_tokens, by_length=False)
    job = {
        "config": {name: getattr(setting.config, name) for name in SIZES},
        "workloads": [
            [[work.lengths[i] for i in group] for group in split.batches(work.lengths)]
            for work in workloads
        ],
        "dtype": str(setting.dtype).removeprefix("torch."),
        "device": str(setting.device),
        "threads": setting.threads,
    }
    with ExitStack() as stack:
        first, second = (stack.enter_context(worker(r, json.dumps(job))) for r in revisions)
        found = []
        for number, work in enumerate(workloads):
            say(f"{work.name}: {len(work.lengths)} texts, {work.tokens} tokens")
            found.append(_compare(first, second, number, work, rounds))
        commits = {r.revision: r.commit for r in (first, second)}
    return {
        "benchmark": "modernbert bench --revisions",
        "machine": machine.conditions(setting.device),
        "settings": {name: job[name] for name in ("config", "dtype", "device", "threads")},
        "revisions": list(revisions),
        "commits": commits,
        "workloads": found,
    }


def _compare(
    first: Worker, second: Worker, number: int, work: Workload, rounds: int
) -> dict[str, Any]:
    seconds: dict[Worker, list[float]] = {first: [], second: []}
    for turn in range(rounds):
        for process in (first, second) if turn % 2 == 0 else (second, first):
            seconds[process].append(process.seconds(number))
    sums = [process.checksums[number] for process in (first, second)]
    return {
        "name": work.name,
        "texts": len(work.lengths),
        "tokens": work.tokens,
        "passes": [seconds[first], seconds[second]],
        "second_is_faster_by": asdict(spread(seconds[first], seconds[second])),
        "relative_difference_of_results": abs(sums[1] / sums[0] - 1),
    }
