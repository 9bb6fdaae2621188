"""Training curves."""

from __future__ import annotations

from statistics import fmean

import altair as alt

from sidestep.report.chart import ABOUT, Figure, Rows, about, series_scale, slug
from sidestep.report.looks import Look
from sidestep.report.rows import Group

HEIGHT = 190
TICKS = 8  # so many epochs have a tick each


def curve_figure(group: Group, task: str, value: str) -> Figure | None:
    """A line a contender, the mean over seeds; None where there is no more than one epoch.

    Args:
        group: of rows.
        task: its name.
        value: "score" on dev or "loss" in training.
    """
    greater = next(found.greater for found in group.tasks if found.name == task)
    scale = 100 if value == "score" and greater else 1
    rows: Rows = []
    for row in group.rows:
        if task not in row.scores or row.score_of:
            continue
        by_epoch: dict[float, list[float]] = {}
        for record in row.scores[task].records:
            for entry in (record.measured or {}).get("history") or []:
                if entry.get(value) is not None and entry.get("epoch") is not None:
                    by_epoch.setdefault(float(entry["epoch"]), []).append(scale * entry[value])
        rows += [
            {**about(row), "epoch": epoch, value: fmean(values), "low": min(values), "high": max(values)}
            for epoch, values in sorted(by_epoch.items())
        ]
    epochs = sorted({row["epoch"] for row in rows})
    if len(epochs) < 2:
        return None
    title = f"dev {value}" if value == "score" else "training loss"

    def draw(look: Look) -> alt.LayerChart:
        wanted = alt.param(name="wanted", value="")
        seen = "wanted == '' || indexof(lower(datum.contender), wanted) >= 0"
        legend = alt.Legend(orient="right", symbolType="stroke", symbolOpacity=1) if look.legend else None
        colour = alt.Color("series:N", scale=series_scale(look, rows), title=None, legend=legend)
        base = alt.Chart()
        x = alt.X(
            "epoch:Q",
            title="epoch",
            axis=alt.Axis(grid=False, values=epochs if len(epochs) <= TICKS else alt.Undefined, format="~g"),
            scale=alt.Scale(zero=False),
        )
        y = alt.Y(f"{value}:Q", title=title, scale=alt.Scale(zero=False), axis=alt.Axis(tickCount=4))
        band = base.mark_area().encode(
            x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour, opacity=alt.condition(seen, alt.value(0.13), alt.value(0))
        )
        line = base.mark_line(point={"size": 18}).encode(
            x=x,
            y=y,
            color=colour,
            strokeWidth=alt.condition("datum.ours", alt.value(2.4), alt.value(1.2)),
            opacity=alt.condition(seen, alt.value(1), alt.value(0.12)),
            tooltip=["contender:N", "epoch:Q", alt.Tooltip(f"{value}:Q", format=".4~r")],
        )
        return (
            alt.layer(band, line, data=alt.Data(values=rows))
            .add_params(wanted)
            .properties(width=look.width, height=HEIGHT)
        )

    return Figure(
        name=f"curve-{slug(task)}-{value}",
        kind="curve",
        group=group,
        title=f"{task}: {title}",
        about=task,
        rows=rows,
        columns={**ABOUT, "epoch": "epoch", value: value, "lowest": "low", "highest": "high"},
        draw=draw,
    )
