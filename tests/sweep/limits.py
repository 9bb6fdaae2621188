"""Limits of time and memory."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TooLong(BaseException):
    """The time limit. No `Exception`, because those of a model on strange inputs are expected and caught."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TooLong` where what runs inside of this takes longer."""

    def stop(*_: Any) -> None:
        raise TooLong(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
