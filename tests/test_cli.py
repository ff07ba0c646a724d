"""The command line: every command, its flags as environment variables, one-line errors."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
from click.testing import CliRunner, Result
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from modernbert import ModernBertConfig, ModernBertModel, SentenceEncoder, Tokenizer, demo, kernels
from modernbert.cli import main
from modernbert.heads import ModernBertForMaskedLM, ModernBertForSequenceClassification
from modernbert.streaming import EncodeReport
from modernbert.weights.folder import EMBEDDED

TEXTS = ["The weather is lovely today.", "", "He drove to the stadium, twice.", "naïve café ☀"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose time by waking up other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A small tokenizer with the pipeline and the special tokens of ModernBERT."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=512,
        special_tokens=[AddedToken(t, lstrip=t == "[MASK]", special=True) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return Tokenizer(backend.to_str().encode(), settings={"model_max_length": 8192})


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "encoder"
    tokenizer = train_tokenizer([*demo.SENTENCES.read_text().splitlines(), *["good", "bad"] * 50])
    config = ModernBertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=2,
        initializer_range=0.1,
        classifier_pooling="mean",
        bos_token_id=tokenizer.cls_token_id,
        cls_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    encoder = SentenceEncoder(ModernBertModel(config).eval(), tokenizer)
    encoder.prompts = {"query": "search: ", "document": ""}
    encoder.max_seq_length = 100
    encoder.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(encoder_folder: str) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(encoder_folder)


def small_config(encoder_folder: str, **changes: Any) -> ModernBertConfig:
    raw = json.loads((Path(encoder_folder) / "config.json").read_text())
    return ModernBertConfig.from_dict(raw).replace(num_hidden_layers=2, **changes)


def save_model(model: Any, encoder_folder: str, folder: Path) -> str:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 1.0))
    model.save_pretrained(folder)
    Tokenizer.from_pretrained(encoder_folder).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def masked_folder(encoder_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    model = ModernBertForMaskedLM(small_config(encoder_folder))
    return save_model(model, encoder_folder, tmp_path_factory.mktemp("models") / "masked")


@pytest.fixture(scope="module")
def classifier_folder(encoder_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    labels = {0: "bad", 1: "\x1b[31mgood", 2: "so so"}
    config = small_config(encoder_folder, num_labels=3, id2label=labels)
    model = ModernBertForSequenceClassification(config)
    return save_model(model, encoder_folder, tmp_path_factory.mktemp("models") / "classifier")


def run(*args: str, code: int = 0, **options: Any) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args], **options)
    assert result.exit_code == code, result.output
    return result


def error_of(*args: str, **options: Any) -> str:
    """The one line of a command that must fail."""
    result = run(*args, code=2, **options)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


# -- the group ---------------------------------------------------------------------------------


def test_help_names_the_environment_variable_of_every_flag() -> None:
    assert set(main.commands) >= {
        *("embed", "similarity", "fill-mask", "classify"),
        *("info", "doctor", "convert", "demo"),
    }
    assert "MODERNBERT_DEBUG" in run("--help").stdout
    for name, command in main.commands.items():
        text = "".join(run(name, "--help").stdout.split())
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                variable = f"MODERNBERT_{name}_{parameter.name}".upper().replace("-", "_")
                assert variable in text, (name, parameter.name)
                assert parameter.help, (name, parameter.name)


def test_help_is_fast_because_it_imports_no_torch() -> None:
    code = """if True:
        import sys
        from modernbert.cli import main
        try:
            main(["embed", "--help"])
        except SystemExit as end:
            assert end.code == 0
        heavy = {"torch", "numpy", "tokenizers", "huggingface_hub", "pyarrow"} & sys.modules.keys()
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd="/")


