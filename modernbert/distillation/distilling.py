"""`distill`: a teacher's vectors of words become the table of a StaticModel.

Shapes: V = tokens of the static model, D = the teacher's width, d = the table's.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from modernbert.static import StaticModel, cluster_rows
from modernbert.vocabulary import Vocabulary

from .frequencies import (
    Source,
    head_probabilities,
    is_mark,
    random_texts,
    token_probabilities,
    word_frequencies,
)
from .postprocess import (
    Axes,
    pca,
    principal_axes,
    rank_probabilities,
    rogue_dimensions,
    sif_weights,
    solve_rows,
    standardize,
)
from .recipe import PRESETS, Recipe

if TYPE_CHECKING:
    import torch

    from .teacher import Input, Teacher

logger = logging.getLogger("modernbert")

FAITHFUL = "model2vec"
LONGEST = 1000  # characters of a text on which rows are solved: within the length of every teacher


def distill(
    teacher: Any,
    *,
    vocabulary: Sequence[str] | str | PathLike[str] | None = None,
    dims: int | float | str | None = 256,
    preset: str = "modernbert",
    compat: str | None = None,
    frequencies: Source | None = None,
    sentences: Iterable[str] | None = None,
    device: "torch.device | str | None" = None,
    batch_tokens: int = 4096,
    show_progress_bar: bool = True,
    **switches: Any,
) -> StaticModel:
    """A static model that gives words the vectors that the teacher gives them.

    Args:
        teacher: a Hub id or folder, a `SentenceEncoder`, a `ModernBertModel`, or a
            `SentenceTransformer`. Models other than ModernBERT need sentence-transformers.
        vocabulary: words and phrases that get a token each, or a file with one on each line. When
            None, the most frequent words of the language, as many as `words` says.
        dims: width of the vectors.
        preset: "modernbert", the best combination found, or "model2vec".
        compat: "model2vec" reproduces what model2vec 0.10 makes of the same teacher.
        frequencies: a file, counts or texts instead of what the recipe says.
        sentences: texts on which the rows are solved, in the place of `mixtures` of random words:
            no longer free of data, but closer to the teacher where such texts are read.
        device: where the teacher runs; the GPU if there is one.
        batch_tokens: the teacher's token budget.
        show_progress_bar: show how many words the teacher has seen.
        switches: any field of `Recipe`, such as `sif=1e-4`.

    Raises `ValueError` for arguments that are out of range or name nothing.
    """
    from .teacher import open_teacher

    if compat not in (None, FAITHFUL):
        raise ValueError(f"compat={compat!r}; the only choice is {FAITHFUL!r}")
    name = compat or preset
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}; choose from {', '.join(PRESETS)}")
    recipe = PRESETS[name].replace(dims=dims, **switches)
    if isinstance(frequencies, str):
        recipe = recipe.replace(frequencies=frequencies)
    source = recipe.frequencies if frequencies is None else frequencies
    counts: dict[str, float] | None = None
    if not (isinstance(source, str) and source in ("rank", "head")):
        counts = word_frequencies(source, language=recipe.language)
    opened = open_teacher(teacher, device=device, prompt=recipe.prompt)
    words = _words(vocabulary, recipe, counts)
    student, base, added = make_student(opened, words, recipe, faithful=compat == FAITHFUL)
    vectors = _vectors(opened, student, recipe, batch_tokens, show_progress_bar)
    if counts is not None:
        shares = token_probabilities(student, counts)
    elif source == "head":
        shares = head_probabilities(_bias(teacher, device), opened.backend, student)
    else:
        shares = rank_probabilities(len(vectors))
    weights = sif_weights(shares, recipe.sif) ** recipe.sif_power
    config = _config(opened.name, recipe)
    settings: dict[str, Any] = {"config": config, "max_length": recipe.max_length}
    if compat is not None and recipe.clusters is not None:  # clusters first, as model2vec does
        rows, mapping, lengths = cluster_rows(vectors, recipe.clusters, weights=weights)
        settings |= {"mapping": mapping, "weights": lengths}
        model = StaticModel(pca(rows, recipe.dims), student.build(), **settings)
        return model.quantize(recipe.dtype)
    rogue = rogue_dimensions(vectors) if recipe.rogue else []
    if rogue:
        logger.info("dimensions %s dominate the teacher's cosines: scaled down", rogue)
    axes = table_axes(standardize(vectors, rogue), shares, recipe)
    table = (project(vectors, rogue, axes) * weights[:, None]).astype(np.float32)
    if recipe.ridge is not None and added:
        table = _with_solved_pieces(table, student, base, added, recipe.ridge)
    tokenizer = student.build()
    if sentences is not None or recipe.mixtures:
        texts = _texts(sentences, opened, recipe, counts)
        wanted = _text_vectors(opened, texts, vectors.shape[1], batch_tokens, show_progress_bar)
        silent = set(_places(student, student.special_tokens))
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        segments = [[number for number in e.ids if number not in silent] for e in found]
        table = _with_solved_texts(table, segments, project(wanted, rogue, axes), recipe)
    table /= np.maximum(weights, 1e-9)[:, None] ** recipe.relax
    table[[piece is not None and is_mark(piece[0]) for _, piece in student.texts()]] *= recipe.marks
    if compat is None:
        table[_places(student, student.special_tokens)] = 0
    model = StaticModel(table.astype(np.float32), tokenizer, **settings)
    return model.quantize(recipe.dtype, clusters=recipe.clusters)


def _words(
    given: Sequence[str] | str | PathLike[str] | None,
    recipe: Recipe,
    counts: Mapping[str, float] | None,
) -> list[str]:
    """The words that get a token each."""
    if given is None and recipe.words:
        if counts is None:
            counts = word_frequencies(language=recipe.language)
        # Entries with digits stand for many numbers, and those with marks are several words.
        frequent = (word for word in counts if word.isalpha())
        return [word for word, _ in zip(frequent, range(recipe.words), strict=False)]
    if isinstance(given, str | PathLike):
        return list(word_frequencies(given))
    words = list(given or [])
    for index, word in enumerate(words):
        if not isinstance(word, str):
            raise ValueError(f"vocabulary[{index}] is {word!r:.40}, not a word")
    return words


def make_student(
    teacher: "Teacher", words: Iterable[str], recipe: Recipe, *, faithful: bool = False
) -> tuple[Vocabulary, tokenizers.Tokenizer, dict[str, str]]:
    """The static model's vocabulary, its tokenizer before words were added, {word: its token}.

    `faithful` edits as model2vec 0.10 does.
    """
    student = Vocabulary(teacher.backend)
    student.drop_added()
    removed: re.Pattern[str] | None = None
    if recipe.remove is not None:
        try:
            removed = re.compile(recipe.remove)
        except re.error as error:
            raise ValueError(f"remove={recipe.remove!r} is no pattern: {error}") from None
        student.remove([token for token in student.tokens if removed.match(token)])
    if faithful:
        student.prefix_space()
    if recipe.align:
        student.align()
    if recipe.fold_case:
        student.fold_case()
    if recipe.align:
        student.prune()
    known = list(student.texts())
    if not recipe.subwords:
        old = student
        student = Vocabulary.of_words(lowercase=recipe.fold_case)
        student.add(piece[0] for _, piece in known if piece and piece[1])
        for token, texts in old.forms.items():
            piece = old.text(token)
            if piece and piece[0] in student.tokens:
                student.forms[piece[0]] = texts
    base = student.build()
    before = set(student.tokens)
    added = student.add(
        (word for word in words if removed is None or not removed.match(word)), loose=faithful
    )
    if not student.tokens:
        raise ValueError("no token is left; check remove=")
    if recipe.fold_case:
        for word, token in added.items():
            if token not in before:
                student.forms.setdefault(token, []).append(_usual_case(teacher, word))
    return student, base, added


def _usual_case(teacher: "Teacher", word: str) -> str:
    """The word as it is written more often, to judge by the pieces a cased tokenizer needs."""
    if not word.islower():
        return word
    both = word, word[0].upper() + word[1:]
    lower, upper = (
        len(teacher.backend.encode(teacher.space + form, add_special_tokens=False)) for form in both
    )
    return both[upper < lower]


def _inputs(
    teacher: "Teacher", student: Vocabulary, template: str, plain: bool
) -> tuple[list["Input"], list[int]]:
    """What the teacher reads, and the token (its place) that each is for."""
    inputs: list[Input] = []
    places: list[int] = []
    same = (student.kind, student.marker) == (teacher.vocabulary.kind, teacher.vocabulary.marker)
    for place, (token, piece) in enumerate(student.texts()):
        texts = student.forms.get(token)
        direct = teacher.token(token) if same or piece is None else None
        if texts:
            found = [teacher.word(text, template) for text in dict.fromkeys(texts)]
        elif direct is not None and (plain or piece is None or not piece[1]):
            found = [direct]
        elif piece is not None:
            found = [teacher.word(piece[0], template)]
        else:
            found = [teacher.word(token, template)]
        inputs += found
        places += [place] * len(found)
    return inputs, places


def _vectors(
    teacher: "Teacher",
    student: Vocabulary,
    recipe: Recipe,
    batch_tokens: int,
    progress: bool,
) -> np.ndarray:
    """The teacher's vector of each token (V, D)."""
    total: np.ndarray | None = None
    poolings = recipe.pooling.split("+")
    for template in recipe.templates:
        inputs, places = _inputs(teacher, student, template, template == "{}")
        shares = _shares_of_forms(places)
        for found in teacher.embed(
            inputs, poolings, layers=recipe.layers, batch_tokens=batch_tokens, progress=progress
        ):
            rows = np.zeros((len(student.tokens), found.shape[1]), np.float32)
            np.add.at(rows, places, found * shares[:, None])
            if len(recipe.templates) * len(poolings) > 1:
                rows -= rows.mean(axis=0)
                rows /= np.sqrt((rows**2).mean()) + 1e-12
            total = rows if total is None else total + rows
    assert total is not None
    return total


