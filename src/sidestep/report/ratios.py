"""Sidestep's methods over their rivals, in tables and in sentences, and the planner's error."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sidestep.report.estimates import Estimate
from sidestep.report.rows import Group, Results, Row
from sidestep.report.tables import MIB, UNMEASURED, Cell, Column, Line, Table, named_cells, score_text, significant

#: What Sidestep's methods are held against, by label.
RIVALS = ("lora", "lora+checkpoint", "full")
#: What is compared: the column's name and the value of a row.
COMPARED: dict[str, Callable[[Row], float | None]] = {
    "kept": lambda row: row.measured("kept_bytes"),
    "peak": lambda row: row.planned_peak if row.peak is None else row.peak,
    "time": lambda row: row.median("step_seconds"),
}
WORDS = {"kept": "bytes kept", "peak": "peak memory", "time": "step time"}
#: Under a ratio of peaks of which one was not measured.
PLANNED = "planned"
#: A ratio within this distance of 1 is a tie: times and peaks repeat to about 2 %.
TIE = 0.02
#: The planner's promise: its prediction is within this share of the measured peak.
PLAN_TOLERANCE = 0.10


def ratio_table(results: Results) -> Table:
    """Each of Sidestep's methods over each rival: what it keeps, peaks at, takes, and scores."""
    scored = any(row.scores for group in results.groups for row in group.rows)
    rivals = [rival for rival in RIVALS if any(group.find(rival) for group in results.groups)]
    names = [name for name in COMPARED if any(COMPARED[name](row) is not None for row in _ours(results))]
    columns = [
        Column(name="backbone", title="backbone", numbers=False),
        Column(name="contender", title="method", numbers=False),
    ]
    for rival in rivals:
        columns += [
            Column(name=f"{name}: {rival}", title=name, unit=f"over {rival}", help=f"{WORDS[name]} over {rival}'s")
            for name in names
        ]
        if scored and not rival.endswith("+checkpoint"):
            columns.append(
                Column(
                    name=f"score: {rival}",
                    title="score",
                    unit=f"minus {rival}",
                    help="Difference of the average scores, in points.",
                )
            )
    lines = []
    for group in results.groups:
        for row in group.rows:
            if row.ours and any(group.find(rival) for rival in rivals):
                cells = named_cells(group, row)
                for column in columns[2:]:
                    name, _, rival = column.name.partition(": ")
                    other = group.find(rival)
                    cells.append(_points(row, other) if name == "score" else _ratio(name, row, other))
                lines.append(Line(group=group, row=row, cells=tuple(cells)))
    return Table(columns=tuple(columns) if lines else (), lines=tuple(lines))


def not_won(results: Results) -> list[str]:
    """Sentences that say where one of Sidestep's methods does not beat a rival, a backbone at a time."""
    said = []
    for group in results.groups:
        for row in group.rows:
            losses = [loss for rival in RIVALS for loss in _losses(row, group.find(rival))] if row.ours else []
            if losses:
                said.append(f"{row.contender} on {group.title}: {'; '.join(losses)}.")
    return said


def in_short(results: Results) -> list[str]:
    """A sentence a group: the best of Sidestep's methods beside the rivals.

    The best is the one with the highest average, or without scores the one that keeps least besides a score.
    """
    return [said for group in results.groups if (said := _group_in_short(group))]


def _group_in_short(group: Group) -> str | None:
    ours = [row for row in group.rows if row.ours and row.measured("kept_bytes") is not None]
    if not ours:
        return None
    scored = [row for row in ours if row.average]
    best = max(scored, key=lambda row: row.average.mean if row.average else 0.0) if scored else ours[0]
    parts = []
    for rival in RIVALS:
        kept, time = (ratio_of(name, best, group.find(rival)) for name in ("kept", "time"))
        if kept is not None:
            parts.append(f"{_times(kept)} the bytes{f' and {_times(time)} the step time' if time else ''} of {rival}")
    others = {rival: group.find(rival) for rival in RIVALS if not rival.endswith("+checkpoint")}
    scores = [f"{rival} {score_text(row.average, None)}" for rival, row in others.items() if row and row.average]
    if not parts:
        return None
    said = f"{group.title}: {best.contender} keeps {', '.join(parts)}"
    if best.average and scores:
        said += f"; it scores {score_text(best.average, None)}, {', '.join(scores)}"
    return f"{said}."


