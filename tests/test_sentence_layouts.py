"""Folders of sentence-transformers, in and out, against the installed sentence-transformers."""

import importlib
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modernbert import SentenceEncoder
from modernbert.pooling import ACTIVATIONS, POOLING_FLAGS, Dense, Normalize, Pooling
from modernbert.weights import CheckpointError

st = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

HIDDEN = 32
TEXTS = [
    "A man is playing a flute.",
    "",
    "x",
    "The quick brown fox jumps over the lazy dog, and then it does so again. " * 6,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好 👋",
]
MODULES, POOL, DENSE = "modules.json", "1_Pooling/config.json", "2_Dense/config.json"
ST, BERT = "config_sentence_transformers.json", "sentence_bert_config.json"
TOLERANCE = {"atol": 1e-6, "rtol": 0}
# Both warn about themselves while they load and save.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def unit_scale(module: torch.nn.Module) -> None:
    """Weights at which every part matters, unlike the usual 0.02."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)
        else:
            scale = 1 if "embeddings" in name else parameter.shape[1] ** -0.5
            parameter.data.normal_(0, scale)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Path:
    """A plain model folder as transformers writes it, with the real tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    config = transformers.ModernBertConfig(
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        local_attention=16,
        classifier_pooling="mean",
    )
    model = transformers.ModernBertModel(config)
    unit_scale(model)
    model.save_pretrained(folder)
    shutil.copyfile(
        shared_data / "tokenizer_modernbert" / "tokenizer.json", folder / "tokenizer.json"
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "mask", "pad", "unk")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def transformer(base: Path) -> Any:
    """`base` as the first module of any sentence-transformers model."""
    return modules_of_st().Transformer(str(base))


def modules_of_st() -> Any:
    return importlib.import_module("sentence_transformers.sentence_transformer.modules")


def saved(folder: Path, *modules: Any, **options: Any) -> Any:
    """A sentence-transformers model, after it was saved in the layout since 5.4."""
    encoder = st.SentenceTransformer(modules=list(modules), device="cpu", **options)
    for module in modules[1:]:
        unit_scale(module)
    encoder.save(str(folder), create_model_card=False)
    return encoder


