"""Rows as tables of cells: everything that was measured of a contender.

A cell has a text for the reader and a value to sort by. The page and the Markdown tables show the same cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import floor, log10

from sidestep.report.chance import ONE_ANSWER, beside
from sidestep.report.estimates import Estimate
from sidestep.report.rows import Group, Results, Row, Task

MIB = 2**20
DECIMALS = 4
NOTHING = "–"
NOT_MEASURED = "not measured"
#: The costs that stand before the scores of single tasks.
FIRST = ("parameters", "kept", "peak", "planned", "step", "forward")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One value of a table.

    Attributes:
        text: what is shown.
        value: what is sorted by; None sorts last.
        small: a second, smaller line, such as a spread.
        marks: phrases that say how the value is not like the others of its table.
        tone: "missing", "shared", "win", "tie" or "loss"; "" for a plain value.
    """

    text: str
    value: float | str | None = None
    small: str = ""
    marks: tuple[str, ...] = ()
    tone: str = ""


UNMEASURED = Cell(text=NOTHING, tone="missing")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table.

    Attributes:
        name: short and unique within the table.
        title: shown in the head.
        unit: shown below the title.
        help: what the values are, in a sentence.
        numbers: whether the cells are numbers, which stand to the right.
        task: the task whose scores these are.
    """

    name: str
    title: str
    unit: str = ""
    help: str = ""
    numbers: bool = True
    task: str = ""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a table: the group and row that it is about, and its cells in the columns' order."""

    group: Group
    row: Row
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Columns and lines.

    Attributes:
        columns: of every line.
        lines: one a row of a group.
        foot: what stands below them: of each group where it is known, what one answer for all scores.
    """

    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    foot: tuple[Line, ...] = ()


def without(table: Table, names: Sequence[str]) -> Table:
    """A table without some of its columns."""
    places = [place for place, column in enumerate(table.columns) if column.name not in names]
    lines, foot = (
        tuple(replace(line, cells=tuple(line.cells[place] for place in places)) for line in part)
        for part in (table.lines, table.foot)
    )
    return Table(columns=tuple(table.columns[place] for place in places), lines=lines, foot=foot)


# --- numbers as texts -------------------------------------------------------------------------------------


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, at most four of them decimals, in groups of thousands."""
    if value == 0:
        return "0"
    before = floor(log10(abs(value))) + 1
    return f"{value:,.{min(max(digits - before, 0), DECIMALS)}f}"


def score_text(found: Estimate, task: Task | None) -> str:
    """A mean with its interval: times 100 where greater is better, as it is for an error."""
    scale, digits = (100, 1) if task is None or task.greater else (1, 3)
    half = "" if found.half is None else f" ± {scale * found.half:.{digits}f}"
    return f"{scale * found.mean:.{digits}f}{half}".replace("-", "−")


# --- the table of all values ------------------------------------------------------------------------------


def main_table(results: Results) -> Table:
    """Every row with everything that was measured of it; columns in which nothing was measured are left out."""
    tasks = {task.name: task for group in results.groups for task in group.tasks}
    columns: list[tuple[Column, _CellOf]] = [
        (Column(name="backbone", title="backbone", numbers=False), _backbone),
        (Column(name="contender", title="contender", numbers=False), _contender),
    ]
    if any(len(group.averaged) > 1 for group in results.groups):
        columns.append((_AVERAGE, _average))
    if tasks:
        columns.append((_SEEDS, _seeds))
    costs = [(column, cell) for column, cell in _COSTS if _any(results, cell)]
    columns += [entry for entry in costs if entry[0].name in FIRST]
    columns += [(_task_column(task), _task_cell(task)) for task in tasks.values()]
    columns += [entry for entry in costs if entry[0].name not in FIRST]
    lines = [
        Line(group=group, row=row, cells=tuple(cell(group, row) for _, cell in columns))
        for group in results.groups
        for row in group.rows
    ]
    heads = tuple(column for column, _ in columns)
    foot = tuple(_one_answer(group, heads) for group in results.groups if _answers(group))
    return Table(columns=heads, lines=tuple(lines), foot=foot)