def _shares_of_forms(places: Sequence[int]) -> np.ndarray:
    """How much each spelling counts in its token's row: 1, 1/2, 1/3, ... scaled to sum 1."""
    numbers = np.asarray(places)
    first = np.searchsorted(numbers, numbers)  # places are sorted
    shares = 1.0 / (1 + np.arange(len(numbers)) - first)
    return (shares / np.bincount(numbers, shares)[numbers]).astype(np.float32)


def table_axes(vectors: np.ndarray, shares: np.ndarray, recipe: Recipe) -> Axes | None:
    """The axes of the table: the words' principal ones, whitened in part; None without a PCA."""
    counted = None
    if recipe.pca_sif is not None:
        counted = shares * sif_weights(shares, recipe.pca_sif) ** 2
    return principal_axes(
        vectors, recipe.dims, weights=counted, drop=recipe.drop, whiten=recipe.whiten
    )


def project(vectors: np.ndarray, rogue: Sequence[int], axes: Axes | None) -> np.ndarray:
    """Teacher's vectors (n, D) in the space of the table, (n, d)."""
    vectors = standardize(vectors, rogue)
    return vectors if axes is None else axes(vectors)


def _texts(
    sentences: Iterable[str] | None,
    teacher: "Teacher",
    recipe: Recipe,
    counts: Mapping[str, float] | None,
) -> list[str]:
    """The texts on which rows are solved."""
    if sentences is not None:
        texts = [sentences] if isinstance(sentences, str) else list(sentences)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError("sentences must be texts, at least one")
        return [text[:LONGEST] for text in texts]
    mixed = random_texts(counts or word_frequencies(language=recipe.language), recipe.mixtures)
    usual = {word: word for text in mixed for word in text}
    if recipe.fold_case:
        usual = {word: _usual_case(teacher, word) for word in usual}
    return [" ".join(map(usual.__getitem__, text)) for text in mixed]


