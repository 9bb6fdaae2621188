"""Equal time for every contender, instead of equal trials: how many epochs it affords, and which rate is best then.

All that a run takes counts: attaching, the frozen pass that is stored, evaluations. A contender that reads stored
features pays for the pass that made them, whoever ran it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sidestep.compare.records import Record

LADDER = (100, 50, 30, 20, 10, 5, 3, 2, 1)
"""Epochs that are considered, from the most."""
LESS = 3
"""With each rate so many times fewer epochs are tried too, as more are not always better. Few are all used."""

Trial = Callable[[float, int], Record]


@dataclass
class Spent:
    """What a contender has spent of its time.

    Attributes:
        budget: seconds that it has.
        seconds: that it has spent.
        stored: of these, those for the frozen pass of rows that are stored.
    """

    budget: float
    seconds: float = 0.0
    stored: float = 0.0

    @property
    def left(self) -> float:
        """Seconds that it may still spend."""
        return self.budget - self.seconds

    def charge(self, record: Record) -> None:
        """Count a run. The frozen pass counts once, also if another contender ran it."""
        told = (record.measured or {}).get("features") or {"seconds": 0.0, "spent_seconds": 0.0}
        more = max(told["seconds"] - self.stored, 0.0)
        self.seconds += record.seconds - told["spent_seconds"] + more
        self.stored += more


@dataclass
class Search:
    """The search of one contender for its rate and epochs.

    Attributes:
        rates: to choose from.
        trial: runs a rate for some epochs on held-out training rows.
        share: how many times the work of a trial's epoch the final run's is.
        spent: its time.
        solved: whether one trial tells all: there are no epochs.
        found: the trials so far.
    """

    rates: Sequence[float]
    trial: Trial
    share: float
    spent: Spent
    solved: bool = False
    found: dict[tuple[float, int], Record] = field(default_factory=dict)

    def run(self) -> dict[tuple[float, int], Record]:
        """Trials as far as the time allows. The first shows the pace, and is taken in any case."""
        middle = self.rates[len(self.rates) // 2]
        record = self._try(middle, 1)
        if record.measured is None or self.solved:
            return self.found
        epoch = record.measured["run_seconds"]
        told = record.measured.get("features") or {"spent_seconds": 0.0}
        fixed = max(record.seconds - epoch - told["spent_seconds"], 0.0)
        affordable = (one for one in LADDER if self._cost(one, epoch, fixed) <= self.spent.left)
        for epochs in _tried(next(affordable, 1)):
            for rate in sorted(self.rates, key=lambda rate: rate != middle):
                both = (1 + self.share) * epochs * epoch + 2 * fixed
                if (rate, epochs) not in self.found and both <= self.spent.left:
                    self._try(rate, epochs)
        return self.found

    def _try(self, rate: float, epochs: int) -> Record:
        record = self.found[rate, epochs] = self.trial(rate, epochs)
        self.spent.charge(record)
        return record

    def _cost(self, epochs: int, epoch: float, fixed: float) -> float:
        """Of all trials and of the final run."""
        trials = sum(len(self.rates) * (each * epoch + fixed) for each in _tried(epochs))
        return trials + self.share * epochs * epoch + fixed


def _tried(epochs: int) -> list[int]:
    return sorted({epochs, epochs // LESS if epochs > LESS else epochs})
