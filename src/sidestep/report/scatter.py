"""Scores against costs, and step time against memory, with the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log10

import altair as alt

from sidestep.report.chance import ONE_ANSWER
from sidestep.report.chart import ABOUT, Figure, Rows, about, series_scale, slug
from sidestep.report.choice import AVERAGE, MEMORY, memory_of, picked
from sidestep.report.labels import Box, place_labels
from sidestep.report.looks import Look
from sidestep.report.rows import Group, Row
from sidestep.report.tables import MIB

HEIGHT = 300
NOMINAL = 340  # width for which labels are placed: a phone's, and a third of a page's
PADDING = 14  # pixels between the outermost values and the plot's edge
#: A cost whose largest value is more than so many times its smallest is drawn on a logarithmic scale.
LOG_RATIO = 20
#: Labels of a logarithmic axis: 0.1, 20, 1k, 10M.
SHORT = {"format": "~s", "labelExpr": "datum.label && datum.value < 1 ? format(datum.value, '~g') : datum.label"}
#: What scores are drawn against: file name, axis title, value of a row.
COSTS: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "peak": ("peak memory above the weights, MiB", lambda row: _in(row.peak, MIB)),
    "planned": ("planned peak memory above the weights, MiB", lambda row: _in(row.planned_peak, MIB)),
    "kept": ("kept for backward, MiB", lambda row: _in(row.measured("kept_bytes"), MIB)),
    "parameters": ("trained parameters", lambda row: row.measured("parameters")),
    "step": ("step time, s", lambda row: row.median("step_seconds")),
}


def score_figure(group: Group, cost: str, tasks: Sequence[str]) -> Figure | None:
    """Scores against a cost; None with fewer than two contenders.

    Args:
        group: of rows.
        cost: a name of `COSTS`.
        tasks: names; `AVERAGE` among them for the average.
    """
    title, value = COSTS[cost]
    less = {task.name for task in group.tasks if not task.greater}
    constants = {AVERAGE: group.constant, **{task.name: task.constant for task in group.tasks}}
    picks = picked(group) if cost in MEMORY else {}
    rows: Rows = []
    for name in tasks:
        greater = name not in less
        scale = 100 if greater else 1
        here: Rows = []
        for row in group.rows:
            found = row.average if name == AVERAGE else row.scores[name].estimate if name in row.scores else None
            x = value(row)
            if found is not None and x is not None:
                ends = {"score": scale * found.mean, "low": scale * found.low, "high": scale * found.high}
                pick = picks.get(name) == row.contender
                here.append({"task": name, **about(row), "x": x, **ends, "seeds": found.count, "pick": pick})
        here = _with_bars(here)
        front = pareto([(row["x"], row["score"]) for row in here], greater=greater)
        here = [{**row, "front": place in front} for place, row in enumerate(here)]
        constant = constants[name]
        rows += here if constant is None else _with_line(here, scale * constant)
    if len({row["contender"] for row in rows}) < 2:
        return None
    first = AVERAGE if any(row["task"] == AVERAGE for row in rows) else rows[0]["task"]

    def draw(look: Look) -> alt.LayerChart:
        log = _wide([row["x"] for row in rows])
        return _scatter(look, rows, first, x_title=title, y_title="score", log=log)

    return Figure(
        name=f"score-against-{cost}-{slug(first)}",
        kind="score",
        group=group,
        title=f"Score against {title.partition(',')[0]}",
        about=first,
        rows=rows,
        columns={
            "task": "task",
            **ABOUT,
            title: "x",
            **{name: name for name in ("score", "low", "high", "seeds")},
            "on the Pareto front": "front",
            **({ONE_ANSWER: "constant"} if any("constant" in row for row in rows) else {}),
        },
        draw=draw,
    )


def _with_line(rows: Rows, constant: float) -> Rows:
    """The rows with what one answer for all scores; the first says that its line is drawn.

    None is drawn so far from all scores that it would press them into a line.
    """
    means = [row["score"] for row in rows]
    span = max(means) - min(means) if means else 0.0
    near = span == 0 or min(means) - span <= constant <= max(means) + span
    return [
        {**row, "constant": constant, **({"line": constant, "lined": ONE_ANSWER} if near and place == 0 else {})}
        for place, row in enumerate(rows)
    ]


def cost_figure(group: Group) -> Figure | None:
    """Step time against memory; None with fewer than two contenders."""
    memory = memory_of(group)
    title, size = COSTS[memory]
    rows = [
        {"task": AVERAGE, **about(row), "x": size(row), "score": row.median("step_seconds")}
        for row in group.rows
        if size(row) is not None and row.median("step_seconds") is not None
    ]
    if len(rows) < 2:
        return None
    front = pareto([(row["x"], row["score"]) for row in rows], greater=False)
    rows = [{**row, "from": row["score"], "to": row["score"], "front": n in front} for n, row in enumerate(rows)]

    def draw(look: Look) -> alt.LayerChart:
        log = _wide([row["x"] for row in rows])
        return _scatter(look, rows, AVERAGE, x_title=title, y_title="step time, s", log=log, zero=True)

    return Figure(
        name=f"step-against-{memory}",
        kind="cost",
        group=group,
        title=f"Step time against {MEMORY[memory][0]}",
        rows=rows,
        columns={**ABOUT, title: "x", "step time, s": "score", "on the Pareto front": "front"},
        draw=draw,
    )


def _with_bars(rows: Rows) -> Rows:
    """The rows with the ends of their error bars: one that leaves the means' range by more than its length is cut.

    Else one contender with two seeds could press all others into a line.
    """
    means = [row["score"] for row in rows]
    span = max(means) - min(means) if means else 0.0
    if span == 0:
        return [{**row, "from": row["low"], "to": row["high"]} for row in rows]
    low, high = min(means) - span, max(means) + span
    return [{**row, "from": max(row["low"], low), "to": min(row["high"], high)} for row in rows]


def pareto(points: Sequence[tuple[float, float]], *, greater: bool) -> set[int]:
    """Places of the points that no other beats in cost and score both.

    Args:
        points: cost and score; a lower cost is better.
        greater: whether a greater score is better.
    """
    sign = 1 if greater else -1
    front, best = set(), float("-inf")
    for place in sorted(range(len(points)), key=lambda place: (points[place][0], -sign * points[place][1])):
        if sign * points[place][1] > best:
            best = sign * points[place][1]
            front.add(place)
    return front


def _scatter(
    look: Look,
    rows: Rows,
    task: str,
    *,
    x_title: str,
    y_title: str,
    log: bool,
    zero: bool = False,
) -> alt.LayerChart:
    chosen = alt.param(name="task", value=task)
    wanted = alt.param(name="wanted", value="")
    opacity = alt.condition(
        "wanted == '' || indexof(lower(datum.contender), wanted) >= 0", alt.value(1), alt.value(0.15)
    )
    scale = alt.Scale(type="log", nice=False, padding=PADDING) if log else alt.Scale(zero=True)
    x = alt.X(
        "x:Q",
        title=x_title,
        scale=scale,
        axis=alt.Axis(grid=False, tickCount=5, **(SHORT if log else {})),
    )
    y = alt.Y(
        "score:Q",
        title=y_title,
        scale=alt.Scale(domainMin=0) if zero else alt.Scale(zero=False, padding=PADDING),
        axis=alt.Axis(tickCount=5),
    )
    tasks = dict.fromkeys(row["task"] for row in rows)
    placed = [_with_labels([row for row in rows if row["task"] == name], log=log, zero=zero) for name in tasks]
    data = alt.Data(values=[row for part in placed for row in part])
    base = alt.Chart().transform_filter("datum.task == task")
    front = (
        base.transform_filter("datum.front")
        .mark_line(interpolate="step-after", color=look.inks["muted"], strokeDash=[4, 3], strokeWidth=1)
        .encode(x=x, y=y)
    )
    series = series_scale(look, rows)
    inside = alt.Scale(domain=[*series["domain"], ""], range=[*series["range"], look.inks["paper"]])
    spread = base.mark_rule(strokeWidth=1).encode(
        x=x, y=alt.Y("from:Q"), y2="to:Q", color=alt.Color("series:N", scale=series, legend=None), opacity=opacity
    )
    points = (
        base.mark_point(size=85, strokeWidth=1.7, opacity=1)
        .encode(
            x=x,
            y=y,
            stroke=alt.Stroke("series:N", scale=series, legend=None),
            fill=alt.Fill("inside:N", scale=inside, legend=None),
            shape=alt.Shape(
                "kind:N",
                scale=alt.Scale(domain=["Sidestep's method", "baseline"], range=["diamond", "circle"]),
                legend=alt.Legend(
                    title=None,
                    orient="bottom",
                    symbolFillColor=look.inks["muted"],
                    symbolStrokeColor=look.inks["muted"],
                    symbolOpacity=1,
                )
                if look.legend
                else None,
            ),
            opacity=opacity,
            tooltip=[
                alt.Tooltip("contender:N"),
                alt.Tooltip("x:Q", title=x_title, format=",.4~r"),
                alt.Tooltip("score:Q", title=y_title, format=".4~r"),
                *([] if zero else [alt.Tooltip("low:Q", format=".4~r"), alt.Tooltip("high:Q", format=".4~r")]),
            ],
        )
        .properties(name="points")
    )
    names = base.mark_text(
        fontSize=11,
        dx=alt.expr("datum.dx"),
        dy=alt.expr("datum.dy"),
        align=alt.expr("datum.align"),
        baseline="middle",
        fontWeight=alt.expr("datum.ours ? 600 : 400"),
        color=look.inks["ink"],
    ).encode(x=x, y=y, text="name:N", opacity=opacity)
    # layers that show few of the rows hide the others: one without a row has no extent, and Vega warns of it
    ring = base.mark_point(shape="circle", size=330, strokeWidth=1.3, color=look.inks["ink"]).encode(
        x=x, y=y, opacity=alt.condition("datum.pick", alt.value(1), alt.value(0))
    )
    line, its_name = _one_answer(look, base)
    layers = alt.layer(line, front, spread, ring, points, names, its_name, data=data)
    return layers.add_params(chosen, wanted).properties(width=look.width, height=HEIGHT)


def _one_answer(look: Look, base: alt.Chart) -> tuple[alt.Chart, alt.Chart]:
    """A dotted line across the plot, and its name at the right, for the row that says so."""
    lined = base.encode(y="line:Q", opacity=alt.condition("datum.lined", alt.value(1), alt.value(0)))
    rule = lined.mark_rule(color=look.inks["muted"], strokeDash=[1, 3], strokeWidth=1.2)
    name = lined.mark_text(align="right", baseline="bottom", dy=-2, fontSize=10.5, color=look.inks["muted"])
    return rule, name.encode(x=alt.value("width"), text="lined:N")


def _with_labels(rows: Rows, *, log: bool, zero: bool) -> Rows:
    """The rows with the places of their labels, in a plot of `NOMINAL` width; a wider one has room to spare."""
    across = _pixels([row["x"] for row in rows], NOMINAL, log=log, zero=not log)
    heights = _pixels([row[end] for row in rows for end in ("score", "from", "to")], HEIGHT - 2 * PADDING, zero=zero)
    down = [HEIGHT - PADDING - height for height in heights]
    points = list(zip(across, down[::3], strict=True))
    bars = [Box(x - 1, high, x + 1, low) for x, low, high in zip(across, down[1::3], down[2::3], strict=True)]
    front = sorted(point for point, row in zip(points, rows, strict=True) if row["front"])
    steps = [
        box
        for (x, y), (next_x, next_y) in pairwise(front)
        for box in (Box(x, y - 1, next_x, y + 1), Box(next_x - 1, min(y, next_y), next_x + 1, max(y, next_y)))
    ]
    places = place_labels(points, [row["contender"] for row in rows], bars + steps, NOMINAL, HEIGHT)
    return [
        {
            "line": row["score"],
            "lined": "",
            "pick": False,
            **row,
            "dx": place.dx,
            "dy": place.dy,
            "align": place.align,
            "name": row["contender"] if place.shown else "",
        }
        for row, place in zip(rows, places, strict=True)
    ]


def _pixels(values: Sequence[float], size: float, *, log: bool = False, zero: bool = False) -> list[float]:
    """Where values come to lie on an axis of a length."""
    scaled = [log10(value) for value in values] if log else list(values)
    low, high = min([0.0, *scaled] if zero else scaled), max(scaled)
    return [size * (value - low) / ((high - low) or 1.0) for value in scaled]


def _wide(values: Sequence[float]) -> bool:
    positive = [value for value in values if value > 0]
    return len(positive) == len(values) and max(positive) / min(positive) > LOG_RATIO


def _in(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit
