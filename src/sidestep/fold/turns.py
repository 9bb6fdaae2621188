"""One call at a time. A second call, in whichever thread, is refused and does not wait."""

from __future__ import annotations

import threading
from typing import Any

import torch

BUSY = (
    "this model is in the middle of another call: use one model per thread, or take turns with a lock around each call"
)


class Turn:
    """A context that one call at a time can be in.

    Args:
        refusal: what is raised for the others.
    """

    def __init__(self, refusal: Exception) -> None:
        self.refusal = refusal
        # a list with one item while it is free: to take an item is one step, which no other thread can come between
        self._free = [True]
        self._thread: int | None = None

    def __enter__(self) -> None:
        try:
            self._free.pop()
        except IndexError:
            raise type(self.refusal)(*self.refusal.args) from None
        self._thread = _here()

    def __exit__(self, *error: object) -> None:
        self._thread = None
        self._free.append(True)

    @property
    def mine(self) -> bool:
        """Whether this thread's call is in it."""
        return self._thread == _here()

    def __reduce__(self) -> Any:
        return Turn, (self.refusal,)  # a copy is free


def _here() -> int:
    """This thread, or one constant for the compiler, which knows no threads and traces one call alone."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
