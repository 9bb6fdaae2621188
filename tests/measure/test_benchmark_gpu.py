"""The script for a card that is lent for minutes: all of it runs on a CPU, and no fault of a part stops the next."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
import sidestep as ss
from gpu_cases import CONTENDERS, SCALES, SMALL
from test_bare_imports import ABSENT

BENCHMARKS = Path(gpu.__file__).parent
#: What PEFT and bitsandbytes need besides is left in place.
PLAIN_IMAGE = ABSENT.replace('"accelerate", ', "")
SCRIPT = """
import runpy
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(tmp_path: Path) -> gpu.Run:
    return gpu.Run(torch.device("cpu"), True, tmp_path / "gpu.json", {"about": {}, "parts": {}})


def test_every_part_of_the_script_runs_on_a_plain_image_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    given = ["--device", "cpu", "--small", "--minutes", "10", "--output", path]
    line = [sys.executable, "-c", PLAIN_IMAGE + SCRIPT, BENCHMARKS, BENCHMARKS / "gpu.py", *given]
    seen, errors = [], tmp_path / "errors.txt"
    with (
        errors.open("w") as stream,
        subprocess.Popen(line, stdout=subprocess.PIPE, stderr=stream, text=True) as process,
    ):
        assert process.stdout is not None
        for _ in process.stdout:  # after each part
            content = json.loads(path.read_text())
            seen.append([name for name, part in content["parts"].items() if part["rows"]])
    assert process.returncode == 0, errors.read_text()
    names = list(gpu.PARTS)
    assert all(set(found) >= set(names[: index + 1]) for index, found in enumerate(seen[:-1]))
    parts = content["parts"]
    assert list(parts) == names
    assert {part["status"] for part in parts.values()} == {"ok"}
    assert all(row["status"] == "ok" and row["holds"] for row in parts["laws"]["rows"])
    for name in SCALES:
        rows = {row["contender"]: row for row in parts[name]["rows"]}
        assert list(rows) == list(SMALL)
        assert all(row["status"] in ("ok", "not installed") for row in rows.values()), rows
        assert all(row["peak_bytes"] > 0 and row["step_seconds"]["median"] > 0 for row in list(rows.values())[:3])
        assert rows["lora+checkpoint+host"]["host_bytes"] > 0
    planned = [row for row in parts["plans"]["rows"] if row["status"] == "ok"]
    assert {row["backbone"] for row in planned} == set(SCALES)
    # what is the same here too: sizes of a CPU's kernels differ a little from what a plan sees
    assert all(0.5 < row["planned_over_measured"] < 2 for row in planned)
    assert all(f"**{name}** (ok)" in gpu.tables(content) for name in SCALES)
    assert content["about"]["versions"]["sidestep"] == ss.__version__


@pytest.mark.parametrize("name", SCALES)
def test_every_contender_is_for_a_backbone_or_refused_by_name(name: str, tmp_path: Path) -> None:
    stage, refused = gpu.Stage(run(tmp_path), SCALES[name]), set()
    for label, one in CONTENDERS.items():
        try:
            if not one.quantised:
                with stage.attached(one) as model:
                    assert model.training != one.bare
        except ss.UnsupportedBackbone:
            refused.add(label)
    other = "dtl" if SCALES[name].reads == "images" else "dtl+"
    assert refused == {other, *(["synqt"] if name in ("llama-1b", "t5-base") else [])}


def test_a_part_that_fails_or_is_late_is_noted_and_the_next_one_runs(tmp_path: Path) -> None:
    def fails(run: gpu.Run, rows: list[Any]) -> None:
        rows.append({"found": 1})
        raise RuntimeError("no such kernel\nand a long text")

    def sleeps(run: gpu.Run, rows: list[Any]) -> None:
        time.sleep(60)  # stands for a row that is stuck: the timer ends it after a second

    one, now = run(tmp_path), time.monotonic()
    before = signal.signal(signal.SIGALRM, gpu._late)
    try:
        one.part("fails", fails, now + 60, 1)
        one.part("over", fails, now - 1, 1)
        one.part("sleeps", sleeps, now + 1, 0.1)
        one.part("works", lambda run, rows: rows.append({"found": 2}), now + 60, 1)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - now < 30
    parts = json.loads(one.path.read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "fails": "failed",
        "over": gpu.LEFT_OUT,
        "sleeps": gpu.LEFT_OUT,
        "works": "ok",
    }
    assert parts["fails"]["reason"] == "no such kernel"
    assert [len(part["rows"]) for part in parts.values()] == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("tried to allocate 80 GiB"), "out of memory"),
        (ss.UnsupportedBackbone("it has no tokens"), "refused"),
        (ModuleNotFoundError("No module named 'bitsandbytes'"), "not installed"),
        (RuntimeError("no kernel"), "failed"),
    ],
)
def test_a_row_without_numbers_says_why(error: Exception, status: str, tmp_path: Path) -> None:
    def work() -> Any:
        raise error

    row: dict[str, Any] = {}
    run(tmp_path).guarded(row, work)
    assert row["status"] == status
    assert str(error) in row["reason"]
