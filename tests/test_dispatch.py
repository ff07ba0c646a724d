"""The table that chooses a backend, asked about machines that are not here."""

import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from modernbert import ModernBertConfig, ModernBertModel, doctor, kernels, pack
from modernbert.benchmark import attention, runner
from modernbert.benchmark.peers import Setting
from modernbert.benchmark.runner import Options
from modernbert.benchmark.workloads import fixed
from modernbert.cli import main
from modernbert.kernels import dispatch
from modernbert.kernels.dispatch import Machine, Need

TRITON = {"triton": (3, 9)}
FA2, FA3, FA4 = {"flash-attn": (2, 8)}, {"flash-attn-3": (3, 0)}, {"flash-attn-4": (4, 0)}
HALF, FULL = torch.float16, torch.float32


def gpu(major: int, minor: int, memory: int = 80, **facts: object) -> Machine:
    options: dict = {"torch": (2, 13), "packages": TRITON} | facts
    return Machine("cuda", (major, minor), memory, **options)


OURS = "our kernels through Triton 3.9 for {}: RoPE on load, windows"
EFFICIENT = "PyTorch's memory-efficient attention without padding, local layers in strided blocks"
BLOCKED = "scaled_dot_product_attention, any device and dtype"
VARLEN = "PyTorch's own variable-length flash attention"
# Machine, need, what "auto" takes and its sentence, and another backend with its own.
EXPECTED = {
    "cpu": (
        Machine(), Need(FULL), "blocked", BLOCKED,
        "triton", "needs an NVIDIA GPU, this is cpu",
    ),
    "cpu with triton": (
        Machine(packages=TRITON), Need(FULL), "blocked", BLOCKED,
        "turing", "needs an NVIDIA GPU, this is cpu",
    ),
    "mac": (
        Machine("mps"), Need(HALF), "blocked", BLOCKED,
        "flash", "needs an NVIDIA GPU, this is mps",
    ),
    "amd": (
        Machine("rocm"), Need(HALF), "blocked", BLOCKED,
        "flash", "needs an NVIDIA GPU, this is rocm",
    ),
    "t4": (
        gpu(7, 5, 16), Need(HALF), "turing", EFFICIENT,
        "triton", "Triton has no tensor cores on sm_75: sm_80 or newer needed",
    ),
    "t4 with flash-attn": (
        gpu(7, 5, 16, packages=TRITON | FA2), Need(HALF), "turing", EFFICIENT,
        "flash", "flash attention needs sm_80 or newer, this is sm_75",
    ),
    "t4, bfloat16": (
        gpu(7, 5, 16), Need(torch.bfloat16), "blocked", BLOCKED,
        "turing", "sm_75 has no bfloat16: use float16",
    ),
    "t4, training": (
        gpu(7, 5, 16), Need(HALF, training=True), "turing", EFFICIENT, "blocked", BLOCKED,
    ),
    "a100": (gpu(8, 0), Need(), "triton", OURS.format("sm_80"), "flash", VARLEN),
    "a100, float32": (
        gpu(8, 0), Need(FULL), "turing", EFFICIENT,
        "triton", "computes in float16 and bfloat16, not in float32",
    ),
    "a100, float64": (
        gpu(8, 0), Need(torch.float64), "blocked", BLOCKED, "turing", "has no float64",
    ),
    "a100 without triton": (
        gpu(8, 0, packages={}), Need(), "flash", VARLEN,
        "triton", "triton is not installed: pip install triton",
    ),
    "a100, old torch": (
        gpu(8, 0, torch=(2, 11), packages={}), Need(), "flash",
        "PyTorch's own variable-length flash attention, by its internal operator",
        "triton", "triton is not installed: pip install triton",
    ),
    "a100, old triton": (
        gpu(8, 0, packages={"triton": (3, 2)}), Need(), "flash", VARLEN,
        "triton", "Triton 3.2 is too old: 3.6 or newer needed",
    ),
    "a100, torch 2.11 with triton 3.6": (
        gpu(8, 0, torch=(2, 11), packages={"triton": (3, 6)}), Need(), "triton",
        "our kernels through Triton 3.6 for sm_80: RoPE on load, windows",
        "flash", "PyTorch's own variable-length flash attention, by its internal operator",
    ),
    "rtx 4090, training": (
        gpu(8, 9, 24), Need(training=True), "triton", OURS.format("sm_89"), "flash", VARLEN,
    ),
    "rtx 4090, flash-attn": (
        gpu(8, 9, 24, packages=FA2), Need(), "flash", "flash-attn 2",
        "triton", "triton is not installed: pip install triton",
    ),
    "h200, flash-attn 3": (
        gpu(9, 0, 141, packages=TRITON | FA3 | FA2), Need(), "triton", OURS.format("sm_90"),
        "flash", "flash-attn 3",
    ),
    "a100, flash-attn 3": (
        gpu(8, 0, packages=FA3 | FA2), Need(), "flash", "flash-attn 2",
        "triton", "triton is not installed: pip install triton",
    ),
    "b200, flash-attn 4": (
        gpu(10, 0, 180, packages=TRITON | FA4), Need(), "triton", OURS.format("sm_100"),
        "flash", "flash-attn 4 (beta)",
    ),
    "b200, flash-attn 4, training": (
        gpu(10, 0, 180, packages=TRITON | FA4), Need(training=True), "triton",
        OURS.format("sm_100"), "flash", VARLEN,
    ),
    "h200, heads of 48": (
        gpu(9, 0), Need(head_size=48), "flash", VARLEN,
        "triton", "heads of 48; it has kernels for 32, 64 and 128",
    ),
    "h200, heads of 12": (
        gpu(9, 0), Need(head_size=12), "blocked", BLOCKED,
        "flash", "heads of 12; they must be multiples of 8 up to 256",
    ),
    "h200, attention dropout": (
        gpu(9, 0), Need(training=True, dropout=True), "blocked", BLOCKED,
        "triton", "has no attention dropout",
    ),
    "cpu taken for a T4": (
        Machine("cpu", (7, 5), pretended=True), Need(HALF), "turing", EFFICIENT,
        "flash", "flash attention needs sm_80 or newer, this is sm_75",
    ),
    "cpu taken for an A100": (
        Machine("cpu", (8, 0), packages=TRITON, pretended=True), Need(HALF), "turing", EFFICIENT,
        "triton", "on cpu Triton runs in its interpreter only: TRITON_INTERPRET=1",
    ),
    "cpu taken for an A100, interpreted": (
        Machine("cpu", (8, 0), packages=TRITON, interpreted=True, pretended=True), Need(FULL),
        "triton", "our kernels through Triton 3.9 in the interpreter: RoPE on load, windows",
        "flash", "flash attention runs on CUDA only, not on cpu",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_the_table(name: str) -> None:
    machine, need, backend, sentence, other, why = EXPECTED[name]
    states = {state.name: state for state in dispatch.table(machine, need)}
    assert tuple(states) == kernels.BACKENDS
    assert dispatch.choose(machine, need) == backend
    assert states[backend].usable and states[backend].reason == sentence
    assert states[other].reason == why


@given(
    device=st.sampled_from(["cpu", "cuda", "mps", "rocm"]),
    capability=st.sampled_from([None, (7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (10, 0), (12, 0)]),
    packages=st.sets(st.sampled_from(list(dispatch.PACKAGES))),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    training=st.booleans(),
    head_size=st.integers(1, 300),
    torch_version=st.sampled_from([(2, 6), (2, 11), (2, 12), (2, 15)]),
)
def test_every_machine_has_a_backend_and_every_backend_a_reason(
    device: str,
    capability: tuple[int, int] | None,
    packages: set[str],
    dtype: torch.dtype,
    training: bool,
    head_size: int,
    torch_version: tuple[int, int],
) -> None:
    installed = {name: (9, 9) for name in packages}
    machine = Machine(device, capability, 16, torch_version, installed)
    need = Need(dtype, training, head_size)
    states = dispatch.table(machine, need)
    assert all(state.reason for state in states)
    chosen = dispatch.choose(machine, need)
    assert next(state for state in states if state.name == chosen).usable
    if capability is None or device != "cuda":
        assert chosen in ("blocked", "turing")
    if capability is not None and capability < (8, 0):
        assert chosen != "triton"  # no tensor cores


@pytest.mark.parametrize(
    ("machine", "dtype", "expected"),
    [
        (Machine(packages=TRITON), FULL, False),
        (gpu(7, 5), HALF, True),
        (gpu(7, 5), torch.bfloat16, False),
        (gpu(7, 0), HALF, False),
        (gpu(9, 0), torch.bfloat16, True),
        (gpu(9, 0), torch.float64, False),
        (gpu(9, 0, packages={}), torch.bfloat16, False),
        (Machine("cpu", (8, 0), packages=TRITON), FULL, False),
        (Machine("cpu", (8, 0), packages=TRITON, interpreted=True), FULL, True),
    ],
)
def test_where_the_fused_kernels_run(machine: Machine, dtype: torch.dtype, expected: bool) -> None:
    assert dispatch.fuses(machine, dtype) is expected


# Capability, memory, multiprocessors, width of a matrix tile, tokens of whole waves.
WAVES = {
    "t4": (7, 5, 16, 40, 128, 2560),
    "a100": (8, 0, 40, 108, 256, 4608),
    "a10": (8, 6, 24, 72, 128, 1536),
    "rtx 3090": (8, 6, 24, 82, 128, 5248),
    "rtx 4090": (8, 9, 24, 128, 128, 8192),
    "l4": (8, 9, 24, 58, 128, 3712),
    "h100 pcie": (9, 0, 80, 114, 256, 4864),
    "h200": (9, 0, 141, 132, 256, 5632),
    "rtx 5090": (12, 0, 32, 170, 128, 10880),
}


@pytest.mark.parametrize("name", WAVES)
def test_token_budgets_fill_whole_waves(name: str) -> None:
    major, minor, memory, processors, wide, wave = WAVES[name]
    budget = dispatch.token_budget(gpu(major, minor, memory, processors=processors))
    assert budget % wave == 0 and wave <= budget <= 65_536
    small = dispatch.token_budget(gpu(major, minor, 1, processors=processors))
    assert wave <= small < budget and small % wave == 0
    for width in (768, 2304):  # Wo and Wqkv: no processor is idle in the last wave
        assert budget // 128 * (width // wide) % processors == 0
    tiles = budget // 128 * 12  # of attention, times heads, where sequences fill them
    assert tiles % processors == 0


def test_a_token_budget_without_a_gpu() -> None:
    assert dispatch.token_budget(Machine()) == 2048
    assert dispatch.token_budget(Machine("cpu", (9, 0), pretended=True)) == 2048
    assert dispatch.token_budget(Machine("mps")) == 8192


# -- 8-bit linear layers, deterministic mode --------------------------------------------------

SCALES = "; a scale for each token and each channel"
EIGHT_BIT = {
    "cpu": (Machine(), "oneDNN" + SCALES, "needs an NVIDIA GPU, this is cpu"),
    "mac": (Machine("mps"), *["needs an NVIDIA GPU, this is mps"] * 2),
    "amd": (Machine("rocm"), *["needs an NVIDIA GPU, this is rocm"] * 2),
    "v100": (
        gpu(7, 0),
        "needs sm_75 or newer, this is sm_70",
        "needs sm_89 or newer, this is sm_70",
    ),
    "t4": (gpu(7, 5), "cuBLAS" + SCALES, "needs sm_89 or newer, this is sm_75"),
    "a100": (gpu(8, 0), "cuBLAS" + SCALES, "needs sm_89 or newer, this is sm_80"),
    "rtx 4090": (gpu(8, 9), "cuBLAS" + SCALES, "cuBLAS" + SCALES),
    "rtx 4090, windows": (
        gpu(8, 9, windows=True),
        "cuBLAS" + SCALES,
        "cuBLAS, scaled afterwards" + SCALES,
    ),
    "h200": (gpu(9, 0), "cuBLAS" + SCALES, "cuBLAS" + SCALES),
    "b200": (gpu(10, 0), "cuBLAS" + SCALES, "cuBLAS" + SCALES),
    "rtx 5090": (gpu(12, 0), "cuBLAS" + SCALES, "cuBLAS, scaled afterwards" + SCALES),
    "cpu taken for an h200": (
        Machine("cpu", (9, 0), pretended=True),
        "cuBLAS" + SCALES,
        "cuBLAS" + SCALES,
    ),
}


@pytest.mark.parametrize("name", EIGHT_BIT)
def test_linear_layers_of_8_bits(name: str) -> None:
    machine, int8, fp8 = EIGHT_BIT[name]
    states = dispatch.eight_bit(machine)
    assert [state.name for state in states] == ["int8", "fp8"]
    assert [state.reason for state in states] == [int8, fp8]
    assert [state.usable for state in states] == [SCALES in reason for reason in (int8, fp8)]


def test_deterministic_gradients_of_flash_attention() -> None:
    """PyTorch's own flash attention heeds PyTorch's switch only; flash-attn is told per call."""
    asked = Need(training=True, deterministic=True)
    plain = gpu(8, 0, packages={})
    states = {state.name: state for state in dispatch.table(plain, asked)}
    assert not states["flash"].usable
    assert "use_deterministic_algorithms(True)" in states["flash"].reason
    assert dispatch.choose(plain, Need(deterministic=True)) == "flash"  # inference always is
    assert dispatch.choose(gpu(8, 0, packages=FA2), asked) == "flash"
    assert dispatch.choose(gpu(8, 0), asked) == "triton"


def test_doctor_says_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "devices", lambda: [torch.device("cuda", 0)])
    monkeypatch.setattr(doctor, "_accelerators", lambda: iter(()))
    machine = gpu(8, 9, 24, processors=128)
    monkeypatch.setattr(dispatch, "this_machine", lambda device: machine)
    lines = dict(doctor.machine())
    assert lines["cuda:0 int8"] == "cuBLAS" + SCALES
    assert lines["cuda:0 fp8"] == "cuBLAS" + SCALES
    assert lines["cuda:0 batches"] == "65536 tokens"
    assert lines["cuda:0 repeats"].startswith("not asked for")
    machine = gpu(7, 5, 16, processors=40)
    assert dict(doctor.machine())["cuda:0 fp8"] == "no: needs sm_89 or newer, this is sm_75"


# -- this machine -----------------------------------------------------------------------------


def test_pretending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for name, capability in (("sm_75", (7, 5)), ("sm_90", (9, 0)), ("sm_120", (12, 0))):
        monkeypatch.setenv("MODERNBERT_PRETEND", name)
        machine = dispatch.this_machine(torch.device("cpu"))
        assert machine.capability == capability and machine.pretended
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_75")
    states = {state.name: state for state in kernels.available_backends("cpu", HALF)}
    assert states["turing"].usable and not states["flash"].usable
    for bad in ("75", "sm_", "sm_7", "T4", "sm_7.5", "sm_٧٥"):
        monkeypatch.setenv("MODERNBERT_PRETEND", bad)
        with pytest.raises(ValueError, match="expected something like sm_75"):
            dispatch.pretended()
    monkeypatch.delenv("MODERNBERT_PRETEND")
    assert dispatch.this_machine(torch.device("cpu")).capability is None


def test_the_facts_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    dispatch._machine.cache_clear()
    facts = SimpleNamespace(
        major=8, minor=9, total_memory=24 * 2**30 - 5, multi_processor_count=128
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    machine = dispatch.this_machine(torch.device("cuda", 0))
    assert machine.capability == (8, 9) and machine.memory == 24 and not machine.pretended
    assert machine.processors == 128
    assert machine.architecture == "sm_89"
    assert dispatch._two("2.13.0+cpu") == (2, 13) and dispatch._two("2.12rc1") == (2, 12)
    dispatch._machine.cache_clear()


def test_a_backend_that_cannot_run_says_why() -> None:
    options: dict = {"window": 2, "dtype": FULL}
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    for name in ("turing", "flash", "triton"):
        with pytest.raises(ValueError, match=f"attention='{name}' cannot run here: needs an NVID"):
            kernels.plan_attention(cu_seqlens, 2, (2,), backend=name, **options)


def test_attention_alone_is_measured_for_every_usable_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_75")
    setting = Setting.make("tiny", HALF, torch.device("cpu"), 1)
    rows = attention.measure_attention(setting, [fixed(64, 2)], lambda line: None)
    found = {(row["kind"], row["backend"]) for row in rows}
    assert found == {(k, b) for k in ("window", "full") for b in ("blocked", "turing")}
    assert all(0 < row["forward"] < 60 and 0 < row["both"] < 60 for row in rows)
    table = attention.attention_rows({"attention": rows})
    assert len(table) == 5 and {len(row) for row in table} == {6}
    assert attention.attention_rows({}) == table[:1]


def test_a_failed_self_check_is_said() -> None:
    good = {"backend": "triton", "device": "cuda:0", "dtype": "bfloat16", "result": "local"}
    good |= {"error": 1e-3, "bound": 2e-3, "passed": True}
    bad = good | {"error": 0.5, "passed": False}
    (line,) = attention.failures({"self_check": [good, bad]})
    assert "triton on cuda:0 in bfloat16: local, error 5.00e-01, allowed 2.00e-03" in line


def test_bench_pretends_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The option reaches the table that chooses, and the settings of the run."""
    seen = {}

    def run(options: Options, say: object) -> dict:
        seen.update(dtype=options.settings.dtype, capability=dispatch.pretended())
        raise ValueError("enough seen")

    monkeypatch.setenv("MODERNBERT_PRETEND", "")
    monkeypatch.setattr(runner, "run", run)
    result = CliRunner().invoke(main, ["bench", "--preset", "h200", "--pretend", "sm_75"])
    assert seen == {"dtype": "float16", "capability": (7, 5)}, result.output
    result = CliRunner().invoke(main, ["bench", "--preset", "h200", "--pretend", "T4"])
    assert result.exit_code and "expected something like sm_75" in result.output


def test_without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_80")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_installed", lambda name: "9.9.9")
    dispatch._machine.cache_clear()
    assert dispatch.fuses_on("cpu", None, FULL)
    with dispatch.unfused():
        assert not dispatch.fuses_on("cpu", None, FULL)
    assert dispatch.fuses_on("cpu", None, FULL)
    dispatch._machine.cache_clear()


def test_a_cpu_needs_neither_triton_nor_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("triton", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    config = ModernBertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        local_attention=8,
    )
    model = ModernBertModel(config)
    model(pack([[1, 2, 3], [4] * 20])).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
