"""Two published comparisons: their models and tasks, and their figures beside measured ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from modernbert.console import plain

from .models import Subject, load_subject
from .scores import Results, markdown, points


@dataclass(frozen=True)
class Row:
    """A model of the published table: where it would come from, and its points by column."""

    name: str
    source: str
    published: Mapping[str, float]


@dataclass(frozen=True)
class Preset:
    """`columns`: the suite that measures each, and the task unless it is the mean of all."""

    title: str
    source: str
    columns: Mapping[str, tuple[str, str | None]]
    rows: Sequence[Row]
    remark: str

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(suite for suite, _ in self.columns.values()))


def _distilled(teacher: str, sts: float, wordsim: float, classification: float) -> Row:
    figures = {"STS": sts, "WordSim": wordsim, "Classification": classification}
    return Row(f"{teacher.rpartition('/')[2]}, distilled", f"distill:{teacher}", figures)


PRESETS = {
    "blog-model2vec": Preset(
        title="Static models distilled with model2vec 0.3.8",
        source='Minish Lab, "ModernBERT support and why it doesn\'t work", 29 January 2025',
        columns={
            "STS": ("sts", None),
            "WordSim": ("wordsim", None),
            "Classification": ("classification", None),
        },
        rows=(
            _distilled("BAAI/bge-base-en-v1.5", 69.3, 49.7, 62.4),
            _distilled("Alibaba-NLP/gte-modernbert-base", 66.5, 25.6, 60.4),
            _distilled("nomic-ai/modernbert-embed-base", 65.1, 26.1, 59.4),
        ),
        remark=(
            "WordSim compares directly: the same seven sets. Published STS is the mean of MTEB's "
            "ten tasks, and which classification tasks were taken was not published; measured are "
            "the sets in the data folder."
        ),
    ),
    "jina-comparison": Preset(
        title="ModernBERT beside two other pretrained encoders",
        source='Jina AI, "What Should We Learn From ModernBERT?", 22 January 2025',
        columns={
            "STS": ("sts", None),
            "Retrieval": ("retrieval", None),
            "Code": ("code", "standard library"),
            "Long": ("long", "buried paragraph"),
        },
        rows=(
            Row("ModernBERT-large", "answerdotai/ModernBERT-large", {}),
            Row("jina-XLM-RoBERTa", "st:jinaai/xlm-roberta-flash-implementation", {}),
            Row("RoBERTa-large", "st:FacebookAI/roberta-large", {}),
        ),
        remark=(
            "It compares parameter efficiency, code and long contexts; its scores are not recorded "
            "here. Measured are the pretrained weights as they are, which were trained for no "
            "similarity, and any MODEL that is named beside them."
        ),
    ),
}


def open_rows(
    preset: Preset, *, device: str | None = None, dtype: str | None = None
) -> tuple[list[Subject], dict[str, str]]:
    """The preset's models that can be opened here, and by source why the others cannot."""
    subjects, unavailable = [], {}
    for row in preset.rows:
        try:
            subject = load_subject(row.source, device=device, dtype=dtype)
            subject.name = row.source
            subject.encoder  # noqa: B018 - opens it
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            unavailable[row.source] = plain(error)[:200]
        else:
            subjects.append(subject)
    return subjects, unavailable


def comparison(preset: Preset, results: Results, unavailable: Mapping[str, str]) -> str:
    """Markdown: a row a model, published (p) and measured (m) in each column.

    `unavailable`: by source, why a model of the preset could not be measured.
    """
    header = ["model", *(f"{name} ({kind})" for name in preset.columns for kind in "pm")]
    published = {row.source: row for row in preset.rows}
    others = [name for name in results.models if name not in published]
    rows = []
    for source in [*published, *others]:
        row = published.get(source, Row(source, source, {}))
        cells = [row.name]
        for column, (suite, task) in preset.columns.items():
            measured = results.mean(source, suite, [task] if task else None)
            cells += [points(row.published.get(column)), points(measured)]
        rows.append(cells)
    lines = [
        f"{preset.title}. Published (p): {preset.source}. Measured (m): here.",
        "",
        markdown(header, rows),
        "",
        preset.remark,
    ]
    if unavailable:
        lines += ["", "Not measured, because the weights cannot be had:"]
        lines += [f"- {published[source].name}: {why}" for source, why in unavailable.items()]
    return "\n".join(lines)