def test_version() -> None:
    assert "0.1.0" in run("--version").stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["embed"], "Missing argument"),
        (["embed", "x.txt"], "Missing option '--output'"),
        (["embed", "x.txt", "-o", "v.npy", "--model", "m"], "there is no file x.txt"),
        (["embed", "in.txt", "-o", "v.xyz", "--model", "m"], "end the name with one of .npy"),
        (["embed", "in.txt", "-o", "no/v.npy", "--model", "m"], "make it first"),
        (["embed", "in.txt", "-o", "in.txt", "--model", "m"], "end the name with one of"),
        (["embed", "in.txt", "-o", "v.npy", "--model", "./m"], "there is no folder './m'"),
        (["embed", "in.txt", "-o", "v.npy", "--model", "in.txt"], "in.txt is a file"),
        (["embed", "in.txt", "-o", "v.npy", "--model", "m", "--keep", "a"], "npy holds vectors al"),
        (["embed", "in.txt", "-o", "v.jsonl", "--model", "m", "--keep", "a"], "is a txt file, wi"),
        (["embed", "in.csv", "-o", "v.npy", "--model", "m"], "no column 'text'; there are 'body'"),
        (["embed", "in.txt", "-o", "v.npy", "--truncate-dim", "0"], "0 is not in the range x>=1"),
        (["embed", "in.txt", "-o", "v.npy", "--model", "m", "--input-format", "x"], "choose from"),
        (["embed", ".", "-o", "v.npy", "--model", "m", "--input-format", "txt"], "Is a directory"),
        (["info", "./nothing"], "there is no folder './nothing'"),
        (["info", "in.txt"], "is not valid JSON"),
        (["convert", "in.txt", "out"], "holds no config.json"),
        (["fill-mask", "a", "--model", "a b"], "Hub id"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("hello\n")
    Path("in.csv").write_text("body\nhello\n")
    assert message in error_of(*args)
    assert sorted(os.listdir()) == ["in.csv", "in.txt"]


@pytest.mark.parametrize(
    "error, line",
    [
        (KeyboardInterrupt(), "error: interrupted"),
        (MemoryError(), "error: out of memory: try a smaller batch"),
        (BrokenPipeError(), "error: nobody reads the output any more"),
        (FileNotFoundError(2, "No such file", "a\nb"), "error: a b: No such file"),
        (ValueError("two\nlines \x1b[31m and\tmore"), "error: two lines [31m and more"),
        (KeyError("x"), "error: internal error, KeyError: 'x'; please report what --debug shows"),
        (ValueError(), "error: internal error, ValueError: ; please report what --debug shows"),
    ],
)
def test_every_exception_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, line: str
) -> None:
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(main.commands["demo"], "callback", fail)
    assert error_of("demo") == f"{line}\n"
    debug = run("--debug", "demo", code=2).stderr
    expected = not isinstance(error, KeyboardInterrupt | BrokenPipeError)
    assert ("Traceback (most recent call last)" in debug) == expected


def test_a_closed_pipe_is_one_line(encoder_folder: str) -> None:
    command = Path(sys.executable).with_name("modernbert")
    texts = [f"text {i}" for i in range(100)]
    process = subprocess.Popen(
        [command, "similarity", *texts, "--model", encoder_folder, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    stderr = process.stderr.read().decode()
    process.stderr.close()
    assert (process.wait(), stderr) == (2, "error: nobody reads the output any more\n")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    line = error_of(
        "similarity", "a", "--model", "answerdotai/ModernBERT-base", "--local-files-only"
    )
    assert "hf download answerdotai/ModernBERT-base" in line


# -- embed -------------------------------------------------------------------------------------


def write_input(path: Path) -> None:
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    match path.suffix:
        case ".txt":
            path.write_text("".join(f"{text}\n" for text in TEXTS), "utf-8")
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        case ".csv" | ".tsv":
            with open(path, "w", encoding="utf-8", newline="") as file:
                tabs = path.suffix == ".tsv"
                writer = csv.DictWriter(file, ["id", "text"], delimiter="\t" if tabs else ",")
                writer.writeheader()
                writer.writerows(rows)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)


def read_output(path: Path) -> tuple[np.ndarray, list[Any]]:
    """Vectors, and the ids kept beside them."""
    if path.suffix == ".npy":
        return np.load(path), []
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    else:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    vectors = np.array([row["embedding"] for row in rows], np.float32)
    return vectors, [row["id"] for row in rows if "id" in row]


@pytest.mark.parametrize("suffix", ["npy", "jsonl", "parquet"])
@pytest.mark.parametrize("source", ["txt", "jsonl", "csv", "tsv", "parquet"])
def test_embed_reads_and_writes_every_format(
    tmp_path: Path, encoder_folder: str, encoder: SentenceEncoder, source: str, suffix: str
) -> None:
    path, output = tmp_path / f"in.{source}", tmp_path / f"out.{suffix}"
    write_input(path)
    result = run("embed", path, "-o", output, "--model", encoder_folder)
    vectors, ids = read_output(output)
    np.testing.assert_allclose(vectors, encoder.encode(TEXTS), atol=1e-6)
    if source != "txt" and suffix != "npy":
        assert ids == ([0, 1, 2, 3] if source in ("jsonl", "parquet") else ["0", "1", "2", "3"])
    assert "4 texts" in result.stderr and "0 of them cut" in result.stderr
    assert "tokens/s" in result.stderr and result.stdout == ""


def test_embed_takes_several_inputs_and_standard_streams(
    tmp_path: Path, encoder_folder: str, encoder: SentenceEncoder
) -> None:
    write_input(tmp_path / "in.csv")
    result = run(
        *("embed", tmp_path / "in.csv", "-", tmp_path / "in.csv", "--output", "-"),
        *("--model", encoder_folder),
        input="from a pipe\n",
    )
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert [row.get("id") for row in rows] == [*"0123", None, *"0123"]
    expected = encoder.encode([*TEXTS, "from a pipe", *TEXTS])
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)


