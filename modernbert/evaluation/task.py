"""A task: one line of a table."""

from collections.abc import Callable
from dataclasses import dataclass

from .models import Subject


@dataclass(frozen=True)
class Measured:
    """What a task finds: over how many items, and points by metric, the main metric first."""

    count: int
    points: dict[str, float]


@dataclass(frozen=True)
class Task:
    """A name within its suite, and how a model is scored."""

    suite: str
    name: str
    run: Callable[[Subject], Measured]
