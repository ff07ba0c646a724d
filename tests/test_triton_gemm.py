"""The linear layers in Triton against float64, and optimized models, interpreted or on a GPU.

Memory that PyTorch hands out unwritten is filled with NaN, so that a lane which the kernel forgets
to write shows.
"""

from collections.abc import Iterator

import pytest
import seeded  # noqa: F401
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from modernbert import (  # noqa: E402
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertModel,
    PackedBatch,
    optimized,
    pack,
)
from modernbert.benchmark import linears  # noqa: E402
from modernbert.benchmark.peers import OursOptimized, Setting, random_weights  # noqa: E402
from modernbert.kernels import reference, triton_attention, triton_gemm  # noqa: E402
from modernbert.kernels.triton_gemm import Tiling, fold, linear  # noqa: E402

ROWS, COLUMNS, DEPTH = 16, 32, 16
EPS = 1e-5
HALVES = st.sampled_from([torch.bfloat16, torch.float16])
TOKENS = st.one_of(
    st.sampled_from([0, 1, ROWS - 1, ROWS, ROWS + 1, 3 * ROWS + 5]), st.integers(0, 40)
)
INPUTS = st.sampled_from([8, DEPTH, DEPTH + 1, 3 * DEPTH - 1, 96])
OUTPUTS = st.sampled_from([2, COLUMNS - 2, COLUMNS, COLUMNS + 2, 3 * COLUMNS])


@pytest.fixture(autouse=True)
def _small_tiles_on_poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cut = Tiling(ROWS, COLUMNS, DEPTH, 4, 2)
    monkeypatch.setattr(triton_gemm, "tiling", lambda *_: cut)
    monkeypatch.setattr(triton_gemm, "GROUP", 2)  # the last group is not full
    torch.use_deterministic_algorithms(True)  # fills empty() with NaN
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale + shift).to(dtype).to(DEVICE)


def check(found: Tensor, usual: Tensor, exact: Tensor) -> None:
    """|found - exact| <= 2 |usual - exact| in the root mean square, plus two roundings."""
    assert found.shape == exact.shape and found.dtype == usual.dtype and exact.dtype == torch.double
    assert found.isfinite().all()
    rounding = torch.finfo(found.dtype).eps
    allowed = 2 * (usual.double() - exact).norm() + rounding * exact.norm()
    assert (found.double() - exact).norm() <= allowed


def plain(
    x: Tensor, weight: Tensor, norm: Tensor | None, residual: Tensor | None, gated: bool
) -> Tensor:
    """Step by step, each result rounded to the dtype of x."""
    if norm is not None:
        x = F.layer_norm(x, norm.shape, norm, None, EPS)
    y = F.linear(x, weight)
    y = reference.glu(y) if gated else y
    return y if residual is None else residual + y


def compare(
    x: Tensor,
    weight: Tensor,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    gated: bool = False,
) -> None:
    given = (x, weight, norm, residual)
    exact = plain(*(None if t is None else t.double() for t in given), gated)  # type: ignore[arg-type]
    sums = None
    folded = weight
    if norm is not None:
        folded, sums = fold(weight, norm)
    found = linear(x, folded, sums=sums, residual=residual, eps=EPS, gated=gated)
    check(found, plain(x, weight, norm, residual, gated), exact)


@settings(max_examples=30)
@given(
    tokens=TOKENS, inputs=INPUTS, outputs=OUTPUTS, dtype=HALVES,
    norm=st.booleans(), add=st.booleans(), gated=st.booleans(),
)  # fmt: skip
@example(tokens=17, inputs=96, outputs=34, dtype=torch.bfloat16, norm=True, add=False, gated=True)
@example(tokens=17, inputs=96, outputs=34, dtype=torch.float16, norm=True, add=False, gated=False)
@example(tokens=33, inputs=47, outputs=30, dtype=torch.bfloat16, norm=False, add=True, gated=False)
def test_every_variant(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, norm: bool, add: bool, gated: bool
) -> None:
    x = draw(tokens, inputs, dtype=dtype, scale=3, shift=1)
    weight = draw(outputs, inputs, dtype=dtype, scale=inputs**-0.5)
    compare(
        x,
        weight,
        draw(inputs, dtype=dtype, scale=0.3, shift=1) if norm else None,
        draw(tokens, outputs // 2 if gated else outputs, dtype=dtype, scale=2) if add else None,
        gated,
    )


def rows(kind: str, dtype: torch.dtype, inputs: int) -> Tensor:
    """Rows (40, inputs) that are hard to normalise."""
    x = torch.randn(40, inputs, dtype=torch.float64)
    match kind:
        case "mean":  # 100 standard deviations and more from 0
            x += torch.linspace(-300, 300, 40)[:, None].double() * 4
        case "outlier":  # as in trained models' residual streams; in the block shifted by
            x[:, 3] += 3e3
        case "late outlier":
            x[:, -1] -= 3e3
        case "large":
            x *= 1e3
        case "small":  # eps decides
            x *= 1e-3
    return x.to(dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mean", "outlier", "late outlier", "large", "small"])
@pytest.mark.parametrize("gated", [False, True])
def test_rows_that_are_hard_to_normalise(kind: str, dtype: torch.dtype, gated: bool) -> None:
    inputs = 384
    weight = draw(36, inputs, dtype=dtype, scale=inputs**-0.5, shift=0.05)  # rows with a mean
    norm = draw(inputs, dtype=dtype, scale=0.5, shift=1)
    compare(rows(kind, dtype, inputs), weight, norm, None, gated)


def test_the_variance_of_a_row_far_from_zero() -> None:
    """E[x^2] - E[x]^2 in float32 would be off by a tenth here; ours by a thousandth at most."""
    inputs = 64
    x = torch.full((16, inputs), 2048.0, dtype=torch.float16, device=DEVICE)
    x[:, ::2] += 2  # the spacing of float16 there; variance 1
    weight = torch.eye(inputs, dtype=torch.float16, device=DEVICE)
    ones = torch.ones(inputs, dtype=torch.float16, device=DEVICE)
    folded, sums = fold(weight, ones)
    found = linear(x, folded, sums=sums, eps=0.0).double()
    exact = F.layer_norm(x.double(), (inputs,))
    assert (found - exact).abs().max() <= 1e-3 * exact.abs().max()


def test_folding_leaves_rows_that_sum_to_rounding() -> None:
    weight, norm = draw(40, 96, dtype=torch.bfloat16, shift=1.0), draw(96, dtype=torch.bfloat16)
    folded, sums = fold(weight, norm)
    assert folded.dtype == torch.bfloat16 and sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), folded.double().sum(1), atol=1e-6, rtol=1e-6)
    # 96 roundings of numbers of about 1.4, half a unit in the last place each at most
    assert sums.abs().max() < 0.2 < (weight.double() * norm.double()).sum(1).abs().max()


def test_narrow_sums_cost_little_accuracy() -> None:
    """float16 sums of a step, added up in float32: the interpreter rounds a step once."""
    x, weight = draw(20, 96, dtype=torch.float16), draw(34, 96, dtype=torch.float16, scale=0.1)
    exact = x.double() @ weight.double().T
    wide, narrow = (linear(x, weight, narrow=narrow).double() for narrow in (False, True))
    errors = [(found - exact).norm() / exact.norm() for found in (wide, narrow)]
    assert errors[0] < errors[1] < 2e-3  # they are sums of float16 indeed


def test_the_operator_is_registered() -> None:
    """Shapes that a compiler is told, and inputs that stay as they are."""
    x, weight = draw(5, 32, dtype=torch.float16), draw(8, 32, dtype=torch.float16)
    sums, residual = torch.zeros(8, device=DEVICE), draw(5, 4, dtype=torch.float16)
    op = torch.ops.modernbert.linear.default
    torch.library.opcheck(op, (x, weight, sums, residual, 1e-5, True, False))
    torch.library.opcheck(op, (x, weight, None, None, 0.0, False, False))


# -- the model --------------------------------------------------------------------------------

CONFIG = ModernBertConfig(
    vocab_size=60,
    hidden_size=32,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=1,
    global_attn_every_n_layers=2,
    pad_token_id=0,
    local_attention=16,
)


@pytest.fixture
def as_an_a100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_80")
    larger, cut = Tiling(32, 64, 32, 4, 2), triton_attention.Tiling(32, 32, 4, 2, split=True)
    monkeypatch.setattr(triton_gemm, "tiling", lambda *_: larger)
    monkeypatch.setattr(triton_attention, "tiling", lambda *_: cut)