def test_embed_options_reach_the_encoder(
    tmp_path: Path, encoder_folder: str, encoder: SentenceEncoder
) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    path.write_text('{"body": "one two", "id": 7, "x": 1}\n')
    common = ("embed", path, "-o", output, "--model", encoder_folder, "--column", "body", "--force")
    run(*common, "--prompt-name", "query", "--truncate-dim", "16", "--normalize", "--keep", "id")
    table = pq.read_table(output)
    expected = encoder.encode(["search: one two"], truncate_dim=16, normalize_embeddings=True)
    np.testing.assert_allclose(table.column("embedding").to_pylist(), expected, atol=1e-6)
    assert table.column_names == ["id", "embedding"]
    facts = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert facts == {
        "modernbert.version": "0.1.0",
        "modernbert.model": encoder_folder,
        "modernbert.revision": "",
        "modernbert.pooling": "mean",
        "modernbert.prompt": "search: ",
        "modernbert.dimensions": "16",
        "modernbert.precision": "float32",
        "modernbert.normalized": "true",
        "modernbert.similarity": "cosine",
    }
    run(
        *common,
        "--prompt",
        "p: ",
        "--precision",
        "ubinary",
        "--device",
        "cpu",
        "--dtype",
        "float64",
    )
    table = pq.read_table(output)
    assert table.schema.field("embedding").type == pa.list_(pa.uint8(), 16)
    codes = encoder.encode(["p: one two"], precision="ubinary")
    assert (np.array(table.column("embedding").to_pylist()) == codes).mean() > 0.9
    assert "this model has ['query', 'document']" in error_of(*common, "--prompt-name", "other")
    assert "run encoder.calibrate(texts)" in error_of(*common, "--precision", "int8")
    assert "dtype='float33'" in error_of(*common, "--dtype", "float33")


def test_flags_come_from_the_environment(
    tmp_path: Path, encoder_folder: str, encoder: SentenceEncoder
) -> None:
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"body": "one", "a": 1, "b": 2, "c": 3}\n')
    output.write_text("old")
    settings = {
        "OUTPUT": str(output),
        "MODEL": encoder_folder,
        "COLUMN": "body",
        "KEEP": "a b",
        "TRUNCATE_DIM": "8",
        "FORCE": "1",
    }
    run("embed", path, env={f"MODERNBERT_EMBED_{name}": value for name, value in settings.items()})
    row = json.loads(output.read_text())
    assert list(row) == ["a", "b", "embedding"]
    np.testing.assert_allclose(row["embedding"], encoder.encode("one")[:8], atol=1e-6)


def test_embed_counts_what_it_cuts_or_refuses_it(tmp_path: Path, encoder_folder: str) -> None:
    path, output = tmp_path / "in.txt", tmp_path / "out.npy"
    path.write_text("short\n" + "a" + " a" * 199 + "\n")
    args = ("embed", path, "-o", output, "--model", encoder_folder)
    assert "text 1 has 202 tokens" in error_of(*args, "--truncation", "error")
    assert not output.exists()
    stderr = run(*args).stderr
    assert "1 of them cut, 102 tokens lost" in stderr and stderr.count("\n") == 1


