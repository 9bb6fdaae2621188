"""Equal time instead of equal trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_compare_runs import comparison, place, silent  # noqa: F401 - a fixture

from sidestep.compare.budget import Search, Spent
from sidestep.compare.records import Record, read
from sidestep.compare.runs import run
from sidestep.messages import duration_of


def record(epochs: int, *, score: float = 0.5, features: dict[str, float] | None = None) -> Record:
    """A run of 2 s besides 3 s an epoch."""
    measured: dict[str, Any] = {"metric": "accuracy", "score": score, "run_seconds": 3.0 * epochs}
    if features is not None:
        measured["features"] = features
    spent = (features or {}).get("spent_seconds", 0.0)
    return Record.of("trial", {}, measured=measured, seconds=2 + 3 * epochs + spent)


def search(budget: float, rates: list[float], share: float = 1.0) -> Search:
    return Search(rates=rates, trial=lambda rate, epochs: record(epochs), share=share, spent=Spent(budget))


@pytest.mark.parametrize("budget", [30, 100, 500, 5000])
@pytest.mark.parametrize("rates", [[1.0], [1.0, 2.0, 3.0]])
def test_trials_and_the_final_run_stay_within_the_time(budget: float, rates: list[float]) -> None:
    one = search(budget, rates, share=1.25)
    found = one.run()
    most = max(epochs for _, epochs in found)
    assert one.spent.seconds == sum(record(epochs).seconds for _, epochs in found)
    assert one.spent.seconds + 2 + 1.25 * 3 * most <= budget


def test_more_time_affords_more_epochs_and_each_rate_is_tried_with_them() -> None:
    rates, most = [1.0, 2.0, 3.0], []
    for budget in (100, 300, 900):
        found = search(budget, rates).run()
        most.append(max(epochs for _, epochs in found))
        assert {rate for rate, epochs in found if epochs == most[-1]} == set(rates)
    assert most == sorted(set(most))


def test_the_first_trial_is_taken_in_any_case_and_is_of_the_middle_rate() -> None:
    assert list(search(0.1, [1.0, 2.0, 3.0]).run()) == [(2.0, 1)]


def test_a_failed_first_trial_ends_the_search() -> None:
    failed = Record.of("trial", {}, status="failed", reason="no", seconds=1.0)
    one = Search(rates=[1.0, 2.0], trial=lambda rate, epochs: failed, share=1.0, spent=Spent(1000))
    assert list(one.run()) == [(2.0, 1)]


def test_the_frozen_pass_is_paid_once_also_by_who_found_it_stored() -> None:
    ran, found = Spent(100), Spent(100)
    ran.charge(record(1, features={"seconds": 20.0, "spent_seconds": 20.5}))
    ran.charge(record(1, features={"seconds": 20.0, "spent_seconds": 0.5}))
    for _ in range(2):
        found.charge(record(1, features={"seconds": 20.0, "spent_seconds": 0.5}))
    assert ran.seconds == found.seconds == 20 + 2 * 5


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), (" 2 m ", 120)])
def test_a_time_is_read(text: str, seconds: float) -> None:
    assert duration_of(text) == seconds


@pytest.mark.parametrize("text", ["", "10", "0s", "ten minutes", "-5m"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no time: write for example 90s"):
        duration_of(text)


def test_contenders_get_equal_time_share_features_and_continue(place: Path, tmp_path: Path) -> None:  # noqa: F811
    own = [
        {"method": "read", "rates": [0.01, 0.1]},
        {"method": "lst", "rates": [0.01]},
        {"method": "lora", "rates": [0.01]},
    ]
    asked = comparison(place, contender=own, seeds=[0], budget="1s", features="ram")
    found = run(asked, tmp_path / "results.jsonl", tell=silent)
    assert all(one.status == "ok" for one in found.records), [one.reason for one in found.records]
    scores = {one.settings["contender"]: one for one in found.records if one.kind == "score"}
    assert scores.keys() == {"read", "lst", "lora"}
    for one in scores.values():
        assert one.settings["budget"] == 1
        assert one.settings["rate"] is None
        assert one.measured is not None
        assert one.measured["epochs"] >= 1
    assert "features" not in (scores["lora"].measured or {})  # it changes the weights, so it runs live
    trials = [one for one in found.records if one.kind == "trial" and one.settings["contender"] == "lst"]
    assert (trials[0].measured or {})["features"]["computed"] == 0  # READ reads the same blocks
    again = run(asked, tmp_path / "results.jsonl", tell=silent)
    assert again.ran == 0
    assert len(read(tmp_path / "results.jsonl")[0]) == len(found.records)


def test_a_head_that_is_solved_has_one_trial() -> None:
    one = search(1000, [1.0, 2.0, 3.0])
    one.solved = True
    assert list(one.run()) == [(2.0, 1)]