def to_old_layout(folder: Path) -> Path:
    """Rewrite a folder as sentence-transformers up to 5.3 would have saved it."""
    modules = json.loads((folder / "modules.json").read_text())
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        module["type"] = f"sentence_transformers.models.{kind}"
        path = folder / module["path"] / "config.json"
        if kind == "Pooling":
            new = json.loads(path.read_text())
            modes = new["pooling_mode"]
            modes = [modes] if isinstance(modes, str) else modes
            old = {flag: mode in modes for mode, flag in POOLING_FLAGS.items()}
            old["word_embedding_dimension"] = new["embedding_dimension"]
            path.write_text(json.dumps({**old, "include_prompt": new["include_prompt"]}))
        elif kind == "Normalize":
            shutil.rmtree(path.parent)
        elif kind == "Dense":
            new = json.loads(path.read_text())
            old = {key: new[key] for key in new if not key.startswith("module_")}
            path.write_text(json.dumps(old))
    (folder / "modules.json").write_text(json.dumps(modules))
    settings = {"max_seq_length": 8192, "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


def edited(folder: Path, name: str, change: Any) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def theirs(folder: Path) -> Any:
    return st.SentenceTransformer(str(folder), device="cpu")


def assert_same_vectors(encoder: SentenceEncoder, oracle: Any, **options: Any) -> None:
    options["normalize_embeddings"] = True
    expected = oracle.encode(TEXTS, **options)
    actual = encoder.encode(TEXTS, **options)
    assert expected.shape == actual.shape and actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


MODES = [*POOLING_FLAGS, ("cls", "mean"), ("max", "mean_sqrt_len_tokens", "lasttoken")]


@pytest.mark.parametrize("modes", MODES, ids=str)
@pytest.mark.parametrize("include_prompt", [True, False])
def test_every_pooling_mode_in_both_layouts(
    tmp_path: Path, transformer: Any, modes: Any, include_prompt: bool
) -> None:
    pooling = modules_of_st().Pooling(HIDDEN, modes, include_prompt=include_prompt)
    prompts = {"query": "search_query: ", "document": "", "odd": "search"}
    oracle = saved(tmp_path, transformer, pooling, prompts=prompts)
    for change in (lambda folder: None, to_old_layout):
        change(tmp_path)
        encoder = SentenceEncoder.from_pretrained(tmp_path)
        for options in (
            {},
            {"prompt_name": "query"},
            {"prompt_name": "odd"},
            {"prompt": "Represent the text: "},
        ):
            assert_same_vectors(encoder, oracle, **options)


def test_modes_concatenate_in_the_order_of_the_file(tmp_path: Path, transformer: Any) -> None:
    pooling = modules_of_st().Pooling(HIDDEN, ("mean", "cls"))
    oracle = saved(tmp_path / "new", transformer, pooling)
    encoder = SentenceEncoder.from_pretrained(tmp_path / "new")
    assert_same_vectors(encoder, oracle)
    encoder.save_pretrained(tmp_path / "old")
    assert_same_vectors(encoder, theirs(tmp_path / "old"))
    assert_same_vectors(SentenceEncoder.from_pretrained(tmp_path / "old"), oracle)


@pytest.mark.parametrize("activation", ACTIVATIONS.values())
def test_dense_and_normalize(tmp_path: Path, transformer: Any, activation: Any) -> None:
    modules = modules_of_st()
    bias = activation is not torch.nn.ReLU
    dense = modules.Dense(HIDDEN, 24, bias=bias, activation_function=activation())
    after = modules.Dense(24, 8, activation_function=activation())
    chain = (modules.Pooling(HIDDEN, "mean"), dense, modules.Normalize(), after)
    oracle = saved(tmp_path, transformer, *chain)
    for change in (lambda folder: None, to_old_layout):
        change(tmp_path)
        encoder = SentenceEncoder.from_pretrained(tmp_path)
        assert encoder.get_embedding_dimension() == 8
        assert_same_vectors(encoder, oracle)
        assert_same_vectors(encoder, oracle, truncate_dim=5)
        np.testing.assert_allclose(encoder.encode(TEXTS), oracle.encode(TEXTS), **TOLERANCE)


def test_settings_are_read(tmp_path: Path, transformer: Any) -> None:
    saved(
        tmp_path,
        transformer,
        modules_of_st().Pooling(HIDDEN, "cls"),
        prompts={"query": "q: ", "document": "d: ", "default": "x: "},
        default_prompt_name="default",
        similarity_fn_name="dot",
        truncate_dim=16,
    )
    to_old_layout(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    oracle, encoder = theirs(tmp_path), SentenceEncoder.from_pretrained(tmp_path)
    assert encoder.max_seq_length == oracle.max_seq_length == 20
    assert encoder.similarity_fn_name == oracle.similarity_fn_name == "dot"
    assert encoder.get_embedding_dimension() == oracle.get_embedding_dimension() == 16
    assert encoder.prompts == oracle.prompts
    for ours, their in (
        (encoder.encode, oracle.encode),
        (encoder.encode_query, oracle.encode_query),
        (encoder.encode_document, oracle.encode_document),
    ):
        expected, actual = their(TEXTS), ours(TEXTS)
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(
            encoder.similarity(actual, actual), oracle.similarity(expected, expected), rtol=1e-4
        )
    assert SentenceEncoder.from_pretrained(tmp_path, truncate_dim=4).encode("x").shape == (4,)


def test_length_and_lower_case_are_honoured(tmp_path: Path, transformer: Any) -> None:
    saved(tmp_path, transformer, modules_of_st().Pooling(HIDDEN, "mean"))
    encoder = SentenceEncoder.from_pretrained(tmp_path)
    assert encoder.max_seq_length == 8192  # the new layout leaves it to the tokenizer
    to_old_layout(tmp_path)
    settings = {"max_seq_length": 512, "do_lower_case": True}
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(settings))
    assert_same_vectors(SentenceEncoder.from_pretrained(tmp_path), theirs(tmp_path))


def test_transformer_in_a_sub_folder(tmp_path: Path, transformer: Any) -> None:
    modules = modules_of_st()
    chain = (modules.Pooling(HIDDEN, "mean"), modules.Dense(HIDDEN, 8))
    oracle = saved(tmp_path, transformer, *chain)
    inside = tmp_path / "0_Transformer"
    inside.mkdir()
    for path in list(tmp_path.iterdir()):
        if path.is_file() and path.name not in (MODULES, ST):
            shutil.move(path, inside / path.name)
    edited(tmp_path, MODULES, lambda listed: listed[0].update(path="0_Transformer"))
    assert_same_vectors(SentenceEncoder.from_pretrained(tmp_path), oracle)
    assert_same_vectors(SentenceEncoder.from_pretrained(tmp_path), theirs(tmp_path))


@pytest.mark.parametrize("mode", ["cls", "mean"])
def test_plain_folder_is_pooled_as_its_config_says(
    tmp_path: Path, base: Path, transformer: Any, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "plain"))
    edited(folder, "config.json", lambda config: config.update(classifier_pooling=mode))
    with caplog.at_level(logging.WARNING, logger="modernbert"):
        encoder = SentenceEncoder.from_pretrained(folder)
    assert encoder.pooling.modes == (mode,)
    assert [mode in record.getMessage() for record in caplog.records] == [True]
    pooling = modules_of_st().Pooling(HIDDEN, mode)
    assert_same_vectors(encoder, st.SentenceTransformer(modules=[transformer, pooling]))


