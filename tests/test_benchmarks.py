import csv
import dataclasses
import gzip
import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from modernbert.benchmark import (
    contest,
    end_to_end,
    machine,
    memory,
    peers,
    presets,
    published,
    regression,
    runner,
)
from modernbert.benchmark.batches import PaddedBatch, Split, make_batches, pad
from modernbert.benchmark.catalogue import OURS, PEERS, make_peer
from modernbert.benchmark.ceiling import Ceiling, best, measure_ceiling
from modernbert.benchmark.command import bench
from modernbert.benchmark.flops import (
    attention_flops,
    forward_flops,
    linear_flops,
    visible_pairs,
)
from modernbert.benchmark.measure import Contestant, alternate, spread
from modernbert.benchmark.peers import SIZES, Setting
from modernbert.benchmark.plots import FIGURES, draw
from modernbert.benchmark.presets import PRESETS
from modernbert.benchmark.results import BASIS, model_name
from modernbert.benchmark.runner import resolve_dtype
from modernbert.benchmark.tables import markdown
from modernbert.benchmark.workloads import (
    SOURCES,
    Skipped,
    Workload,
    even_texts,
    fixed,
    paper,
    real,
    tokenizer_file,
    variable,
)

CPU = torch.device("cpu")


@pytest.fixture
def setting() -> Setting:
    return Setting.make("tiny", torch.float32, CPU, threads=1)


# -- floating-point operations --------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "linear", "by_length"),
    [
        (
            "base",
            "220.6",
            {128: "227.9", 512: "238.4", 1024: "251.1", 2048: "276.4", 8192: "427.4"},
        ),
        (
            "large",
            "686.3",
            {128: "698.7", 512: "716.2", 1024: "737.4", 2048: "779.5", 8192: "1031.0"},
        ),
    ],
)
def test_flops_of_a_token_are_those_derived_by_hand(
    size: str, linear: str, by_length: dict[int, str]
) -> None:
    config = SIZES[size]
    assert f"{linear_flops(config) / 1e6:.1f}" == linear
    found = {n: f"{forward_flops(config, [n]) / n / 1e6:.1f}" for n in by_length}
    assert {n: round(float(v), 0) for n, v in found.items()} == {
        n: round(float(v), 0) for n, v in by_length.items()
    }
    assert {n: v for n, v in found.items() if n < 8192} == {
        n: v for n, v in by_length.items() if n < 8192
    }


def test_attention_divides_into_global_and_local() -> None:
    base = SIZES["base"]
    for length, whole, windows in ((512, "12.6", "5.2"), (8192, "201.3", "5.5")):
        everywhere = 8 * 4 * 768 * length**2
        assert f"{everywhere / length / 1e6:.1f}" == whole
        local = attention_flops(base, length) - everywhere
        assert f"{local / length / 1e6:.1f}" == windows


@given(st.integers(1, 90), st.integers(0, 40))
def test_visible_pairs_counts_every_pair(length: int, window: int) -> None:
    pairs = sum(abs(i - j) <= window for i in range(length) for j in range(length))
    assert visible_pairs(length, window) == pairs
    assert visible_pairs(length, None) == length**2


# -- workloads ------------------------------------------------------------------------------


def test_seeded_lengths_give_the_token_totals_of_the_paper() -> None:
    totals = (
        fixed(512, 8192).tokens,
        variable(256, 64, 512, 8192).tokens,
        fixed(8192, 8192).tokens,
        variable(4096, 1024, 8192, 8192).tokens,
    )
    assert totals == (4_194_304, 2_096_510, 67_108_864, 33_604_913)


def test_fewer_documents_are_the_first_of_the_paper() -> None:
    assert variable(256, 64, 512, 10).lengths == variable(256, 64, 512, 8192).lengths[:10]


def test_workloads_of_a_run_have_about_as_many_tokens_each() -> None:
    short, mixed, long, mixed_long = paper(1024)
    assert short.tokens == 262_144 and long.tokens == 2 * 262_144
    assert mixed.tokens == pytest.approx(262_144, rel=0.05)
    assert mixed_long.tokens == pytest.approx(2 * 262_144, rel=0.05)
    assert all(workload.tokens for workload in paper(1))


