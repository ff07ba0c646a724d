"""One run of the benchmark: prepare, measure, and put everything into one JSON-able report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from . import machine, published, workloads
from .batches import PaddedBatch, Split, make_batches, pad
from .catalogue import OURS, make_peer
from .ceiling import Ceiling, best, measure_ceiling
from .end_to_end import end_to_end
from .flops import forward_flops
from .measure import Contestant, Spread, Timing, alternate, describe, spread, timed
from .memory import largest_batch, peak_bytes
from .peers import Peer, Setting, prepare
from .presets import Preset, resolve_dtype
from .workloads import Skipped, Workload

SCHEMA = 1
PARTS = ("paper", "sweep", "real", "end-to-end", "memory", "largest")
AGREES = 0.99  # cosine to ours; bfloat16 through 28 layers keeps more
# Ragged as workloads are, and full ones of one text and of more: each may compile anew.
WARM_UP = ((200, 33, 150), (130,), (96, 96))
SHORT, LONG = 1.0, 4.0  # shares of the time for workloads up to 2048 tokens, and beyond


@dataclass(frozen=True)
class Options:
    """What to run: a preset, possibly changed, and what no preset sets."""

    preset: str
    settings: Preset
    size: str = "base"
    threads: int | None = None
    data: Path | None = None
    parts: tuple[str, ...] = PARTS


@dataclass
class Prepared:
    """A peer that can run here, and the batch size that suits it best."""

    key: str
    peer: Peer
    split: Split | None = None


class Run:
    """The state of one run; `report` makes it."""

    def __init__(self, options: Options, say: Callable[[str], None]):
        self.options, self.say = options, say
        self.begun = time.perf_counter()
        self.device = torch.device(options.settings.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"preset {options.preset!r} needs an NVIDIA GPU and none is usable here; "
                "use --preset cpu"
            )
        threads = options.threads or machine.usable_cores()
        torch.set_num_threads(threads)
        dtype = resolve_dtype(options.settings.dtype, self.device)
        self.setting = Setting.make(options.size, dtype, self.device, threads)
        self.given = Split(options.settings.batch_tokens, by_length=False)
        self.speeds: dict[tuple[str, bool], float] = {}  # by name and whether as given
        self.ceiling = Ceiling(0.0, (0, 0, 0), 0.0)

    def report(self) -> dict[str, Any]:
        """Measure everything; the result is ready for `json.dumps`."""
        settings, setting = self.options.settings, self.setting
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        conditions = machine.conditions(self.device)
        self.say(f"{conditions['cpu']}, {setting.dtype}, {setting.threads} threads")
        first = measure_ceiling(setting.dtype, self.device)
        self.ours, self.others, states = self._prepare_all()
        with torch.inference_mode():
            measured = self._measure_workloads()
        memory = self._memory() if "memory" in self.options.parts else []
        largest = self._largest() if "largest" in self.options.parts else []
        self.ceiling = best([first, measure_ceiling(setting.dtype, self.device)])
        for workload in measured:
            self._add_shares(workload)
        return {
            "schema": SCHEMA,
            "benchmark": "modernbert bench",
            "started": started,
            "seconds": round(time.perf_counter() - self.begun, 1),
            "machine": conditions,
            "load_average_after": machine.load_average(),
            "settings": {
                "preset": self.options.preset,
                **asdict(settings),
                "size": setting.size,
                "dtype": str(setting.dtype).removeprefix("torch."),
                "threads": setting.threads,
                "parts": list(self.options.parts),
            },
            "ceiling": asdict(self.ceiling),
            "peers": states,
            "workloads": measured,
            "memory": memory,
            "largest_batch": largest,
            "published": {
                "source": published.SOURCE,
                "workloads": list(published.WORKLOADS),
                "thousand_tokens_per_second": published.TABLE.get(setting.size, {}),
                "largest_batch": published.LARGEST_BATCH.get(setting.size, {}),
            },
        }

    # -- peers ------------------------------------------------------------------------------

    def _prepare_all(self) -> tuple[Peer, list[Prepared], list[dict[str, Any]]]:
        ours = make_peer(OURS)
        prepare(ours, self.setting)
        warm = [self._random_batch(lengths) for lengths in WARM_UP]
        with torch.inference_mode():
            expected = [ours.forward(batch) for batch in warm]
        ready: list[Prepared] = []
        states = [{"name": ours.name, "state": "measured", "reason": "", "agreement": 1.0}]
        for key in self.options.settings.peers:
            peer = make_peer(key)
            state: dict[str, Any] = {"name": peer.name, "state": "absent", "agreement": None}
            state["reason"] = peer.missing(self.setting) or ""
            if not state["reason"]:
                begun = time.perf_counter()
                state |= self._prepare_one(peer, warm, expected)
                state["prepare_seconds"] = round(time.perf_counter() - begun, 1)
                if state["state"] == "measured":
                    ready.append(Prepared(key, peer))
            states.append(state)
            self.say(f"{peer.name}: {state['state']} {state['reason']}".rstrip())
        for prepared in ready:
            if not prepared.peer.packs:
                prepared.split = self._best_split(prepared.peer)
        return ours, ready, states

    def _prepare_one(
        self, peer: Peer, warm: Sequence[PaddedBatch], expected: Sequence[torch.Tensor]
    ) -> dict[str, Any]:
        """Prepare a peer, warm it up, and see whether it computes what ours computes."""
        try:
            prepare(peer, self.setting)
            with torch.inference_mode():
                got = [peer.forward(batch) for batch in warm]
        except Exception as error:  # a foreign library's failure is a result of its own
            return {"state": "failed", "reason": describe(error)}
        found: dict[str, Any] = {"state": "measured", "reason": peer.remark}
        if peer.modernbert:
            triples = zip(got, expected, warm, strict=True)
            cosine = min(_agreement(a, b, batch) for a, b, batch in triples)
            found["agreement"] = cosine
            if not cosine >= AGREES:  # NaN too
                found |= {"state": "failed", "reason": f"its output is not ours: cosine {cosine}"}
        return found

    def _best_split(self, peer: Peer) -> Split:
        """The fastest of three batch sizes on a few texts of N(256, 64), sorted by length."""
        tokens = self.given.tokens
        sample = workloads.variable(256, 64, 512, max(tokens // 4 // 256, 1))
        candidates = [Split(max(tokens // part, 1), by_length=True) for part in (4, 16, 64)]
        seconds = {}
        with torch.inference_mode():
            for split in candidates:
                run = self._contestant(peer, sample, split).run
                seconds[split] = timed(run, self.device, time.perf_counter)
        return min(seconds, key=lambda split: seconds[split])

    def _random_batch(self, lengths: Sequence[int]) -> PaddedBatch:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(100, 16_000, (n,), generator=generator) for n in lengths]
        return pad(rows, self.device)

    # -- speed ------------------------------------------------------------------------------

    def _measure_workloads(self) -> list[dict[str, Any]]:
        jobs = self._workloads()
        shares = [SHORT if isinstance(job, Skipped) or job.longest <= 2048 else LONG for job in jobs]
        results = []
        for number, job in enumerate(jobs):
            if isinstance(job, Skipped):
                self.say(f"{job.name}: skipped, {job.reason}")
                results.append({"name": job.name, "skipped": job.reason, "entries": []})
                continue
            left = 60 * self.options.settings.minutes - (time.perf_counter() - self.begun)
            allowance = max(0.9 * left, 0.0) * shares[number] / sum(shares[number:])
            self.say(f"{job.name}: {len(job.lengths)} texts, {job.tokens} tokens")
            results.append(self._measure(job, allowance))
        return results

    def _workloads(self) -> list[Workload | Skipped]:
        parts, docs, data = self.options.parts, self.options.settings.docs, self.options.data
        jobs: list[Workload | Skipped] = []
        paper = workloads.paper(docs)
        if "paper" in parts:
            jobs += paper[:2]
        if "real" in parts:
            jobs += workloads.real(data, 2 * docs)
        if "end-to-end" in parts:
            jobs.append(workloads.even_texts(data, docs, 256))
        if "sweep" in parts:
            jobs += workloads.sweep(self.options.settings.sweep, docs)
        if "paper" in parts:
            jobs += paper[2:]
        return jobs

    def _measure(self, workload: Workload, allowance: float) -> dict[str, Any]:
        rounds = self.options.settings.rounds
        measure = partial(alternate, rounds=rounds, allowance=allowance, device=self.device)
        entries = []
        if workload.name.endswith(" tokens"):
            return self._measure_end_to_end(workload, measure)
        ours = self._contestant(self.ours, workload, self.given)
        named: dict[str, tuple[str, Split]] = {ours.name: (self.ours.name, self.given)}
        others = []
        for prepared in self.others:
            peer = prepared.peer
            limit = peer.longest(self.setting)
            if workload.longest > limit:
                note = f"takes at most {limit} tokens here"
                entries.append(self._entry(peer.name, None, workload, Timing(note=note)))
                continue
            for split in self._splits(prepared, workload):
                contestant = self._contestant(peer, workload, split)
                named[contestant.name] = (peer.name, split)
                others.append(contestant)
        others.sort(key=lambda c: -self._speed(named[c.name]))
        timings = measure(ours, others)
        for name, timing in timings.items():
            peer_name, split = named[name]
            entries.append(self._entry(peer_name, split, workload, timing))
            if timing.median is not None:
                self.speeds[peer_name, not split.by_length] = workload.tokens / timing.median
        return self._result(workload, entries)