# -- saving --------------------------------------------------------------------------------------


@pytest.fixture
def full(base: Path) -> SentenceEncoder:
    """An encoder with everything that a folder can hold."""
    encoder = SentenceEncoder.from_pretrained(base)
    encoder.pooling = Pooling(HIDDEN, ("cls", "mean"), include_prompt=False)
    dense = Dense(2 * HIDDEN, 16, activation_function=torch.nn.GELU())
    unit_scale(dense)
    encoder.after = torch.nn.Sequential(dense, Normalize())
    encoder.prompts["query"] = "search_query: "
    encoder.default_prompt_name = "document"
    encoder.similarity_fn_name = "dot"
    encoder.truncate_dim = 12
    encoder.max_seq_length = 40
    return encoder


def test_a_save_loads_in_sentence_transformers(tmp_path: Path, full: SentenceEncoder) -> None:
    full.save_pretrained(tmp_path / "saved")
    oracle = theirs(tmp_path / "saved")
    assert oracle.max_seq_length == 40 and oracle.similarity_fn_name == "dot"
    assert oracle.prompts == full.prompts and oracle.get_embedding_dimension() == 12
    again = SentenceEncoder.from_pretrained(tmp_path / "saved")
    for name in ("query", "document"):
        vectors = full.encode(TEXTS, prompt_name=name, normalize_embeddings=True)
        expected = oracle.encode(TEXTS, prompt_name=name, normalize_embeddings=True)
        np.testing.assert_allclose(vectors, expected, **TOLERANCE)
        repeated = again.encode(TEXTS, prompt_name=name, normalize_embeddings=True)
        np.testing.assert_array_equal(repeated, vectors)