def test_ids_are_the_same_each_time() -> None:
    workload = variable(256, 64, 512, 3)
    first, second = workload.sequences(), workload.sequences()
    assert [len(ids) for ids in first] == list(workload.lengths)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert int(torch.cat(first).min()) >= 100 and int(torch.cat(first).max()) < 16_000


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder laid out like the real data, with a tokenizer of one token a word."""
    vocabulary = {"[UNK]": 0, "a": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for folder in ("tokenizer_modernbert", "sts_benchmark", "ret_scifact", "text_wikipedia_en"):
        (tmp_path / folder).mkdir()
    tokenizer.save(str(tokenizer_file(tmp_path)))
    paths = [tmp_path / source.path for source in SOURCES.values()]
    with gzip.open(paths[0], "wt") as file:
        file.write("split\tscore\tsentence1\tsentence2\n")
        file.writelines(f'train\t5.0\t"{"a " * n}\tb\n' for n in range(1, 30))
    with zipfile.ZipFile(paths[1], "w") as archive:
        text = io.StringIO()
        rows = csv.writer(text)
        rows.writerow(["doc_id", "title", "abstract", "structured"])
        rows.writerows([n, "title", f"['{'a ' * n}'\n 'b']", "False"] for n in range(1, 30))
        archive.writestr("corpus_train.csv", text.getvalue())
    with gzip.open(paths[2], "wt") as file:
        file.writelines(
            json.dumps({"id": n, "text": "a b c\n\n" + "a " * n}) + "\n" for n in range(1, 30)
        )
    return tmp_path


def test_real_texts_are_seeded_samples_with_true_token_counts(data: Path) -> None:
    jobs = real(data, docs=8)
    for job, again in zip(jobs, real(data, docs=8), strict=True):
        assert isinstance(job, Workload) and job == again
        assert len(job.lengths) == len(job.texts) == 8
        assert [len(text.replace("'", " ' ").split()) for text in job.texts] == pytest.approx(
            list(job.lengths), abs=2
        )
    assert [job.name for job in jobs] == list(SOURCES)
    (cut,) = {len(text.split()) for text in even_texts(data, docs=4, tokens=12).texts}  # type: ignore[union-attr]
    assert cut == 10  # the other two are [CLS] and [SEP], which this tokenizer does not add


def test_absent_data_is_skipped_with_a_reason(data: Path) -> None:
    assert all("--data" in job.reason for job in real(None, 4) if isinstance(job, Skipped))
    assert isinstance(even_texts(None, 4, 256), Skipped)
    (data / SOURCES["SciFact abstracts"].path).unlink()
    states = {job.name: job for job in real(data, 4)}
    skipped = states["SciFact abstracts"]
    assert isinstance(skipped, Skipped) and "ret_scifact/scifact.zip" in skipped.reason
    assert isinstance(states["STS-B sentences"], Workload)


def test_real_data_beside_the_checkout(shared_data: Path) -> None:
    sentences, abstracts, paragraphs = real(shared_data, docs=64)
    assert isinstance(sentences, Workload) and isinstance(abstracts, Workload)
    assert isinstance(paragraphs, Workload)
    assert sentences.tokens < paragraphs.tokens < abstracts.tokens
    even = even_texts(shared_data, docs=3, tokens=256)
    assert isinstance(even, Workload) and even.lengths == pytest.approx((256,) * 3, abs=2)


# -- batches --------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 600), st.booleans())
def test_a_split_holds_every_text_once_within_its_budget(
    lengths: list[int], tokens: int, by_length: bool
) -> None:
    groups = Split(tokens, by_length).batches(lengths)
    flat = [index for group in groups for index in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert by_length or flat == sorted(flat)
    for group in groups:
        places = len(group) * max(lengths[i] for i in group)
        assert places <= tokens or len(group) == 1
    places = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    one_by_one = Split(1, by_length).batches(lengths)
    assert len(one_by_one) == len(lengths) and places >= sum(lengths)


def test_padded_batches_hold_the_texts() -> None:
    workload = Workload("x", "variable", (3, 5, 5))
    ragged, full = make_batches(workload.sequences(), Split(10, by_length=False), CPU)
    assert ragged.input_ids.shape == (2, 5) and ragged.attention_mask.sum(1).tolist() == [3, 5]
    assert not ragged.full and full.full
    assert torch.equal(ragged.input_ids[0, :3], workload.sequences()[0])


# -- timing ---------------------------------------------------------------------------------


class Bench:
    """A clock that only contestants move, and a record of who ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ran: list[str] = []

    def contestant(self, name: str, seconds: float, *, fails: bool = False) -> Contestant:
        def run() -> None:
            self.ran.append(name)
            self.now += seconds
            if fails:
                raise RuntimeError("no such operator\nmore words")

        return Contestant(name, run)

    def alternate(self, *others: Contestant, rounds: int = 4, allowance: float = 1e9) -> Any:
        ours = self.contestant("ours", 1.0)
        return alternate(
            ours, others, rounds=rounds, allowance=allowance, device=CPU, clock=lambda: self.now
        )


