"""What a distillation does, as data: every part with its own switch."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from modernbert.static_dtypes import DTYPES

Dims = int | float | str | None  # a number, a share of the variance, "auto", or all


@dataclass(frozen=True)
class Recipe:
    """The switches of a distillation; the defaults are `preset="modernbert"`.

    Attributes:
        dims: width of the vectors: a number, a fraction below 1 of the variance, "auto" for the
            teacher's own width, None for no PCA.
        words: how many frequent words get a token each, beside the teacher's own tokens.
        language: of those words.
        fold_case: lower-case texts; the spellings of a word share a row.
        align: a word is the same token behind a space, a bracket, a newline and at the start.
        subwords: keep the teacher's tokens; without them, words not listed count for nothing.
        remove: a regular expression; tokens that begin with a match are removed.
        pooling: "own" (the teacher's pooling and Dense), "mean" (special tokens included), "span"
            (the word's own tokens), "first", "last" or "pooler". Joined by "+", each is centred and
            scaled to the same spread, and they are added.
        layers: whose states are averaged; -1 is the last.
        templates: contexts such as "the {}"; vectors are averaged over them, each centred.
        prompt: a text, or the name of a prompt of the teacher, before every word.
        frequencies: "wordfreq", "rank" (the order of ids, by Zipf's law) or "head" (the bias of a
            masked LM). `distill` also takes a file, counts or texts.
        sif: a of the weight (a / (a + p)) ** sif_power of a token with frequency p; None for no
            weights.
        sif_power: 1 is the usual weight; smaller ones leave frequent words more of theirs.
        pca_sif: in the mean and the PCA a token counts by p * (a / (a + p)) ** 2, nearly as it does
            in texts; None for all alike.
        drop: leading components that are left out.
        whiten: components are divided by variance ** whiten.
        rogue: scale down dimensions that dominate every cosine.
        ridge: solve the rows of pieces inside words with this regularisation; None to leave them.
        mixtures: texts of random words, drawn by frequency, on which the rows are solved: the mean
            of a text's rows should be the teacher's vector of it. 0 to leave the rows as they are.
        mixture_ridge: what holds the rows back in that.
        relax: rows are divided by weight ** relax afterwards. Texts tell more of rare words, labels
            also depend on frequent ones.
        marks: factor of the rows of punctuation.
        dtype: of the table.
        clusters: tokens share that many rows, by k-means; None for a row each.
        max_length: tokens of a text that count; None for all.
    """

    dims: Dims = 256
    words: int = 90_000
    language: str = "en"
    fold_case: bool = True
    align: bool = True
    subwords: bool = True
    remove: str | None = r"\[unused\d+\]"
    pooling: str = "first+span"
    layers: tuple[int, ...] = (-1,)
    templates: tuple[str, ...] = ("{}",)
    prompt: str | None = None
    frequencies: str = "wordfreq"
    sif: float | None = 1e-5
    sif_power: float = 0.2
    pca_sif: float | None = 1e-3
    drop: int = 1
    whiten: float = 0.25
    rogue: bool = True
    ridge: float | None = 1.0
    mixtures: int = 10_000
    mixture_ridge: float = 0.2
    relax: float = 0.4
    marks: float = 0.3
    dtype: str = "float16"
    clusters: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        dims = self.dims
        if not (
            dims is None
            or dims == "auto"
            or (isinstance(dims, float) and 0 < dims < 1)
            or (type(dims) is int and dims > 0)
        ):
            raise ValueError(
                f"dims is {dims!r}; give a positive integer, a fraction of the variance between 0 "
                "and 1, 'auto' or None"
            )
        for name in ("sif", "pca_sif"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} is {value}; give a number between 0 and 1, or None")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; choose from {', '.join(DTYPES)}")
        for name, least in (
            ("words", 0),
            ("drop", 0),
            ("whiten", 0),
            ("ridge", 0),
            ("mixtures", 0),
            ("mixture_ridge", 0),
            ("relax", 0),
            ("marks", 0),
            ("clusters", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not self.layers:
            raise ValueError("layers is empty; give at least one, such as (-1,)")
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"the template {template!r} must contain {{}} once, for the word")
        if not self.templates:
            raise ValueError("templates is empty; give at least '{}'")

    def replace(self, **changes: Any) -> "Recipe":
        """A recipe with other switches; `ValueError` for one that does not exist."""
        known = [field.name for field in dataclasses.fields(self)]
        if unknown := sorted(changes.keys() - set(known)):
            raise ValueError(f"unknown options {unknown}; distill takes {', '.join(known)}")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The switches as JSON takes them."""
        return dataclasses.asdict(self) | {
            "layers": list(self.layers),
            "templates": list(self.templates),
        }


PRESETS = {
    "modernbert": Recipe(),
    # Every step of model2vec 0.10.
    "model2vec": Recipe(
        words=0,
        fold_case=False,
        align=False,
        pooling="mean",
        frequencies="rank",
        sif=1e-4,
        sif_power=1.0,
        pca_sif=None,
        drop=0,
        whiten=0.0,
        rogue=False,
        ridge=None,
        mixtures=0,
        relax=0.0,
        marks=1.0,
        max_length=512,
    ),
}
