"""The files of a sentence-transformers folder: both layouts are read, the old one is written.

Read: the layout up to sentence-transformers 5.3 and the one since 5.4. Written: the former, the
only one that sentence-transformers 5 and 6, TEI, vLLM and llama.cpp all understand.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modernbert.pooling import Dense, Normalize, Pooling
from modernbert.quantization import Calibration
from modernbert.similarity import SIMILARITIES
from modernbert.weights import Checkpoint, CheckpointError, ModelFolder

KINDS = ("Transformer", "Pooling", "Dense", "Normalize")
RANGES = "embedding_ranges"  # ours; other programs ignore it


@dataclass
class Settings:
    """What a folder says beside its weights.

    Attributes:
        prompts: text put before the input, by name; "query" and "document" are always there.
        default_prompt_name: the prompt of plain `encode` calls, or None.
        similarity_fn_name: cosine, dot, euclidean or manhattan.
        truncate_dim: keep that many leading dimensions, or None for all.
        max_seq_length: tokens of the longest text, special tokens included; None: not said.
        do_lower_case: lower-case every text first.
        calibration: ranges for int8 and uint8, or None.
    """

    prompts: dict[str, str] = field(default_factory=lambda: {"query": "", "document": ""})
    default_prompt_name: str | None = None
    similarity_fn_name: str = "cosine"
    truncate_dim: int | None = None
    max_seq_length: int | None = None
    do_lower_case: bool = False
    calibration: Calibration | None = None


def read_modules_json(folder: ModelFolder) -> list[tuple[str, str]]:
    """(kind, sub-folder) of each module, Transformer first; empty for a plain model folder.

    Raises `CheckpointError` for a module this library does not implement, an order other than
    Transformer, Pooling, then Dense and Normalize, and a path that leaves the folder.
    """
    raw = folder.read_json("modules.json")
    if raw is None:
        return []
    source = f"{folder.name}/modules.json"
    modules = []
    for entry in raw if isinstance(raw, list) else [raw]:
        kind, path = (entry.get("type"), entry.get("path")) if isinstance(entry, dict) else (0, 0)
        if not isinstance(kind, str) or not isinstance(path, str):
            raise CheckpointError(f"{source} is not a list of modules with a type and a path each")
        package, _, short = kind.rpartition(".")
        if package.split(".")[0] != "sentence_transformers" or short not in KINDS:
            raise CheckpointError(
                f"{source}: module type {kind[:120]!r} is not implemented; "
                f"known are sentence-transformers' {', '.join(KINDS)}"
            )
        if path:
            folder.path(f"{path}/config.json")  # refuses '..' and absolute paths
        modules.append((short, path))
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or {*kinds[2:]} & {"Transformer", "Pooling"}:
        raise CheckpointError(
            f"{source} chains {', '.join(kinds) or 'nothing'}; a sentence encoder is a "
            "Transformer, a Pooling, then any Dense and Normalize"
        )
    return modules


def read_pooling(
    folder: ModelFolder, modules: Sequence[tuple[str, str]], hidden_size: int
) -> tuple[Pooling, list[nn.Module]]:
    """The Pooling and what follows it, for the `modules` of a sentence-transformers folder."""
    path = modules[1][1]
    source = f"{path}/config.json"
    config = _object(folder, source)
    if config is None:
        raise CheckpointError(f"{folder.name}: {source} is missing; it names the pooling mode")
    pooling = Pooling.from_config(config, hidden_size=hidden_size, source=f"{folder.name}/{source}")
    after: list[nn.Module] = []
    width = pooling.out_features
    for kind, path in modules[2:]:
        if kind == "Normalize":
            after.append(Normalize())
        else:
            if isinstance(folder, Checkpoint):
                dense = Dense.from_checkpoint(folder, f"{path}/", in_features=width)
            else:  # the Transformer is in a sub-folder, so the Dense folder stands for itself
                alone = Checkpoint(f"{folder.name}/{path}", folder.folder / path)
                dense = Dense.from_checkpoint(alone, "", in_features=width)
            after.append(dense)
            width = dense.out_features
    return pooling, after


def read_settings(folder: ModelFolder, transformer: str) -> Settings:
    """The settings of a folder whose Transformer lives in the sub-folder `transformer`.

    Raises `CheckpointError` by file, key and value.
    """
    settings = Settings()
    name = "config_sentence_transformers.json"
    source = f"{folder.name}/{name}"
    config = _object(folder, name) or {}
    if config.get("model_type") not in (None, "SentenceTransformer"):
        raise CheckpointError(
            f"{source}: model_type is {config['model_type']!r}; "
            "this class loads models with one vector per text ('SentenceTransformer')"
        )
    prompts = config.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(
        isinstance(p, str | None) for p in prompts.values()
    ):
        raise CheckpointError(f"{source}: prompts is {prompts!r}; expected an object of texts")
    settings.prompts |= {key: prompt or "" for key, prompt in prompts.items()}
    settings.default_prompt_name = config.get("default_prompt_name")
    if settings.default_prompt_name is not None:
        if settings.default_prompt_name not in list(settings.prompts):
            raise CheckpointError(
                f"{source}: default_prompt_name is {settings.default_prompt_name!r}; "
                f"the prompts are {list(settings.prompts)}"
            )
    settings.similarity_fn_name = config.get("similarity_fn_name") or "cosine"
    if settings.similarity_fn_name not in list(SIMILARITIES):
        raise CheckpointError(
            f"{source}: similarity_fn_name is {settings.similarity_fn_name!r}; "
            f"known are {', '.join(SIMILARITIES)}"
        )
    settings.truncate_dim = _positive(config, "truncate_dim", source)
    if config.get(RANGES) is not None:
        try:
            settings.calibration = Calibration.from_json(config[RANGES], source=source)
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    name = f"{transformer}/sentence_bert_config.json".removeprefix("/")
    source = f"{folder.name}/{name}"
    config = _object(folder, name) or {}
    settings.max_seq_length = _positive(config, "max_seq_length", source)
    settings.do_lower_case = bool(config.get("do_lower_case", False))
    for key, expected in (
        ("transformer_task", "feature-extraction"),
        ("module_output_name", "token_embeddings"),
    ):
        if config.get(key) not in (None, expected):
            raise CheckpointError(
                f"{source}: {key} is {config[key]!r}; this library implements {expected!r} only"
            )
    return settings


def _object(folder: ModelFolder, name: str) -> dict[str, Any] | None:
    """A JSON file that holds an object; None when there is no such file."""
    value = folder.read_json(name)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(f"{folder.name}/{name} holds no JSON object")
    return value


def _positive(config: dict[str, Any], key: str, source: str) -> int | None:
    value = config.get(key)
    if value is not None and (type(value) is not int or not 1 <= value <= 2**31):
        raise CheckpointError(f"{source}: {key} is {value!r}; expected a positive integer")
    return value


def layout_files(
    settings: Settings, pooling: Pooling, after: Sequence[nn.Module]
) -> tuple[dict[str, bytes], dict[str, dict[str, Tensor]]]:
    """Files by relative name, and the tensors of each further safetensors file, of an encoder."""
    modules: list[dict[str, Any]] = []
    jsons: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for index, kind in enumerate(["Transformer", *(type(m).__name__ for m in (pooling, *after))]):
        path = f"{index}_{kind}" if index else ""
        type_name = f"sentence_transformers.models.{kind}"
        modules.append({"idx": index, "name": str(index), "path": path, "type": type_name})
    jsons["modules.json"] = modules
    jsons["1_Pooling/config.json"] = pooling.to_config()
    for entry, module in zip(modules[2:], after, strict=True):
        if isinstance(module, Dense):
            jsons[f"{entry['path']}/config.json"] = module.to_config()
            tensors[f"{entry['path']}/model.safetensors"] = {
                name: p.detach() for name, p in module.named_parameters()
            }
    jsons["config_sentence_transformers.json"] = {
        "__version__": {"pytorch": str(torch.__version__)},
        "model_type": "SentenceTransformer",
        "prompts": settings.prompts,
        "default_prompt_name": settings.default_prompt_name,
        "similarity_fn_name": settings.similarity_fn_name,
        **({"truncate_dim": settings.truncate_dim} if settings.truncate_dim else {}),
        **({RANGES: settings.calibration.to_json()} if settings.calibration else {}),
    }
    jsons["sentence_bert_config.json"] = {
        "max_seq_length": settings.max_seq_length,
        "do_lower_case": settings.do_lower_case,
    }
    files = {name: json.dumps(value, indent=2).encode() + b"\n" for name, value in jsons.items()}
    files["README.md"] = _model_card(settings, pooling, after).encode()
    return files, tensors


def _model_card(settings: Settings, pooling: Pooling, after: Sequence[nn.Module]) -> str:
    widths = [
        module.out_features for module in (pooling, *after) if hasattr(module, "out_features")
    ]
    chain = " -> ".join(
        [f"Pooling ({', '.join(pooling.modes)})", *(type(m).__name__ for m in after)]
    )
    prompts = "".join(
        f"\n- `{name}`: `{text!r}`" for name, text in settings.prompts.items() if text
    )
    return f"""\
---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- sentence-similarity
- feature-extraction
- modernbert
---

# Sentence encoder

A ModernBERT model that maps a text to a vector of {widths[-1]} dimensions.

- Modules: ModernBERT -> {chain}
- Longest text: {settings.max_seq_length} tokens
- Similarity: {settings.similarity_fn_name}
{f"- Prompts:{prompts}" if prompts else "- Prompts: none"}

```python
from modernbert import SentenceEncoder  # or: from sentence_transformers import SentenceTransformer

encoder = SentenceEncoder.from_pretrained("this folder or repository")
vectors = encoder.encode(["The weather is lovely today.", "He drove to the stadium."])
print(encoder.similarity(vectors, vectors))
```
"""