def _losses(row: Row, rival: Row | None) -> list[str]:
    if rival is None:
        return []
    found = []
    for name in COMPARED:
        ratio = ratio_of(name, row, rival)
        if ratio is not None and ratio > 1 - TIE:
            tie = "about the same" if ratio <= 1 + TIE else f"{_times(ratio)} the"
            found.append(
                f"{tie} {WORDS[name]} as {rival.contender}"
                if ratio <= 1 + TIE
                else f"{tie} {WORDS[name]} of {rival.contender}"
            )
    if rival.score_of is None and row.average and rival.average:
        points = 100 * (row.average.mean - rival.average.mean)
        if points < 0:
            apart = row.average.high < rival.average.low
            found.append(
                f"scores {-points:.1f} points below {rival.contender}" + ("" if apart else " (the intervals overlap)")
            )
    return found


def ratio_of(name: str, row: Row, rival: Row | None) -> float | None:
    """A compared value over a rival's; None if one of them was not measured."""
    if rival is None:
        return None
    mine, other = COMPARED[name](row), COMPARED[name](rival)
    return None if mine is None or not other else mine / other


def _ratio(name: str, row: Row, rival: Row | None) -> Cell:
    ratio = ratio_of(name, row, rival)
    if ratio is None or rival is None:
        return UNMEASURED
    tone = "win" if ratio < 1 - TIE else "tie" if ratio <= 1 + TIE else "loss"
    marks = tuple(dict.fromkeys((*row.cost_marks, *rival.cost_marks)))
    planned = name == "peak" and (row.peak is None or rival.peak is None)
    return Cell(text=_times(ratio), value=ratio, small=PLANNED if planned else "", marks=marks, tone=tone)


def _points(row: Row, rival: Row | None) -> Cell:
    if rival is None or row.average is None or rival.average is None:
        return UNMEASURED
    points = 100 * (row.average.mean - rival.average.mean)
    return Cell(
        text=f"{points:+.1f}".replace("-", "−"),
        value=points,
        small="" if _apart(row.average, rival.average) else "intervals overlap",
        tone="win" if points >= 0 else "loss",
    )


def _apart(one: Estimate, other: Estimate) -> bool:
    """Whether two intervals do not overlap."""
    return one.low > other.high or one.high < other.low


def _times(ratio: float) -> str:
    return f"{significant(ratio, 2 if ratio < 1 else 3)}×"


def _ours(results: Results) -> Iterable[Row]:
    return (row for group in results.groups for row in group.rows if row.ours)


def plan_table(results: Results) -> Table:
    """Planned against measured peak, where there are both."""
    columns = (
        Column(name="backbone", title="backbone", numbers=False),
        Column(name="contender", title="contender", numbers=False),
        Column(name="planned", title="planned", unit="MiB", help="Rise over weights and optimizer state in a step."),
        Column(name="measured", title="measured", unit="MiB", help="The same, by the allocator's count."),
        Column(name="error", title="error", unit="%", help="Planned over measured, minus 1."),
    )
    lines = []
    for group in results.groups:
        for row in group.rows:
            planned, measured = row.measured("planned_peak_bytes"), row.measured("peak_bytes")
            if planned is not None and measured:
                error = planned / measured - 1
                cells = (
                    *named_cells(group, row),
                    Cell(text=significant(planned / MIB), value=planned),
                    Cell(text=significant(measured / MIB), value=measured, marks=row.cost_marks),
                    Cell(
                        text=f"{100 * error:+.1f}".replace("-", "−"),
                        value=abs(error),
                        tone="win" if abs(error) <= PLAN_TOLERANCE else "loss",
                    ),
                )
                lines.append(Line(group=group, row=row, cells=cells))
    return Table(columns=columns if lines else (), lines=tuple(lines))
