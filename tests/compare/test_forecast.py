"""How long a comparison will take: by measured steps before a run is done, then by the runs themselves."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from sidestep.compare.files import comparison_from
from sidestep.compare.forecast import Forecast, Run, step_pace
from sidestep.compare.records import Record
from sidestep.compare.runs import run
from small_tasks import reviews, text_backbone, write

READ, FULL, PROBE = (Run(contender=name, work=work) for name, work in (("read", 10), ("full", 10), ("probe", 5)))


def test_nothing_measured_nothing_told() -> None:
    forecast = Forecast({READ: 2}, {})
    assert (forecast.runs, forecast.seconds) == (2, None)
    forecast.done(READ)  # it was in the results file
    assert (forecast.runs, forecast.seconds) == (1, None)


def test_before_a_run_the_steps_tell() -> None:
    forecast = Forecast({READ: 2, FULL: 1, PROBE: 4}, {"read": 1.0, "full": 3.0, "probe": 0.5})
    assert forecast.seconds == 2 * 10 * 1 + 10 * 3 + 4 * 5 * 0.5
    assert Forecast({READ: 2}, {"read": 1.0}, steps_tell=False).seconds is None


def test_runs_that_are_done_tell_better_than_steps() -> None:
    forecast = Forecast({READ: 3, FULL: 2}, {"read": 1.0, "full": 3.0})
    forecast.done(READ, 40.0)  # four times as long as by its steps, and so are the others expected to be
    assert forecast.seconds == 2 * 10 * 4 + 2 * 10 * 12
    forecast.done(FULL, 200.0)
    assert forecast.seconds == 2 * 10 * 4 + 1 * 10 * 20
    forecast.done(READ)
    forecast.done(FULL)
    assert forecast.seconds == 1 * 10 * 4


def test_without_steps_other_contenders_tell() -> None:
    forecast = Forecast({READ: 2, PROBE: 1}, {})
    forecast.done(READ, 30.0)
    assert forecast.seconds == 1 * 10 * 3 + 1 * 5 * 3


def test_a_contender_whose_step_could_not_be_measured_is_as_the_others() -> None:
    forecast = Forecast({READ: 1, FULL: 1, PROBE: 1}, {"read": 2.0, "probe": 2.0})
    assert forecast.seconds == 10 * 2 + 10 * 2 + 5 * 2


def rows(**parts: Dataset) -> Any:
    return SimpleNamespace(**parts)


def test_work_is_tokens_or_images() -> None:
    texts = Dataset.from_dict({"length": [3, 4]}), Dataset.from_dict({"length": [5]})
    images = Dataset.from_dict({"labels": [0, 1]}), Dataset.from_dict({"labels": [1]})
    assert Run.of("read", rows(train=texts[0], dev=texts[1]), 2).work == 2 * (3 * 7 + 5)
    assert Run.of("read", rows(train=images[0], dev=images[1]), 2).work == 2 * (3 * 2 + 1)


@pytest.mark.parametrize(("length", "expected"), [(16, 0.1 / (3 * 4 * 16)), (None, 0.1 / (3 * 4))])
def test_a_step_as_a_pace(length: int | None, expected: float) -> None:
    cost = {"contender": "read", "batch": 4, "length": length}
    measured = {"step_seconds": {"median": 0.1}}
    assert step_pace(Record.of("cost", cost, measured=measured)) == pytest.approx(expected)
    assert step_pace(Record.of("cost", cost, status="failed", reason="broken")) is None
    assert step_pace(Record.of("cost", cost, measured={"step_seconds": None})) is None


def test_a_comparison_tells_what_is_left(tmp_path: Path) -> None:
    """Before the first run by the steps, after each by the runs; of runs that are there already nothing is said."""
    text_backbone(tmp_path / "bert")
    write(tmp_path / "rows.csv", reviews(24))
    values = {
        "backbone": [{"model": "bert"}],
        "task": [{"train": "rows.csv", "text": "text"}],
        "contender": [{"method": "probe", "rates": [0.01]}, {"method": "bitfit", "rates": [0.01]}],
        "seeds": [0],
        "epochs": 1,
        "costs": {"batch": 4, "length": 8, "repeats": 1, "warmup": 0},
    }
    said: list[str] = []
    run(comparison_from(values, tmp_path, "the test"), tmp_path / "out.jsonl", tell=said.append)
    first, one, two = said[1:]
    time = r"(less than|about) \d+ (s|min)"
    assert re.fullmatch(rf"bert: 2 runs, {time} by the measured steps", first)
    assert re.fullmatch(rf"\[1/2\] .* s\); {time} left", one)
    assert two.startswith("[2/2] ")
    assert "left" not in two
    said.clear()
    more = comparison_from({**values, "seeds": [0, 1]}, tmp_path, "the test")
    run(more, tmp_path / "out.jsonl", tell=said.append)
    assert re.fullmatch(rf"bert: 2 runs, {time} by the measured steps", said[0])
    assert [line.partition(" ")[0] for line in said[1:]] == ["[3/4]", "[4/4]"]
