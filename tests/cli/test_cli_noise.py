"""What the commands print is their own: no remark of another package, no bar of `datasets`, notes in plain words."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from sidestep.cli.errors import reporting
from small_tasks import reviews, text_backbone

OWN = (
    r"\w+ on \w+: [\d,]+ parameters are trained",
    r"\d+ training rows, each with one label of neg, pos",
    r"dev: .*",
    r"learning rate .*, seed \d+",
    r"\d+ epochs?.*",
    r"features: .*",
    r"time: .*",
    r"note: .*",
    r"details: .*; curves: .*",
    r"and \d+ smaller ones: see --json",
)
"""The lines that `train` and `plan` write to stderr."""

BOTH = """
import json, sys
from sidestep.cli import app
for arguments in json.loads(sys.argv[1]):
    app(arguments, standalone_mode=False)
"""


@pytest.fixture
def noisy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that logs when it is imported, as those do whose optional parts are not installed."""
    (tmp_path / "noisy.py").write_text(
        "import logging\n"
        "logging.getLogger(__name__).warning('Failed to load a kernel')\n"
        "logging.getLogger(__name__).error('cannot go on')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "noisy", raising=False)


@pytest.mark.parametrize("debug", [False, True])
def test_what_other_packages_log_is_shown_only_if_it_is_an_error(
    noisy: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, debug: bool
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's would take the remark
    with reporting(debug):
        import noisy  # type: ignore[import-not-found]  # noqa: F401
    said = capfd.readouterr().err
    assert "cannot go on" in said
    assert ("Failed to load a kernel" in said) is debug


def test_a_fresh_process_prints_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    """A real one: libraries speak when they are imported. It trains and then plans."""
    backbone = text_backbone(tmp_path / "bert")
    Dataset.from_list(reviews(20)).to_parquet(tmp_path / "rows.parquet")
    given = ["--backbone", str(backbone), "--method", "lora"]
    rows = ["--train", str(tmp_path / "rows.parquet"), "--text", "text", "--output", str(tmp_path / "task")]
    commands = [
        ["train", *given, *rows, "--epochs", "1", "--quiet"],
        ["plan", *given, "--batch", "2", "--length", "8"],
    ]
    line = [sys.executable, "-c", BOTH, json.dumps(commands)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    assert "peak of a step" in done.stdout
    lines = [part for part in re.split(r"[\r\n]+", done.stderr) if part]
    strange = [part for part in lines if not any(re.fullmatch(own, part) for own in OWN)]
    assert not strange
