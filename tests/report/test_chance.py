from __future__ import annotations

from pathlib import Path

import pytest
import sample

from sidestep.report.chance import AT, BELOW, beside
from sidestep.report.estimates import Estimate
from sidestep.report.load import load
from sidestep.report.markdown import markdown
from sidestep.report.scatter import score_figure
from sidestep.report.tables import main_table, without


@pytest.mark.parametrize(
    ("mean", "half", "greater", "said"),
    [
        (0.75, 0.04, True, ""),
        (0.75, 0.05, True, AT),
        (0.65, 0.06, True, AT),
        (0.65, 0.04, True, BELOW),
        (0.70, 0.0, True, AT),
        (0.65, 0.04, False, ""),
        (0.75, 0.04, False, BELOW),
        (0.71, None, True, ""),
        (0.70, None, True, AT),
        (0.10, None, True, AT),
    ],
)
def test_a_score_is_at_chance_if_its_interval_reaches_one_answer(
    mean: float, half: float | None, greater: bool, said: str
) -> None:
    assert beside(Estimate(mean=mean, half=half, count=2), 0.70, greater=greater) == said
    assert beside(Estimate(mean=mean, half=half, count=2), None, greater=greater) == ""


@pytest.fixture
def lines() -> list[sample.Record]:
    """Two contenders on a task whose one answer for all is 0.70: read is at chance, full is better."""
    answer = {"constant": {"accuracy": 0.70}}
    values = {"read": (0.69, 0.71), "full": (0.80, 0.802)}
    found = [
        sample.score("b", name, "rte", seed, measured={**answer, "score": value})
        for name, scores in values.items()
        for seed, value in enumerate(scores)
    ]
    return [*found, sample.cost("b", "read"), sample.cost("b", "full")]


def test_tables_mark_chance_and_end_with_one_answer(tmp_path: Path, lines: list[sample.Record]) -> None:
    results = load([sample.write(tmp_path / "results.jsonl", lines)])
    table = main_table(results)
    place = [column.name for column in table.columns].index("task rte")
    assert {line.row.contender: line.cells[place].small for line in table.lines} == {"read": AT, "full": ""}
    (foot,) = table.foot
    assert (foot.cells[1].text, foot.cells[place].text) == ("one answer for all", "70.0")
    assert len(without(table, ["backbone"]).foot[0].cells) == len(table.columns) - 1
    text = markdown(results, command="sidestep report")
    assert "| read | 70.0 ± 12.7 (at chance) |" in text.replace("| 2 ", "")
    assert "| one answer for all |" in text


def test_the_picture_has_the_line_of_one_answer(tmp_path: Path, lines: list[sample.Record]) -> None:
    group = load([sample.write(tmp_path / "results.jsonl", lines)]).groups[0]
    figure = score_figure(group, "peak", ["rte"])
    assert figure is not None
    assert {row["constant"] for row in figure.rows} == {70.0}
    assert "one answer for all" in figure.columns


def test_results_of_before_have_neither(tmp_path: Path) -> None:
    group_lines = sample.study("b", ("read", "full"), tasks=("rte",))
    results = load([sample.write(tmp_path / "results.jsonl", group_lines)])
    assert main_table(results).foot == ()
    assert "(at chance)" not in markdown(results, command="c")
    figure = score_figure(results.groups[0], "peak", ["rte"])
    assert figure is not None
    assert "one answer for all" not in figure.columns
