"""What a report leaves behind as files: the page, and every figure as PNG, SVG and csv."""

from __future__ import annotations

import csv
import os
from io import StringIO
from pathlib import Path

import vl_convert

from sidestep.report.chart import Figure, slug
from sidestep.report.figures import figures
from sidestep.report.looks import for_files
from sidestep.report.page import render
from sidestep.report.rows import Results

WIDTH = 420  # pixels of a plot; PNG files have `SCALE` times as many
SCALE = 3


def write_page(results: Results, path: Path, *, command: str) -> None:
    """Write the page; arguments as `render`."""
    _write(path, render(results, command=command).encode())


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Write every figure of every group, one a task where it shows scores, and say which files these are."""
    look = for_files(results.contenders, WIDTH)
    written = []
    for group in results.groups:
        for figure in figures(group, by_task=True):
            spec, name = figure.spec(look), f"{slug(group.title)}-{figure.name}"
            parts = {
                ".svg": vl_convert.vega_to_svg(spec).encode(),
                ".png": vl_convert.vega_to_png(spec, scale=SCALE),
                ".csv": _csv(figure).encode(),
            }
            for ending, content in parts.items():
                path = folder / f"{name}{ending}"
                _write(path, content)
                written.append(path)
    return written


def _csv(figure: Figure) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(figure.columns)
    writer.writerows([row.get(name) for name in figure.columns.values()] for row in figure.rows)
    return text.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file in one step: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    os.replace(beside, path)
