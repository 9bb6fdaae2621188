"""How the commands report: a user's mistake as one message, warnings as one line each. Other remarks are silenced."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TextIO

import typer

VERBOSITY = ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY")
"""Variables by which packages with a log of their own say how much they write; read when they are imported."""
USER_ERROR = 2
INTERRUPTED = 130


@contextmanager
def reporting(debug: bool, *, shared: bool = False) -> Iterator[None]:
    """Run a command's body. What a user can mend is printed to stderr, with exit code 2 and no traceback.

    Args:
        debug: whether to let through the traceback and the remarks of other packages.
        shared: whether several processes may do it together. Else it is refused in each of them.
    """
    with warnings.catch_warnings(), nullcontext() if debug else _without_remarks():
        warnings.showwarning = _show_warning
        try:
            with _ranks(shared):
                yield
        except KeyboardInterrupt:
            _say("Stopped. A training run continues with --resume")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if debug or not _is_users(error):
                raise
            # what the system says lacks the kind of error, what Sidestep says does not
            told = isinstance(error, ValueError | RuntimeError) or (isinstance(error, OSError) and error.errno is None)
            _say(f"{_who()}Error: {error}" if told else f"{_who()}Error: {type(error).__name__}: {error}")
            raise typer.Exit(USER_ERROR) from error


@contextmanager
def _ranks(shared: bool) -> Iterator[None]:
    """What a launcher has started beside this process: they work together, and the first one speaks for all."""
    if "LOCAL_RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield
        return
    if not shared:
        raise ValueError(
            f"{os.environ['WORLD_SIZE']} processes were started, and this command is for one: start it without "
            "torchrun or accelerate launch. train, eval, predict and compare are for several"
        )
    from sidestep import ranks

    with ranks.together():
        if not ranks.is_first():
            warnings.simplefilter("ignore")
        yield
    ranks.end()


def _who() -> str:
    """Which process speaks, where it is one of several and not the first."""
    number = os.environ.get("RANK", "0") if "LOCAL_RANK" in os.environ else "0"
    return "" if number == "0" else f"rank {number} of {os.environ.get('WORLD_SIZE')}: "


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence what other packages log at their import and later, errors excepted."""
    for variable in VERBOSITY:
        os.environ.setdefault(variable, "error")
    # the handler of all packages that set up none of their own
    before, logging.lastResort = logging.lastResort, logging.StreamHandler()
    logging.lastResort.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.lastResort = before


def _is_users(error: Exception) -> bool:
    """Whether the user can mend an error's cause."""
    if isinstance(error, ValueError | OSError | ModuleNotFoundError):
        return True
    from sidestep.fold import FoldError
    from sidestep.ranks import RankEnded
    from sidestep.training.train import TrainError

    return isinstance(error, FoldError | TrainError | RankEnded)


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
