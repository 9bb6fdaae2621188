"""A chart and what all charts share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from sidestep.report.looks import Look, plain
from sidestep.report.rows import Group, Row

VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
SLUG = 60  # letters
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart.

    Attributes:
        name: for file names.
        kind: "score", "cost", "memory", "curve".
        group: what it is about.
        title: what it shows.
        about: a task's name, or "".
        rows: the values drawn.
        columns: those of its csv file, with the names that the values have in the rows.
        draw: makes the chart in a look.
    """

    name: str
    kind: str
    group: Group
    title: str
    about: str = ""
    rows: Rows
    columns: Mapping[str, str]
    draw: Callable[[Look], alt.LayerChart]

    def spec(self, look: Look) -> dict[str, Any]:
        """The chart as a Vega specification."""
        chart = self.draw(look).configure(**look.config())
        spec: dict[str, Any] = vl_convert.vegalite_to_vega(chart.to_dict(), vl_version=VEGA_LITE)
        return spec


#: Of every csv file.
ABOUT = {"contender": "contender", "kind": "kind", "checkpoint": "checkpoint"}


def slug(text: str) -> str:
    """A text as a part of a file name, of which disks take no more than 255 bytes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:SLUG].strip("-") or "x"


def about(row: Row) -> dict[str, Any]:
    """What every drawn value says of its contender."""
    return {
        "contender": row.contender,
        "series": plain(row.contender),
        "inside": "" if row.checkpoint else plain(row.contender),
        "kind": "Sidestep's method" if row.ours else "baseline",
        "ours": row.ours,
        "checkpoint": row.checkpoint,
    }


def series_scale(look: Look, rows: Rows) -> alt.Scale:
    """The contenders' colours."""
    names = list(dict.fromkeys(row["series"] for row in rows))
    return alt.Scale(domain=names, range=[look.series[name] for name in names])