def _answers(group: Group) -> dict[str, Cell]:
    """What one answer for all scores, by the column's name; empty if no line says it."""
    found = {f"task {task.name}": (task.constant, task) for task in group.tasks}
    return {
        name: Cell(text=score_text(Estimate(mean=value, half=None, count=1), task), value=value)
        for name, (value, task) in {_AVERAGE.name: (group.constant, None), **found}.items()
        if value is not None
    }


def _one_answer(group: Group, columns: Sequence[Column]) -> Line:
    row = Row(contender=ONE_ANSWER, method="", ours=False, checkpoint=False)
    known = {
        **_answers(group),
        **{column.name: cell for column, cell in zip(columns, named_cells(group, row), strict=False)},
    }
    return Line(group=group, row=row, cells=tuple(known.get(column.name, Cell(text="")) for column in columns))


def unmeasured(results: Results) -> list[str]:
    """Titles of the costs that were measured of no row, if there are cost lines at all."""
    if not any(row.cost for group in results.groups for row in group.rows):
        return []
    # a plan only stands in for a peak that was not measured
    return [column.title for column, cell in _COSTS if column.name != "planned" and not _any(results, cell)]


_CellOf = Callable[[Group, Row], Cell]


def _any(results: Results, cell: _CellOf) -> bool:
    return any(cell(group, row).value is not None for group in results.groups for row in group.rows)


def _backbone(group: Group, row: Row) -> Cell:
    return Cell(text=group.backbone, value=group.title, small=group.remark)


def _contender(group: Group, row: Row) -> Cell:
    return Cell(
        text=row.contender,
        value=row.contender,
        small=f"scores of {row.score_of}" if row.score_of and row.scores else "",
    )


def named_cells(group: Group, row: Row) -> list[Cell]:
    """The cells that say which row it is: backbone and contender."""
    return [_backbone(group, row), replace(_contender(group, row), small="")]


def _seeds(group: Group, row: Row) -> Cell:
    counts = [row.scores[task.name].estimate.count for task in group.tasks if task.name in row.scores]
    if not counts:
        return UNMEASURED
    fewest, most = min(counts), max(counts)
    return Cell(text=str(most) if fewest == most else f"{fewest} to {most}", value=fewest)


def _average(group: Group, row: Row) -> Cell:
    if row.average is None:
        lacking = [task.name for task in group.averaged if task.name not in row.scores]
        small = f"without {', '.join(lacking)}" if lacking and len(lacking) < len(group.averaged) else ""
        return Cell(text=NOTHING, small=small, tone="missing")
    marks = tuple(dict.fromkeys(mark for task in group.averaged for mark in row.scores[task.name].marks))
    return _score_cell(row, row.average, None, marks, beside(row.average, group.constant, greater=True))


def _task_column(task: Task) -> Column:
    better = "" if task.greater else ", less is better"
    return Column(
        name=f"task {task.name}",
        title=task.name,
        unit=f"{task.metric}{' × 100' if task.greater else ''}{better}",
        help="Mean over seeds ± half the 95 % interval (Student's t).",
        task=task.name,
    )


def _task_cell(task: Task) -> _CellOf:
    def cell(group: Group, row: Row) -> Cell:
        score = row.scores.get(task.name)
        if score is None:
            return Cell(text=row.missing.get(task.name, NOTHING), tone="missing")
        chance = beside(score.estimate, score.constant, greater=task.greater)
        return _score_cell(row, score.estimate, task, score.marks, chance)

    return cell


def _score_cell(row: Row, found: Estimate, task: Task | None, marks: tuple[str, ...], chance: str) -> Cell:
    return Cell(
        text=score_text(found, task),
        value=found.mean,
        small=", ".join(part for part in ("1 seed" if found.count == 1 else "", chance) if part),
        marks=marks,
        tone="shared" if row.score_of else "",
    )


def _cost(name: str, unit: float = 1.0, text: Callable[[float], str] = significant) -> _CellOf:
    """The cell of a measured number."""

    def cell(group: Group, row: Row) -> Cell:
        value = row.measured(name)
        if value is None:
            return UNMEASURED
        return Cell(text=text(value / unit), value=value, marks=row.cost_marks)

    return cell


