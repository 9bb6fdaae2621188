"""How the commands report: a user's mistake as one message, warnings as one line each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import typer

USER_ERROR = 2
INTERRUPTED = 130


@contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Run a command's body; what a user can mend is printed to stderr, with exit code 2 and no traceback.

    Args:
        debug: whether to let the traceback through.
    """
    from sidestep.fold import FoldError
    from sidestep.train import TrainError

    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        except (ValueError, OSError, ModuleNotFoundError, FoldError, TrainError) as error:
            if debug:
                raise
            message = str(error) if isinstance(error, ValueError) or type(error) in (FoldError, TrainError) else ""
            _say(f"Error: {message or f'{type(error).__name__}: {error}'}")
            raise typer.Exit(USER_ERROR) from error
        except KeyboardInterrupt:
            _say("Stopped. A training run continues with --resume")
            raise typer.Exit(INTERRUPTED) from None


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if category.__module__.startswith("sidestep"):
        _say(f"Warning: {message}")
    elif not issubclass(category, DeprecationWarning | FutureWarning):
        _say(f"{category.__name__}: {message}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