def test_every_pass_stands_beside_one_of_ours() -> None:
    bench = Bench()
    timings = bench.alternate(bench.contestant("b", 2.0), bench.contestant("c", 3.0), rounds=2)
    first, second = ["ours", "b", "ours", "c"], ["b", "ours", "c", "ours"]
    assert bench.ran == ["ours", "b", "c", *first, *second]
    assert timings["b"].seconds == [2.0, 2.0] and timings["b"].partner == [1.0, 1.0]
    assert timings["ours"].seconds == [1.0] * 4 and timings["ours"].median == 1.0


def test_the_slowest_are_left_out_when_time_is_short() -> None:
    bench = Bench()
    others = [bench.contestant(f"{n}", float(n)) for n in (2, 3, 40)]
    timings = bench.alternate(*others, allowance=100.0)
    assert timings["40"].seconds == [] and timings["40"].median == 40.0
    assert "too slow" in timings["40"].note
    assert len(timings["2"].seconds) == len(timings["3"].seconds) == 4
    assert bench.now <= 100.0


def test_the_fastest_of_each_way_stays_while_one_round_fits() -> None:
    """So that peers are compared as the texts are given, and as suits them best."""
    for allowance, left_out in ((260.0, {"21"}), (160.0, {"21", "60"})):
        bench = Bench()
        others = [bench.contestant(f"{n}", float(n)) for n in (10, 20, 21)]
        given = dataclasses.replace(bench.contestant("60", 60.0), way="as given")
        timings = bench.alternate(*others, given, allowance=allowance)
        assert {name for name, found in timings.items() if "too slow" in found.note} == left_out
        assert timings["10"].seconds and timings["20"].seconds and bench.now <= allowance
        assert bool(timings["60"].seconds) == ("60" not in left_out)


def test_those_who_come_late_are_not_measured() -> None:
    bench = Bench()
    others = [bench.contestant(f"{n}", float(n)) for n in (10, 11, 12)]
    timings = bench.alternate(*others, allowance=60.0)
    assert timings["12"].median is None and "not measured" in timings["12"].note


def test_at_least_one_pair_is_kept_however_short_the_time() -> None:
    bench = Bench()
    timings = bench.alternate(bench.contestant("b", 2.0), allowance=0.0)
    assert bench.ran == ["ours", "b"]
    assert timings["b"].seconds == [2.0] and timings["b"].partner == [1.0]
    assert "single unwarmed pair" in timings["b"].note


def test_a_peer_that_fails_is_a_result() -> None:
    bench = Bench()
    broken = bench.contestant("broken", 1.0, fails=True)
    timings = bench.alternate(broken, bench.contestant("b", 2.0), rounds=2)
    assert timings["broken"].note == "failed: RuntimeError: no such operator"
    assert timings["broken"].median is None and len(timings["b"].seconds) == 2


def test_ours_alone_is_timed_too() -> None:
    assert len(Bench().alternate(rounds=3)["ours"].seconds) == 3


def test_the_ratio_is_taken_pair_by_pair() -> None:
    found = spread([2.0, 6.0, 4.0, 10.0, 3.0], [1.0, 2.0, 4.0, 2.0, 1.5])
    assert (found.low, found.first_quartile, found.median) == (1.0, 2.0, 2.0)
    assert (found.third_quartile, found.high, found.pairs) == (3.0, 5.0, 5)
    single = spread([3.0], [2.0])
    assert single.low == single.third_quartile == single.median == 1.5


