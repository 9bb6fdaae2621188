"""A request to the core: rows with their tasks, and their answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from sidestep.kinds.base import Probabilities
from sidestep.serve.cells import Row
from sidestep.serve.forms import Answer
from sidestep.serve.problems import Problem

Way = Literal["answers", "embeddings"]
TooLong = Literal["cut", "refuse"]


@dataclass(eq=False)
class Request:
    """Rows, each with its tasks, and their answers.

    Attributes:
        rows: as they were given.
        tasks: the names for each row.
        probabilities: which of them are told.
        too_long: what is done with a row that has more tokens than a task reads.
        way: "answers", or "embeddings" of the rows' texts.
        results: of each row, an answer or a problem by task.
        cut: of each row, the tasks that did not read all of it.
        tokens: of all rows, as often as they are read.
        times: milliseconds: "read" until all rows were read, "wait" of the longest for its batch, "run" of all batches.
        began: by `time.monotonic`.
        writes: whether one of its tasks writes texts.
        gone: whether nobody waits for the answers.
        left: how often rows still have to be run.
        done: gives the request itself, when every row has its answers.
    """

    rows: Sequence[Row]
    tasks: Sequence[Sequence[str]]
    probabilities: Probabilities = "all"
    too_long: TooLong = "cut"
    way: Way = "answers"
    results: list[dict[str, Answer | Problem]] = field(init=False)
    cut: list[set[str]] = field(init=False)
    tokens: int = 0
    times: dict[str, float] = field(default_factory=lambda: {"read": 0.0, "wait": 0.0, "run": 0.0})
    began: float = field(default_factory=time.monotonic)
    writes: bool = False
    gone: bool = False
    left: int = 0
    done: Future[Request] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.results, self.cut = [{} for _ in self.rows], [set() for _ in self.rows]

    @property
    def names(self) -> list[str]:
        """All tasks, each once."""
        return [*dict.fromkeys(name for row in self.tasks for name in row)]

    def settle(self, row: int, answers: Mapping[str, Answer | Problem]) -> None:
        """Put down a row's answers."""
        self.results[row].update(answers)
        self.left -= 1

    def finish(self) -> None:
        """Give the answers to whoever waits, in the order of the tasks."""
        asked = zip(self.tasks, self.results, strict=True)
        self.results = [{name: found[name] for name in names if name in found} for names, found in asked]
        with suppress(InvalidStateError):  # nobody waits any more
            self.done.set_result(self)

    def fail(self, error: Exception) -> None:
        """Give a problem of the whole request to whoever waits."""
        with suppress(InvalidStateError):
            self.done.set_exception(error)
