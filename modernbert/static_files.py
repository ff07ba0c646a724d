"""The files of a static model: every layout is read; the tensors and the ONNX graph to write."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modernbert.weights import CheckpointError, ModelFolder

# config, folder of the table and the tokenizer, name of the table: the first that is there counts.
LAYOUTS = (
    ("config.json", "", "embeddings"),
    ("config_sentence_transformers.json", "", "embedding.weight"),
    ("config_sentence_transformers.json", "0_StaticEmbedding/", "embedding.weight"),
)
TABLE, TOKENIZER = "model.safetensors", "tokenizer.json"
MAX_LENGTH = 512  # tokens, when a config says nothing


def read_parts(folder: ModelFolder) -> dict[str, Any]:
    """The arguments of `StaticModel` that a folder of any layout holds."""
    for layout in LAYOUTS:
        config_name, inside, table = layout
        names = (config_name, inside + TABLE, inside + TOKENIZER)
        if all(folder.path(name) is not None for name in names):
            break
    else:
        raise CheckpointError(
            f"{folder.name} is no static model: it needs {TABLE}, {TOKENIZER} and config.json "
            "(model2vec), or config_sentence_transformers.json (sentence-transformers)"
        )
    config = folder.read_json(config_name)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder.name}/{config_name} holds no JSON object")
    tensors = _tensors_of(folder.path(inside + TABLE), table)
    raw = folder.read_bytes(inside + TOKENIZER)
    modules = folder.read_json("modules.json") if inside or config_name != "config.json" else None
    listed = [m for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    scaled = any(str(module.get("type")).endswith("Normalize") for module in listed)
    card = folder.read_bytes("README.md")
    scale = config.get("embedding_scale", 1.0)
    max_length = config.get("max_length", MAX_LENGTH)
    for name, value, kinds in (
        ("embedding_scale", scale, (int, float)),
        ("max_length", max_length, (int, type(None))),
    ):
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CheckpointError(f"{folder.name}/{config_name} has {name} {value!r:.40}")
    return {
        **tensors,
        "tokenizer": raw,
        "scale": scale,
        "normalize": bool(config.get("normalize", scaled)),
        "max_length": max_length,
        "config": config,
        "card": None if card is None else card.decode("utf-8", "replace"),
    }


def _tensors_of(path: Path | None, table: str) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if table not in names and "embeddings" in names:
                table = "embeddings"
            if table not in names:
                raise CheckpointError(f"{path} holds no tensor {table!r}, only {sorted(names)[:5]}")
            found = {"embeddings": file.get_tensor(table)}
            for name in ("weights", "mapping"):
                found[name] = file.get_tensor(name) if name in names else None
            return found
    except (SafetensorError, TypeError) as error:  # TypeError: a dtype that numpy does not have
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from None


def safetensors_bytes(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file with these tensors."""
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(values) for name, values in tensors.items()})


def onnx_bytes(rows: np.ndarray, unknown: int | None, normalize: bool) -> bytes:
    """A graph that computes what `StaticModel.encode` does, from ids and a mask."""
    try:
        from onnx import TensorProto, checker, helper, numpy_helper
    except ImportError:
        raise ImportError("export_onnx needs the package onnx: pip install onnx") from None

    constants = {
        "table": rows,
        "axis": np.array([1]),
        "unknown": np.array(-1 if unknown is None else unknown),
        "one": np.array(1, np.float32),
        "tiny": np.array(1e-30, np.float32),
    }
    node: Callable[..., Any] = helper.make_node
    float32 = TensorProto.FLOAT
    nodes = [
        node("Gather", ["table", "input_ids"], ["stored"]),  # (N, L, d)
        node("Cast", ["stored"], ["rows"], to=float32),
        node("Equal", ["input_ids", "unknown"], ["is_unknown"]),
        node("Not", ["is_unknown"], ["is_known"]),
        node("Cast", ["attention_mask"], ["present"], to=TensorProto.BOOL),
        node("And", ["is_known", "present"], ["counted"]),
        node("Cast", ["counted"], ["mask"], to=float32),  # (N, L)
        node("Unsqueeze", ["mask", "axis"], ["mask_row"]),  # (N, 1, L)
        node("MatMul", ["mask_row", "rows"], ["sum_row"]),
        node("Squeeze", ["sum_row", "axis"], ["sums"]),  # (N, d)
        node("ReduceSum", ["mask", "axis"], ["lengths"]),
        node("Max", ["lengths", "one"], ["divisor"]),
        node("Div", ["sums", "divisor"], ["means"]),
        node("ReduceL2", ["means", "axis"], ["norms"]),
        node("Max", ["norms", "tiny"], ["norm"]),
        node("Div", ["means", "norm"], ["embeddings"]),
    ]
    if not normalize:
        nodes = [*nodes[:-4], node("Div", ["sums", "divisor"], ["embeddings"])]
    both = ["texts", "tokens"]
    graph = helper.make_graph(
        nodes,
        "static_model",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, both)
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("embeddings", float32, ["texts", rows.shape[1]])],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(
        graph, producer_name="modernbert", opset_imports=[helper.make_opsetid("", 18)]
    )
    model.ir_version = 9
    checker.check_model(model)
    return model.SerializeToString()