def make(
    dtype: torch.dtype, kind: type = ModernBertForMaskedLM, config: ModernBertConfig = CONFIG
) -> ModernBertForMaskedLM:
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # larger than at the start of training: errors show
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            elif "norm" in name:  # so does a weight that is folded where it does not belong
                parameter.normal_(1.0, 0.3)
            parameter.copy_(parameter.bfloat16().half())
    return model.to(DEVICE, dtype).eval()


def batch_of(lengths: tuple[int, ...]) -> PackedBatch:
    generator = torch.Generator().manual_seed(1)
    return pack([torch.randint(1, 60, (n,), generator=generator) for n in lengths], device=DEVICE)


def states(model: ModernBertForMaskedLM, batch: PackedBatch) -> tuple[Tensor, list[Tensor]]:
    """Logits and the states of every layer."""
    out = model(batch, output_hidden_states=True)
    return out.logits, list(out.hidden_states)


@pytest.mark.usefixtures("as_an_a100")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_optimized_masked_lm(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of((17, 1, 30))
    ours = make(dtype)
    exact = ModernBertForMaskedLM(CONFIG, attention="reference").to(DEVICE).double().eval()
    exact.load_state_dict({n: x.double() for n, x in ours.state_dict().items()})
    plain = ModernBertForMaskedLM(CONFIG, attention="reference").to(DEVICE, dtype).eval()
    plain.load_state_dict(ours.state_dict())
    called: list[tuple[bool, bool, bool]] = []
    launch = triton_gemm._launch_linear

    def record(x: Tensor, w: Tensor, sums: Tensor | None, add: Tensor | None, *o: bool) -> Tensor:
        called.append((sums is not None, add is not None, o[1]))
        return launch(x, w, sums, add, *o)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_gemm, "_launch_linear", record)
    with torch.no_grad():
        truth = states(exact, batch)
        usual = states(plain, batch)
        assert ours.optimize() is ours
        found = states(ours, batch)
        first = ours.model(batch, first_only=True).last_hidden_state
    layer = [(True, False, False), (False, True, False), (True, False, True), (False, True, False)]
    assert called == 2 * (3 * layer)[1:]  # the first layer has no norm, and nothing to fuse
    for x, y, z in zip(
        [found[0], *found[1]], [usual[0], *usual[1]], [truth[0], *truth[1]], strict=True
    ):
        check(x, y, z)
    starts = batch.cu_seqlens[:-1].long()
    check(first, usual[1][-1][starts], truth[1][-1][starts])