def test_the_higher_ceiling_counts() -> None:
    low, high = Ceiling(1.0, (1, 1, 1), 9.0), Ceiling(2.0, (2, 2, 2), 5.0)
    assert best([low, high]) == Ceiling(2.0, (2, 2, 2), 9.0)


# -- implementations ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdpa", "eager", "openvino", "onnxruntime"])
def test_every_modernbert_computes_what_ours_computes(name: str, setting: Setting) -> None:
    if reason := make_peer(name).missing(setting):
        pytest.skip(reason)
    found = contest.prepare_all(setting, [name], batch_tokens=512, say=lambda line: None)
    _, state = found.states
    assert state["state"] == "measured", state
    assert state["agreement"] > 0.9999
    assert "sorted" in state["best_split"]


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta-v3", "nomic-bert", "xlm-roberta"])
def test_other_architectures_run(name: str, setting: Setting) -> None:
    peer = make_peer(name)
    assert peer.missing(setting) is None
    peers.prepare(peer, setting)
    batch = pad([torch.arange(100, 100 + n) for n in (90, 7)], CPU)
    with torch.inference_mode():
        out = peer.forward(batch)
    assert out.shape == (2, 90, 64) and bool(out.isfinite().all())
    assert not peer.modernbert


def test_absent_implementations_say_why(monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    assert make_peer("flash").missing(setting) == "flash-attn runs on CUDA only"
    large = Setting.make("tiny", torch.float16, CPU, threads=1)
    assert "float16" in str(make_peer("openvino").missing(large))
    monkeypatch.setattr(peers, "cpp_compiler", lambda: None)
    for name in ("compile", "modernbert-compiled"):
        assert "needs a C++ compiler" in str(make_peer(name).missing(setting))
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    for name in ("sdpa", "openvino", "onnxruntime", "bert"):
        assert "is not installed: pip install" in str(make_peer(name).missing(setting))
    found = contest.prepare_all(setting, ["openvino"], batch_tokens=64, say=lambda line: None)
    assert found.others == [] and found.states[1]["state"] == "absent"
    with pytest.raises(ValueError, match="unknown peer 'tensorflow'; choose from"):
        make_peer("tensorflow")


def test_nothing_is_prepared_after_the_deadline(setting: Setting) -> None:
    found = contest.prepare_all(setting, ["sdpa"], 64, lambda line: None, deadline=0.0)
    assert found.others == [] and "took too long" in found.states[1]["reason"]


def test_nomic_bert_large_does_not_exist() -> None:
    large = Setting("large", SIZES["large"], {}, torch.float32, CPU, 1)
    assert make_peer("nomic-bert").missing(large) == "no large NomicBERT was published"


def test_a_peer_with_other_results_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, setting: Setting
) -> None:
    class Wrong(peers.Ours):
        name = "wrong"

        def forward(self, batch: PaddedBatch) -> torch.Tensor:
            return super().forward(batch) * batch.input_ids[..., None].remainder(2)

    class Nan(peers.Ours):
        name = "nan"

        def forward(self, batch: PaddedBatch) -> torch.Tensor:
            return super().forward(batch) * float("nan")

    class Broken(peers.Ours):
        name = "broken"

        def prepare(self, setting: Setting) -> None:
            raise RuntimeError("cannot convert")

    for name, kind in (("wrong", Wrong), ("nan", Nan), ("broken", Broken)):
        monkeypatch.setitem(PEERS, name, kind)
    found = contest.prepare_all(setting, ["wrong", "nan", "broken"], 64, lambda line: None)
    assert found.others == []
    assert [state["state"] for state in found.states[1:]] == ["failed"] * 3
    wrong, nan, broken = (state["reason"] for state in found.states[1:])
    assert "not ours" in wrong and "not ours" in nan and "cannot convert" in broken
    json.dumps(found.states, allow_nan=False)


