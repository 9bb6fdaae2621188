"""Rows that wait, and the batches that are made of them: by tokens and rows, of rows of like length."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from sidestep.serve.forms import Form, Piece
from sidestep.serve.requests import Request
from sidestep.serve.settings import ServeSettings


@dataclass(eq=False)
class Waiting:
    """A row that waits for the answers of tasks of one form.

    Attributes:
        request: whose row it is.
        row: its number there.
        form: how the tasks read it.
        piece: as they read it.
        tasks: their names.
        since: when it began to wait, by `time.monotonic`.
    """

    request: Request
    row: int
    form: Form
    piece: Piece
    tasks: list[str]
    since: float = field(default_factory=time.monotonic)


@dataclass
class Room:
    """How many rows of a lane wait, from when they are asked until they are answered, and how fast they are answered.

    Attributes:
        limit: rows that may wait.
        taken: rows that wait.
        rate: rows a second, as it was of late. 0: none has been answered.
    """

    limit: int
    taken: int = 0
    rate: float = 0.0

    def ran(self, rows: int, seconds: float) -> None:
        """So many rows were answered in this time."""
        rate = rows / max(seconds, 1e-6)
        self.rate = 0.8 * self.rate + 0.2 * rate if self.rate else rate

    @property
    def seconds(self) -> int:
        """Whole seconds until there is room again."""
        return max(1, min(60, round(self.taken / self.rate))) if self.rate else 1


class Lanes:
    """Two lanes of waiting rows: of tasks that read, and of those that write. They take turns, batch by batch.

    It is not safe for threads. The core holds its lock around each call.

    Attributes:
        clock: gives the time in seconds.
    """

    def __init__(self, settings: ServeSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings, self.clock = settings, clock
        self._lanes: dict[bool, dict[Hashable, list[Waiting]]] = {False: {}, True: {}}
        self._wrote = False

    def __len__(self) -> int:
        return sum(len(rows) for lane in self._lanes.values() for rows in lane.values())

    def put(self, rows: Iterable[Waiting]) -> None:
        """Let rows wait."""
        for row in rows:
            self._lanes[row.form.writes].setdefault(row.form.key, []).append(row)

    def drop(self) -> list[Waiting]:
        """The rows that nobody waits for, which leave their lanes."""
        gone: list[Waiting] = []
        for lane in self._lanes.values():
            for key in [*lane]:
                gone += [row for row in lane[key] if row.request.gone]
                lane[key] = [row for row in lane[key] if not row.request.gone]
                if not lane[key]:
                    del lane[key]
        return gone

    def clear(self) -> None:
        """Have all rows leave their lanes."""
        for lane in self._lanes.values():
            lane.clear()

    def take(self, *, hurry: bool = False) -> list[Waiting]:
        """The next batch. Empty if no row waits, or all may wait for others.

        Args:
            hurry: whether no row waits for others.
        """
        for writes in (not self._wrote, self._wrote):
            ready = [rows for rows in self._lanes[writes].values() if hurry or self._is_ready(rows)]
            if ready:
                batch = self._batch(min(ready, key=lambda rows: rows[0].since), writes)
                self._wrote = writes
                return batch
        return []

    def until(self) -> float | None:
        """Seconds until a batch is ready if no row comes. None: no row waits."""
        firsts = [rows[0].since for lane in self._lanes.values() for rows in lane.values()]
        return max(0.0, min(firsts) + self.settings.max_wait_ms / 1000 - self.clock()) if firsts else None

    def _is_ready(self, rows: list[Waiting]) -> bool:
        if self.clock() - rows[0].since >= self.settings.max_wait_ms / 1000:
            return True
        most = max(row.piece.length for row in rows)
        return len(rows) >= self._most_rows(rows[0].form) or len(rows) * most >= self.settings.max_tokens

    def _most_rows(self, form: Form) -> int:
        return self.settings.writing_rows if form.writes else self.settings.max_rows

    def _batch(self, rows: list[Waiting], writes: bool) -> list[Waiting]:
        """The row that has waited the longest, with those whose lengths are nearest to its own."""
        first, rest = rows[0], rows[1:]
        batch, longest = [first], first.piece.length
        for row in sorted(rest, key=lambda row: abs(row.piece.length - first.piece.length)):
            most = max(longest, row.piece.length)
            if len(batch) == self._most_rows(first.form) or (len(batch) + 1) * most > self.settings.max_tokens:
                break
            batch.append(row)
            longest = most
        taken = {id(row) for row in batch}
        left = [row for row in rows if id(row) not in taken]
        lane = self._lanes[writes]
        if left:
            lane[first.form.key] = left
        else:
            del lane[first.form.key]
        return batch
