from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import sample

from sidestep.compare.spec import QUICK_ROWS
from sidestep.report.load import load
from sidestep.report.markdown import markdown
from sidestep.report.quick import FEW, noise_of, quick_line
from sidestep.report.rows import Results


def loaded(path: Path, lines: Sequence[sample.Record]) -> Results:
    return load([sample.write(path / "results.jsonl", lines)])


def runs(task: str, rows: Any, *, score: float = 0.8, seeds: int = 1, metric: str = "accuracy") -> list[sample.Record]:
    measured = {"score": score, "metric": metric}
    return [
        sample.score("b", name, task, seed, settings={"part_rows": rows}, measured=measured)
        for name in ("read", "lora")
        for seed in range(seeds)
    ]


def test_few_rows_are_those_of_a_quick_comparison() -> None:
    assert FEW == QUICK_ROWS


def test_noise_is_two_binomial_standard_errors() -> None:
    assert noise_of(0.8, 100) == pytest.approx(2 * 0.04)
    assert noise_of(0.5, 25) == pytest.approx(0.2)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2, 1.7])
def test_noise_is_at_least_one_row(share: float) -> None:
    assert noise_of(share, 50) == pytest.approx(1 / 50)


def test_a_quick_run_says_rows_and_noise(tmp_path: Path) -> None:
    results = loaded(tmp_path, runs("rte", 100))
    said = quick_line(results)
    assert said.startswith("Quick: 100 dev rows of rte. Differences under 8.0 points are noise.")
    assert "2 √(p(1 − p)/n)" in said
    assert "Quick: 100 dev rows of rte." in markdown(results, command="c")


def test_of_several_tasks_each_has_its_own(tmp_path: Path) -> None:
    said = quick_line(loaded(tmp_path, [*runs("rte", 100), *runs("cr", 25, score=0.5), *runs("big", 2000)]))
    assert said.startswith("Quick: few dev rows. Differences under these are noise: rte 8.0 points (100 dev rows); cr")
    assert "cr 20.0 points (25 dev rows)." in said
    assert "big" not in said


def test_a_metric_that_is_no_share_of_rows_has_no_such_noise(tmp_path: Path) -> None:
    said = quick_line(loaded(tmp_path, runs("sts-b", 100, metric="pearson")))
    assert said == "Quick: No such noise is known where the metric is no share of rows: sts-b (100 dev rows, pearson)."


def test_few_rows_of_several_seeds_are_not_called_quick(tmp_path: Path) -> None:
    assert quick_line(loaded(tmp_path, runs("rte", 100, seeds=2))).startswith("Coarse: 100 dev rows of rte.")


@pytest.mark.parametrize("rows", [None, 0, -3, "many", 1.5, True, [], FEW + 1])
def test_many_rows_or_unknown_ones_say_nothing(tmp_path: Path, rows: Any) -> None:
    assert quick_line(loaded(tmp_path, runs("rte", rows))) == ""


def test_costs_alone_say_nothing(tmp_path: Path) -> None:
    assert quick_line(loaded(tmp_path, [sample.cost("b", "read")])) == ""
