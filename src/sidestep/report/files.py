"""What a report leaves behind as files: the page, and every figure as PNG, SVG and csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from io import StringIO
from itertools import chain, count
from pathlib import Path

import vl_convert

from sidestep.disk.atomic import refuse_inputs, whole
from sidestep.report.chart import Figure, slug
from sidestep.report.figures import figures
from sidestep.report.looks import for_files
from sidestep.report.page import render
from sidestep.report.rows import Results
from sidestep.report.texts import in_cell

WIDTH = 420  # pixels of a plot; PNG files have `SCALE` times as many
SCALE = 3


def write_page(results: Results, path: Path, *, command: str) -> None:
    """Write the page; arguments as `render`."""
    _write(path, render(results, command=command).encode(errors="replace"))


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Write every figure of every group, one a task where it shows scores, and say which files these are.

    Raises:
        OutputError: if one of them is a results file.
    """
    look = for_files(results.contenders, WIDTH)
    found = [figure for group in results.groups for figure in figures(group, by_task=True)]
    names = _unlike(f"{slug(figure.group.title)}-{figure.name}" for figure in found)
    written = [folder / f"{name}{ending}" for name in names for ending in (".svg", ".png", ".csv")]
    refuse_inputs(written, [source.path for source in results.sources])
    for name, figure in zip(names, found, strict=True):
        spec = figure.spec(look)
        _write(folder / f"{name}.svg", vl_convert.vega_to_svg(spec).encode())
        _write(folder / f"{name}.png", vl_convert.vega_to_png(spec, scale=SCALE))
        _write(folder / f"{name}.csv", _csv(figure).encode())
    return written


def _unlike(names: Iterable[str]) -> list[str]:
    """The names, with a number where one was there before: those of two tasks may differ in signs alone."""
    taken: list[str] = []
    for name in names:
        numbered = chain([name], (f"{name}-{number}" for number in count(2)))
        taken.append(next(one for one in numbered if one not in taken))
    return taken


def _csv(figure: Figure) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(figure.columns)
    writer.writerows([in_cell(row.get(name)) for name in figure.columns.values()] for row in figure.rows)
    return text.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file in one step: a reader sees the old one or the new one."""
    with whole(path) as beside:
        beside.write_bytes(content)
