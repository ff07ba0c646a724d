"""One run of the benchmark: prepare, measure, and put everything into one report."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from modernbert.allocator import keep_freed_memory
from modernbert.kernels import computes_natively

from . import attention, linears, machine, published, workloads
from .ceiling import best, measure_ceiling
from .contest import Contest, prepare_all
from .end_to_end import BARE, INVARIANT, NAME, THEIRS, end_to_end
from .measure import Timing, alternate, describe, timed
from .memory import largest_batch, peak_bytes
from .peers import SIZES, Peer, Setting
from .presets import PARTS, Preset
from .results import add_shares, entry, result, skipped
from .workloads import Skipped, Workload

SCHEMA = 1
PREPARING = 0.3  # of the whole time; compiling 22 layers for several shapes takes minutes
RESERVED = 0.15  # of the time left stays for memory and the like
BUSY = 0.1  # of the cores
LONG = 4.0  # times as much time for a workload with texts beyond 2048 tokens
EVEN_TOKENS = 256
ALONE = 65_536  # tokens of attention alone


@dataclass(frozen=True)
class Options:
    """What to run: a preset, possibly changed, and what no preset sets."""

    preset: str
    settings: Preset
    size: str = "base"
    threads: int | None = None
    data: Path | None = None
    parts: tuple[str, ...] = PARTS


def run(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure everything; the report is ready for `json.dumps`.

    Raises `ValueError` when the preset's device is not here.
    """
    clock = Clock(60 * options.settings.minutes)
    setting = make_setting(options)
    kept = keep_freed_memory()  # by all implementations in this process
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    conditions = machine.conditions(setting.device)
    say(f"{conditions['cpu']}, {setting.threads} threads, {setting.dtype}")
    for warning in busy(conditions["cores_in_use"], conditions["usable_cores"]):
        say(warning)
    before = measure_ceiling(setting.dtype, setting.device)
    setting = fitted(setting, options.settings)
    if setting.config.num_hidden_layers < SIZES[setting.size].num_hidden_layers:
        say(f"a model of {setting.config.num_hidden_layers} layers")
    say("peers:")
    contest = prepare_all(
        setting,
        options.settings.peers,
        options.settings.batch_tokens,
        say,
        deadline=clock.begun + PREPARING * clock.limit,
    )
    measured = measure_workloads(options, contest, clock, say)
    memory = measure_memory(options, contest, say) if "memory" in options.parts else []
    largest = measure_largest(options, contest, say) if "largest" in options.parts else []
    alone = measure_alone(options, setting, say) if "attention" in options.parts else {}
    ceiling = best([before, measure_ceiling(setting.dtype, setting.device)])
    used = [x for x in (conditions["cores_in_use"], machine.cores_in_use()) if x is not None]
    counted = {contest.ours.name: True, NAME: True, INVARIANT: True, BARE: True}
    counted |= {prepared.peer.name: prepared.peer.modernbert for prepared in contest.others}
    for workload in measured:
        add_shares(workload, ceiling.matmul_flops, counted)
    return {
        "schema": SCHEMA,
        "benchmark": "modernbert bench",
        "started": started,
        "seconds": round(clock.elapsed(), 1),
        "warnings": busy(max(used, default=None), conditions["usable_cores"]),
        "machine": conditions,
        "cores_in_use_after": used[-1] if used else None,
        "settings": {
            "preset": options.preset,
            **asdict(options.settings),
            "size": setting.size,
            "layers": setting.config.num_hidden_layers,
            "layers_of_size": SIZES[setting.size].num_hidden_layers,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "threads": setting.threads,
            "keeps_freed_memory": kept,
            "parts": list(options.parts),
        },
        "ceiling": asdict(ceiling),
        "peers": contest.states,
        "workloads": measured,
        "memory": memory,
        "largest_batch": largest,
        **alone,
        "published": published.as_dict(setting.size),
    }


def busy(used: float | None, cores: int) -> list[str]:
    """What to tell a reader when others were using `used` of the machine's cores."""
    if used is None or used < BUSY * cores:
        return []
    return [
        f"Others were using this machine ({used} of {cores} cores): figures and ratios are not to "
        "be relied on. PyTorch suffers most, as its threads wait for each other."
    ]


