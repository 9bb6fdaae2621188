"""Two processes compute what one does: losses, gradients, scores, files. One that ends ends the other."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import rank_cases
import torch
from typer.testing import CliRunner

from sidestep import ranks
from sidestep.cli import app
from small_tasks import reviews, write

ROUNDING = 1e-6
"""How far sums in another order may be apart, relative to the largest entry."""
Found = tuple[Path, dict[str, Any], dict[str, Any]]


def launched(*arguments: str, wait: float | None = None) -> subprocess.Popen[str]:
    """Two processes of this Python."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", ""), *sys.path]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    own |= {} if wait is None else {ranks.TIMEOUT: f"{wait:g}s"}
    return subprocess.Popen(
        [*launcher, *arguments], env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one process and two have computed, in one launch of two."""
    folder = tmp_path_factory.mktemp("ranks")
    rank_cases.backbones(folder)
    pair = launched(str(Path(rank_cases.__file__)), str(folder))
    rank_cases.run_all(folder)
    said, _ = pair.communicate(timeout=600)
    assert pair.returncode == 0, said[-6000:]
    one, two = (torch.load(folder / f"of {count}" / "found.pt") for count in (1, 2))
    return folder, one, two


@pytest.mark.parametrize("name", [*rank_cases.CASES, "retrieval"])
def test_losses_and_gradients_of_every_step_are_those_of_one_process(found: Found, name: str) -> None:
    _, one, two = found
    assert two[name]["losses"] == pytest.approx(one[name]["losses"], rel=ROUNDING)
    for expected, gradients in zip(one[name]["gradients"], two[name]["gradients"], strict=True):
        assert gradients.keys() == expected.keys()
        scale = max(float(gradient.abs().max()) for gradient in expected.values())
        for which, gradient in expected.items():
            assert float((gradients[which] - gradient).abs().max()) <= ROUNDING * scale, which


@pytest.mark.parametrize("name", rank_cases.CASES)
def test_a_checkpoint_holds_the_task_alone_and_scores_count_each_row_once(found: Found, name: str) -> None:
    _, one, two = found
    assert two[name]["wrapped"] == "DistributedDataParallel"
    assert two[name]["bytes"] == one[name]["bytes"]
    assert two[name]["scores"] == pytest.approx(one[name]["scores"], nan_ok=True)


def test_readouts_and_stored_features_are_those_of_one_process(found: Found) -> None:
    _, one, two = found
    for name, value in one["solved"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(two["solved"][name], value, rtol=1e-4, atol=1e-4)  # L-BFGS ends at 1e-6
    # of 27 and 13 rows some are the same text. Each is in the folder once
    stored = two["solved"]["stored"]
    assert len(stored) == len(set(stored))
    assert stored == one["solved"]["stored"]
    for name, value in one["kept"].items():
        torch.testing.assert_close(two["kept"][name], value, rtol=1e-4, atol=1e-5)


def test_rows_are_answered_once_and_in_order(found: Found) -> None:
    _, one, two = found
    for name in ("read", "lm"):
        expected, given = one["answers"][name], two["answers"][name]
        assert given["text"] == expected["text"]
        assert given["prediction"] == expected["prediction"]
        assert two["answers"][f"{name}, scores"] == pytest.approx(one["answers"][f"{name}, scores"])
    assert two["answers"]["read"]["p_pos"] == pytest.approx(one["answers"]["read"]["p_pos"], abs=ROUNDING)


def test_a_run_goes_on_bit_for_bit_and_with_another_number_of_processes_to_rounding(found: Found) -> None:
    folder, one, two = found
    assert one["resumed"]["same"]
    assert two["resumed"]["same"]
    ended = rank_cases.go_on(folder, folder / "of 1" / "resumed" / "handed on")
    for name, value in rank_cases.go_on(folder, folder / "of 2" / "resumed" / "handed on").items():
        # AdamW's steps turn rounding of small gradients into a small share of a step
        torch.testing.assert_close(value, ended[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parts"),
    {
        "data": ("RanksDiffer: the 2 processes", "on rank 1 training rows is 26,", "(rank 0: 27,"),
        "settings": ("on rank 1 learning_rate is 0.002 (rank 0: 0.001)",),
        "shares": ("batch_size=13 with 27 training rows leaves 1 row", "--drop-last"),
        "rows": ("batch_size=1 with 2 processes", "at least 2"),
        "folder": ("seen by 0 is another folder for rank 1 than for rank 0",),
        "each": ("division or modulo by zero",),
    }.items(),
)
def test_what_does_not_fit_is_refused_by_all_before_the_first_step(
    found: Found, name: str, parts: tuple[str, ...]
) -> None:
    said = found[2]["refused"][name]
    for part in parts:
        assert part in said


def arguments_of(folder: Path, output: Path) -> list[str]:
    """A run of the command that takes a while."""
    data = {"--train": write(folder / "train.csv", reviews(64)), "--dev": write(folder / "dev.csv", reviews(12, 1))}
    given = [str(part) for option in data.items() for part in option]
    how = ["--text", "text", "--backbone", str(folder / "bert"), "--output", str(output), "--epochs", "2000"]
    return ["train", *given, *how, "--batch-size", "8", "--patience", "0", "--features", "off", "--quiet"]


def test_one_that_is_killed_ends_the_other(found: Found, tmp_path: Path) -> None:
    folder, output = found[0], tmp_path / "task"
    pair = launched("-m", "sidestep.cli", *arguments_of(folder, output), wait=60)
    try:
        deadline = time.monotonic() + 300
        while not list(output.glob("checkpoints/checkpoint-*/trainer_state.json")):
            assert pair.poll() is None, pair.communicate()[0][-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        started = psutil.Process(pair.pid).children(recursive=True)
        next(process for process in started if process.environ().get("RANK") == "1").kill()
        said, _ = pair.communicate(timeout=120)
    finally:
        pair.kill()
    assert pair.returncode != 0
    assert "rank      : 1" in said
    assert "Signal 9 (SIGKILL)" in said
    assert not any(process.is_running() for process in started)


def test_a_command_for_one_process_is_refused_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["bank", "list", "nowhere"])
    assert result.exit_code == 2
    assert "rank 1 of 2: Error: 2 processes were started" in result.output
