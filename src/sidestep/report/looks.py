"""Colours and fonts of the charts: by CSS variables on the page, by values in files.

On the page a colour is a CSS variable, so that light, dark and print are the style sheet's and no chart is drawn
twice. The colours are told apart with the common kinds of colour blindness: Okabe and Ito's, then Paul Tol's muted
ones. Baselines and methods also differ in the shape of their marks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidestep.report.rows import BASELINES, WAYS

#: name -> (light, dark)
INKS = {
    "ink": ("#1d1c1a", "#e9e6df"),
    "muted": ("#6b6760", "#a19c92"),
    "rule": ("#dcd8cf", "#3a3833"),
    "paper": ("#fffefb", "#1b1a18"),
}
#: The baselines have a colour each that no method takes.
OF_BASELINES = dict(
    zip(
        BASELINES,
        (
            ("#978d7e", "#857d71"),
            ("#8a8175", "#a39a8d"),
            ("#7a6fb0", "#aba2dc"),
            ("#0072b2", "#56a8dc"),
            ("#2f90c6", "#9fd4f5"),
            ("#3d3d3d", "#c9c5bd"),
        ),
        strict=True,
    )
)
#: For all others, in order of appearance; then from the start again.
OF_METHODS = (
    ("#d55e00", "#f28c3b"),
    ("#009e73", "#35c99f"),
    ("#aa3377", "#e07bb4"),
    ("#b38500", "#e8bf3f"),
    ("#882255", "#c9668f"),
    ("#117733", "#6cbf80"),
    ("#661100", "#d08770"),
    ("#8a8a2b", "#c9c96a"),
)
#: Where memory goes, from the bottom of a bar up; what is kept for backward in one family of colours.
OF_PARTS = {
    "weights": ("#cfcac0", "#4a4741"),
    "gradients": ("#8f887c", "#7d776d"),
    "optimizer state": ("#5f5a52", "#b0a99d"),
    "kept: attention": ("#08519c", "#2f7fc9"),
    "kept: MLP": ("#3182bd", "#5fa3dd"),
    "kept: norms, dropout": ("#6baed6", "#8fc1e8"),
    "kept: embeddings": ("#9ecae1", "#b5d6ef"),
    "kept: whole blocks": ("#c6dbef", "#d6e6f5"),
    "kept: the method": ("#d55e00", "#f28c3b"),
    "kept: head": ("#fdae6b", "#fbc894"),
    "kept: other": ("#a9c4b5", "#7d9a8a"),
    "temporaries": ("#e9d8a6", "#8c7f52"),
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """How charts are drawn.

    Attributes:
        inks, series, parts: colours by name; series by contender without how it recomputes and keeps.
        font: of all text.
        width: of the plot in pixels, or "container".
        legend: whether a chart explains its own colours; the page has one key for all.
    """

    inks: Mapping[str, str]
    series: Mapping[str, str]
    parts: Mapping[str, str]
    font: str
    width: int | str
    legend: bool

    def colour(self, contender: str) -> str:
        """The colour of a contender; recomputation has that of the plain one."""
        return self.series[plain(contender)]

    def config(self) -> dict[str, Any]:
        """Vega-Lite's configuration."""
        text = {"labelColor": self.inks["muted"], "titleColor": self.inks["ink"], "titleFontWeight": "normal"}
        sizes = {"labelFontSize": 11, "titleFontSize": 11.5}
        return {
            "font": self.font,
            "background": self.inks["paper"] if self.legend else "transparent",
            "view": {"stroke": None},
            "axis": {
                **text,
                **sizes,
                "domainColor": self.inks["muted"],
                "gridColor": self.inks["rule"],
                "tickColor": self.inks["muted"],
                "tickSize": 4,
            },
            "legend": {**text, **sizes, "symbolStrokeWidth": 1.5},
            "title": {"color": self.inks["ink"], "fontSize": 12, "fontWeight": "normal", "anchor": "start"},
        }


def plain(contender: str) -> str:
    """A contender's label without how it recomputes and keeps."""
    for way in WAYS:
        contender = contender.removesuffix(way)
    return contender


def colours(contenders: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A light and a dark colour for every contender, recomputation left out."""
    names = list(dict.fromkeys(plain(contender) for contender in contenders))
    others = [name for name in names if name not in OF_BASELINES]
    return {name: OF_BASELINES.get(name) or OF_METHODS[others.index(name) % len(OF_METHODS)] for name in names}


def for_files(contenders: Sequence[str], width: int) -> Look:
    """Colours as values, on white, with legends."""
    return Look(
        inks={name: light for name, (light, _) in INKS.items()} | {"paper": "#ffffff"},
        series={name: light for name, (light, _) in colours(contenders).items()},
        parts={name: light for name, (light, _) in OF_PARTS.items()},
        font="Helvetica, Arial, Liberation Sans, sans-serif",
        width=width,
        legend=True,
    )


def for_page(contenders: Sequence[str]) -> Look:
    """Colours as CSS variables, see `variables`; as wide as their place."""
    return Look(
        inks={name: f"var(--{name})" for name in INKS},
        series={name: f"var(--series-{number})" for number, name in enumerate(colours(contenders))},
        parts={name: f"var(--part-{number})" for number, name in enumerate(OF_PARTS)},
        font="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif",
        width="container",
        legend=False,
    )


def variables(contenders: Sequence[str], *, dark: bool) -> dict[str, str]:
    """The values of the page's CSS variables."""
    pairs = {
        **{f"--{name}": pair for name, pair in INKS.items()},
        **{f"--series-{number}": pair for number, pair in enumerate(colours(contenders).values())},
        **{f"--part-{number}": pair for number, pair in enumerate(OF_PARTS.values())},
    }
    return {name: pair[dark] for name, pair in pairs.items()}
