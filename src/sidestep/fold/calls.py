"""Calls for `Fold.run` that take what a pass gives, or run on what was taken before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from sidestep.fold.deferred import Ended
from sidestep.fold.fold import Fold
from sidestep.fold.stored import Recorder, States, passing_over
from sidestep.interface.layers import keeping_all


def fed(fold: Fold, states: States, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call for `Fold.run`, whose frozen blocks do not run: what they gave comes from a store."""

    def passed(*args: Any, **kwargs: Any) -> Any:
        fold.stored = states
        try:
            # the states are in memory already, so what is made of them is kept, unless less was asked for
            kept = keeping_all() if fold.keeping.way == "full" else nullcontext()
            with passing_over(fold.places, states.route), kept:
                return call(*args, **kwargs)
        finally:
            fold.stored = None

    return passed


def recorded(fold: Fold, recorder: Recorder, call: Callable[..., Any]) -> Callable[..., Any]:
    """A call for `Fold.run`, along which no method runs: its hidden states are taken, and it ends with the last."""

    def taken(*args: Any, **kwargs: Any) -> None:
        fold.recorder = recorder
        try:
            call(*args, **kwargs)
        except Ended:
            pass
        finally:
            fold.recorder = None

    return taken