def fitted(setting: Setting, settings: Preset) -> Setting:
    """A model of fewer layers on a machine on which a pass over the texts would take too long."""
    layers = min(settings.slow_layers, setting.config.num_hidden_layers)
    if settings.pass_seconds is None or settings.layers is not None:
        return setting
    sample = workloads.variable(256, 64, 512, min(4, settings.docs))
    alone = prepare_all(setting, (), settings.batch_tokens, lambda _: None)
    ours = alone.contestant(alone.ours, sample, alone.given)
    with torch.inference_mode():
        seconds = min(timed(ours.run, setting.device, time.perf_counter) for _ in range(2))
    if seconds * settings.docs / len(sample.lengths) <= settings.pass_seconds:
        return setting
    return Setting.make(setting.size, setting.dtype, setting.device, setting.threads, layers)


class Clock:
    """Divides the time a run may take."""

    def __init__(self, limit: float):
        self.limit, self.begun = limit, time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def allowance(self, share: float) -> float:
        """Seconds for something that is `share` of all that is still to do."""
        return max(self.limit - self.elapsed(), 0.0) * (1 - RESERVED) * share


def make_setting(options: Options) -> Setting:
    """Threads set, dtype chosen, weights made."""
    device = torch.device(options.settings.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"preset {options.preset!r} needs an NVIDIA GPU that PyTorch can use, and there is "
            "none; use --preset cpu"
        )
    threads = options.threads or machine.usable_cores()
    torch.set_num_threads(threads)
    dtype = resolve_dtype(options.settings.dtype, device)
    return Setting.make(options.size, dtype, device, threads, options.settings.layers)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto" is what the device multiplies fastest without emulation."""
    if name != "auto":
        return getattr(torch, name)
    native = computes_natively(torch.bfloat16, device)
    if device.type == "cuda" and not native:
        return torch.float16
    return torch.bfloat16 if native else torch.float32


def choose_workloads(options: Options) -> list[Workload | Skipped]:
    """Short texts first, so that the fast ones are known when the long ones are timed."""
    docs = options.settings.docs
    jobs: list[Workload | Skipped] = []
    if "paper" in options.parts:
        jobs += workloads.paper(docs)
    if "real" in options.parts:
        jobs += workloads.real(options.data, docs)
    if "sweep" in options.parts:
        jobs += workloads.sweep(options.settings.sweep, docs)
    return sorted(jobs, key=lambda job: _weight(job))


