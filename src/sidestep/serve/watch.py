"""What a core tells of its work. Whoever wants to know makes a subclass."""

from __future__ import annotations

from collections.abc import Sequence

from sidestep.serve.batches import Waiting
from sidestep.serve.requests import Request


class Watch:
    """Is told what happens, from any thread. It does nothing with it."""

    def queued(self, rows: int) -> None:
        """So many rows have no answer yet."""

    def refused(self, name: str) -> None:
        """A request was refused by a problem of this name."""

    def ran(self, batch: Sequence[Waiting], seconds: float, passes: int, switches: int) -> None:
        """A batch was run, in so many passes and with so many switches of tasks."""

    def answered(self, request: Request) -> None:
        """A request has all its answers."""

    def tasks(self, names: Sequence[str]) -> None:
        """The bank holds these tasks."""
