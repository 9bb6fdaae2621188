"""`sidestep demo`."""

from __future__ import annotations

from pathlib import Path

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting


def demo(output: opt.DemoOutput = Path("runs/demo"), debug: opt.Debug = False) -> None:
    """Train READ and a probe on docstrings with a real encoder, and use the saved task."""
    with reporting(debug):
        from sidestep.demo import run

        run(output)
