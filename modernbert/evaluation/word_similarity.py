"""Word similarity: the seven sets of the WordSim score as model2vec scores them, and any pair file.

Source of the protocol: MinishLab/evaluation. The cosine of the two encoded strings against the
human score, over all pairs; no word is skipped, an underscore is a space.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from .correlation import Pair, correlate
from .files import number, read_lines
from .models import Subject
from .scores import Skipped
from .task import Measured, Task

SUITE = "wordsim"
FOLDER = "wordsim_minish"

# Name: file, columns of the two words and of the score.
SETS = {
    "RareWord": ("rw.txt", (0, 1, 2)),
    "MEN": ("men.txt", (0, 1, 2)),
    "SimLex": ("simLex.txt", (1, 2, 3)),
    "rel353": ("rel353.txt", (1, 2, 3)),
    "simverb": ("simverb_3500.txt", (2, 3, 1)),
    "MTurk-771": ("mturk_771.txt", (1, 2, 3)),
    "Card-660": ("card_660.txt", (0, 1, 2)),
}


def tasks(data: Path, pair_files: Iterable[Path] = ()) -> Iterator[Task | Skipped]:
    """The sets in `data`/wordsim_minish, then files of (word, word, score), tab-separated."""
    for name, (file, columns) in SETS.items():
        path = data / FOLDER / file
        if path.is_file():
            yield Task(SUITE, name, partial(_run, path, columns))
        else:
            yield Skipped(SUITE, name, f"there is no {FOLDER}/{file}")
    for path in pair_files:
        yield Task(SUITE, path.stem, partial(_run, path, (0, 1, 2)))


def _run(path: Path, columns: tuple[int, int, int], subject: Subject) -> Measured:
    return correlate(subject, read_pairs(path, columns))


def read_pairs(path: Path, columns: tuple[int, int, int] = (0, 1, 2)) -> Iterator[Pair]:
    """The pairs of a tab-separated file; a first line whose score is no number is a header."""
    for index, (place, line) in enumerate(read_lines(path)):
        fields = line.strip().split("\t")
        if fields == [""]:
            continue
        if len(fields) <= max(columns):
            raise ValueError(f"{place} has {len(fields)} fields; {max(columns) + 1} are needed")
        left, right, score = (fields[column] for column in columns)
        if index == 0 and not _is_number(score):
            continue
        yield Pair(left.replace("_", " "), right.replace("_", " "), number(score, place))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
