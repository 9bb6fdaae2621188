"""`sidestep demo`."""

from __future__ import annotations

from pathlib import Path

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting


def demo(vision: opt.Vision = False, output: opt.DemoOutput = Path("runs/demo"), debug: opt.Debug = False) -> None:
    """Train side networks and a probe on a real backbone (text, or images), and use a saved task."""
    with reporting(debug):
        from sidestep.disk.atomic import check_folder

        check_folder(output)
        if vision:
            from sidestep.demo.vision import run
        else:
            from sidestep.demo.text import run

        run(output)
