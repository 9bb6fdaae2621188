"""The command line as tests call it."""

from __future__ import annotations

import csv
from pathlib import Path

from typer.testing import CliRunner, Result

from sidestep.cli import app

FAST = ["--set", "rank=8", "--epochs", "2", "--batch-size", "8", "--lr", "0.02", "--quiet"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refusal(*arguments: object) -> str:
    """The message that a command ends with: on stderr, without traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.count("Error: ") == 1
    return " ".join(result.stderr.split("Error: ")[1].split())