def test_presets_name_known_things() -> None:
    assert {*presets.PEERS, OURS} == set(PEERS) and set(presets.SIZES) == set(SIZES)
    assert set(PRESETS) == {"cpu", "t4", "rtx-4090", "a100", "h200"}
    for preset in PRESETS.values():
        assert set(preset.peers) <= set(PEERS) and set(preset.memory_peers) <= set(PEERS)
        assert resolve_dtype(preset.dtype, CPU).is_floating_point
    assert PRESETS["t4"].dtype == "float16"  # it has no bfloat16
    assert PRESETS["cpu"].minutes < 15


def test_published_figures() -> None:
    assert published.published_speed("base", "variable 512") == 147_300
    assert published.published_speed("large", "fixed 8192") == 46_800
    assert published.published_speed("base", "fixed 8192", "BERT") is None
    assert published.published_speed("tiny", "fixed 512") is None
    assert published.LARGEST_BATCH["base"]["ModernBERT"] == (1604, 98)


# -- memory ---------------------------------------------------------------------------------


def test_peak_memory_is_measured_in_a_process_of_its_own() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory of a pass needs Linux's /proc")
    setting = Setting.make("tiny", torch.float32, CPU, threads=1)
    small, large = memory.peak_bytes("modernbert", setting, [(1, 64), (64, 1024)])
    assert isinstance(small, int) and isinstance(large, int)
    assert large >= 64 * 1024 * 64 * 4 > small  # at least what it returns
    broken = memory.peak_bytes("tensorflow", setting, [(1, 64)])
    assert isinstance(broken[0], str) and "unknown peer" in broken[0]


@pytest.mark.parametrize(("fits", "limit"), [(0, 64), (1, 64), (37, 64), (64, 64), (1000, 4096)])
def test_the_largest_batch_is_found_by_bisection(fits: int, limit: int, setting: Setting) -> None:
    class Small(peers.Ours):
        trials = 0

        def forward(self, batch: PaddedBatch) -> torch.Tensor:
            self.trials += 1
            if len(batch.input_ids) > fits:
                raise torch.OutOfMemoryError
            return batch.input_ids

    peer = Small()
    found = memory.largest_batch(peer, 8, limit, CPU)
    assert fits - max(fits // 32, 1) < found <= fits or found == fits
    assert peer.trials < 25


# -- the whole ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """One small run through the command line; its result and the folder it wrote."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("results")
    command = "--size tiny --docs 2 --rounds 1 --minutes 60 --threads 1 --dtype float32"
    command += " --peer sdpa --peer flash --only paper --only sweep --only largest --out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "measure_ceiling", partial(measure_ceiling, seconds=0.1))
        yield CliRunner().invoke(bench, [*command.split(), str(folder)]), folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def report(run: tuple[Any, Path]) -> dict[str, Any]:
    result, _ = run
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


ENTRY = {
    "peer": str,
    "split": str,
    "as_given": bool,
    "tokens_per_second": float,
    "texts_per_second": float,
    "ceiling_share": float,
    "passes": list,
    "first_pass": float,
    "note": str,
}


def test_the_report_has_every_condition(report: dict[str, Any]) -> None:
    assert report["schema"] == 1
    conditions = report["machine"]
    assert {"cpu", "cpu_features", "cores", "memory_bytes", "cores_in_use"} <= conditions.keys()
    assert (
        conditions["versions"]["torch"] == torch.__version__.split("+")[0]
        or "+" in (conditions["versions"]["torch"])
    )
    assert {"revision", "compiler", "python", "gpu", "threads"} <= conditions.keys()
    settings = report["settings"]
    assert settings["dtype"] == "float32" and settings["threads"] == 1 and settings["docs"] == 2
    assert report["ceiling"]["matmul_flops"] > 0 and report["ceiling"]["copy_bytes"] > 0
    assert report["published"]["source"].startswith("Warner et al. 2024")


def test_every_workload_has_complete_entries(report: dict[str, Any]) -> None:
    names = [workload["name"] for workload in report["workloads"]]
    assert sorted(names) == sorted(
        ["fixed 128", "fixed 512", "variable 512", "fixed 2048", "fixed 8192", "variable 8192"]
    )
    for workload in report["workloads"]:
        assert (
            workload["flops"]
            == forward_flops(SIZES["tiny"], [workload["longest"]] * workload["texts"])
            or workload["kind"] == "variable"
        )
        assert workload["best"]["peer"] == "transformers sdpa"
        if workload["kind"] == "fixed":  # each in the batches that suit it
            assert workload["best_as_given"] is None
        else:
            assert workload["best_as_given"]["split"].startswith("as given")
        for entry in workload["entries"]:
            assert {name: type(entry[name]) for name in ENTRY} == ENTRY
            ratio = entry["ours_is_faster_by"]
            if entry["peer"] in BASIS:
                assert ratio is None
            else:
                assert ratio["low"] <= ratio["first_quartile"] <= ratio["median"]
                assert ratio["median"] <= ratio["third_quartile"] <= ratio["high"]
                assert ratio["pairs"] == len(entry["passes"]) >= 1
            speed = workload["tokens"] / median(entry["passes"])
            assert entry["tokens_per_second"] == pytest.approx(speed, rel=1e-2)


def test_a_slow_machine_gets_fewer_layers() -> None:
    setting = Setting.make("tiny", torch.float32, torch.device("cpu"), 1)
    preset = dataclasses.replace(PRESETS["cpu"], docs=2, slow_layers=1)
    slow = runner.fitted(setting, dataclasses.replace(preset, pass_seconds=0.0))
    assert slow.config == setting.config.replace(num_hidden_layers=1)
    for change in (
        {"pass_seconds": 1e9},
        {"pass_seconds": None},
        {"pass_seconds": 0.0, "layers": 2},
    ):
        assert runner.fitted(setting, dataclasses.replace(preset, **change)) is setting
    settings = {"size": "base", "layers": 6, "layers_of_size": 22, "dtype": "float32"}
    assert model_name({"settings": settings}) == "ModernBERT-base, 6 of 22 layers, float32"
    assert model_name({"settings": settings | {"layers": 22}}) == "ModernBERT-base, float32"


def test_a_busy_machine_is_a_warning() -> None:
    assert runner.busy(0.1, 2) == runner.busy(None, 2) == []
    (warning,) = runner.busy(0.9, 2)
    assert "0.9 of 2 cores" in warning


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="Linux counts ticks in /proc/stat")
def test_who_uses_the_cores_is_counted() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        used = machine.cores_in_use(0.5)
    finally:
        busy.kill()
        busy.wait()
    assert used is not None and 0.5 < used <= (os.cpu_count() or 1)


