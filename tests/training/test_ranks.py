"""Two processes compute what one does: losses, gradients, scores, files. One that ends ends the other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import rank_cases
import torch
from typer.testing import CliRunner

import own_process
from sidestep import ranks
from sidestep.cli import app

ROUNDING = 1e-6
"""How far sums in another order may be apart, relative to the largest entry."""
Pair = tuple[Path, "subprocess.Popen[str]"]
Found = tuple[Path, dict[str, Any], dict[str, Any]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two processes that run `rank_cases`, and their folder. They are launched once."""
    folder, tests = tmp_path_factory.mktemp("ranks"), Path(__file__).parent
    rank_cases.backbones(folder)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(tests), str(tests.parent), *sys.path]
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", ranks.TIMEOUT: "5m"}
    with (folder / "said").open("w") as said:
        command = [*launcher, rank_cases.__file__, str(folder)]
        process = subprocess.Popen(command, env={**os.environ, **own}, stdout=said, stderr=said, text=True)
    yield folder, process
    process.terminate()
    process.wait()


@pytest.fixture(scope="module")
def found(pair: Pair) -> Found:
    """What one process and two have computed."""
    folder, _ = pair
    rank_cases.run_all(folder)
    one, two = (folder / f"of {count}" / rank_cases.FOUND for count in (1, 2))
    wait_for(two.exists, pair)
    return folder, torch.load(one), torch.load(two)


def wait_for(there: Callable[[], object], pair: Pair) -> None:
    """Wait until something is there, while the two run."""
    folder, process = pair
    deadline = time.monotonic() + 600
    while not there():
        assert process.poll() is None, (folder / "said").read_text()[-6000:]
        assert time.monotonic() < deadline, (folder / "said").read_text()[-6000:]
        time.sleep(0.1)


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
    to_fewer = rank_cases.go_on(folder, folder / "of 2" / "resumed" / "handed on")
    for other in (to_fewer, two["taken over"]):
        assert other.keys() == ended.keys()
        for name, value in other.items():
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


def test_one_that_is_killed_ends_the_other(found: Found, pair: Pair) -> None:
    folder, process = pair
    (folder / rank_cases.GO).mkdir()
    wait_for(lambda: list(folder.glob("go/run/checkpoints/checkpoint-*/trainer_state.json")), pair)
    started = psutil.Process(process.pid).children(recursive=True)
    next(one for one in started if one.environ().get("RANK") == "1").kill()
    assert process.wait(timeout=120) != 0
    said = (folder / "said").read_text()
    assert "rank      : 1" in said
    assert "Signal 9 (SIGKILL)" in said
    assert not any(one.is_running() for one in started)


def test_a_command_for_one_process_is_refused_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["bank", "list", "nowhere"])
    assert result.exit_code == 2
    assert "rank 1 of 2: Error: 2 processes were started" in result.output


FAILS = """
import torch
from sidestep import ranks

with ranks.together():
    ranks.agree({"rows": 3})
    if ranks.rank() == 1:
        raise ValueError("row 17 cannot be read")
    ranks.total(torch.ones(1))
"""


def test_who_waits_for_one_that_failed_names_it_and_its_reason(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    group[ranks.TIMEOUT] = "2m"
    both = [
        own_process.start(
            FAILS, said=tmp_path / f"{number}", env={**group, "RANK": str(number), "LOCAL_RANK": str(number)}
        )
        for number in range(2)
    ]
    assert [own_process.ended(process) for process in both] == [1, 1]
    said = [(tmp_path / f"{number}.err").read_text() for number in range(2)]
    assert "RankEnded: rank 1 of 2 ended: ValueError: row 17 cannot be read" in said[0]
    assert "RankEnded" not in said[1]
