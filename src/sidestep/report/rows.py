"""What a report shows, as data: results, groups of one backbone and setup, rows of one contender."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from sidestep.compare.records import Record
from sidestep.report.estimates import Estimate

#: What Sidestep's methods are compared with, in the order of the tables.
BASELINES = ("probe", "bitfit", "ia3", "lora", "dora", "full")
WAYS = ("+bf16", "+int8", "+offload", "+replay", "+auto", "+checkpoint")
"""What a contender's label ends with, by how it keeps what backward needs. This room knows no torch."""
LESS_IS_BETTER = frozenset({"mse"})


@dataclass(frozen=True, kw_only=True)
class Source:
    """A results file: its path, how many results it holds, and how many broken lines were skipped."""

    path: Path
    results: int
    broken: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task: its name, the metric of its scores, and whether a greater one is better.

    Attributes:
        constant: the metric of the best single answer for all dev rows; None where no line says it, or lines differ.
        dev_rows: that scores were taken on, the fewest of its lines; None where no line says it.
    """

    name: str
    metric: str
    constant: float | None = None
    dev_rows: int | None = None

    @property
    def greater(self) -> bool:
        """Whether a greater score is the better one."""
        return self.metric not in LESS_IS_BETTER


@dataclass(frozen=True, kw_only=True)
class Score:
    """A contender's scores on a task.

    Attributes:
        estimate: of the metric, over seeds.
        records: one line a seed.
        marks: how these lines differ from the others of the task, and which were left out.
        constant: what the best single answer for all of their dev rows scores; None where that is not known.
    """

    estimate: Estimate
    records: tuple[Record, ...]
    marks: tuple[str, ...] = ()
    constant: float | None = None

    @property
    def by_seed(self) -> dict[Any, float]:
        """The score of each seed."""
        return {record.settings.get("seed"): float((record.measured or {})["score"]) for record in self.records}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A contender on a backbone in a setup.

    Attributes:
        contender: its label.
        method: registered name.
        ours: whether it is one of Sidestep's methods and no baseline.
        checkpoint: whether blocks are recomputed in backward.
        score_of: the contender whose scores it shares; None if they are its own.
        cost: the line with what a step costs.
        cost_marks: how that line differs from the group's others.
        scores: by task.
        average: of the scores over the group's tasks with a greater-is-better metric; None if one is missing.
        missing: why a task has no score: "refused", "failed"; tasks that were not tried are not in it.
        trials: lines of the rates that were tried.
    """

    contender: str
    method: str
    ours: bool
    checkpoint: bool
    score_of: str | None = None
    cost: Record | None = None
    cost_marks: tuple[str, ...] = ()
    scores: Mapping[str, Score] = field(default_factory=dict)
    average: Estimate | None = None
    missing: Mapping[str, str] = field(default_factory=dict)
    trials: tuple[Record, ...] = ()

    @property
    def peak(self) -> int | None:
        """Bytes that a step needs above the weights at its peak, the optimizer's state included.

        The line's own `peak_bytes` begins where that state is there already.
        """
        rise = self.measured("peak_bytes")
        return None if rise is None else rise + (self.measured("optimizer_bytes") or 0)

    @property
    def planned_peak(self) -> int | None:
        """`peak` as the planner predicts it, of a line whose peak was not measured."""
        rise = self.measured("planned_peak_bytes")
        if rise is None or self.peak is not None:
            return None
        return rise + (self.measured("optimizer_bytes") or 0)

    def measured(self, name: str) -> Any:
        """A value of the cost line; None if it was not measured."""
        return None if self.cost is None else (self.cost.measured or {}).get(name)

    def median(self, name: str) -> float | None:
        """The median of a time of the cost line, in seconds; None if it was not measured."""
        found = self.measured(name)
        return found.get("median") if isinstance(found, Mapping) else None


@dataclass(frozen=True, kw_only=True)
class Group:
    """The contenders of one backbone in one setup.

    Attributes:
        backbone: its label.
        setup: the settings of `SETUP` and the machine's name; empty if there are scores only.
        remark: what tells this setup from the backbone's others; "" if it is the only one.
        tasks: those with a score, in order of appearance.
        rows: Sidestep's methods first.
    """

    backbone: str
    setup: Mapping[str, Any]
    remark: str
    tasks: tuple[Task, ...]
    rows: tuple[Row, ...]

    @property
    def title(self) -> str:
        """The backbone, with what tells this setup from others."""
        return f"{self.backbone} ({self.remark})" if self.remark else self.backbone

    @property
    def averaged(self) -> tuple[Task, ...]:
        """The tasks over which scores are averaged."""
        return tuple(task for task in self.tasks if task.greater)

    @property
    def constant(self) -> float | None:
        """The average of one answer for all over the averaged tasks; None where one of them is not known."""
        found = [task.constant for task in self.averaged if task.constant is not None]
        return fmean(found) if found and len(found) == len(self.averaged) else None

    def find(self, contender: str) -> Row | None:
        """The row of a contender."""
        return next((row for row in self.rows if row.contender == contender), None)


@dataclass(frozen=True, kw_only=True)
class Missing:
    """Results that there are not: a contender's runs that were refused or failed for one reason."""

    backbone: str
    contender: str
    status: str
    what: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """All that a report is made from.

    Attributes:
        sources: the files.
        groups: one per backbone and setup, in order of appearance.
        missing: what was refused or failed.
        records: every line that counts: of two with one key on one machine, the later.
    """

    sources: tuple[Source, ...]
    groups: tuple[Group, ...]
    missing: tuple[Missing, ...]
    records: tuple[Record, ...]

    @property
    def broken(self) -> int:
        """Lines that could not be read, over all files."""
        return sum(source.broken for source in self.sources)

    @property
    def remark(self) -> str:
        """What to say of the broken lines; "" if there is none."""
        return f"{self.broken} broken line{'s were' if self.broken > 1 else ' was'} skipped" if self.broken else ""

    @property
    def contenders(self) -> list[str]:
        """Every contender's label, Sidestep's methods first."""
        rows = {row.contender: row for group in self.groups for row in group.rows}
        return [row.contender for row in sorted(rows.values(), key=order_of)]


def order_of(row: Row) -> tuple[int, bool]:
    """Sidestep's methods first, then the baselines in their order; recomputation after the plain one."""
    return (-1 if row.ours else BASELINES.index(row.method), row.checkpoint and not row.ours)
