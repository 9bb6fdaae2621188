"""Which contender to take: of those whose score is within noise of the best, the one that needs the least memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from sidestep.report.chance import beside
from sidestep.report.estimates import Estimate, difference
from sidestep.report.rows import Group, Row, Task

#: In the place of a task: the average over tasks.
AVERAGE = "average"
#: What memory is compared by: words, and the bytes of a row.
MEMORY: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "peak": ("peak memory", lambda row: row.peak),
    "planned": ("planned peak memory", lambda row: row.planned_peak),
    "kept": ("bytes kept for backward", lambda row: row.measured("kept_bytes")),
}


def memory_of(group: Group) -> str:
    """Which memory a group's contenders are compared by: the peak, the planned one, or what is kept.

    It is the first that at least half of those with any memory figure have. So one measured peak among many
    contenders does not leave the others out.
    """
    counts = {name: sum(value(row) is not None for row in group.rows) for name, (_, value) in MEMORY.items()}
    known = sum(any(value(row) is not None for _, value in MEMORY.values()) for row in group.rows)
    return next((name for name, count in counts.items() if count and 2 * count >= known), "kept")


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A contender among those that are compared.

    Attributes:
        row: the contender.
        score: its mean over seeds.
        memory: bytes of the choice's kind of memory; None if that was not measured.
        behind: how far the best is ahead, in scores; None if noise is unknown, and of the best itself.
        chance: how the score stands to one answer for all; see `chance.beside`.
    """

    row: Row
    score: Estimate
    memory: float | None
    behind: Estimate | None = None
    chance: str = ""

    @property
    def within(self) -> bool:
        """Whether the interval of the difference to the best reaches zero; of the best itself it is not asked."""
        return self.behind is not None and self.behind.low <= 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The contenders of a group, compared by one score and by memory.

    Attributes:
        group: of rows.
        about: a task's name, or `AVERAGE`.
        tasks: whose scores are compared.
        constant: what one answer for all scores; None if that is not known.
        memory: a name of `MEMORY`.
        standings: the best score first; of equal scores the one that needs less memory.
        left_out: why a contender is not compared, by its label.
    """

    group: Group
    about: str
    tasks: tuple[Task, ...]
    constant: float | None
    memory: str
    standings: tuple[Standing, ...]
    left_out: Mapping[str, str]

    @property
    def best(self) -> Standing:
        """The best score."""
        return self.standings[0]

    @property
    def within(self) -> list[Standing]:
        """The best, and those that are within noise of it."""
        return [self.best, *(one for one in self.standings[1:] if one.within)]

    @property
    def front(self) -> list[Standing]:
        """Those with a memory figure that no cheaper one matches in score, the best and dearest first."""
        found: list[Standing] = []
        for one in self.standings:
            if _memory(one) < _memory(found[-1] if found else None):
                found.append(one)
        return found

    @property
    def pick(self) -> Standing | None:
        """The one to take: the cheapest of the front that is within noise of the best; None if there is none.

        Off the front a contender may be within noise for its wide interval alone, while a cheaper and better one is
        not. One at chance is passed over while the best is better than chance, for a wide interval reaches both.
        """
        good = self.within
        able = [one for one in self.front if one in good and bool(one.chance) <= bool(self.best.chance)]
        return able[-1] if able else None

    @property
    def cheaper(self) -> list[Standing]:
        """What is left of the front with less memory than the pick's, the best first."""
        return [one for one in self.front if self.pick is not None and _memory(one) < _memory(self.pick)]


def choices(group: Group) -> list[Choice]:
    """The average of a group's scores, then each task where there are several; errors are not averaged.

    Where no contender has all tasks there is no average, and each task stands alone.
    """
    # a contender may show another's scores, so that nobody shows its own
    tasks = [task for task in group.tasks if any(task.name in row.scores for row in group.rows)]
    found = []
    if any(row.average for row in group.rows):
        found.append(_choice(group, AVERAGE, group.averaged))
    if len(tasks) > 1 or not found:
        found += [_choice(group, task.name, (task,)) for task in tasks]
    return found


def picked(group: Group) -> dict[str, str]:
    """The contender to take, by task or `AVERAGE`."""
    return {choice.about: choice.pick.row.contender for choice in choices(group) if choice.pick}


def _choice(group: Group, about: str, tasks: tuple[Task, ...]) -> Choice:
    memory = memory_of(group)
    constant = group.constant if about == AVERAGE else tasks[0].constant
    found = sorted(_standings(group, about, tasks, constant, MEMORY[memory][1]), key=lambda one: _order(one, tasks))
    best = _by_task(found[0].row, tasks)
    sign = 1 if tasks[0].greater else -1
    others = [_behind(one, difference(best, _by_task(one.row, tasks)), sign) for one in found[1:]]
    return Choice(
        group=group,
        about=about,
        tasks=tasks,
        constant=constant,
        memory=memory,
        standings=(found[0], *others),
        left_out={
            row.contender: _why(row, tasks)
            for row in group.rows
            if all(row is not one.row for one in found) and not row.score_of
        },
    )


def _standings(
    group: Group, about: str, tasks: Sequence[Task], constant: float | None, memory: Callable[[Row], float | None]
) -> Iterator[Standing]:
    """The contenders that have the score, in the group's order."""
    for row in group.rows:
        score = row.scores.get(about)
        found = row.average if about == AVERAGE else score.estimate if score else None
        if found is not None:
            chance = beside(found, constant, greater=tasks[0].greater)
            yield Standing(row=row, score=found, memory=memory(row), chance=chance)


def _order(one: Standing, tasks: Sequence[Task]) -> tuple[float, float]:
    return -one.score.mean if tasks[0].greater else one.score.mean, _memory(one)


def _memory(one: Standing | None) -> float:
    return inf if one is None or one.memory is None else one.memory


def _by_task(row: Row, tasks: Sequence[Task]) -> list[dict[Any, float]]:
    return [row.scores[task.name].by_seed for task in tasks]


def _behind(one: Standing, ahead: Estimate | None, sign: int) -> Standing:
    return one if ahead is None else replace(one, behind=replace(ahead, mean=sign * ahead.mean))


def _why(row: Row, tasks: Sequence[Task]) -> str:
    """Why a contender is not compared: tasks that failed, were refused or are missing; or no seed that all have."""
    lacking: dict[str, list[str]] = {}
    for task in tasks:
        if task.name not in row.scores:
            lacking.setdefault(row.missing.get(task.name, "no score"), []).append(task.name)
    said = "; ".join(f"{status} on {', '.join(names)}" for status, names in lacking.items())
    return said or "no seed that all tasks have"
