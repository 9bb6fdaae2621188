"""Every chart of a group: scores against costs, where memory goes, training curves."""

from __future__ import annotations

from sidestep.report.bars import memory_figure
from sidestep.report.chart import Figure
from sidestep.report.choice import AVERAGE, memory_of
from sidestep.report.curves import curve_figure
from sidestep.report.rows import Group
from sidestep.report.scatter import cost_figure, score_figure


def figures(group: Group, *, by_task: bool = False) -> list[Figure]:
    """Every chart that a group's results allow.

    Args:
        group: of rows.
        by_task: a chart of its own for the scores of every task, as files need it. Else there is one chart for
            all tasks, whose parameter `task` says which is shown.
    """
    names = [AVERAGE, *(task.name for task in group.tasks)]
    found = [
        score_figure(group, cost, tasks)
        for cost in (memory_of(group), "parameters", "step")
        for tasks in ([[name] for name in names] if by_task else [names])
    ]
    found += [cost_figure(group), memory_figure(group)]
    for task in group.tasks:
        found += [curve_figure(group, task.name, value) for value in ("score", "loss")]
    return [figure for figure in found if figure is not None]
