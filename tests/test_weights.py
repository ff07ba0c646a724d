import json
import os
import random
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from modernbert.weights import (
    FLEXBERT_CONFIG,
    OFFICIAL,
    CheckpointError,
    canonical_name,
    convert_pickle,
    expected_tensors,
    open_checkpoint,
    open_folder,
    parameters_of,
    save_folder,
)
from modernbert.weights.convert import _check_torch
from modernbert.weights.folder import IGNORED_PATTERNS, METADATA_PATTERNS, WEIGHT_PATTERNS
from modernbert.weights.remap import BARE, TABLES, inverse, rename

TINY = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tiny_tensors(head: str | None = "masked_lm") -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in expected_tensors(TINY, head).items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: Any = TINY) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / WEIGHTS)
    return folder


def write_sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    save_folder(
        folder,
        files={"config.json": json.dumps(TINY).encode()},
        tensors=tensors,
        max_shard_size=2000,
    )
    return json.loads((folder / INDEX).read_text())


def assert_same(checkpoint: Any, tensors: dict[str, torch.Tensor]) -> None:
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = checkpoint.tensors[name]
        assert (info.dtype, info.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(checkpoint.get(name), tensor)


# Reading


def test_single_file(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    checkpoint = open_checkpoint(write(tmp_path / "m", tensors))
    assert_same(checkpoint, tensors)
    assert checkpoint.config == TINY
    assert checkpoint.name == str(tmp_path / "m")
    assert checkpoint.revision is None
    info = checkpoint.tensors["decoder.bias"]
    assert (info.file.name, info.stored_name) == (WEIGHTS, "decoder.bias")


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
def test_stored_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tiny_tensors().items()}
    assert_same(open_checkpoint(write(tmp_path, tensors)), tensors)


def test_sharded(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    index = write_sharded(tmp_path / "m", tensors)
    assert len(set(index["weight_map"].values())) > 2
    assert_same(open_checkpoint(tmp_path / "m"), tensors)


def test_tensors_are_memory_mapped_and_private(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, tiny_tensors()))
    before = (tmp_path / WEIGHTS).read_bytes()
    checkpoint.get("decoder.bias").add_(1)
    assert (tmp_path / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("dialect", sorted(TABLES))
def test_every_dialect_gets_canonical_names(tmp_path: Path, dialect: str) -> None:
    back = inverse(TABLES[dialect])
    head = None if "bare" in dialect else "masked_lm"
    tensors = tiny_tensors(head)
    stored = {str(rename(name, back)): tensor for name, tensor in tensors.items()}
    assert len(stored) == len(tensors) and "None" not in stored
    assert stored.keys() != tensors.keys()
    assert_same(open_checkpoint(write(tmp_path, stored)), tensors)


def test_a_stored_duplicate_of_the_decoder_is_kept(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["decoder.weight"] = tensors["model.embeddings.tok_embeddings.weight"].clone()
    assert_same(open_checkpoint(write(tmp_path, tensors)), tensors)


@pytest.mark.parametrize("head", [None, "masked_lm", "classification"])
def test_tables_round_trip(head: str | None) -> None:
    for dialect, table in TABLES.items():
        back = inverse(table)
        assert inverse(back) == table
        for name in expected_tensors(OFFICIAL["answerdotai/ModernBERT-base"], head):
            assert canonical_name(name) == name
            stored = rename(name, back)
            if stored is None:
                assert "bare" in dialect and not name.startswith("model.")
            else:
                assert canonical_name(stored) == name


def test_config_table_names_every_field_of_the_facts() -> None:
    assert FLEXBERT_CONFIG["rotary_emb_base"] == "global_rope_theta"
    assert FLEXBERT_CONFIG["local_attn_rotary_emb_base"] == "local_rope_theta"
    assert FLEXBERT_CONFIG["sliding_window"] == "local_attention"
    assert FLEXBERT_CONFIG["norm_kwargs.eps"] == "norm_eps"
    order = list(FLEXBERT_CONFIG)
    assert order.index("head_pred_act") > order.index("head_class_act")


def test_further_safetensors_files(tmp_path: Path) -> None:
    write(tmp_path, tiny_tensors())
    dense = {"linear.weight": torch.randn(4, 8)}
    (tmp_path / "2_Dense").mkdir()
    save_file(dense, tmp_path / "2_Dense" / WEIGHTS)
    checkpoint = open_checkpoint(tmp_path)
    loaded = checkpoint.read_tensors("2_Dense/model.safetensors")
    assert loaded.keys() == dense.keys()
    assert torch.equal(loaded["linear.weight"], dense["linear.weight"])
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.read_tensors("3_Dense/model.safetensors")
    (tmp_path / "3_Dense").mkdir()
    (tmp_path / "3_Dense" / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        checkpoint.read_tensors("3_Dense/model.safetensors")


def test_json_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    folder = open_folder(tmp_path)
    assert folder.read_json("1_Pooling/config.json") == {"a": 1}
    assert folder.read_bytes("1_Pooling/config.json") == b'\xef\xbb\xbf{"a": 1}'
    assert folder.path("1_Pooling/config.json") == tmp_path / "1_Pooling" / "config.json"
    assert folder.read_json("modules.json") is None
    assert folder.read_bytes("2_Dense/config.json") is None
    assert folder.path("1_Pooling/config.json/deeper") is None


def test_folders_without_weights_need_no_torch(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    code = (
        "import sys; from modernbert.weights import open_folder, CheckpointError\n"
        f"assert open_folder({str(tmp_path)!r}).read_json('tokenizer.json') == {{}}\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write(tmp_path, tiny_tensors()))
    with pytest.raises(CheckpointError, match="no tensor 'decoder.weight'"):
        checkpoint.get("decoder.weight")


# The Hub


def fake_cache(cache: Path, tensors: dict[str, torch.Tensor]) -> str:
    """The layout of the Hub's cache: every file of a snapshot is a link to a blob."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = cache / "models--someone--tiny"
    snapshot = repo / "snapshots" / commit
    write(repo / "written", tensors)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(["config.json", WEIGHTS]):
        (repo / "written" / name).rename(repo / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    return commit


@pytest.mark.parametrize("pinned", [False, True])
def test_cached_repository_opens_offline(tmp_path: Path, pinned: bool) -> None:
    tensors = tiny_tensors()
    commit = fake_cache(tmp_path, tensors)
    checkpoint = open_checkpoint(
        "someone/tiny",
        revision=commit if pinned else None,
        local_files_only=True,
        cache_dir=tmp_path,
    )
    assert_same(checkpoint, tensors)
    assert (checkpoint.name, checkpoint.revision) == ("someone/tiny", commit)


def test_links_of_a_snapshot_may_only_lead_to_its_blobs(tmp_path: Path) -> None:
    commit = fake_cache(tmp_path, tiny_tensors())
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / commit
    outside = tmp_path / "secret.json"
    outside.write_text("{}")
    (snapshot / "modules.json").symlink_to(outside)
    folder = open_folder("someone/tiny", local_files_only=True, cache_dir=tmp_path)
    with pytest.raises(CheckpointError, match="outside the model folder"):
        folder.read_json("modules.json")


def test_cached_repository_without_safetensors(tmp_path: Path) -> None:
    commit = fake_cache(tmp_path, tiny_tensors())
    (tmp_path / "models--someone--tiny" / "snapshots" / commit / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="hf download someone/tiny"):
        open_checkpoint("someone/tiny", local_files_only=True, cache_dir=tmp_path)


def test_only_json_text_and_safetensors_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.utils import filter_repo_objects

    published = {
        "config.json": True,
        "tokenizer.json": True,
        "merges.txt": True,
        "modules.json": True,
        "1_Pooling/config.json": True,
        "2_Dense/model.safetensors": True,
        WEIGHTS: True,
        "model-00001-of-00002.safetensors": True,
        "pytorch_model.bin": False,
        "training_args.bin": False,
        "model.py": False,
        "2_Dense/pytorch_model.bin": False,
        "onnx/model.onnx": False,
        "onnx/config.json": False,
        "openvino/openvino_model.xml": False,
        "openvino/config.json": False,
        "checkpoint-500/model.safetensors": False,
        "1_Pooling/deep/config.json": False,
        "README.md": False,
    }
    kept = filter_repo_objects(
        published,
        allow_patterns=METADATA_PATTERNS + WEIGHT_PATTERNS,
        ignore_patterns=IGNORED_PATTERNS,
    )
    assert set(kept) == {name for name, wanted in published.items() if wanted}
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(KeyboardInterrupt):
        open_checkpoint("a/b", revision="v1", token="t", local_files_only=True, cache_dir="c")
    assert asked == {
        "name": "a/b",
        "revision": "v1",
        "token": "t",
        "local_files_only": True,
        "cache_dir": "c",
        "allow_patterns": METADATA_PATTERNS + WEIGHT_PATTERNS,
        "ignore_patterns": IGNORED_PATTERNS,
    }
    with pytest.raises(KeyboardInterrupt):
        open_folder("a/b")
    assert asked["allow_patterns"] == METADATA_PATTERNS


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("GatedRepoError", "Accept the conditions"),
        ("RepositoryNotFoundError", "Check the spelling"),
        ("DisabledRepoError", "Try again later"),
        ("RevisionNotFoundError", "commits/main"),
        ("LocalEntryNotFoundError", "hf download someone/tiny"),
        ("HFValidationError", "existing folder"),
    ],
)
def test_hub_errors_keep_their_class_and_gain_advice(
    monkeypatch: pytest.MonkeyPatch, kind: str, advice: str
) -> None:
    from huggingface_hub import errors

    error_class = getattr(errors, kind)

    class Response:
        headers: dict[str, str] = {}
        request = None

    def download(*args: Any, **options: Any) -> str:
        if issubclass(error_class, errors.HfHubHTTPError):
            raise error_class("the Hub's own words", response=Response())
        raise error_class("the Hub's own words")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(error_class) as caught:
        open_checkpoint("someone/tiny")
    assert type(caught.value) is error_class
    assert str(caught.value).startswith("the Hub's own words\n")
    assert advice in str(caught.value)


@pytest.mark.hub
def test_official_base_checkpoint() -> None:
    checkpoint = open_checkpoint("answerdotai/ModernBERT-base")
    expected = expected_tensors(OFFICIAL["answerdotai/ModernBERT-base"])
    assert {name: info.shape for name, info in checkpoint.tensors.items()} == expected
    assert checkpoint.revision is not None and len(checkpoint.revision) == 40


@pytest.mark.parametrize("name", ["", "./absent", "/absent/folder", "~/absent", "a\\b"])
def test_paths_that_are_no_folder(name: str) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        open_checkpoint(name)


def test_a_file_or_a_revision_where_a_folder_is_meant(tmp_path: Path) -> None:
    write(tmp_path, tiny_tensors())
    with pytest.raises(CheckpointError, match="is a file"):
        open_checkpoint(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="revision='v1'"):
        open_checkpoint(tmp_path, revision="v1")


# Hostile folders


def refused(folder: Path, *parts: str) -> str:
    """Opening and reading the folder gives one clear line that contains `parts`."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint = open_checkpoint(folder)
        for name in checkpoint.tensors:
            checkpoint.get(name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    for part in parts:
        assert part in message
    return message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ep1-ba1-rank0.pt", "model.ckpt"])
def test_pickle_only(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04cos\nsystem\n")
    refused(tmp_path, name, "modernbert convert", "--allow-pickle")


def test_no_config_and_no_weights(tmp_path: Path) -> None:
    refused(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no model.safetensors")


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "C:model.safetensors",
        "C:\\model.safetensors",
        "\\\\server\\share\\model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "model\0.safetensors",
        "model\n.safetensors",
        "mo\udc80del.safetensors",
        "model.bin",
        "MODEL.SAFETENSORS",
        "x" * 300 + ".safetensors",
        "",
        "..",
        7,
        None,
        ["model.safetensors"],
    ],
    ids=repr,
)
def test_shard_names(tmp_path: Path, shard: Any) -> None:
    write(tmp_path / "m", tiny_tensors())
    (tmp_path / "m" / WEIGHTS).rename(tmp_path / WEIGHTS)
    index = {"weight_map": {"decoder.bias": shard}}
    (tmp_path / "m" / INDEX).write_text(json.dumps(index))
    message = refused(tmp_path / "m")
    assert "must be a plain file name" in message or "plain names" in message


@pytest.mark.parametrize(
    "index", [[], "x", 3, None, {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}]
)
def test_index_of_another_form(tmp_path: Path, index: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(tmp_path, INDEX)


def test_index_and_shards_that_disagree(tmp_path: Path) -> None:
    index = write_sharded(tmp_path, tiny_tensors())
    shards = sorted(set(index["weight_map"].values()))
    first = load_file(tmp_path / shards[0])
    second = load_file(tmp_path / shards[1])
    name = min(first)

    save_file({key: value for key, value in first.items() if key != name}, tmp_path / shards[0])
    refused(tmp_path, shards[0], name, "promises")
    save_file(first, tmp_path / shards[0])

    save_file({**second, name: first[name]}, tmp_path / shards[1])
    refused(tmp_path, shards[0], shards[1], name, "both hold")
    save_file({**second, "extra": first[name]}, tmp_path / shards[1])
    refused(tmp_path, shards[1], "'extra'", "does not list")

    save_file(second, tmp_path / shards[1])
    assert len(open_checkpoint(tmp_path).tensors) == len(index["weight_map"])
    index["weight_map"][name] = shards[1]
    (tmp_path / INDEX).write_text(json.dumps(index))
    refused(tmp_path, shards[1], name, "promises")

    (tmp_path / shards[1]).unlink()
    refused(tmp_path, shards[1], "missing")


def test_one_tensor_under_two_dialects(tmp_path: Path) -> None:
    tensors = {"bert.final_norm.weight": torch.ones(8), "final_norm.weight": torch.ones(8)}
    refused(write(tmp_path, tensors), "both 'model.final_norm.weight'")


def test_single_file_wins_over_an_index_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_sharded(tmp_path / "m", tiny_tensors())
    tensors = tiny_tensors()
    save_file(tensors, tmp_path / "m" / WEIGHTS)
    assert_same(open_checkpoint(tmp_path / "m"), tensors)
    assert "ignored" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_nan_and_infinity(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensors = tiny_tensors()
    tensors["model.final_norm.weight"] = torch.ones(8, dtype=dtype)
    tensors["model.final_norm.weight"][5] = value
    checkpoint = open_checkpoint(write(tmp_path, tensors))
    assert torch.equal(checkpoint.get("decoder.bias"), tensors["decoder.bias"])
    refused(tmp_path, WEIGHTS, "'model.final_norm.weight'", "NaN or infinity")


def test_unsupported_dtype(tmp_path: Path) -> None:
    tensors = {"model.final_norm.weight": torch.ones(8).to(torch.float8_e4m3fn)}
    refused(write(tmp_path, tensors), "F8_E4M3", "F16, BF16")


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(start: int, end: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end], **other}


BROKEN_FILES = {
    "empty": b"",
    "short": b"\1\2\3",
    "text": b"not a checkpoint at all, just words",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "truncated": safetensors_bytes({"a": entry(0, 8)}, b"\0" * 4),
    "name of two lines": safetensors_bytes({"a\nb": entry(0, 8), "c\n": entry(4, 8)}, b"\0" * 8),
    "long name": safetensors_bytes({"a" * 10**6: entry(0, 8)}, b"\0" * 4),
    "trailing": safetensors_bytes({"a": entry(0, 8)}, b"\0" * 12),
    "overlap": safetensors_bytes({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12),
    "hole": safetensors_bytes({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12),
    "wrong size": safetensors_bytes({"a": entry(0, 8, shape=[3])}, b"\0" * 8),
    "10^9": safetensors_bytes({"a": entry(0, 8, shape=[10**9, 10**9])}, b"\0" * 8),
    "overflow": safetensors_bytes({"a": entry(0, 8, shape=[2**63, 2**63])}, b"\0" * 8),
    "negative": safetensors_bytes({"a": entry(0, 8, shape=[-2])}, b"\0" * 8),
    "float shape": safetensors_bytes({"a": entry(0, 8, shape=[2.0])}, b"\0" * 8),
    "reversed": safetensors_bytes({"a": entry(0, 8, data_offsets=[8, 0])}, b"\0" * 8),
    "dtype": safetensors_bytes({"a": entry(0, 8, dtype="P32")}, b"\0" * 8),
    "no shape": safetensors_bytes({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, b"\0" * 8),
    "list": safetensors_bytes([1, 2]),
    "number": safetensors_bytes(b"7"),
    "not utf-8": safetensors_bytes(b'{"\xff": 1}'),
    "twice": safetensors_bytes(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        b"\0\0",
    ),
    "deep": safetensors_bytes(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "header of 2^63": safetensors_bytes({}, length=2**63),
    "header longer than the file": safetensors_bytes({}, length=1000),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_safetensors(tmp_path: Path, case: str) -> None:
    write(tmp_path, tiny_tensors())
    (tmp_path / WEIGHTS).write_bytes(BROKEN_FILES[case])
    refused(tmp_path, WEIGHTS)


BROKEN_JSON = {
    "empty": b"",
    "not utf-8": b'{"a": "\xff"}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "cut": b'{"a": ',
    "list": b"[]",
    "string": b'"x"',
    "null": b"null",
    "twice": b'{"hidden_size": 8, "hidden_size": 9}',
    "twice below": b'{"a": [{"b": 1, "b": 2}]}',
    "constant": b'{"a": Infinity}',
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "deep": b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
    "very deep": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "control": b'{"a\x1b[31m": 1, "a\x1b[31m": 2}',
}


@pytest.mark.parametrize("case", BROKEN_JSON)
def test_broken_config(tmp_path: Path, case: str) -> None:
    write(tmp_path, tiny_tensors())
    (tmp_path / "config.json").write_bytes(BROKEN_JSON[case])
    assert refused(tmp_path, "config.json").isprintable()


def test_brackets_inside_strings_are_no_depth(tmp_path: Path) -> None:
    config = {**TINY, "text": "[" * 1000, "nested": [[[{"a": [1]}]]]}
    assert open_checkpoint(write(tmp_path, tiny_tensors(), config)).config == config


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, INDEX])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link out", "link in circles", "broken link"])
def test_no_regular_file(tmp_path: Path, name: str, kind: str) -> None:
    folder = write(tmp_path / "m", tiny_tensors())
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    else:
        (folder / name).rename(tmp_path / name)
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "folder":
        (folder / name).mkdir()
    elif kind == "link out":
        (tmp_path / INDEX).write_text("{}")
        (folder / name).symlink_to(tmp_path / name)
    elif kind == "link in circles":
        (folder / name).symlink_to(folder / name)
    else:
        (folder / name).symlink_to("nowhere")
    refused(folder, name)


def test_links_within_the_folder_are_fine(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    write(tmp_path, tensors)
    (tmp_path / WEIGHTS).rename(tmp_path / "v2.safetensors")
    (tmp_path / WEIGHTS).symlink_to("v2.safetensors")
    assert_same(open_checkpoint(tmp_path), tensors)


@pytest.mark.parametrize(
    "relative",
    ["../x", "/etc/passwd", "a/../../x", "C:x", "a\\b", "", ".", "a//b", "x\0y", "a/", "\ud800"],
)
def test_paths_that_leave_the_folder(tmp_path: Path, relative: str) -> None:
    folder = open_folder(tmp_path)
    for read in (folder.path, folder.read_bytes, folder.read_json):
        with pytest.raises(CheckpointError, match="could leave the model folder"):
            read(relative)


LIMITS = """
import json, sys, time
from pathlib import Path
from modernbert.weights import CheckpointError, open_checkpoint

def memory(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024

root = Path(sys.argv[1])
try:
    open_checkpoint(root / "warm up")
except CheckpointError:
    pass
report = {}
for folder in sorted(root.iterdir()):
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before, start, error = memory("VmRSS"), time.monotonic(), None
    try:
        open_checkpoint(folder)
    except CheckpointError as caught:
        error = str(caught)
    report[folder.name] = [memory("VmHWM") - before, time.monotonic() - start, error]
print(json.dumps(report))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_and_time_of_hostile_folders(tmp_path: Path) -> None:
    def add(case: str, name: str, content: bytes, size: int | None = None) -> None:
        folder = write(tmp_path / case, tiny_tensors())
        if name == INDEX:
            (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(content)
        if size is not None:
            os.truncate(folder / name, size)

    limit = 2 * 2**20
    small = b'"%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    header = b"{" + b"".join(small % number for number in range(36_000)) + b'"x":1}'
    add("header 100 MB", WEIGHTS, safetensors_bytes(b"{", length=100_000_000), 100_000_100)
    add("header many", WEIGHTS, safetensors_bytes(header))
    add("header 40 MB", WEIGHTS, safetensors_bytes(header * 20))
    add("header spaces", WEIGHTS, safetensors_bytes(b"{" + b" " * (limit - 3) + b"}x"))
    add("config 10 GB", "config.json", b"{", 10 * 2**30)
    add("config lists", "config.json", b"[" + b"[]," * (limit // 3 - 2) + b"[]]")
    add("config deep", "config.json", b"[" * limit)
    add("config keys", "config.json", b"{" + b'"":1,' * (limit // 5 - 2) + b'"":1}')
    shards = b",".join(b'"%d":"%d.safetensors"' % (n, n) for n in range(70_000))
    add("index many", INDEX, b'{"weight_map":{' + shards + b"}}")
    add("index 10 MB", INDEX, b"[" + b"0," * 5_000_000 + b"0]")
    ran = subprocess.run(
        [sys.executable, "-c", LIMITS, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path.parent,
    )
    report = json.loads(ran.stdout)
    assert len(report) == 10
    for case in ("header 100 MB", "header 40 MB"):
        assert "more than the 2,097,152 allowed" in report[case][2]
    for case, (growth, seconds, error) in report.items():
        assert error is not None and "\n" not in error, case
        assert growth < 200, f"{case} took {growth:.0f} MB"
        assert seconds < 30, f"{case} took {seconds:.1f} s"  # a guard against hanging, no benchmark


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """`raw` after a few random edits of the kinds that break parsers."""
    pieces = [b'"', b"{", b"}", b"[", b"]", b":", b",", b"-1", b"1e999", b"null", b"\xff", b"\0"]
    for _ in range(rng.randint(1, 4)):
        at, other = rng.randrange(len(raw) + 1), rng.randrange(len(raw) + 1)
        low, high = min(at, other), max(at, other)
        match rng.randrange(6):
            case 0:
                raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
            case 1:
                raw = raw[:at] + rng.choice(pieces) + raw[at:]
            case 2:
                raw = raw[:low] + raw[high:]
            case 3:
                raw = raw[:high] + raw[low:high] + raw[high:]
            case 4:
                raw = raw[:at]
            case 5:
                digits = [place for place, byte in enumerate(raw) if 48 <= byte <= 57]
                if digits:
                    place = rng.choice(digits)
                    raw = raw[:place] + str(rng.choice([0, 9, 2**31, 2**64])).encode() + raw[place:]
    return raw


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-*.safetensors"])
def test_random_mutations_never_crash(tmp_path: Path, name: str) -> None:
    rng = random.Random(name)
    folder = tmp_path / "m"
    write_sharded(folder, tiny_tensors())
    [path] = folder.glob(name)
    original = path.read_bytes()
    broken = 0
    for _ in range(700):
        if name.endswith(".json"):
            changed = mutated(original, rng)
        else:  # the header and its length, more than the numbers behind them
            end = 8 + int.from_bytes(original[:8], "little")
            header = mutated(original[8:end], rng)
            honest = rng.random() < 0.7
            length = len(header).to_bytes(8, "little") if honest else original[:8]
            changed = length + header + original[end:]
        path.write_bytes(changed)
        try:
            checkpoint = open_checkpoint(folder)
            for tensor in checkpoint.tensors:
                checkpoint.get(tensor)
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
            broken += 1
    assert broken > 300, "the mutations do not break anything"
    path.write_bytes(original)
    open_checkpoint(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(config=JSON, weight_map=JSON, extra=JSON)
def test_any_json_in_place_of_config_and_index(
    tmp_path: Path, config: Any, weight_map: Any, extra: Any
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map, "metadata": extra}))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


# Written by transformers


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", minversion="5.0")


def tiny_transformer(transformers: Any, name: str, **changes: Any) -> Any:
    config = transformers.ModernBertConfig(
        **TINY, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    )
    for field, value in changes.items():
        setattr(config, field, value)
    torch.manual_seed(0)
    return getattr(transformers, name)(config)


CLASSES = {
    "ModernBertModel": (None, 2),
    "ModernBertForMaskedLM": ("masked_lm", 2),
    "ModernBertForSequenceClassification": ("classification", 2),
    "ModernBertForTokenClassification": ("classification", 2),
    "ModernBertForQuestionAnswering": ("classification", 2),
    "ModernBertForMultipleChoice": ("classification", 1),
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_saved_by_transformers(tmp_path: Path, transformers: Any, name: str, sharded: bool) -> None:
    model = tiny_transformer(transformers, name)
    model.save_pretrained(tmp_path, max_shard_size="2KB" if sharded else "1GB")
    checkpoint = open_checkpoint(tmp_path)
    assert (tmp_path / INDEX).exists() == sharded
    head, labels = CLASSES[name]
    expected = expected_tensors(TINY, head, num_labels=labels)
    assert {key: info.shape for key, info in checkpoint.tensors.items()} == expected
    assert checkpoint.config["architectures"] == [name]
    state = {canonical_name(key): value for key, value in model.state_dict().items()}
    for key in checkpoint.tensors:
        assert torch.equal(checkpoint.get(key), state[key])


def test_half_precision_saved_by_transformers(tmp_path: Path, transformers: Any) -> None:
    tiny_transformer(transformers, "ModernBertModel").half().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert {info.dtype for info in checkpoint.tensors.values()} == {torch.float16}
    assert checkpoint.get("model.final_norm.weight").dtype == torch.float16


@pytest.mark.parametrize(
    "flags",
    [
        {"norm_bias": True},
        {"attention_bias": True, "mlp_bias": True},
        {"classifier_bias": True, "decoder_bias": False},
        {"tie_word_embeddings": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["ModernBertForMaskedLM", "ModernBertForTokenClassification"])
def test_manifest_knows_every_flag(
    tmp_path: Path, transformers: Any, name: str, flags: dict[str, bool]
) -> None:
    tiny_transformer(transformers, name, **flags).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    expected = expected_tensors({**TINY, **flags}, CLASSES[name][0])
    assert {key: info.shape for key, info in checkpoint.tensors.items()} == expected


def test_transformers_reads_what_we_save(tmp_path: Path, transformers: Any) -> None:
    model = tiny_transformer(transformers, "ModernBertForMaskedLM")
    state = {name: value for name, value in model.state_dict().items() if name != "decoder.weight"}
    save_folder(
        tmp_path / "m",
        files={"config.json": model.config.to_json_string().encode()},
        tensors=state,
        max_shard_size=3000,
    )
    again, info = transformers.ModernBertForMaskedLM.from_pretrained(
        tmp_path / "m", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


# The manifest


@pytest.mark.parametrize(
    ("name", "head", "parameters", "tensors"),
    [
        ("answerdotai/ModernBERT-base", "masked_lm", 149_655_232, 137),
        ("answerdotai/ModernBERT-large", "masked_lm", 395_881_664, 173),
        ("answerdotai/ModernBERT-base", None, 149_014_272, 134),
        ("answerdotai/ModernBERT-large", None, 394_781_696, 170),
    ],
)
def test_official_sizes(name: str, head: str | None, parameters: int, tensors: int) -> None:
    assert parameters_of(name, head) == parameters
    assert len(expected_tensors(OFFICIAL[name], head)) == tensors


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_tensors_are_those_of_transformers(transformers: Any, name: str) -> None:
    with torch.device("meta"):
        model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**OFFICIAL[name]))
    expected = expected_tensors(OFFICIAL[name])
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert shapes == expected
    assert parameters_of(name) == sum(prod(shape) for shape in shapes.values())
    heads, hidden = OFFICIAL[name]["num_attention_heads"], OFFICIAL[name]["hidden_size"]
    assert hidden == 64 * heads


@pytest.mark.parametrize(
    ("name", "millions"), [("17m", 17), ("32m", 32), ("68m", 68), ("150m", 150), ("400m", 400)]
)
def test_ettin_names_tell_their_size(name: str, millions: int) -> None:
    assert parameters_of(f"jhu-clsp/ettin-encoder-{name}") == pytest.approx(
        millions * 1e6, rel=0.02
    )


def test_manifest_refuses_unknown_names() -> None:
    with pytest.raises(ValueError, match="no official model"):
        parameters_of("bert-base-uncased")
    with pytest.raises(ValueError, match="'masked_lm' or 'classification'"):
        expected_tensors(TINY, "pooler")


# Conversion


def flexbert_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    back = inverse(TABLES["composer"])
    state = {str(rename(name, back)): tensor for name, tensor in tensors.items()}
    state["model.decoder.weight"] = state["model.bert.embeddings.tok_embeddings.weight"]
    return state


def composer_file(folder: Path, tensors: dict[str, torch.Tensor], **options: Any) -> Path:
    folder.mkdir()
    state = {"state": {"model": flexbert_state(tensors), "timestamp": {"batch": 3}}, "rng": [1]}
    torch.save(state, folder / "ep0-ba3-rank0.pt", **options)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "config.json").write_text('{"model_type": "flex_bert"}')
    (folder / "notes.bin").write_bytes(b"not carried")
    return folder / "ep0-ba3-rank0.pt"


@pytest.mark.parametrize("zipped", [True, False])
def test_convert_composer_file(tmp_path: Path, zipped: bool) -> None:
    tensors = tiny_tensors()
    source = composer_file(tmp_path / "s", tensors, _use_new_zipfile_serialization=zipped)
    made = convert_pickle(source, tmp_path / "d", allow_pickle=True, config=TINY)
    assert made == tmp_path / "d"
    assert_same(open_checkpoint(made), tensors)
    assert open_checkpoint(made).config == TINY
    assert sorted(os.listdir(made)) == ["config.json", WEIGHTS, "tokenizer.json"]


def test_convert_in_place_keeps_the_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tiny_tensors()
    composer_file(tmp_path / "s", tensors)
    (tmp_path / "s" / "notes.bin").unlink()
    monkeypatch.chdir(tmp_path)
    convert_pickle("s", "s", allow_pickle=True)
    assert_same(open_checkpoint("s"), tensors)
    assert sorted(os.listdir("s")) == [
        "config.json",
        "ep0-ba3-rank0.pt",
        WEIGHTS,
        "tokenizer.json",
    ]
    assert open_checkpoint("s").config == {"model_type": "flex_bert"}


def test_convert_keeps_an_untied_decoder(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["decoder.weight"] = torch.randn(40, 8)
    (tmp_path / "s").mkdir()
    torch.save(tensors, tmp_path / "s" / "pytorch_model.bin")
    made = convert_pickle(tmp_path / "s", tmp_path / "d", allow_pickle=True, config=TINY)
    assert_same(open_checkpoint(made), tensors)


def test_convert_sentence_transformers_folder(tmp_path: Path) -> None:
    tensors = tiny_tensors(head=None)
    back = inverse(BARE)
    source = tmp_path / "s"
    (source / "2_Dense").mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(TINY))
    (source / "modules.json").write_text("[]")
    torch.save(
        {rename(name, back): tensor for name, tensor in tensors.items()},
        source / "pytorch_model.bin",
    )
    (source / "2_Dense" / "config.json").write_text('{"in_features": 8}')
    dense = {"linear.weight": torch.randn(4, 8)}
    torch.save(dense, source / "2_Dense" / "pytorch_model.bin")
    convert_pickle(source, tmp_path / "d", allow_pickle=True)
    checkpoint = open_checkpoint(tmp_path / "d")
    assert_same(checkpoint, tensors)
    assert checkpoint.tensors["model.final_norm.weight"].stored_name == "final_norm.weight"
    loaded = checkpoint.read_tensors("2_Dense/model.safetensors")
    assert torch.equal(loaded["linear.weight"], dense["linear.weight"])
    assert checkpoint.read_json("2_Dense/config.json") == {"in_features": 8}
    assert checkpoint.read_json("modules.json") == []


def test_convert_sharded_pickles(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    source = tmp_path / "s"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(TINY))
    names = sorted(tensors)
    shards = {"pytorch_model-1.bin": names[:5], "pytorch_model-2.bin": names[5:]}
    for file, held in shards.items():
        torch.save({name: tensors[name] for name in held}, source / file)
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    convert_pickle(source, tmp_path / "d", allow_pickle=True, max_shard_size=2000)
    assert_same(open_checkpoint(tmp_path / "d"), tensors)
    assert not (tmp_path / "d" / "pytorch_model.bin.index.json").exists()

    index["weight_map"][names[0]] = "../pytorch_model-1.bin"
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="could leave"):
        convert_pickle(source, tmp_path / "e", allow_pickle=True)


def test_convert_asks_first(tmp_path: Path) -> None:
    source = composer_file(tmp_path / "s", tiny_tensors())
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        convert_pickle(source, tmp_path / "d")
    assert not (tmp_path / "d").exists()


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch EXECUTED",)


@pytest.mark.parametrize("zipped", [True, False])
def test_convert_never_runs_what_it_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "pytorch_model.bin"
    torch.save({"a": Evil()}, source, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="cannot be read as tensors alone") as caught:
        convert_pickle(source, tmp_path / "d", allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["pytorch_model.bin"]


@pytest.mark.parametrize("content", [{"a": 3}, [torch.ones(2)], torch.ones(2), {}, {5: "x"}])
def test_convert_wants_tensors_by_name(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt holds"):
        convert_pickle(tmp_path / "x.pt", tmp_path / "d", allow_pickle=True)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("content", [b"", b"PK\3\4 no zip", b"\x80\x02.", b"\x80\x02}q"])
def test_convert_of_broken_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read"):
        convert_pickle(tmp_path / "x.pt", tmp_path / "d", allow_pickle=True)


def test_convert_of_a_folder_without_or_with_many_pickles(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="0 other pickled files"):
        convert_pickle(tmp_path, tmp_path / "d", allow_pickle=True)
    (tmp_path / "a.pt").touch()
    (tmp_path / "b.pt").touch()
    with pytest.raises(CheckpointError, match="2 other pickled files"):
        convert_pickle(tmp_path, tmp_path / "d", allow_pickle=True)
    with pytest.raises(CheckpointError, match="no file or folder"):
        convert_pickle(tmp_path / "absent", tmp_path / "d", allow_pickle=True)


def test_old_torch_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CheckpointError, match="CVE-2025-32434"):
        _check_torch("2.5.1+cu121")
    assert not caplog.text
    _check_torch("2.6.0")
    assert "CVE-2026-24747" in caplog.text
    caplog.clear()
    for version in ("2.10.0", "2.13.0+cpu", "3.0.0a0+git1"):
        _check_torch(version)
    assert not caplog.text
