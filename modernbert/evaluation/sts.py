"""Semantic textual similarity: STS12 to STS17, STS benchmark, SICK relatedness.

A year's score is one correlation over all its pairs together, as in MTEB, not a mean over files.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from .correlation import Pair, correlate
from .files import find, number, read_lines, read_rows
from .models import Subject
from .scores import Skipped
from .task import Measured, Task

SUITE = "sts"
YEARS = (12, 13, 14, 15, 16, 17)


def tasks(data: Path) -> Iterator[Task | Skipped]:
    """What `data` has of sts_senteval/STSnn*/, sts_benchmark/ and sick/."""
    for year in YEARS:
        folders = sorted((data / "sts_senteval").glob(f"STS{year}*"))
        if folders:
            yield Task(SUITE, f"STS{year}", partial(_run, partial(read_year, folders[0])))
        else:
            yield Skipped(SUITE, f"STS{year}", f"there is no sts_senteval/STS{year}*")
    yield benchmark(data, "test", SUITE)
    path = find(data / "sick", "SICK_test_annotated.txt")
    if path is None:
        yield Skipped(SUITE, "SICK-R", "there is no sick/SICK_test_annotated.txt")
    else:
        yield Task(SUITE, "SICK-R", partial(_run, partial(read_sick, path)))


def benchmark(data: Path, split: str, suite: str) -> Task | Skipped:
    """The STS benchmark's "test" or "dev" as a task."""
    name = f"STS-B {split}"
    path = find(data / "sts_benchmark", "stsbenchmark.tsv")
    if path is None:
        return Skipped(suite, name, "there is no sts_benchmark/stsbenchmark.tsv.gz")
    return Task(suite, name, partial(_run, partial(read_benchmark, path, split)))


def _run(read: Callable[[], Iterable[Pair]], subject: Subject) -> Measured:
    return correlate(subject, read())


def read_year(folder: Path) -> Iterator[Pair]:
    """SentEval's layout: STS.input.X.txt (text TAB text) beside STS.gs.X.txt (blank: no score)."""
    inputs = sorted(folder.glob("STS.input.*.txt"))
    if not inputs:
        raise ValueError(f"{folder} holds no STS.input.*.txt")
    for path in inputs:
        gold = path.with_name(path.name.replace("STS.input.", "STS.gs.", 1))
        texts, scores = list(read_lines(path)), list(read_lines(gold))
        if len(texts) != len(scores):
            raise ValueError(f"{path} has {len(texts)} lines, {gold.name} {len(scores)}")
        for (place, text), (gold_place, score) in zip(texts, scores, strict=True):
            if not score.strip():
                continue
            fields = text.split("\t")
            if len(fields) < 2:
                raise ValueError(f"{place} is not two texts separated by a tab")
            yield Pair(fields[0].strip(), fields[1].strip(), number(score, gold_place))


def read_benchmark(path: Path, split: str) -> Iterator[Pair]:
    """The rows of one split of a tsv with the columns split, score, sentence1 and sentence2."""
    return _read_table(path, ("sentence1", "sentence2", "score"), split)


def read_sick(path: Path) -> Iterator[Pair]:
    """SICK's pairs with their relatedness."""
    return _read_table(path, ("sentence_A", "sentence_B", "relatedness_score"))


def _read_table(
    path: Path, names: tuple[str, str, str], split: str | None = None
) -> Iterator[Pair]:
    rows = read_rows(path, "\t", quoted=False)
    place, header = next(rows, (str(path), []))
    wanted = (*names, "split") if split else names
    if missing := [name for name in wanted if name not in header]:
        raise ValueError(f"{place}: no column {missing[0]!r}")
    left, right, score = (header.index(name) for name in names)
    for place, row in rows:
        if len(row) < len(header):
            raise ValueError(f"{place} has {len(row)} fields, the header {len(header)}")
        if split is None or row[header.index("split")] == split:
            yield Pair(row[left], row[right], number(row[score], place))
