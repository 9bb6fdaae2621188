"""How long the runs of a comparison that are left will take, by those that are done or by the steps that were measured.

A run's time is taken to grow with its rows, their lengths and its epochs. Each contender has a pace of its own.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidestep.compare.records import Record
from sidestep.kinds.prepare import TaskData

TRAINED = 3
"""What a training row costs, counted in dev rows: a pass forward and one backward, which is about two."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is to come: its contender, and its work in tokens (or images, or samples) of dev rows."""

    contender: str
    work: float

    @classmethod
    def of(cls, contender: str, data: TaskData, epochs: int) -> Run:
        """The run of a contender on these rows."""
        return cls(contender=contender, work=epochs * (TRAINED * _size(data.train) + _size(data.dev)))


class Forecast:
    """What is left of a comparison, and how long it will take."""

    def __init__(self, runs: Mapping[Run, int], steps: Mapping[str, float], *, steps_tell: bool = True) -> None:
        """Of runs that are to come, each with how many there are.

        Args:
            runs: all of them, whether they will be found in the results file or not.
            steps: by contender, seconds for a unit of work by its measured step (see `step_pace`), as far as known.
            steps_tell: whether these stand for runs before one is done. They do not where texts are written.
        """
        self._left, self._steps, self._steps_tell = Counter(runs), dict(steps), steps_tell
        self._took: dict[str, list[float]] = defaultdict(list)

    @property
    def runs(self) -> int:
        """How many are left."""
        return self._left.total()

    def done(self, run: Run, seconds: float | None = None) -> None:
        """Take a run off the list. `seconds` is what it took, if it was run now and came through."""
        self._left[run] -= 1
        if seconds is not None:
            self._took[run.contender].append(seconds / run.work)

    @property
    def seconds(self) -> float | None:
        """Seconds of all runs that are left. None if nothing was measured yet."""
        paces = {name: statistics.median(found) for name, found in self._took.items()}
        if not paces and self._steps_tell:
            paces = self._steps
        if not paces:
            return None
        usual = statistics.median(pace / self._relative(name) for name, pace in paces.items())
        return sum(
            count * run.work * paces.get(run.contender, usual * self._relative(run.contender))
            for run, count in self._left.items()
        )

    def _relative(self, contender: str) -> float:
        """A contender's measured step. Its runs are expected to differ from those of others as the steps do."""
        return self._steps.get(contender) or statistics.median(self._steps.values() or [1.0])


def step_pace(cost: Record) -> float | None:
    """Seconds for one unit of work, by a cost line. None where no step was timed."""
    times = (cost.measured or {}).get("step_seconds")
    if times is None:
        return None
    return times["median"] / (TRAINED * cost.settings["batch"] * (cost.settings["length"] or 1))


def _size(rows: Any) -> float:
    """Tokens or samples of the rows, or how many images they are."""
    return float(sum(rows["length"][:])) if "length" in rows.column_names else float(len(rows))