def measure_workloads(
    options: Options, contest: Contest, clock: Clock, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every workload within its share of the time."""
    jobs = choose_workloads(options)
    speeds: dict[str, float] = {}
    weights = [_weight(job) for job in jobs]
    if "end-to-end" in options.parts:
        weights.append(1.0)
    results = []
    for number, job in enumerate(jobs):
        if isinstance(job, Skipped):
            results.append(skipped(job.name, job.reason))
            say(f"{job.name}: skipped, {job.reason}")
            continue
        say(f"{job.name}: {len(job.lengths)} texts, {job.tokens} tokens")
        allowance = clock.allowance(weights[number] / sum(weights[number:]))
        entries = compare(contest, job, speeds, options.settings.rounds, allowance)
        results.append(result(job, entries, contest.setting.config, contest.setting.size))
    if "end-to-end" in options.parts:
        results.append(measure_end_to_end(options, contest.setting, clock, say))
    return results


def compare(
    contest: Contest, workload: Workload, speeds: dict[str, float], rounds: int, allowance: float
) -> list[dict[str, Any]]:
    """Ours and every peer on one workload; `speeds` remembers who was fast."""
    entries, others, named = [], [], {}
    ours = contest.contestant(contest.ours, workload, contest.given)
    named[ours.name] = (contest.ours.name, contest.given)
    for prepared in contest.others:
        peer, limit = prepared.peer, prepared.peer.longest(contest.setting)
        if workload.longest > limit:
            note = f"takes at most {limit} tokens a text here"
            entries.append(entry(peer.name, None, workload, Timing(note=note)))
            continue
        for split in contest.splits(prepared, workload):
            other = contest.contestant(peer, workload, split)
            named[other.name] = (peer.name, split)
            others.append(other)
    others.sort(key=lambda other: -speeds.get(other.name, float("inf")))
    with torch.inference_mode():
        timings = alternate(
            ours, others, rounds=rounds, allowance=allowance, device=contest.setting.device
        )
    for name, timing in timings.items():
        peer_name, split = named[name]
        entries.append(entry(peer_name, split, workload, timing))
        if timing.median is not None:
            speeds[name] = workload.tokens / timing.median
    return entries


def measure_end_to_end(
    options: Options, setting: Setting, clock: Clock, say: Callable[[str], None]
) -> dict[str, Any]:
    """Texts in, vectors out."""
    job = workloads.even_texts(options.data, options.settings.docs, EVEN_TOKENS)
    if isinstance(job, Skipped):
        say(f"{job.name}: skipped, {job.reason}")
        return skipped(f"end to end, {job.name}", job.reason)
    assert options.data is not None
    say(f"end to end, {job.name}: {len(job.lengths)} texts, {job.tokens} tokens")
    vocabulary = workloads.tokenizer_file(options.data)
    both = end_to_end(setting, job, vocabulary)
    timings = alternate(
        both.ours,
        both.others,
        rounds=options.settings.rounds,
        allowance=clock.allowance(1.0),
        device=setting.device,
    )
    entries = [entry(name, None, job, timing) for name, timing in timings.items()]
    if both.missing:
        entries.append(entry(THEIRS, None, job, Timing(note=both.missing)))
    found = result(job, entries, setting.config, setting.size)
    return found | {"name": f"end to end, {job.name}", "agreement": both.agreement}


def measure_memory(
    options: Options, contest: Contest, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Peak memory of one pass by shape, for ours and the preset's `memory_peers`."""
    settings, setting = options.settings, contest.setting
    if setting.device.type == "cpu":
        setting = Setting.make(
            setting.size, setting.dtype, setting.device, setting.threads, settings.memory_layers
        )
    rows = []
    prepared = {p.key: p.peer for p in contest.others if p.key in settings.memory_peers}
    for key, peer in {"modernbert": contest.ours, **prepared}.items():
        say(f"memory of {peer.name}")
        for shape, found in zip(
            settings.memory, peak_bytes(key, setting, settings.memory, peer), strict=True
        ):
            measured = isinstance(found, int)
            rows.append(
                {
                    "peer": peer.name,
                    "texts": shape[0],
                    "tokens_each": shape[1],
                    "bytes": found if measured else None,
                    "note": "" if measured else found,
                    "layers": setting.config.num_hidden_layers,
                }
            )
    return rows


def measure_largest(
    options: Options, contest: Contest, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The largest batches at 512 and 8192 tokens; on a GPU only, whose memory is a hard limit."""
    limit, device = options.settings.largest, contest.setting.device
    if not limit:
        return []
    rows = []
    for peer in (contest.ours, *(prepared.peer for prepared in contest.others)):
        for length in (512, 8192):
            if device.type != "cuda":
                note, found = "not measured: the system's memory has no hard limit", None
            elif length > peer.longest(contest.setting):
                note, found = f"takes at most {peer.longest(contest.setting)} tokens a text", None
            else:
                say(f"largest batch of {peer.name} at {length}")
                found, note = _largest(peer, length, max(limit * 512 // length, 1), device)
            rows.append({"peer": peer.name, "tokens_each": length, "texts": found, "note": note})
    return rows


def measure_alone(options: Options, setting: Setting, say: Callable[[str], None]) -> dict[str, Any]:
    """On a GPU: backends and linear layers checked against float64, and timed alone."""
    if setting.device.type != "cuda":
        return {}
    say("every backend against float64")
    checks = [*attention.self_check(), *linears.self_check(setting)]
    tokens = min(options.settings.batch_tokens, ALONE)
    jobs = attention.workloads(tokens)
    return {
        "self_check": checks,
        "attention": attention.measure_attention(setting, jobs, say),
        "linears": linears.measure_linears(setting, tokens),
    }


def _largest(peer: Peer, length: int, limit: int, device: torch.device) -> tuple[int | None, str]:
    try:
        found = largest_batch(peer, length, limit, device)
    except Exception as error:  # a foreign library's failure is a result of its own
        return None, describe(error)
    return found, f"no more were tried than {limit}" if found == limit else ""


def _weight(job: Workload | Skipped) -> float:
    if isinstance(job, Skipped):
        return 0.0
    ways = 1 if job.kind == "fixed" else 2  # as given, and tuned
    return ways * (LONG if job.longest > 2048 else 1.0)