def test_the_report_lists_who_is_absent(report: dict[str, Any]) -> None:
    states = {state["name"]: state for state in report["peers"]}
    assert states["transformers sdpa"]["state"] == "measured"
    assert states["transformers flash-attn"]["state"] == "absent"
    assert states["transformers flash-attn"]["reason"]
    notes = {row["note"] for row in report["largest_batch"]}
    assert report["settings"]["largest"] == 0 and notes == set()


def test_files_and_tables_show_the_same(run: tuple[Any, Path], report: dict[str, Any]) -> None:
    result, folder = run
    (path,) = folder.glob("*.json")
    assert json.loads(path.read_text()) == report
    assert path.stem.startswith(machine.short_name("cpu"))
    table = path.with_suffix(".md").read_text()
    assert table in result.stdout and table == markdown(report)
    for workload in report["workloads"]:
        assert f"## {workload['name']}" in table
    assert "flash-attn runs on CUDA only" in table


def test_published_figures_are_marked_in_the_table(report: dict[str, Any]) -> None:
    assert "published" not in markdown(report)  # nothing of this size was
    base = {**report, "published": published.as_dict("base")}
    lines = [line for line in markdown(base).splitlines() if "ublished" in line]
    marked = ["148100", "147300", "123700", "133800"]
    assert [next(m for m in marked if m in line) for line in lines[:4]] == marked
    assert all("on one RTX 4090" in line for line in lines[:4])
    assert lines[4].startswith("## Published, not measured here") and len(lines) == 5


