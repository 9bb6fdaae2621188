"""The page: one HTML file with its style, its scripts and its data, that asks the network for nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from string import ascii_lowercase
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sidestep.compare.records import Record
from sidestep.report.chart import VEGA_LITE, Figure
from sidestep.report.choice import memory_of
from sidestep.report.figures import figures
from sidestep.report.looks import OF_PARTS, for_page, plain, variables
from sidestep.report.mixed import canonical, text_of
from sidestep.report.quick import quick_line
from sidestep.report.ratios import in_short, not_won, plan_table, ratio_table
from sidestep.report.rows import Group, Results, Row
from sidestep.report.tables import Table, main_table, score_text, unmeasured, without
from sidestep.report.verdict import BY_TASK, RULE, Verdict, by_task, verdicts
from sidestep.versions import version_of

#: Settings that are said elsewhere in a row.
_SAID = frozenset({"backbone", "contender", "method", "config", "task", "seed", "rate", "score_of"})


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A figure's place on the page: the id of its specification, and the figure."""

    id: str
    figure: Figure

    @property
    def tasks(self) -> list[str]:
        """The tasks that it shows, or one of which it can show; none if it is about no task."""
        if self.figure.kind == "score":
            return list(dict.fromkeys(row["task"] for row in self.figure.rows))
        return [self.figure.about] if self.figure.kind == "curve" else []


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the page begins with, of one group: the answer by each score, and its picture.

    Attributes:
        group: of rows.
        verdicts: the average first; one without a score where there are costs alone.
        panel: score against memory, or step time against memory where there are no scores; None with too few points.
    """

    group: Group
    verdicts: tuple[Verdict, ...]
    panel: Panel | None

    @property
    def by_task(self) -> list[tuple[str, ...]]:
        """See `verdict.by_task`."""
        return by_task(self.verdicts)

    @classmethod
    def of(cls, group: Group, panels: Sequence[Panel]) -> Answer:
        """The answer of a group, with its picture from among the panels."""
        memory = memory_of(group)
        own = [panel for panel in panels if panel.figure.group is group]
        wanted = [panel for panel in own if panel.figure.name.startswith(f"score-against-{memory}-")]
        wanted += [panel for panel in own if panel.figure.kind == "cost"]
        return cls(group=group, verdicts=tuple(verdicts(group)), panel=wanted[0] if wanted else None)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """The part of the table of all values that is about one backbone.

    Attributes:
        backbone: its label.
        table: its rows, with the columns in which anything was measured of them.
        tasks: how many have a score.
    """

    backbone: str
    table: Table
    tasks: int


@dataclass(frozen=True, kw_only=True)
class Marks:
    """Letters for the phrases that say how a value is unlike the others, in order of appearance."""

    letters: dict[str, str] = field(default_factory=dict)

    def letter(self, phrase: str) -> str:
        """The letter of a phrase, a new one if it has none yet."""
        if phrase not in self.letters:
            rounds, place = divmod(len(self.letters), len(ascii_lowercase))
            self.letters[phrase] = ascii_lowercase[place] * (rounds + 1)
        return self.letters[phrase]


def render(results: Results, *, command: str) -> str:
    """The page as HTML.

    Args:
        results: of one file or of several.
        command: that makes this page, for the reader.
    """
    environment = Environment(
        loader=PackageLoader("sidestep.report", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = text_of
    every = [Panel(id=f"figure-{number}", figure=figure) for number, figure in enumerate(_figures(results))]
    answers = [Answer.of(group, every) for group in results.groups]
    panels = [panel for panel in every if all(panel is not answer.panel for answer in answers)]
    look = for_page(results.contenders)
    tables = {"ratios": ratio_table(results), "plans": plan_table(results)}
    single = len(results.groups) == 1
    marks = Marks()
    for mark in (mark for table in (main_table(results), *tables.values()) for mark in _marks_of(table)):
        marks.letter(mark)
    return environment.get_template("page.html").render(
        **{name: without(table, ["backbone"]) if single else table for name, table in tables.items()},
        folds=_folds(results),
        answers=answers,
        quick=quick_line(results),
        rule=RULE,
        by_task_heads=BY_TASK,
        results=results,
        command=command,
        version=version_of("sidestep"),
        marks=marks,
        in_short=in_short(results),
        unmeasured=unmeasured(results),
        not_won=not_won(results),
        details=details,
        backbones=list(dict.fromkeys(group.backbone for group in results.groups)),
        tasks=list(dict.fromkeys(task.name for group in results.groups for task in group.tasks)),
        panels=panels,
        parts=_parts(panels),
        key=_key(results),
        colour=lambda contender: look.colour(contender),
        made_with=_made_with(results.records),
        dates=sorted({record.date[:10] for record in results.records}),
        light=variables(results.contenders, dark=False),
        dark=variables(results.contenders, dark=True),
        specs=_for_script({panel.id: panel.figure.spec(look) for panel in every}),
        style=Markup(_source(environment, "style.css")),
        script=Markup(_source(environment, "page.js")),
        vega=Markup(_vega() if every else ""),
        drawn=bool(every),
    )


def details(group: Group, row: Row) -> list[tuple[str, list[tuple[str, str]]]]:
    """The exact settings of a row: sections of names and values."""
    first = row.cost or next(score.records[0] for score in row.scores.values())
    sections = [("Method", [("name", row.method), *_pairs(first.settings.get("config") or {})])]
    if row.cost:
        sections.append(("Cost", [*_pairs(row.cost.settings), *_origin([row.cost])]))
    runs = [record for score in row.scores.values() for record in score.records]
    if runs:
        common = _common(runs)
        head = f"Scores of {row.score_of}" if row.score_of else "Scores"
        pairs = [*_pairs(common), *_origin(runs)]
        for task in group.tasks:
            if task.name in row.scores:
                score = row.scores[task.name]
                own = {name: value for name, value in score.records[0].settings.items() if name not in common}
                rates = dict.fromkeys(text_of(record.settings.get("rate")) for record in score.records)
                said = [f"rate {', '.join(rates)}", *(f"{name} {value}" for name, value in _pairs(own))]
                values = [
                    f"seed {text_of(record.settings.get('seed'))}: {(record.measured or {})['score']:.4f}"
                    for record in score.records
                ]
                pairs.append((task.name, f"{score_text(score.estimate, task)}; {'; '.join([*said, *values])}"))
        sections.append((head, pairs))
    if row.trials:
        sections.append(("Rates tried", _trials(row.trials)))
    return sections


def _folds(results: Results) -> list[Fold]:
    folds = []
    for backbone in dict.fromkeys(group.backbone for group in results.groups):
        groups = tuple(group for group in results.groups if group.backbone == backbone)
        table = main_table(replace(results, groups=groups))
        table = without(table, ["backbone"]) if len(groups) == 1 else table
        folds.append(Fold(backbone=backbone, table=table, tasks=len(groups[0].tasks)))
    return folds


def _figures(results: Results) -> list[Figure]:
    return [figure for group in results.groups for figure in figures(group)]


def _marks_of(table: Table) -> Iterable[str]:
    return (mark for line in table.lines for cell in line.cells for mark in cell.marks)


def _parts(panels: Sequence[Panel]) -> dict[str, str]:
    """The colours of the parts of memory that are drawn."""
    drawn = {row["part"] for panel in panels if panel.figure.kind == "memory" for row in panel.figure.rows}
    return {name: f"var(--part-{number})" for number, name in enumerate(OF_PARTS) if name in drawn}


def _key(results: Results) -> list[Row]:
    """One row for each contender that has a colour of its own."""
    rows = {plain(row.contender): row for group in results.groups for row in reversed(group.rows)}
    return [rows[name] for name in dict.fromkeys(plain(contender) for contender in results.contenders)]


def _pairs(settings: Any) -> list[tuple[str, str]]:
    return [(name, text_of(value)) for name, value in settings.items() if name not in _SAID]


def _common(runs: Sequence[Record]) -> dict[str, Any]:
    """The settings that all runs share."""
    return {
        name: value
        for name, value in runs[0].settings.items()
        if all(canonical(run.settings.get(name)) == canonical(value) for run in runs)
    }


def _origin(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Where and when lines were made, and with what."""
    machines = dict.fromkeys(str(record.machine.get("name", "unknown")) for record in records)
    threads = dict.fromkeys(text_of(record.machine.get("threads")) for record in records)
    dates = sorted({record.date[:16].replace("T", " ") for record in records})
    versions = dict.fromkeys(
        f"{name} {number}" for record in records for name, number in record.versions.items() if number
    )
    keys = [record.key for record in records]
    return [
        ("machine", ", ".join(machines)),
        ("threads", ", ".join(threads)),
        ("versions", ", ".join(versions)),
        ("date", dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"),
        ("seconds", f"{sum(record.seconds for record in records):.1f}"),
        ("key" if len(keys) == 1 else "keys", " ".join(keys)),
    ]


def _trials(trials: Sequence[Record]) -> list[tuple[str, str]]:
    found: dict[str, list[str]] = {}
    for record in trials:
        said = f"{text_of(record.settings.get('rate'))}: {(record.measured or {}).get('score', float('nan')):.4f}"
        found.setdefault(record.settings.get("task", ""), []).append(said)
    return [(task, "; ".join(said)) for task, said in found.items()]


def _made_with(records: Sequence[Record]) -> list[tuple[str, str, int, str]]:
    """Machine, versions, number of results and days of each combination of machine and versions."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        memory = record.machine.get("memory_bytes")
        machine = str(record.machine.get("name", "unknown"))
        machine += f", threads: {record.machine.get('threads')}" + (f", {memory / 2**30:.0f} GiB" if memory else "")
        versions = ", ".join(f"{name} {number}" for name, number in record.versions.items() if number)
        found.setdefault((machine, versions), []).append(record)
    return [
        (machine, versions, len(lines), _days([line.date[:10] for line in lines]))
        for (machine, versions), lines in found.items()
    ]


def _days(dates: Sequence[str]) -> str:
    return min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"


def _source(environment: Environment, name: str) -> str:
    """A file of the template as it is."""
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _for_script(value: Any) -> Markup:
    """JSON that may stand in a script element: nothing in it ends the element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


@cache
def _vega() -> str:
    """Vega and its embedding, in one script; the charts come compiled, but it cannot be had without Vega-Lite."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)
    return str(bundle).replace("</script", "<\\/script")
