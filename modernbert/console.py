"""How the command line speaks: errors in one line, an environment variable for every flag."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import click

logger = logging.getLogger("modernbert")
Command = TypeVar("Command", bound=Callable[..., Any])


def plain(text: object) -> str:
    """Text of unknown origin on one line, without anything that could control a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option whose help names its environment variable."""
    return click.option(*names, show_envvar=True, **settings)


def similarity_table(texts: Sequence[str], scores: Sequence[Sequence[float]]) -> Iterator[str]:
    """The lines of a table of scores (n, n), each row labelled with its text."""
    labels = [f"{number}  {plain(text)}" for number, text in enumerate(texts, start=1)]
    labels = [label if len(label) <= 60 else f"{label[:57]}..." for label in labels]
    width = max(map(len, labels))
    yield " " * width + "".join(f"{number:9}" for number in range(1, len(labels) + 1))
    for label, row in zip(labels, scores, strict=True):
        yield label.ljust(width) + "".join(f"{score:9.4f}" for score in row)


def explain(error: BaseException) -> str:
    """An exception as one line for the user."""
    text = plain(error)
    match error:
        case KeyboardInterrupt() | click.Abort():
            return "interrupted"
        case BrokenPipeError():
            return "nobody reads the output any more"
        case MemoryError():
            return f"out of memory: {text or 'try a smaller batch'}"
        case click.ClickException():
            return plain(error.format_message())
        case OSError() if error.strerror and error.filename:
            return f"{plain(error.filename)}: {error.strerror}"
        case ValueError() | OSError() | ImportError() | RuntimeError() if text:
            return text
    return f"internal error, {type(error).__name__}: {text}; please report what --debug shows"


class OneLineErrors(click.Group):
    """A group whose commands, when they fail, end in one line on standard error and exit code 2.

    Its flag `debug` lets exceptions through with their traceback.
    """

    def main(self, *args: Any, **options: Any) -> NoReturn:
        """Run the command line and exit."""
        options["standalone_mode"] = False
        try:
            code = super().main(*args, **options)
        except (click.ClickException, click.Abort) as error:
            _fail(error)
        except Exception:  # only with --debug: else `invoke` has caught it
            traceback.print_exc()
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params["debug"]
        try:
            with _log(debug):
                result = super().invoke(ctx)
                sys.stdout.flush()
                return result
        except (click.exceptions.Exit, click.ClickException):
            raise
        except (KeyboardInterrupt, BrokenPipeError) as error:
            _fail(error)
        except Exception as error:
            if debug:
                raise
            _fail(error)


def _fail(error: BaseException) -> NoReturn:
    if isinstance(error, BrokenPipeError):
        # Else the interpreter fails once more, with a traceback, when it flushes at its end.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    click.echo(f"error: {explain(error)}", err=True)
    sys.exit(2)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {plain(record.getMessage())}"


@contextmanager
def _log(debug: bool) -> Iterator[None]:
    """The library's warnings, or all it says, as single lines on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine())
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