def _time(name: str, *, quartiles: bool) -> _CellOf:
    """The cell of a measured time: its median, with the quartiles if asked for, and the batch if it is another one."""

    def cell(group: Group, row: Row) -> Cell:
        median = row.median(name)
        if median is None:
            return UNMEASURED
        low, high = (row.measured(name).get(end) for end in ("low", "high"))
        known = quartiles and low is not None and high is not None
        spread = f"{significant(low)}–{significant(high)}" if known else ""
        small = ", ".join(part for part in (spread, _timed_batch(group)) if part)
        return Cell(text=significant(median), value=median, small=small, marks=row.cost_marks)

    return cell


def _timed_batch(group: Group) -> str:
    """The batch that times were taken with, where it is not that of the bytes."""
    timed = group.setup.get("timed_batch")
    return "" if timed in (None, group.setup.get("batch")) else f"batch {timed}"


def _peak(group: Group, row: Row) -> Cell:
    if row.peak is None:
        return UNMEASURED
    return Cell(text=significant(row.peak / MIB), value=row.peak, marks=row.cost_marks)


def _planned(group: Group, row: Row) -> Cell:
    if row.planned_peak is None:
        return UNMEASURED
    return Cell(text=significant(row.planned_peak / MIB), value=row.planned_peak, marks=row.cost_marks)


def _over_forward(group: Group, row: Row) -> Cell:
    step, forward = row.median("step_seconds"), row.median("forward_seconds")
    if not step or not forward:
        return UNMEASURED
    ratio = step / forward
    return Cell(text=f"{ratio:.2f}", value=ratio, small=_timed_batch(group), marks=row.cost_marks)


def _energy(group: Group, row: Row) -> Cell:
    joules = row.measured("energy_joules")
    if joules is None:
        return Cell(text=NOT_MEASURED if row.cost else NOTHING, tone="missing")
    source = str(row.measured("energy_source") or "")
    return Cell(text=significant(joules), value=joules, small=source, marks=row.cost_marks)


def _count(value: float) -> str:
    return f"{value:,.0f}"


_AVERAGE = Column(
    name="average",
    title="average",
    unit="score × 100",
    help="Mean over the tasks. The interval is that of the seeds' averages. Empty if a task is missing.",
)
_SEEDS = Column(
    name="seeds", title="seeds", unit="a task", help="Runs with different seeds that a score is the mean of."
)
_COSTS: list[tuple[Column, _CellOf]] = [
    (
        Column(name="parameters", title="trained", unit="parameters", help="Values that are trained."),
        _cost("parameters", text=_count),
    ),
    (Column(name="task", title="task file", unit="MiB", help="What is stored per task."), _cost("task_bytes", MIB)),
    (
        Column(name="kept", title="kept", unit="MiB", help="What autograd keeps for backward in one step."),
        _cost("kept_bytes", MIB),
    ),
    (
        Column(
            name="peak",
            title="peak",
            unit="MiB",
            help="What a step needs above the weights at its peak, optimizer state included, by the allocator's count.",
        ),
        _peak,
    ),
    (
        Column(name="planned", title="planned peak", unit="MiB", help="The planner's peak, where none was measured."),
        _planned,
    ),
    (
        Column(
            name="resident", title="resident", unit="MiB", help="How far the process's resident memory rises (CPU)."
        ),
        _cost("resident_bytes", MIB),
    ),
    (
        Column(
            name="step",
            title="step",
            unit="s",
            help="Forward, backward and optimizer: median, quartiles below.",
        ),
        _time("step_seconds", quartiles=True),
    ),
    (
        Column(
            name="forward",
            title="÷ forward",
            unit="ratio",
            help="Step time over the bare frozen backbone's forward pass, in the same run.",
        ),
        _over_forward,
    ),
    (Column(name="flops", title="compute", unit="GFLOP", help="Of one training step."), _cost("flops", 1e9)),
    (
        Column(name="energy", title="energy", unit="J per step", help="By the device's own counter, or not measured."),
        _energy,
    ),
    (
        Column(
            name="inference",
            title="inference",
            unit="s",
            help="A batch with the task attached: the median.",
        ),
        _time("inference_seconds", quartiles=False),
    ),
    (
        Column(name="inference_peak", title="inference peak", unit="MiB", help="Above the model, in inference."),
        _cost("inference_peak_bytes", MIB),
    ),
]
