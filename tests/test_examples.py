"""Every example is short, runs offline, and leaves nothing behind where it is run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

NEEDS = {"chat_with_trl": "trl"}
"""Packages that no extra but the tests' own installs."""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_offline(example: Path, tmp_path: Path) -> None:
    pytest.importorskip(NEEDS.get(example.stem, "sidestep"))
    here, scratch = tmp_path / "here", tmp_path / "scratch"
    here.mkdir()
    scratch.mkdir()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TMPDIR": str(scratch)}
    run = subprocess.run(
        [sys.executable, str(example)], cwd=here, env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert not any(here.iterdir())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(example: Path) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) < 60


def test_there_are_examples() -> None:
    assert EXAMPLES