def test_saving_twice_writes_the_same_bytes(tmp_path: Path, full: SentenceEncoder) -> None:
    full.calibrate(TEXTS)
    full.save_pretrained(tmp_path / "one")
    SentenceEncoder.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")

    def contents(folder: Path) -> dict[str, bytes]:
        files = (path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_other_programs_parse(tmp_path: Path, full: SentenceEncoder) -> None:
    """The files as TEI (router/src/lib.rs), vLLM and llama.cpp's converter read them."""
    full.save_pretrained(tmp_path)

    def read(name: str) -> Any:
        return json.loads((tmp_path / name).read_text())

    modules = read("modules.json")
    known = ("Transformer", "Pooling", "Dense", "Normalize")  # TEI's ModuleType, an enum
    for index, module in enumerate(modules):
        assert module["type"] in [f"sentence_transformers.models.{kind}" for kind in known]
        assert module["idx"] == index and type(module["name"]) is str
        assert type(module["path"]) is str
    assert [module["type"].rpartition(".")[2] for module in modules] == list(known)

    pooling = read("1_Pooling/config.json")  # TEI's PoolConfig; vLLM takes the first true flag
    assert type(pooling["pooling_mode_cls_token"]) is bool
    assert type(pooling["pooling_mode_mean_tokens"]) is bool
    assert {key for key in pooling if pooling[key] is True} == {
        "pooling_mode_cls_token",
        "pooling_mode_mean_tokens",
    }
    assert set(POOLING_FLAGS.values()) <= pooling.keys()
    assert pooling["word_embedding_dimension"] == HIDDEN
    assert "pooling_mode" not in pooling and "embedding_dimension" not in pooling

    # TEI's STConfig and vLLM's SentenceTransformers config: both keys, nothing that they refuse.
    assert read("sentence_bert_config.json") == {"max_seq_length": 40, "do_lower_case": False}

    dense = read("2_Dense/config.json")  # TEI's DenseConfig
    assert dense == {
        "in_features": 2 * HIDDEN,
        "out_features": 16,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.GELU",
    }
    config = read("config.json")
    assert config["model_type"] == "modernbert" and config["architectures"] == ["ModernBertModel"]
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "embeddings.tok_embeddings.weight" in file.keys()  # noqa: SIM118
    with safe_open(tmp_path / "2_Dense" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["linear.bias", "linear.weight"]
    assert (tmp_path / "tokenizer.json").is_file()
    assert (tmp_path / "README.md").read_text().startswith("---\nlibrary_name:")


def test_shards_load_everywhere(tmp_path: Path, base: Path) -> None:
    encoder = SentenceEncoder.from_pretrained(base)
    encoder.save_pretrained(tmp_path, max_shard_size="2MB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_same_vectors(SentenceEncoder.from_pretrained(tmp_path), theirs(tmp_path))


# -- refusals ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_dense(tmp_path_factory: pytest.TempPathFactory, transformer: Any) -> Path:
    modules = modules_of_st()
    folder = tmp_path_factory.mktemp("dense") / "model"
    chain = (modules.Pooling(HIDDEN, "mean"), modules.Dense(HIDDEN, 8), modules.Normalize())
    saved(folder, transformer, *chain)
    return folder


@pytest.fixture
def dense_folder(tmp_path: Path, with_dense: Path) -> Path:
    return Path(shutil.copytree(with_dense, tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (MODULES, lambda c: c[2].update(type="pylate.models.Dense.Dense"), "pylate.models.Dense"),
        (MODULES, lambda c: c[2].update(type="os.system"), "'os.system' is not implemented"),
        (MODULES, lambda c: c[2].update(type="sentence_transformers.models.LSTM"), "LSTM"),
        (MODULES, lambda c: c[1].update(path="../1_Pooling"), r"\.\./1_Pooling"),
        (MODULES, lambda c: c[1].update(path="/etc"), "/etc"),
        (MODULES, lambda c: c[0].update(path="../model"), r"\.\./model"),
        (MODULES, lambda c: c[3].update(path=".."), r"'\.\./config.json'"),
        (MODULES, lambda c: c.pop(1), "chains Transformer, Dense"),
        (MODULES, lambda c: c.clear(), "chains nothing"),
        (MODULES, lambda c: c.append(7), "is not a list of modules"),
        (POOL, lambda c: c.update(pooling_mode="attention"), "attention"),
        (POOL, lambda c: c.update(pooling_mode=3), "3; expected a name"),
        (POOL, lambda c: c.update(embedding_dimension=31), "31"),
        (DENSE, lambda c: c.update(activation_function="os.system"), "os.system"),
        (DENSE, lambda c: c.update(activation_function=["x"]), "activation_function"),
        (DENSE, lambda c: c.update(use_residual=True), "use_residual"),
        (DENSE, lambda c: c.update(module_input_name="token_embeddings"), "token_embeddings"),
        (DENSE, lambda c: c.update(in_features=31), "in_features is 31"),
        (DENSE, lambda c: c.update(out_features=9), "the weights are"),
        (DENSE, lambda c: c.update(out_features=10**9), "1000000000"),
        (DENSE, lambda c: c.update(bias=False), "the weights are"),
        (ST, lambda c: c.update(model_type="SparseEncoder"), "SparseEncoder"),
        (ST, lambda c: c.update(similarity_fn_name="maxsim"), "maxsim"),
        (ST, lambda c: c.update(default_prompt_name="absent"), "absent"),
        (ST, lambda c: c.update(prompts={"query": 3}), "object of texts"),
        (ST, lambda c: c.update(prompts=[]), None),
        (ST, lambda c: c.update(truncate_dim=0), "truncate_dim is 0"),
        (BERT, lambda c: c.update(max_seq_length="8"), "max_seq_length is '8'"),
        (BERT, lambda c: c.update(transformer_task="fill-mask"), "fill-mask"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    dense_folder: Path, name: str, change: Any, message: str | None
) -> None:
    edited(dense_folder, name, change)
    if message is None:
        SentenceEncoder.from_pretrained(dense_folder)
    else:
        with pytest.raises(CheckpointError, match=message):
            SentenceEncoder.from_pretrained(dense_folder)


def test_pickled_or_missing_dense_weights_are_refused(dense_folder: Path) -> None:
    weights = dense_folder / "2_Dense" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(CheckpointError, match="2_Dense/model.safetensors"):
        SentenceEncoder.from_pretrained(dense_folder)


def test_nan_in_dense_weights_is_refused(dense_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = dense_folder / "2_Dense" / "model.safetensors"
    tensors = load_file(weights)
    tensors["linear.weight"][3, 4] = float("nan")
    save_file(tensors, weights)
    with pytest.raises(CheckpointError, match="linear.weight"):
        SentenceEncoder.from_pretrained(dense_folder)


# -- the Hub -------------------------------------------------------------------------------------


@pytest.mark.hub
def test_the_county_example() -> None:
    """The published similarities of joe32140/ModernBERT-base-msmarco, two decimals."""
    encoder = SentenceEncoder.from_pretrained("joe32140/ModernBERT-base-msmarco")
    vectors = encoder.encode(
        [
            "what county is hayden in",
            "Hayden is a city in Kootenai County, Idaho, United States. Located in the northern "
            "portion of the state, just north of Coeur d'Alene, its population was 13,294 at the "
            "2010 census.",
            "According to the United States Census Bureau, the city has a total area of 9.61 "
            "square miles (24.89 km2), of which 9.60 square miles (24.86 km2) is land and 0.01 "
            "square miles (0.03 km2) is water. It lies at the southwestern end of Hayden Lake, "
            "and the elevation of the city is 2,287 feet (697 m) above sea level. Hayden is "
            "located on U.S. Route 95 at the junction of Route 41. It is also four miles (6 km) "
            "north of Interstate 90 and Coeur d'Alene. The Coeur d'Alene airport is northwest of "
            "Hayden.",
            "organization name",
        ]
    )
    expected = [
        [1.0, 0.7469, 0.6398, -0.1262],
        [0.7469, 1.0, 0.6513, -0.0741],
        [0.6398, 0.6513, 1.0, -0.0760],
        [-0.1262, -0.0741, -0.0760, 1.0],
    ]
    scores = encoder.similarity(vectors, vectors)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=0.005, rtol=0)
