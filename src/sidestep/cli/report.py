"""`sidestep report`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting
from sidestep.console import remark

if TYPE_CHECKING:
    from sidestep.report.rows import Results

#: What the page and the figures are made with.
PARTS = ("altair", "vl_convert", "jinja2", "markupsafe")


def report(
    results: opt.ResultsFiles,
    output: opt.Page = None,
    figures: opt.Figures = None,
    markdown: opt.AsMarkdown = False,
    debug: opt.Debug = False,
) -> None:
    """Show the results of comparisons: one HTML page, figures for papers, tables for a README."""
    with reporting(debug):
        from sidestep.disk.atomic import OutputError, check_file, check_folder, lies_in, refuse_inputs
        from sidestep.report.load import load
        from sidestep.report.markdown import markdown as tables

        if output is None and figures is None and not markdown:
            raise ValueError("nothing to write: give --output report.html, --figures FOLDER or --markdown")
        if output is not None:
            check_file(output)
            refuse_inputs([output], results)
        if figures is not None:
            check_folder(figures)
            if output is not None and lies_in(figures / "figure", output):
                raise OutputError(
                    f"--output {output} is a file, so --figures {figures} cannot be there: choose another"
                )
        found = load(results)
        if found.broken:
            remark(found.remark)
        command = _command(results, output, figures, markdown)
        if output is not None or figures is not None:
            _write(found, output, figures, command)
        if markdown:
            encoding = sys.stdout.encoding or "utf-8"  # which may not know every sign, as in a path's odd bytes
            print(tables(found, command=command).encode(encoding, errors="replace").decode(encoding), end="")


def _write(found: Results, output: Path | None, figures: Path | None, command: str) -> None:
    try:
        from sidestep.report import files
    except ModuleNotFoundError as error:
        if error.name not in PARTS:
            raise
        raise ValueError(f'the report needs {error.name}: install it with pip install "sidestep[compare]"') from error
    if output is not None:
        files.write_page(found, output, command=command)
        remark(f"{output} written ({output.stat().st_size / 2**20:.1f} MiB)")
    if figures is not None:
        written = files.write_figures(found, figures)
        remark(f"{len(written)} files written to {figures}")


def _command(results: list[Path], output: Path | None, figures: Path | None, markdown: bool) -> str:
    """The command as it was given."""
    parts = ["sidestep", "report", *map(str, results)]
    parts += ["--output", str(output)] if output is not None else []
    parts += ["--figures", str(figures)] if figures is not None else []
    return shlex.join([*parts, *(["--markdown"] if markdown else [])])
