"""`--plugin`: a method from a file, through train, eval, plan and the list of methods."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import own_process
from small_tasks import reviews, text_backbone, write

OWN = Path(__file__).parents[2] / "examples" / "own_method.py"


def sidestep(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because a registered method stays."""
    return own_process.run("sidestep.cli", *arguments)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plugin")
    text_backbone(folder / "bert")
    write(folder / "rows.csv", reviews(24, 0))
    return folder


def test_a_method_of_a_file_is_trained_and_its_task_needs_the_file(place: Path) -> None:
    rows, task = place / "rows.csv", place / "task"
    how = ("--method", "sum", "--set", "rank=2", "--text", "text", "--epochs", 1, "--quiet", "--output", task)
    trained = sidestep("train", "--backbone", place / "bert", "--train", rows, "--dev", rows, *how, "--plugin", OWN)
    assert trained.returncode == 0, trained.stderr
    assert "sum on BertModel" in trained.stderr
    scored = sidestep("--plugin", OWN, "eval", task, "--data", rows)
    assert scored.returncode == 0, scored.stderr
    without = sidestep("eval", task, "--data", rows)
    assert without.returncode == 2
    assert "unknown method 'sum'" in without.stderr
    assert "--plugin FILE" in without.stderr


def test_it_is_listed_beside_the_others() -> None:
    assert "sum" in sidestep("methods", f"--plugin={OWN}").stdout


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [("own.py", None, "is not there"), ("own.txt", "", "is no Python file"), ("own.py", "1 / 0", "ZeroDivisionError")],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, text: str | None, told: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    found = sidestep("methods", "--plugin", tmp_path / name)
    assert found.returncode == 2
    assert told in " ".join(found.stderr.replace("│", " ").split())
    assert "Traceback" not in found.stderr