def _text_vectors(
    teacher: "Teacher", texts: Sequence[str], width: int, batch_tokens: int, progress: bool
) -> np.ndarray:
    """The teacher's vectors of texts (n, D) of length 1, by its own pooling where that has D."""
    inputs = [teacher.word(text) for text in texts]
    (first,) = teacher.embed(inputs[:1])
    pooling = "own" if first.shape[1] == width else "mean"
    (vectors,) = teacher.embed(
        inputs, [pooling], batch_tokens=batch_tokens, progress=progress, unit=" texts"
    )
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-32
    return vectors


def _with_solved_texts(
    table: np.ndarray, segments: Sequence[list[int]], targets: np.ndarray, recipe: Recipe
) -> np.ndarray:
    """The table with rows whose mean over a text comes out as the teacher's vector of it."""
    used = [number for number, segment in enumerate(segments) if segment]
    segments = [segments[number] for number in used]
    targets = targets[used] - targets[used].mean(axis=0)
    means = np.stack([table[segment].mean(axis=0) for segment in segments])
    # The teacher's vectors have length 1, whatever the lengths of rows are.
    targets *= (means * targets).sum() / max((targets**2).sum(), 1e-32)
    return solve_rows(table, segments, targets, ridge=recipe.mixture_ridge, mean=True)


def _with_solved_pieces(
    table: np.ndarray,
    student: Vocabulary,
    base: tokenizers.Tokenizer,
    added: Mapping[str, str],
    ridge: float,
) -> np.ndarray:
    """The table with rows of pieces that make the words they spell come out right."""
    ids = {token: number for number, token in enumerate(student.tokens)}
    free = np.array([piece is not None and not piece[1] for _, piece in student.texts()])
    encoded = base.encode_batch_fast(list(added), add_special_tokens=False)
    unknown = {ids[token] for token in student.special_tokens}
    segments, places = [], []
    for token, encoding in zip(added.values(), encoded, strict=True):
        segment = [ids[base.id_to_token(number) or ""] for number in encoding.ids]
        if free[segment].any() and not set(segment) & unknown:
            segments.append(segment)
            places.append(ids[token])
    if not segments:
        return table
    return solve_rows(table, segments, table[places], free=free, ridge=ridge)


def _places(vocabulary: Vocabulary, tokens: Iterable[str]) -> list[int]:
    wanted = set(tokens)
    return [number for number, token in enumerate(vocabulary.tokens) if token in wanted]


def _bias(teacher: Any, device: Any) -> np.ndarray:
    """The decoder's bias of a masked LM; `ValueError` when it has none."""
    from modernbert.heads import ModernBertForMaskedLM

    model = teacher
    if isinstance(teacher, str | PathLike):
        model = ModernBertForMaskedLM.from_pretrained(str(teacher))
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None or head.bias is None:
        raise ValueError(
            "frequencies='head' needs a masked LM whose decoder has a bias; use 'wordfreq'"
        )
    return head.bias.detach().float().cpu().numpy()


def _config(name: str, recipe: Recipe) -> dict[str, Any]:
    """The fields of model2vec's config.json, and ours under "recipe"."""
    return {
        "tokenizer_name": name,
        "apply_pca": recipe.dims,
        "sif_coefficient": recipe.sif,
        "pooling": recipe.pooling,
        "recipe": recipe.to_dict(),
    }
