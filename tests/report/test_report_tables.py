from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sample

from sidestep.compare.records import Record
from sidestep.report.estimates import estimate
from sidestep.report.load import load
from sidestep.report.markdown import markdown
from sidestep.report.ratios import in_short, not_won, plan_table, ratio_table
from sidestep.report.rows import Results, Task
from sidestep.report.tables import Cell, Table, main_table, score_text, significant, unmeasured, without


def loaded(path: Path, lines: Sequence[Record]) -> Results:
    return load([sample.write(path / "results.jsonl", lines)])


def cells(table: Table, contender: str, backbone: str = "") -> dict[str, Cell]:
    line = next(
        line for line in table.lines if line.row.contender == contender and line.group.backbone.startswith(backbone)
    )
    return dict(zip([column.name for column in table.columns], line.cells, strict=True))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00091, "0.0009"),
        (0.0478, "0.0478"),
        (9.99, "9.99"),
        (74.66, "74.7"),
        (1500.2, "1,500"),
        (-0.5, "-0.500"),
    ],
)
def test_three_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text


def test_scores_are_percent_unless_less_is_better() -> None:
    found = estimate([0.7, 0.8])
    assert score_text(found, Task(name="a", metric="accuracy")) == "75.0 ± 63.5"
    assert score_text(found, Task(name="a", metric="mse")) == "0.750 ± 0.635"
    assert score_text(estimate([-0.031]), None) == "−3.1"


def test_the_table_shows_what_was_measured(tmp_path: Path) -> None:
    table = main_table(loaded(tmp_path, [*sample.study(), *sample.on_gpu()]))
    read = cells(table, "read", "all-MiniLM")
    assert read["parameters"].text == "248,066"
    assert read["kept"].text == "48.1"
    assert (read["step"].text, read["step"].small) == ("0.980", "0.961–1.01")
    assert read["forward"].value == pytest.approx(2.65 * 0.37 / 0.66)
    assert read["seeds"].text == "3"
    assert read["energy"].text == "not measured"
    assert read["energy"].value is None
    assert cells(table, "read", "BERT")["energy"].small == "nvml"
    assert cells(table, "lora+checkpoint")["task rte"].tone == "shared"


def test_what_is_missing_is_not_guessed(tmp_path: Path) -> None:
    results = loaded(tmp_path, sample.troubled())
    table = main_table(results)
    assert "energy" not in [column.name for column in table.columns]
    assert unmeasured(results) == ["energy"]
    dtl = cells(table, "dtl")
    assert [dtl[name].value for name in ("peak", "resident", "step", "forward", "flops")] == [None] * 5
    full = cells(table, "full")
    assert full["task drift"].text == "failed"
    assert full["average"].small == "without drift"
    assert cells(table, "read")["task cr"].small == "1 seed"
    assert cells(table, "probe")["kept"].marks == ("torch 2.14.0, elsewhere 2.15.0",)


def test_times_of_another_batch_say_so(tmp_path: Path) -> None:
    read = cells(main_table(loaded(tmp_path, [sample.cost("b", "read", settings={"timed_batch": 4})])), "read")
    assert (read["step"].small, read["forward"].small) == ("0.961–1.01, batch 4", "batch 4")


def test_ratios_are_over_each_rival_and_losses_are_said(tmp_path: Path) -> None:
    results = loaded(tmp_path, sample.study())
    dtl = cells(ratio_table(results), "dtl")
    assert dtl["kept: lora"].value == pytest.approx(0.31 / 0.74)
    assert dtl["kept: lora"].tone == "win"
    assert dtl["kept: lora+checkpoint"].text == "2.82×"
    assert dtl["kept: lora+checkpoint"].tone == "loss"
    assert "score: lora+checkpoint" not in dtl
    assert [line.row.contender for line in ratio_table(results).lines] == ["read", "read-32", "dtl"]
    (said,) = (said for said in not_won(results) if said.startswith("dtl"))
    assert "2.82× the bytes kept of lora+checkpoint" in said
    assert "the step time of" not in said


def test_a_tie_is_no_win(tmp_path: Path) -> None:
    kept = {"kept_bytes": 1000, "peak_bytes": None, "step_seconds": None}
    lines = [sample.cost("b", name, measured=kept) for name in ("read", "lora")]
    results = loaded(tmp_path, lines)
    assert cells(ratio_table(results), "read")["kept: lora"].tone == "tie"
    assert not_won(results) == ["read on b: about the same bytes kept as lora."]


def test_in_short_names_the_best_scoring_method(tmp_path: Path) -> None:
    (said,) = in_short(loaded(tmp_path, sample.study()))
    assert said.startswith("all-MiniLM-L6-v2: read keeps 0.059× the bytes and 0.53× the step time of lora, 0.40×")
    assert "it scores 76.0 ± 0.5, lora 76.4 ± 1.1, full 77.1 ± 0.7." in said


def test_without_rivals_there_are_no_ratios(tmp_path: Path) -> None:
    results = loaded(tmp_path, [sample.cost("b", "read"), sample.cost("b", "probe")])
    assert ratio_table(results).lines == ()
    assert in_short(results) == []


def test_the_planners_error_beyond_its_promise_is_a_loss(tmp_path: Path) -> None:
    table = plan_table(loaded(tmp_path, sample.study()))
    assert (cells(table, "read")["error"].text, cells(table, "read")["error"].tone) == ("+4.0", "win")
    assert (cells(table, "dora")["error"].text, cells(table, "dora")["error"].tone) == ("−13.0", "loss")


def test_columns_can_be_left_out(tmp_path: Path) -> None:
    table = without(main_table(loaded(tmp_path, sample.study())), ["backbone", "kept"])
    assert not {"backbone", "kept"} & {column.name for column in table.columns}
    assert all(len(line.cells) == len(table.columns) for line in table.lines)


def test_markdown_has_the_command_the_tables_and_the_notes(tmp_path: Path) -> None:
    lines = [*sample.study(), *sample.troubled()]
    results = load([sample.write(tmp_path / "results.jsonl", lines, broken=True)])
    text = markdown(results, command="sidestep report results.jsonl --markdown")
    assert text.startswith("`sidestep report results.jsonl --markdown` (Sample CPU, 16 cores; 2026-11-20)")
    assert "| all-MiniLM-L6-v2 | read | 76.0 ± 0.5 | 3 |" in text
    assert "2.82× (loss)" in text
    assert "- bitfit on T5-base: refused (cost): bitfit cannot work on T5Model: it has no bias vectors" in text
    assert "torch 2.14.0, elsewhere 2.15.0" in text
    assert "1 broken line was skipped" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(tables) == 4
    assert all(len({line.count(" | ") for line in table}) == 1 for table in tables)


def test_a_planned_peak_stands_in_for_one_that_was_not_measured(tmp_path: Path) -> None:
    lines = [line for line in sample.study() if line.kind == "cost" and line.status == "ok"]
    measured = ratio_table(loaded(tmp_path, lines))
    assert cells(measured, "read")["peak: lora"].small == ""
    unknown = [replace(line, measured={**line.measured, "peak_bytes": None}) for line in lines if line.measured]
    planned = ratio_table(loaded(tmp_path, unknown))
    read, lora = (next(line.measured for line in unknown if line.settings["contender"] == n) for n in ("read", "lora"))
    found = cells(planned, "read")["peak: lora"]
    assert found.small == "planned"
    parts = ("planned_peak_bytes", "optimizer_bytes")
    assert found.value == pytest.approx(sum(read[part] for part in parts) / sum(lora[part] for part in parts))