@pytest.mark.usefixtures("as_an_a100")
@pytest.mark.parametrize(
    "fused",
    [
        (("MLP Wo",), (), ("Wqkv", "attention Wo")),
        ((), ("Wqkv", "Wi"), ("attention Wo", "MLP Wo")),
    ],
)
def test_any_mixture_of_ours_and_cublas(fused: tuple[tuple[str, ...], ...]) -> None:
    """What one layer leaves to add the next one adds."""
    batch = batch_of((9, 20))
    model: ModernBertModel = make(torch.float16).model
    with torch.no_grad():
        expected = model(batch).last_hidden_state
        model.optimize()
        for layer, names in zip(model.layers, fused, strict=True):
            assert isinstance(layer, optimized.OptimizedLayer)
            layer.fused = {16: frozenset(optimized.LINEARS), 64: frozenset(names)}
        found = model(batch).last_hidden_state
    assert (found - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.usefixtures("as_an_a100")
def test_what_is_measured_is_the_layer_and_ties_go_to_cublas() -> None:
    model = make(torch.float16).model
    runs = []

    def seconds(run: object, device: torch.device) -> float:
        assert callable(run)
        fused = run.func.fused[512]  # type: ignore[attr-defined]
        runs.append(fused)
        return 1.0 - 0.1 * ("Wi" in fused) - 0.005 * ("Wqkv" in fused)  # the latter: a tie

    assert optimized.fastest(model, 512, False, seconds) == {"Wi"}
    assert len(set(runs)) == len(runs) == 16 and runs[0] == frozenset()
    entries = {512: frozenset({"Wi"}), 4096: frozenset({"Wqkv"})}
    found = [optimized.by_tokens(entries, n) for n in (1, 512, 513, 4096, 9999)]
    assert found == [entries[512]] * 2 + [entries[4096]] * 3


@pytest.mark.usefixtures("as_an_a100")
def test_one_graph_of_an_optimized_model() -> None:
    torch.compiler.reset()
    model = make(torch.float16, config=CONFIG.replace(num_hidden_layers=2)).model.optimize()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.no_grad():
        for lengths in ((5, 17), (9,)):
            batch = batch_of(lengths)
            expected = model(batch).last_hidden_state
            torch.testing.assert_close(compiled(batch).last_hidden_state, expected)


@pytest.mark.usefixtures("as_an_a100")
def test_what_an_optimized_model_refuses(tmp_path: pytest.TempPathFactory) -> None:
    model = make(torch.float16, ModernBertForSequenceClassification)
    with pytest.raises(ValueError, match="training mode: eval"):
        model.train().optimize()
    with pytest.raises(ValueError, match="choose auto or fused"):
        model.eval().optimize(linears="cublas")
    with pytest.raises(ValueError, match="needs a float16 model"):
        make(torch.bfloat16).optimize(fp16_accumulate=True)
    assert not model.model.optimized
    model.optimize(fp16_accumulate=True)
    with pytest.raises(ValueError, match="optimized already"):
        model.optimize()
    with pytest.raises(ValueError, match="cannot be saved.*load it anew"):
        model.save_pretrained(tmp_path / "out")  # type: ignore[operator]
    assert not list(tmp_path.iterdir())  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model.train()
    with pytest.raises(RuntimeError, match="stays on .* in torch.float16"):
        model.float()
    model.eval().to(DEVICE).half()
    assert not any(p.requires_grad for p in model.model.parameters())
    batch = batch_of((4,))
    assert model(batch).logits.isfinite().all()  # gradients of the head need no switch
    rows = torch.zeros(1, 4, 32, dtype=torch.float16, device=DEVICE, requires_grad=True)
    with pytest.raises(RuntimeError, match="no gradients"):
        model(inputs_embeds=rows)


@pytest.mark.parametrize(
    ("changes", "dtype", "reason"),
    [
        ({}, torch.float32, "float16 and bfloat16, not in float32"),
        ({"mlp_bias": True}, torch.float16, "biases"),
        ({"hidden_activation": "silu"}, torch.float16, "'silu', not the exact gelu"),
    ],
)
def test_what_cannot_be_fused_stays(
    as_an_a100: None, changes: dict[str, object], dtype: torch.dtype, reason: str
) -> None:
    model = make(dtype, config=CONFIG.replace(**changes))
    assert reason in optimized.obstacle(model.model)
    with pytest.raises(ValueError, match="linears='fused' cannot run here"):
        model.optimize(linears="fused")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    model.optimize()
    assert not model.model.optimized and model.tensors_to_save()
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name])


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is here")
def test_a_cpu_keeps_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    model = make(torch.bfloat16)
    layers = list(model.model.layers)
    model.optimize()
    assert list(model.model.layers) == layers and not model.model.optimized
    assert model.train().training and model.float().dtype == torch.float32
    for name, gpu in (("sm_75", "Triton has no tensor cores on sm_75"), ("", "NVIDIA GPU")):
        monkeypatch.setenv("MODERNBERT_PRETEND", name)
        with pytest.raises(ValueError, match=gpu):
            make(torch.float16).optimize(linears="fused")


@pytest.mark.usefixtures("as_an_a100")
def test_the_benchmark_checks_and_times_them(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(
        "tiny", CONFIG, random_weights(ModernBertModel(CONFIG)), torch.float16,
        torch.device(DEVICE), 1,
    )  # fmt: skip
    monkeypatch.setattr(linears, "CHECKED", 40)
    monkeypatch.setattr(linears, "PASSES", 1)
    checks = list(linears.self_check(setting))
    assert len(checks) == 4 and all(check["passed"] for check in checks)
    report = {"linears": linears.measure_linears(setting, 40), "self_check": checks}
    rows = linears.linear_rows(report)
    assert [row[0] for row in rows[1:]] == [check["result"] for check in checks]
    # A wrong kernel is found out.
    with monkeypatch.context() as wrong:
        wrong.setattr(triton_gemm, "fold", lambda weight, _: (weight, torch.zeros(len(weight))))
        found = [check["passed"] for check in linears.self_check(setting)]
    assert found == [False, True, False, True]  # the second and fourth have no norm
    peer = OursOptimized()
    assert peer.missing(setting) is None
    peer.prepare(setting)
    assert peer.model.optimized and "to 32768 tokens" in peer.remark
    monkeypatch.setenv("MODERNBERT_PRETEND", "sm_75")
    assert "no tensor cores on sm_75" in str(OursOptimized().missing(setting))
    assert not linears.measure_linears(setting, 40)
