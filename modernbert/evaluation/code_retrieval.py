"""Code retrieval: the docstring of a function of Python's standard library finds its code.

The functions are read from the installed sources when the task runs, so their number depends on the
Python version. Whole modules belong to the train or the test split, by the hash of their name.
"""

import ast
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from modernbert.training.readers import is_validation

from .models import Subject
from .retrieval import Collection, search
from .scores import Skipped
from .task import Measured, Task

SUITE = "code"
TEST_SHARE = 0.2  # of the top-level modules
LEAST_WORDS, LEAST_LINES = 3, 3  # of a docstring, of the code below it
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages"}


class Function(NamedTuple):
    """`docstring` is its first paragraph; `code` is the source without the docstring."""

    module: str
    name: str
    docstring: str
    code: str


def tasks(data: Path) -> Iterator[Task | Skipped]:
    """The functions of the test modules; `data` is not needed."""
    name = "standard library"
    if next(standard_library("test"), None) is None:
        yield Skipped(SUITE, name, "this Python comes without the sources of its library")
    else:
        yield Task(SUITE, name, _run)


def _run(subject: Subject) -> Measured:
    functions = list(standard_library("test"))
    names = [str(number) for number in range(len(functions))]
    return search(
        subject,
        Collection(
            documents=dict(zip(names, (f.code for f in functions), strict=True)),
            queries=dict(zip(names, (f.docstring for f in functions), strict=True)),
            judgements={name: {name: 1.0} for name in names},
        ),
    )


def in_test_split(module: str) -> bool:
    """Whether a top-level module, such as "asyncio", is in the test split."""
    return is_validation(module, TEST_SHARE)


def standard_library(split: str) -> Iterator[Function]:
    """The functions and methods of a split ("train", "test" or "all") that have a docstring.

    No docstring and no code comes twice.
    """
    if split not in ("train", "test", "all"):
        raise ValueError(f"split is {split!r}; choose train, test or all")
    seen: set[str] = set()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if LEFT_OUT & set(parts):
            continue
        if split != "all" and in_test_split(parts[0]) != (split == "test"):
            continue
        for function in functions_of(_read(path), ".".join(parts)):
            if function.docstring not in seen and function.code not in seen:
                seen |= {function.docstring, function.code}
                yield function


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a handful of old modules; not worth their codecs
        return ""


def functions_of(source: str, module: str) -> Iterator[Function]:
    """The documented functions of a source file, methods included; none when it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of invalid escapes in other people's code
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    pending: list[ast.stmt] = list(reversed(tree.body))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.ClassDef):
            pending += reversed(node.body)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = _function(node, lines, module)
            if function is not None:
                yield function


def _function(
    node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], module: str
) -> Function | None:
    docstring = ast.get_docstring(node)
    if docstring is None or len(node.body) == 1:
        return None
    words = docstring.split("\n\n")[0].split()
    text = node.body[0]
    body = lines[text.end_lineno : node.end_lineno]
    code = lines[node.lineno - 1 : text.lineno - 1] + body
    if len(words) < LEAST_WORDS or sum(bool(line.strip()) for line in body) < LEAST_LINES:
        return None
    return Function(module, node.name, " ".join(words), textwrap.dedent("\n".join(code)).strip())