def test_embed_of_nothing_is_an_empty_table(tmp_path: Path, encoder_folder: str) -> None:
    (tmp_path / "in.txt").write_bytes(b"")
    for suffix in ("npy", "jsonl", "parquet"):
        output = tmp_path / f"out.{suffix}"
        run("embed", tmp_path / "in.txt", "-o", output, "--model", encoder_folder)
        assert len(read_output(output)[0]) == 0
    assert np.load(tmp_path / "out.npy").shape == (0, 128)
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert schema.field("embedding").type == pa.list_(pa.float32(), 128)


def test_embed_never_leaves_half_an_output(tmp_path: Path, encoder_folder: str) -> None:
    """The last row is broken: thousands of vectors are written by then."""
    path, output = tmp_path / "in.jsonl", tmp_path / "out.parquet"
    path.write_text('{"text": "a"}\n' * 5000 + '{"text": null}\n')
    output.write_bytes(b"old")
    args = ("embed", path, "-o", output, "--model", encoder_folder)
    assert "out.parquet exists; pass --force" in error_of(*args)
    assert "in.jsonl, line 5001: column 'text' holds null" in error_of(*args, "--force")
    assert output.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.parquet"]


def test_embed_reads_as_it_writes(
    tmp_path: Path, encoder_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks are written while later ones are still unread, so memory does not grow."""
    from modernbert import cli, tables, vector_files

    path = tmp_path / "in.txt"
    path.write_text("a\n" * 20_000)
    events: list[str] = []
    read, write = tables.read_table, vector_files.NpyWriter.write

    def watched_read(*args: Any, **options: Any) -> Iterator[tables.Block]:
        for block in read(*args, **options):
            events.append("read")
            yield block

    def watched_write(self: Any, keys: Any, vectors: np.ndarray) -> None:
        events.append("write")
        write(self, keys, vectors)

    def fake(self: Any, texts: Any, report: EncodeReport, **options: Any) -> Iterator[np.ndarray]:
        for _ in texts:
            report.texts += 1
            yield np.zeros(128, np.float32)

    monkeypatch.setattr(tables, "read_table", watched_read)
    monkeypatch.setattr(vector_files.NpyWriter, "write", watched_write)
    monkeypatch.setattr(SentenceEncoder, "encode_stream", fake)
    assert cli is not None
    run("embed", path, "-o", tmp_path / "out.npy", "--model", encoder_folder)
    assert events == ["read", "write"] * 20
    assert np.load(tmp_path / "out.npy").shape == (20_000, 128)


def test_progress_counts_tokens(tmp_path: Path, encoder_folder: str) -> None:
    write_input(tmp_path / "in.txt")
    args = ("embed", tmp_path / "in.txt", "-o", tmp_path / "o.npy", "--model", encoder_folder)
    assert "tok/s" in run(*args, "--progress").stderr
    assert "tok/s" not in run(*args, "--force").stderr.replace("tokens/s", "")


# -- similarity, fill-mask, classify -----------------------------------------------------------


def test_similarity(encoder_folder: str, encoder: SentenceEncoder) -> None:
    expected = encoder.similarity(*[encoder.encode(TEXTS)] * 2)
    table = run("similarity", *TEXTS, "--model", encoder_folder).stdout.splitlines()
    assert len(table) == 5 and table[1].startswith("1  The weather is lovely today. ")
    shown = [[float(number) for number in line.split()[-4:]] for line in table[1:]]
    np.testing.assert_allclose(shown, expected, atol=5.1e-5)
    result = run("similarity", "-", "--model", encoder_folder, "--json", input="\n".join(TEXTS))
    answer = json.loads(result.stdout)
    assert answer["texts"] == TEXTS
    np.testing.assert_allclose(answer["similarity"], expected, atol=1e-6)
    assert "there is no text" in error_of("similarity", "-", "--model", encoder_folder, input="")


def test_fill_mask(masked_folder: str) -> None:
    text = "The [MASK] is lovely [MASK]."
    result = run("fill-mask", text, "--model", masked_folder, "--top-k", "3", "--json")
    [answer] = json.loads(result.stdout)
    tokenizer = Tokenizer.from_pretrained(masked_folder)
    model = ModernBertForMaskedLM.from_pretrained(masked_folder)
    ids = torch.tensor(tokenizer([text]).input_ids)
    with torch.no_grad():
        probabilities = model(ids).logits[0].softmax(-1)
    places = [i for i, token in enumerate(ids[0].tolist()) if token == tokenizer.mask_token_id]
    assert len(answer["masks"]) == len(places) == 2
    for guesses, place in zip(answer["masks"], places, strict=True):
        best = probabilities[place].topk(3)
        assert [guess["id"] for guess in guesses] == best.indices.tolist()
        shown = [guess["probability"] for guess in guesses]
        np.testing.assert_allclose(shown, best.values, rtol=1e-4)
    lines = run("fill-mask", text, "--model", masked_folder).stdout.splitlines()
    assert len(lines) == 11 and lines[0] == text
    assert lines[1].startswith("  mask 1  0.") and lines[10].startswith("  mask 2  0.")
    assert "holds no [MASK] to predict" in error_of("fill-mask", "none", "--model", masked_folder)


def logits_of(folder: str, texts: list[str], pairs: list[str] | None = None) -> torch.Tensor:
    tokenizer = Tokenizer.from_pretrained(folder)
    model = ModernBertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        rows = [model(torch.tensor([ids])).logits for ids in tokenizer(texts, pairs).input_ids]
    return torch.cat(rows)


def test_classify(classifier_folder: str) -> None:
    args = ("classify", TEXTS[0], TEXTS[2], "--model", classifier_folder)
    answers = json.loads(run(*args, "--json").stdout)
    expected = logits_of(classifier_folder, [TEXTS[0], TEXTS[2]]).softmax(-1)
    for answer, row in zip(answers, expected, strict=True):
        scores = {score["label"]: score["score"] for score in answer["scores"]}
        names = ["bad", "\x1b[31mgood", "so so"]
        np.testing.assert_allclose([scores[name] for name in names], row, rtol=1e-4)
        assert list(scores.values()) == sorted(scores.values(), reverse=True)
    text = run(*args).stdout
    assert "\x1b" not in text and "[31mgood" in text  # a label cannot control the terminal
    assert len(text.splitlines()) == 8


@pytest.mark.parametrize(
    "problem, labels, score",
    [
        ("multi_label_classification", 3, torch.sigmoid),
        ("single_label_classification", 3, lambda x: x.softmax(-1)),
        (None, 1, torch.sigmoid),
        ("regression", 1, lambda x: x),
    ],
)
def test_classify_scores_follow_the_problem_type(
    tmp_path: Path, encoder_folder: str, problem: str | None, labels: int, score: Any
) -> None:
    config = small_config(encoder_folder, num_labels=labels, problem_type=problem)
    model = ModernBertForSequenceClassification(config)
    folder = save_model(model, encoder_folder, tmp_path / "model")
    result = run("classify", "a query", "--pair", "a document", "--model", folder, "--json")
    [answer] = json.loads(result.stdout)
    expected = score(logits_of(folder, ["a query"], ["a document"]))[0]
    scores = {score["label"]: score["score"] for score in answer["scores"]}
    shown = [scores[f"LABEL_{i}"] for i in range(labels)]
    np.testing.assert_allclose(shown, expected, rtol=1e-4)


def test_classify_refuses_models_that_would_guess(
    masked_folder: str, classifier_folder: str
) -> None:
    line = error_of("classify", "a", "--model", masked_folder)
    assert "is ModernBertForMaskedLM, not a classifier of texts" in line
    line = error_of("classify", "a", "b", "--pair", "c", "--model", classifier_folder)
    assert "there are 2 texts and 1 --pair" in line


# -- info, doctor, convert, demo ---------------------------------------------------------------


@pytest.mark.parametrize(
    "name, parameters, linear, at_512, at_8192",
    [
        (
            "answerdotai/ModernBERT-base",
            149_655_232,
            220.6,
            (12.6, 5.2, 238.4),
            (201.3, 5.5, 427.4),
        ),
        (
            "answerdotai/ModernBERT-large",
            395_881_664,
            686.3,
            (None, None, 716.2),
            (None,) * 2 + (1031,),
        ),
    ],
)
def test_info_has_the_published_figures(
    name: str, parameters: int, linear: float, at_512: Any, at_8192: Any
) -> None:
    figures = json.loads(run("info", name, "--json").stdout)
    assert figures["parameters"]["total"] == parameters
    assert sum(figures["parameters"].values()) == 2 * parameters
    assert figures["bytes"] == {
        "float32": 4 * parameters,
        "bfloat16": 2 * parameters,
        "float16": 2 * parameters,
    }
    for length, expected in (("512", at_512), ("8192", at_8192)):
        flops = figures["flops_per_token"][length]
        assert round(flops["linear"] / 1e6, 1) == linear
        names = ("global_attention", "local_attention", "total")
        for part, figure in zip(names, expected, strict=True):
            digits = 0 if figure == 1031 else 1
            assert figure is None or round(flops[part] / 1e6, digits) == figure


def test_info_counts_the_keys_a_token_sees() -> None:
    """The average over a text, by counting."""
    from modernbert.accounting import flops_per_token

    config = ModernBertConfig(num_hidden_layers=2, global_attn_every_n_layers=2, local_attention=6)
    for length in (1, 2, 5, 20):
        flops = flops_per_token(config, length)
        pairs = sum(abs(i - j) <= 3 for i in range(length) for j in range(length))
        assert flops.local_attention == pytest.approx(4 * 768 * pairs / length)
        assert flops.global_attention == 4 * 768 * length


@pytest.mark.parametrize("fixture", ["encoder_folder", "masked_folder", "classifier_folder"])
def test_info_of_a_folder_counts_what_is_in_it(request: Any, fixture: str) -> None:
    folder = request.getfixturevalue(fixture)
    from modernbert.weights import open_checkpoint

    stored = open_checkpoint(folder).tensors.values()
    expected = sum(int(np.prod(info.shape)) for info in stored)
    for place in (folder, f"{folder}/config.json"):
        figures = json.loads(run("info", place, "--json").stdout)
        assert figures["parameters"]["total"] == expected
    text = run("info", folder).stdout
    assert f"{expected:,}" in text and figures["architecture"] in text


def test_info_shows_a_table() -> None:
    lines = run("info", "answerdotai/ModernBERT-base").stdout.splitlines()
    assert "  total            149,655,232" in lines
    assert "  at   512 tokens     220.6      12.6       5.2     238.4" in lines
    assert "  at  8192 tokens     220.6     201.3       5.5     427.4" in lines


def test_doctor_passes_on_this_machine() -> None:
    text = run("doctor").stdout
    assert f"torch            {torch.__version__}" in text and "all checks passed" in text
    for status in kernels.available_backends():
        assert f"{status.name}  " in text and status.reason in text
    for result in ("local attention, gradient of k", "global attention", "small model"):
        assert result in text


def test_doctor_fails_when_a_backend_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.attention

    def off_by_a_little(q: Any, k: Any, v: Any, plan: Any, **options: Any) -> Any:
        out, maps = right(q, k, v, plan, **options)
        if plan.backend == "blocked" and options["local"]:
            out = out * (1 + 1e-5)
        return out, maps

    monkeypatch.setattr(kernels, "attention", off_by_a_little)
    text = run("doctor", code=1).stdout
    failures = [line for line in text.splitlines() if line.startswith("  FAIL")]
    assert failures and all("blocked" in line for line in failures)
    assert any("local attention" in line for line in failures)
    assert not any("global" in line for line in failures)
    assert f"{len(failures)} checks failed" in text

    def broken(q: Any, k: Any, v: Any, plan: Any, **options: Any) -> Any:
        if plan.backend == "blocked":
            raise RuntimeError("no kernel image")
        return right(q, k, v, plan, **options)

    monkeypatch.setattr(kernels, "attention", broken)
    assert "does not run: no kernel image" in run("doctor", code=1).stdout


def test_convert(tmp_path: Path, masked_folder: str) -> None:
    source = tmp_path / "old"
    source.mkdir()
    model = ModernBertForMaskedLM.from_pretrained(masked_folder)
    state = {**model.tensors_to_save(), "decoder.weight": model.decoder.weight.detach()}
    torch.save(state, source / "pytorch_model.bin")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((Path(masked_folder) / name).read_bytes())
    new = tmp_path / "new"
    assert "pass --allow-pickle" in error_of("convert", source, new)
    assert not new.exists()
    run("convert", source, new, "--allow-pickle")
    assert "exists; pass --force" in error_of("convert", source, new, "--allow-pickle")
    run("convert", source / "pytorch_model.bin", new, "--allow-pickle", "--force")
    ids = torch.tensor([[1, 7, 8, 2]])
    with torch.no_grad():
        converted = ModernBertForMaskedLM.from_pretrained(new)(ids).logits
        torch.testing.assert_close(converted, model(ids).logits, rtol=0, atol=0)
    assert len(json.loads(run("fill-mask", "[MASK]", "--model", new, "--json").stdout)) == 1


def test_convert_translates_flexbert(tmp_path: Path, masked_folder: str) -> None:
    """A Composer file: wrapped names, FlexBERT's config fields, the config given apart."""
    model = ModernBertForMaskedLM.from_pretrained(masked_folder)
    state = {}
    for name, tensor in model.tensors_to_save().items():
        bare = name.replace("model.embeddings", "bert.embeddings")
        bare = bare.replace("model.layers", "bert.encoder.layers")
        bare = bare.replace("model.final_norm", "bert.final_norm")
        state[f"model.{bare}"] = tensor
    torch.save({"state": {"model": state}}, tmp_path / "ep1-rank0.pt")
    raw = json.loads((Path(masked_folder) / "config.json").read_text())
    ours = ModernBertConfig.from_dict(raw)
    flexbert = {
        "model_type": "bert",
        "architectures": ["FlexBertForMaskedLM"],
        "rotary_emb_base": ours.global_rope_theta,
        "local_attn_rotary_emb_base": ours.local_rope_theta,
        "sliding_window": ours.local_attention,
        "attn_out_bias": False,
        **{
            name: raw[name]
            for name in raw
            if name.endswith(("_size", "_token_id", "_heads", "_layers", "max_position_embeddings"))
        },
    }
    (tmp_path / "flex.json").write_text(json.dumps(flexbert))
    args = ("convert", tmp_path / "ep1-rank0.pt", tmp_path / "new", "--allow-pickle")
    assert "config.json" in error_of(*args)
    run(*args, "--config", tmp_path / "flex.json")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["architectures"] == ["ModernBertForMaskedLM"]
    assert written["model_type"] == "modernbert"
    ids = torch.tensor([[1, 7, 8, 2]])
    with torch.no_grad():
        converted = ModernBertForMaskedLM.from_pretrained(tmp_path / "new")(ids).logits
        torch.testing.assert_close(converted, model(ids).logits, rtol=0, atol=0)


@pytest.fixture
def embedded(masked_folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small random model in the place of the one that ships."""
    folder = Path(masked_folder)
    monkeypatch.setattr("modernbert.weights.folder.EMBEDDED", folder)
    return folder


def test_commands_without_a_model_use_the_one_that_ships(tmp_path: Path, embedded: Path) -> None:
    write_input(tmp_path / "in.jsonl")
    run("embed", tmp_path / "in.jsonl", "-o", tmp_path / "out.parquet")
    metadata = pq.read_schema(tmp_path / "out.parquet").metadata
    assert b"modernbert-mini" in metadata.values()
    for args, named in (
        (("similarity", "a", "b"), ("--model", embedded)),
        (("fill-mask", "a [MASK]"), ("--model", embedded)),
        (("info", "--json"), (embedded,)),
    ):
        assert run(*args).stdout == run(*args, *named).stdout
    assert run("info").stdout.startswith("modernbert-mini: ModernBertForMaskedLM\n")
    line = error_of("classify", "a")
    assert "modernbert-mini is ModernBertForMaskedLM, not a classifier of texts" in line


def test_commands_without_a_model_say_what_to_do_when_none_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modernbert.weights.folder.EMBEDDED", tmp_path)
    for args in (("similarity", "a"), ("fill-mask", "a"), ("classify", "a"), ("info",), ("demo",)):
        assert "reinstall the package, or give a Hub id or a folder" in error_of(*args)


def test_demo_sentences() -> None:
    """240 different lines of plain text; none gives an answer away by a word of the query."""
    sentences = demo.SENTENCES.read_text("ascii").splitlines()
    assert len(set(sentences)) == len(sentences) == 240
    for sentence in sentences:
        assert 8 <= len(sentence.split()) <= 20 and sentence.endswith("."), sentence
    assert set(ANSWERS) == set(demo.QUERIES)
    for query, answers in ANSWERS.items():
        for answer in answers:
            assert answer in sentences
            assert words(query) & words(answer) <= {"a"}


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


ANSWERS = {
    "money for old age": ["Contributions to a pension are often free of tax until you retire."],
    "I cannot pay back my home loan": [
        "The bank can take the house if the mortgage is not repaid."
    ],
    "a long trip through Russia": [
        "The Trans-Siberian Railway takes about a week from Moscow to Vladivostok."
    ],
    "puppies must go outside in bad weather": ["Dogs need a walk even when it pours with rain."],
}


def blocks_of(output: str) -> dict[str, list[tuple[float, str]]]:
    """The results of a demo, by query and by masked text."""
    blocks = {}
    for block in output.split("\n\n")[1:-1]:
        title, *lines = block.splitlines()
        blocks[title] = [(float(line[:8]), line[10:]) for line in lines]
    return blocks


def test_demo_searches_a_file(tmp_path: Path, embedded: Path) -> None:
    """Every line once, blank ones not at all; the scores are those of the encoder."""
    lines = [*TEXTS, TEXTS[0], "\x1b[31mred", "  ", "the end"]
    (tmp_path / "notes").write_text("\n".join(lines), "utf-8")
    output = run("demo", tmp_path / "notes", "--query", "weather", "--query", TEXTS[0]).stdout
    assert output.startswith("modernbert-mini: ")
    assert "5 texts -> vectors of 128 dimensions" in output and " s in all\n" in output
    assert "\x1b" not in output
    blocks = blocks_of(output)
    assert list(blocks) == ["weather", TEXTS[0], *demo.MASKED]
    encoder = SentenceEncoder.from_pretrained(embedded)
    texts = [*(text for text in TEXTS if text), "\x1b[31mred", "the end"]
    for query in ("weather", TEXTS[0]):
        vectors = encoder.encode([query]), encoder.encode(texts)
        scores = encoder.similarity(*vectors)[0].tolist()
        pairs = zip(scores, texts, strict=True)
        best = sorted((p for p in pairs if p[1] != query), reverse=True)[:3]
        assert [text for _, text in blocks[query]] == [text.lstrip("\x1b") for _, text in best]
        shown = [score for score, _ in blocks[query]]
        np.testing.assert_allclose(shown, [score for score, _ in best], atol=5.1e-4)


def test_demo_without_queries(embedded: Path) -> None:
    """Built-in queries for the built-in sentences, lines of a file for the others."""
    blocks = blocks_of(run("demo").stdout)
    assert list(blocks) == [*demo.QUERIES, *demo.MASKED]
    assert {len(found) for found in blocks.values()} == {3}
    blocks = blocks_of(run("demo", "-", input="a\n\nb\nc\nd\n").stdout)
    assert list(blocks) == ["a", "c", *demo.MASKED]
    assert {text for _, text in blocks["c"]} == {"a", "b", "d"}
    assert "there is no text in -" in error_of("demo", "-", input="\n \n")
    assert "no-such-file: No such file" in error_of("demo", "no-such-file")


@pytest.mark.skipif(
    not (EMBEDDED / "config.json").is_file(), reason="modernbert-mini is not in weights/embedded"
)
def test_demo_answers_offline_in_an_empty_home(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("modernbert")
    environment = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "https_proxy": "http://localhost:1",
    }
    before = os.times()
    result = subprocess.run(
        [command, "demo"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    # Of the processor, not of a clock that runs while others compute.
    assert os.times().children_user - before.children_user < 20
    blocks = blocks_of(result.stdout)
    for query, answers in ANSWERS.items():
        score, best = blocks[query][0]
        assert best in answers and score > 0.3
    assert os.listdir(tmp_path) == []


def test_the_readme_examples_run(
    encoder_folder: str, masked_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small models in the place of the published ones."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text("one\ntwo\n")
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, re.S)
    # Distilling has tests of its own; its default vocabulary takes too long here.
    blocks = [block for block in blocks if "distill(" not in block]
    assert len(blocks) == 4
    names: dict[str, Any] = {}
    for block in blocks:
        block = block.replace("nomic-ai/modernbert-embed-base", encoder_folder)
        block = block.replace("answerdotai/ModernBERT-base", masked_folder)
        exec(block.replace("truncate_dim=256", "truncate_dim=64"), names)
    assert names["vectors"].shape == (3, 64) and names["vector"].shape == (64,)
    folder = Path("my-classifier")
    assert ModernBertForSequenceClassification.from_pretrained(folder).config.num_labels == 3


def test_stdin_is_left_open() -> None:
    from modernbert.tables import read_table

    stream = io.TextIOWrapper(io.BytesIO(b"a\nb\n"))
    before, sys.stdin = sys.stdin, stream
    try:
        assert [block.texts for block in read_table("-")] == [["a", "b"]]
    finally:
        sys.stdin = before
    assert not stream.closed
