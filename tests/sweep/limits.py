"""Limits of time."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

CLOCKS = {"real": (signal.ITIMER_REAL, signal.SIGALRM), "cpu": (signal.ITIMER_PROF, signal.SIGPROF)}


class TooLong(BaseException):
    """The time limit. No `Exception`, because those of a model on strange inputs are expected and caught."""


@contextmanager
def time_limit(seconds: float, clock: Literal["real", "cpu"] = "cpu") -> Iterator[None]:
    """Raise `TooLong` where what runs inside of this takes longer, by the time of this process on the CPU or really."""
    timer, sent = CLOCKS[clock]

    def stop(*_: Any) -> None:
        raise TooLong(f"longer than {seconds:.0f} s")

    before = signal.signal(sent, stop)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(sent, before)
