"""Which contender is named: the rule of noise, of memory and of chance, and odd results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sample

from sidestep.compare.records import Record
from sidestep.report.choice import AVERAGE, Choice, choices, memory_of, picked
from sidestep.report.load import load
from sidestep.report.rows import Group
from sidestep.report.scatter import score_figure

MIB = 2**20
Scores = Mapping[str, Sequence[float]]


def cost(contender: str, peak: float | None, **measured: Any) -> Record:
    """A cost line of which nothing but memory is known, in MiB."""
    bytes_of = {"peak_bytes": None if peak is None else peak * MIB, "optimizer_bytes": 0, "planned_peak_bytes": None}
    return sample.cost("b", contender, measured={**bytes_of, "kept_bytes": None, **measured})


def runs(contender: str, task: str, values: Sequence[float], **changes: Any) -> list[Record]:
    """A run for each seed, 0 and up."""
    measured = {"history": [], **changes.pop("measured", {})}
    return [
        sample.score("b", contender, task, seed, measured={**measured, "score": value}, **changes)
        for seed, value in enumerate(values)
    ]


def group_of(folder: Path, lines: Sequence[Record]) -> Group:
    return load([sample.write(folder / "results.jsonl", lines)]).groups[0]


def chosen(folder: Path, scores: Scores, peaks: Mapping[str, float | None], **changes: Any) -> Choice:
    """The choice on one task, by scores of seeds and peaks in MiB."""
    lines = [line for name, values in scores.items() for line in runs(name, "rte", values, **dict(changes))]
    (choice,) = choices(group_of(folder, lines + [cost(name, peak) for name, peak in peaks.items()]))
    return choice


def pick(choice: Choice) -> str | None:
    return choice.pick.row.contender if choice.pick else None


PEAKS = {"read": 100.0, "lora": 500.0, "full": 900.0}


def test_the_cheapest_within_noise_of_the_best_is_named(tmp_path: Path) -> None:
    choice = chosen(tmp_path, {"read": [0.70, 0.76], "lora": [0.71, 0.75], "full": [0.73, 0.76]}, PEAKS)
    assert choice.best.row.contender == "full"
    assert pick(choice) == "read"


def test_pairing_by_seed_tells_apart_what_intervals_do_not(tmp_path: Path) -> None:
    # seeds differ by far more than contenders, which differ by the same amount at every seed
    choice = chosen(tmp_path, {"read": [0.50, 0.70, 0.90], "full": [0.52, 0.72, 0.921]}, PEAKS)
    read = choice.standings[1]
    assert read.score.high > choice.best.score.low
    assert not read.within
    assert pick(choice) == "full"
    assert [one.row.contender for one in choice.cheaper] == ["read"]


def test_the_best_is_named_if_it_is_the_cheapest(tmp_path: Path) -> None:
    choice = chosen(tmp_path, {"read": [0.80, 0.81], "lora": [0.70, 0.71]}, PEAKS)
    assert pick(choice) == "read"
    assert choice.cheaper == []


def test_of_equal_scores_the_cheaper_is_the_best(tmp_path: Path) -> None:
    choice = chosen(tmp_path, {"lora": [0.76], "read": [0.76], "full": [0.70]}, PEAKS)
    assert choice.best.row.contender == "read"
    assert pick(choice) == "read"


def test_one_seed_makes_nothing_cheaper_as_good(tmp_path: Path) -> None:
    choice = chosen(tmp_path, {"read": [0.7599], "full": [0.76]}, PEAKS)
    assert choice.standings[1].behind is None
    assert pick(choice) == "full"


def test_a_dominated_contender_is_not_named_for_its_wide_interval(tmp_path: Path) -> None:
    # probe is steady, cheaper and better than read; read alone is within noise
    scores = {"read": [0.50, 0.76], "probe": [0.65, 0.65], "full": [0.70, 0.70]}
    choice = chosen(tmp_path, scores, {**PEAKS, "probe": 10.0})
    within = {one.row.contender: one.within for one in choice.standings[1:]}
    assert within == {"probe": False, "read": True}
    assert pick(choice) == "full"


def test_the_pick_lies_on_the_pictures_front(tmp_path: Path) -> None:
    group = group_of(tmp_path, sample.study())
    figure = score_figure(group, memory_of(group), [AVERAGE, *sample.TASKS])
    assert figure is not None
    named = {row["task"]: row["contender"] for row in figure.rows if row["pick"]}
    assert named == picked(group)
    assert set(named) == {AVERAGE, *sample.TASKS}
    assert all(row["front"] for row in figure.rows if row["pick"])


def test_scores_that_are_shared_are_within_noise_of_each_other(tmp_path: Path) -> None:
    lines = [*runs("lora", "rte", [0.7]), *runs("read", "rte", [0.6]), cost("lora", 500), cost("lora+checkpoint", 90)]
    (choice,) = choices(group_of(tmp_path, lines))
    assert pick(choice) == "lora+checkpoint"


def test_less_is_better_for_errors(tmp_path: Path) -> None:
    mse = {"metric": "mse"}
    choice = chosen(tmp_path, {"read": [1.3, 1.4], "full": [1.1, 1.2]}, PEAKS, measured=mse)
    assert (choice.about, choice.best.row.contender, pick(choice)) == ("rte", "full", "full")
    assert choice.standings[1].behind is not None
    assert choice.standings[1].behind.mean == pytest.approx(0.2)


def test_the_average_stands_first_and_errors_stand_alone(tmp_path: Path) -> None:
    found = choices(group_of(tmp_path, sample.troubled()))
    assert [choice.about for choice in found] == [AVERAGE, "cr", "drift", "price"]
    assert found[0].left_out == {
        "dtl": "no score on cr, drift",
        "probe": "no score on cr, drift",
        "full": "failed on drift",
    }


def test_without_a_contender_that_has_all_tasks_each_stands_alone(tmp_path: Path) -> None:
    lines = [*runs("read", "rte", [0.7, 0.71]), *runs("lora", "cr", [0.8, 0.81])]
    assert [choice.about for choice in choices(group_of(tmp_path, lines))] == ["rte", "cr"]


def test_tasks_have_different_metrics_and_seeds(tmp_path: Path) -> None:
    lines = [cost(name, peak) for name, peak in PEAKS.items() if name != "lora"]
    for name, more in (("read", 0.0), ("full", 0.02)):
        lines += runs(name, "rte", [0.6 + more, 0.61 + more, 0.62 + more])
        lines += runs(name, "sts-b", [0.8 + more, 0.81 + more], measured={"metric": "pearson"})
    (average, *_) = choices(group_of(tmp_path, lines))
    behind = average.standings[1].behind
    assert behind is not None
    assert (behind.mean, behind.count) == (pytest.approx(0.02), 5)
    assert pick(average) == "full"


def test_scores_that_nobody_shows_are_no_choice(tmp_path: Path) -> None:
    # the cost line says that lora shows the scores of a contender that has none
    odd = sample.cost("b", "lora", settings={"score_of": "nobody"})
    assert choices(group_of(tmp_path, [odd, *runs("lora", "rte", [0.7, 0.71])])) == []


def test_costs_alone_are_no_choice(tmp_path: Path) -> None:
    assert choices(group_of(tmp_path, [cost("read", 10)])) == []


# --- memory -----------------------------------------------------------------------------------------------


def test_without_memory_figures_nobody_is_the_cheapest(tmp_path: Path) -> None:
    choice = chosen(tmp_path, {"read": [0.70, 0.76], "full": [0.73, 0.76]}, {})
    assert pick(choice) is None
    assert len(choice.within) == 2


def test_the_best_may_have_no_memory_figure(tmp_path: Path) -> None:
    scores = {"dtl": [0.74, 0.77], "read": [0.70, 0.76], "full": [0.73, 0.76]}
    choice = chosen(tmp_path, scores, PEAKS)
    assert choice.best.row.contender == "dtl"
    assert choice.best.memory is None
    assert pick(choice) == "read"


def test_what_is_kept_stands_in_for_a_peak_that_was_not_measured(tmp_path: Path) -> None:
    lines = [cost("read", None, kept_bytes=7), cost("lora", None, kept_bytes=70)]
    lines += [*runs("read", "rte", [0.70, 0.76]), *runs("lora", "rte", [0.71, 0.77])]
    (choice,) = choices(group_of(tmp_path, lines))
    assert choice.memory == "kept"
    assert choice.best.memory == 70


def test_one_peak_among_many_contenders_is_no_measure(tmp_path: Path) -> None:
    lines = [cost(name, None, kept_bytes=7) for name in ("read", "lora", "full")]
    assert memory_of(group_of(tmp_path, [*lines, cost("dtl", 5.0, kept_bytes=7)])) == "kept"
    assert memory_of(group_of(tmp_path, [cost("read", 5.0, kept_bytes=7), lines[1]])) == "peak"


# --- chance -----------------------------------------------------------------------------------------------

ANSWER = {"constant": {"accuracy": 0.70, "f1": 0.8}}


def test_one_at_chance_is_passed_over_while_the_best_is_not(tmp_path: Path) -> None:
    scores = {"read": [0.65, 0.80], "full": [0.76, 0.765]}
    choice = chosen(tmp_path, scores, PEAKS, measured=ANSWER)
    assert choice.standings[1].within
    assert [one.chance for one in choice.standings] == ["", "at chance"]
    assert pick(choice) == "full"
    # without one answer for all, its interval alone would have made it as good
    assert pick(chosen(tmp_path, scores, PEAKS)) == "read"


def test_all_at_chance(tmp_path: Path) -> None:
    choice = chosen(tmp_path, {"read": [0.65, 0.80], "full": [0.60, 0.81]}, PEAKS, measured=ANSWER)
    assert {one.chance for one in choice.standings} == {"at chance"}


def test_one_answer_for_all_of_the_average_needs_every_task(tmp_path: Path) -> None:
    lines = runs("read", "rte", [0.7, 0.71], measured=ANSWER) + runs("read", "cr", [0.7, 0.71])
    assert choices(group_of(tmp_path, lines))[0].constant is None
    lines += runs("lora", "cr", [0.7, 0.71], measured={"constant": {"accuracy": 0.6}})
    assert choices(group_of(tmp_path, lines))[0].constant == pytest.approx(0.65)


def test_a_line_of_before_takes_one_answer_from_a_newer_line_of_the_same_rows(tmp_path: Path) -> None:
    old, new = runs("read", "rte", [0.7, 0.71]), runs("lora", "rte", [0.7, 0.71], measured=ANSWER)
    other = runs("full", "rte", [0.7, 0.71], settings={"data": "other rows"})
    group = group_of(tmp_path, [*old, *new, *other])
    assert {row.contender: row.scores["rte"].constant for row in group.rows} == {"read": 0.7, "lora": 0.7, "full": None}
    assert group.tasks[0].constant == 0.7


def test_different_answers_of_one_task_are_no_line(tmp_path: Path) -> None:
    other = {"constant": {"accuracy": 0.5}}
    lines = runs("read", "rte", [0.8], measured=ANSWER)
    lines += runs("full", "rte", [0.8], settings={"data": "other rows"}, measured=other)
    group = group_of(tmp_path, lines)
    assert group.tasks[0].constant is None
    assert [row.scores["rte"].constant for row in group.rows] == [0.7, 0.5]


@pytest.mark.parametrize("constant", [None, {}, {"f1": 0.5}, {"accuracy": None}])
def test_one_answer_may_be_missing(tmp_path: Path, constant: Any) -> None:
    group = group_of(tmp_path, runs("read", "rte", [0.7], measured={"constant": constant}))
    assert group.tasks[0].constant is None


def test_failed_seeds_do_not_count(tmp_path: Path) -> None:
    lines = [*runs("read", "rte", [0.7, 0.71, 0.72]), *runs("full", "rte", [0.75, 0.76])]
    failed = replace(sample.score("b", "full", "rte", 2), status="failed", reason="no memory", measured=None)
    (choice,) = choices(group_of(tmp_path, [*lines, failed, *(cost(name, peak) for name, peak in PEAKS.items())]))
    behind = choice.standings[1].behind
    assert behind is not None
    assert (behind.count, pick(choice)) == (2, "full")