def test_plots_are_drawn_from_the_report(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {
            "peer": name,
            "texts": 1,
            "tokens_each": length,
            "bytes": length * 1000,
            "note": "",
            "layers": 2,
        }
        for name in ("modernbert", "transformers sdpa")
        for length in (512, 8192)
    ]
    paths = draw({**report, "memory": rows}, tmp_path, "x")
    assert [path.name for path in paths] == ["x-paper.png", "x-length.png", "x-memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(FIGURES) == 4  # real text needs the data


def test_a_preset_for_a_gpu_needs_one(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    result = CliRunner().invoke(bench, ["--preset", "h200", "--out", str(tmp_path)])
    assert isinstance(result.exception, ValueError)
    assert "needs an NVIDIA GPU" in str(result.exception)


def test_end_to_end_gives_the_vectors_of_sentence_transformers(
    shared_data: Path, setting: Setting
) -> None:
    pytest.importorskip("sentence_transformers")
    job = even_texts(shared_data, docs=2, tokens=64)
    assert isinstance(job, Workload)
    both = end_to_end.end_to_end(setting, job, tokenizer_file(shared_data))
    assert both.missing is None and both.agreement is not None and both.agreement > 0.9999
    for contestant in (both.ours, *both.others):
        contestant.run()
    assert len(both.others) == 2 + len(end_to_end.BATCH_SIZES)


# -- two revisions --------------------------------------------------------------------------

STUB = """
import torch
class ModernBertConfig:
    def __init__(self, **sizes): self.sizes = sizes
class Output:
    def __init__(self, x): self.last_hidden_state = x
class ModernBertModel(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        print("a line that must not disturb the answers")
    def forward(self, ids, mask):
        from modernbert.kernels import FACTOR
        return Output(ids * mask * FACTOR)
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two revisions of a stand-in for the library, and changes on top."""
    root = tmp_path / "repository"
    for folder, text in (("modernbert", STUB), ("kernels", "FACTOR = 1.0")):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").write_text(text)

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True)

    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("comparing revisions needs git")
    git("add", ".")
    git("commit", "-qm", "one")
    (root / "kernels" / "__init__.py").write_text("FACTOR = 2.0")
    git("commit", "-qam", "two")
    (root / "kernels" / "__init__.py").write_text("FACTOR = 3.0")
    monkeypatch.setattr(machine, "repository", lambda: root)
    return root


def test_revisions_are_unpacked_as_they_were(checkout: Path, tmp_path: Path) -> None:
    for number, (revision, factor) in enumerate((("HEAD~1", 1), ("HEAD", 2), (".", 3))):
        folder = tmp_path / str(number)
        folder.mkdir()
        regression.unpack(revision, folder)
        text = (folder / "modernbert" / "kernels" / "__init__.py").read_text()
        assert text == f"FACTOR = {factor}.0" and not (folder / "kernels").exists()
    with pytest.raises(ValueError, match="git rev-parse"):
        regression.unpack("no-such-branch", tmp_path)


def test_two_revisions_are_timed_in_turn(checkout: Path, setting: Setting) -> None:
    jobs = [fixed(16, 3), variable(256, 64, 512, 2)]
    found = regression.compare_revisions(
        ("HEAD~1", "."), jobs, setting, batch_tokens=32, rounds=3, say=lambda line: None
    )
    assert [work["name"] for work in found["workloads"]] == ["fixed 16", "variable 512"]
    for work in found["workloads"]:
        assert [len(passes) for passes in work["passes"]] == [3, 3]
        assert work["second_is_faster_by"]["pairs"] == 3
        assert work["relative_difference_of_results"] == pytest.approx(2.0)
    assert len(found["commits"]["HEAD~1"]) == 40 and found["commits"]["."] == "."
    json.dumps(found, allow_nan=False)


def test_a_revision_that_does_not_run_says_so(checkout: Path, setting: Setting) -> None:
    (checkout / "modernbert" / "__init__.py").write_text("raise ImportError('half-written')")
    with pytest.raises(ValueError, match="revision . failed:(.|\n)*half-written"):
        regression.compare_revisions(
            (".", "HEAD"), [fixed(8, 1)], setting, batch_tokens=8, rounds=1, say=lambda line: None
        )


def test_this_library_can_be_compared_with_itself(setting: Setting) -> None:
    if machine.repository() is None:
        pytest.skip("comparing revisions needs git and a checkout")
    found = regression.compare_revisions(
        (".", "."), [fixed(16, 2)], setting, batch_tokens=32, rounds=1, say=lambda line: None
    )
    (work,) = found["workloads"]
    assert work["relative_difference_of_results"] == 0.0
