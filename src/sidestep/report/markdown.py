"""The tables as Markdown, for a README, with the command that made them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sidestep.report.chance import AT, BELOW
from sidestep.report.quick import quick_line
from sidestep.report.ratios import PLANNED, not_won, plan_table, ratio_table
from sidestep.report.rows import Group, Results
from sidestep.report.tables import Cell, Table, main_table, unmeasured, without
from sidestep.report.texts import as_code, in_markdown
from sidestep.report.verdict import RULE, first_verdicts

SCORES = ("average", "seeds")


def markdown(results: Results, *, command: str) -> str:
    """The answer, scores, costs, ratios and the planner's error, as far as there are results for each.

    Args:
        results: of one file or of several.
        command: that made the tables.
    """
    table = main_table(results)
    names = ("backbone", "contender")
    of_scores = [column.name for column in table.columns if column.task or column.name in SCORES]
    of_costs = [column.name for column in table.columns if column.name not in (*names, *of_scores)]
    parts = [
        f"{as_code(command)} ({in_markdown(_made_on(results))})",
        in_markdown(quick_line(results)),
        "\n".join(_answers(results)),
        _section("Scores: mean over seeds ± half the 95 % interval", without(table, of_costs), results)
        if of_scores
        else "",
        _section("Costs of a step", without(table, of_scores), results) if of_costs else "",
        _section("Sidestep's methods over their rivals", ratio_table(results), results),
        "\n".join(
            ["Where a method of Sidestep does not win:", "", *(f"- {in_markdown(said)}" for said in not_won(results))]
        )
        if not_won(results)
        else "",
        _section("Planned and measured peak", plan_table(results), results),
        "\n".join(_notes(results, [table, ratio_table(results)])),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _answers(results: Results) -> list[str]:
    """What to take on each backbone, by the average or else by each task."""
    found = [verdict for group in results.groups for verdict in first_verdicts(group)]
    alone = len(results.groups) == 1
    said = [
        in_markdown(" ".join(["" if alone else f"{verdict.group.title}:", verdict.headline, *verdict.remarks]).strip())
        for verdict in found
    ]
    return [f"- {text}" for text in said] + ([f"- {in_markdown(RULE)}"] if any(one.choice for one in found) else [])


def _section(title: str, table: Table, results: Results) -> str:
    if not table.lines:
        return ""
    if len(results.groups) == 1:
        table = without(table, ["backbone"])
    heads = [f"{column.title}, {column.unit}" if column.unit else column.title for column in table.columns]
    lines = [
        f"{title}:",
        "",
        _row(map(in_markdown, heads)),
        _row("---:" if column.numbers else "---" for column in table.columns),
        *(
            _row(_text(cell, line.group) for cell in line.cells)
            for line in (*table.lines, *table.foot)
            if _says(table, line.cells)
        ),
    ]
    return "\n".join(lines)


def _says(table: Table, cells: Sequence[Cell]) -> bool:
    """Whether a line has any number at all."""
    return any(cell.value is not None for cell, column in zip(cells, table.columns, strict=True) if column.numbers)


def _text(cell: Cell, group: Group) -> str:
    if cell.value == group.title and cell.small:
        return in_markdown(f"{cell.text} ({cell.small})")
    small = [part for part in cell.small.split(", ") if part in (PLANNED, AT, BELOW)]
    said = [*small, *(part for part in [cell.tone] if part in ("loss", "tie"))]
    text = in_markdown(f"{cell.text} ({', '.join(said)})" if said else cell.text)
    return f"{text}\\*" if cell.marks else text


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _made_on(results: Results) -> str:
    machines = dict.fromkeys(str(record.machine.get("name", "unknown")) for record in results.records)
    dates = sorted({record.date[:10] for record in results.records})
    return f"{', '.join(machines)}; {dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'}"


def _notes(results: Results, tables: Sequence[Table]) -> list[str]:
    marks = dict.fromkeys(
        mark for table in tables for line in table.lines for cell in line.cells for mark in cell.marks
    )
    notes = [f"\\* {in_markdown(mark)}" for mark in marks]
    notes += [
        in_markdown(f"{entry.contender} on {entry.backbone}: {entry.status} ({entry.what}): {entry.reason}")
        for entry in results.missing
    ]
    if unmeasured(results):
        notes.append(f"not measured: {', '.join(unmeasured(results))}")
    if results.broken:
        notes.append(results.remark)
    return [f"- {note}" for note in notes]
