"""The answer in words, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import sample
from test_choice import PEAKS, cost, group_of, runs

from sidestep.report.load import load
from sidestep.report.markdown import markdown
from sidestep.report.verdict import BY_TASK, Verdict, by_task, first_verdicts, listed, verdicts

COSTS = [cost(name, peak) for name, peak in PEAKS.items()]


def said(folder: Path, lines: Sequence[sample.Record]) -> Verdict:
    return verdicts(group_of(folder, lines))[0]


def two(read: Sequence[float], full: Sequence[float], **changes: Any) -> list[sample.Record]:
    return [*runs("read", "rte", read, **dict(changes)), *runs("full", "rte", full, **dict(changes))]


def test_the_cheapest_within_noise(tmp_path: Path) -> None:
    found = said(tmp_path, [*two([0.70, 0.76], [0.73, 0.76]), *COSTS])
    assert found.headline == (
        "Take read: on rte it scores 73.0 ± 38.1 with 100 MiB of peak memory, the least within noise of the best. "
        "full scores 74.5 ± 19.1 with 900 MiB of peak memory, 1.5 ± 19.1 points ahead."
    )


def test_the_best_itself_and_what_less_memory_costs(tmp_path: Path) -> None:
    found = said(tmp_path, [*two([0.60, 0.62], [0.75, 0.77]), *COSTS])
    assert found.headline == (
        "Take full: it scores best on rte, 76.0 ± 12.7 with 900 MiB of peak memory. "
        "No contender within noise of it needs less."
    )
    assert found.remarks[0] == "With less memory: read (100 MiB) 15.0 ± 0.0 points behind the best."
    cheapest = said(tmp_path, [*two([0.75, 0.77], [0.60, 0.62]), *COSTS])
    assert cheapest.headline.endswith("with 100 MiB of peak memory. No contender needs less.")


def test_with_one_seed_noise_is_unknown(tmp_path: Path) -> None:
    found = said(tmp_path, [*two([0.70], [0.76]), *COSTS])
    assert found.headline == (
        "full scores best on rte: 76.0 with 900 MiB of peak memory. "
        "With one seed noise is unknown, so nothing cheaper can be called as good."
    )
    assert found.remarks[0] == "With less memory: read (100 MiB) 70.0."
    others = said(tmp_path, [*two([0.70], [0.76, 0.77]), *COSTS])
    assert "With one seed of all others noise is unknown" in others.headline


def test_one_contender(tmp_path: Path) -> None:
    found = said(tmp_path, [*runs("read", "rte", [0.7, 0.72]), *COSTS])
    assert found.headline == (
        "Only read has a score on rte: 71.0 ± 12.7 with 100 MiB of peak memory. There is nothing to compare it with."
    )
    assert found.remarks[0] == "Not compared: lora, full (no score on rte)."


def test_without_memory_figures(tmp_path: Path) -> None:
    found = said(tmp_path, two([0.70, 0.76], [0.73, 0.76]))
    assert found.headline == (
        "full scores best on rte: 74.5 ± 19.1 (memory not measured). As good within noise: read. "
        "Their memory was not measured, so the cheapest is unknown."
    )
    alone = said(tmp_path, two([0.60, 0.61], [0.73, 0.74]))
    assert alone.headline.endswith("(memory not measured). Its memory was not measured, so the cheapest is unknown.")


def test_a_contender_without_a_memory_figure_is_named(tmp_path: Path) -> None:
    found = said(tmp_path, [*two([0.70, 0.76], [0.73, 0.76]), *runs("dtl", "rte", [0.74, 0.77]), *COSTS])
    assert found.headline.startswith("Take read:")
    assert "dtl scores 75.5 ± 19.1 (memory not measured), 2.5 ± 19.1 points ahead." in found.headline
    assert "Without a memory figure, and so never the cheapest: dtl." in found.remarks


def test_the_kind_of_memory_is_said(tmp_path: Path) -> None:
    kept = [cost(name, None, kept_bytes=size) for name, size in (("read", 2**20), ("full", 2**21))]
    planned = [cost(name, None, planned_peak_bytes=2**20) for name in ("read", "full")]
    scores = two([0.70, 0.76], [0.73, 0.76])
    assert "with 1.00 MiB of bytes kept for backward" in said(tmp_path, [*scores, *kept]).headline
    assert "with 1.00 MiB of planned peak memory" in said(tmp_path, [*scores, *planned]).headline


def test_nothing_is_named_where_all_are_at_chance(tmp_path: Path) -> None:
    answer = {"constant": {"accuracy": 0.70}}
    found = said(tmp_path, [*two([0.65, 0.80], [0.60, 0.81], measured=answer), *COSTS])
    assert found.headline == "Take none on rte: no score can be told from one answer for all rows (70.0)."
    better = said(tmp_path, [*two([0.65, 0.80], [0.80, 0.81], measured=answer), *COSTS])
    assert better.headline.startswith("Take full:")
    assert "At chance or below: read." in better.remarks
    assert "One answer for all rows scores 70.0." in better.remarks


def test_errors_are_not_in_points(tmp_path: Path) -> None:
    found = said(tmp_path, [*two([1.3, 1.31], [1.1, 1.2], measured={"metric": "mse"}), *COSTS])
    assert "1.150 ± 0.635 with 900 MiB" in found.headline
    assert "0.155 ± 0.572 ahead" in found.headline


def test_failed_runs_and_different_metrics_are_said(tmp_path: Path) -> None:
    found = said(tmp_path, sample.troubled())
    assert "on average over 2 tasks" in found.headline
    assert "Not compared: dtl, probe (no score on cr, drift). full (failed on drift)." in found.remarks
    assert "The average goes over different metrics: accuracy, pearson." in found.remarks


def test_a_contender_with_too_few_seeds_is_named(tmp_path: Path) -> None:
    found = said(tmp_path, [*two([0.70, 0.76], [0.73, 0.76]), *runs("lora", "rte", [0.72]), *COSTS])
    assert "Noise is unknown, for want of seeds: lora." in found.remarks


def test_results_of_before_say_that_chance_is_not_known(tmp_path: Path) -> None:
    found = said(tmp_path, [*two([0.70, 0.76], [0.73, 0.76]), *COSTS])
    unknown = "What one answer for all rows scores is not in these results, so scores at chance are not marked."
    assert unknown in found.remarks
    known = said(tmp_path, [*two([0.80, 0.76], [0.83, 0.76], measured={"constant": {"accuracy": 0.1}}), *COSTS])
    assert unknown not in known.remarks


def test_contenders_with_other_settings_are_named(tmp_path: Path) -> None:
    longer = runs("lora", "rte", [0.72, 0.73], settings={"epochs": 10})
    found = said(tmp_path, [*two([0.70, 0.76], [0.73, 0.76]), *longer, *COSTS])
    assert "Made with other settings or versions than the rest, or some seeds left out: lora." in found.remarks


def test_costs_alone_say_what_they_cannot_say(tmp_path: Path) -> None:
    found = said(tmp_path, COSTS)
    assert found.headline == (
        "There are no scores here, so these results cannot say which contender is good enough. "
        "Least peak memory: read 100 MiB, lora 500 MiB, full 900 MiB."
    )
    nothing = said(tmp_path, [cost("read", None)])
    assert nothing.headline.endswith("No memory was measured either.")


def test_each_backbone_has_its_answer_in_markdown_with_the_rule(tmp_path: Path) -> None:
    lines = [*sample.study("one"), *sample.study("two"), *sample.on_gpu()]
    text = markdown(load([sample.write(tmp_path / "r.jsonl", lines)]), command="sidestep report")
    answers = text.split("\n\n")[1].splitlines()
    assert [line.split(":")[0] for line in answers] == ["- one", "- two", "- BERT-large", "- How this is chosen"]
    alone = markdown(load([sample.write(tmp_path / "r.jsonl", sample.study("one"))]), command="sidestep report")
    assert alone.split("\n\n")[1].startswith("- Take ")


def test_only_failures_are_no_answer(tmp_path: Path) -> None:
    failed = [replace(line, status="failed", reason="no", measured=None) for line in two([0.7], [0.8])]
    text = markdown(load([sample.write(tmp_path / "r.jsonl", failed)]), command="sidestep report")
    assert "Take" not in text


def test_task_by_task_has_a_line_a_task(tmp_path: Path) -> None:
    found = verdicts(group_of(tmp_path, sample.study()))
    lines = by_task(found)
    assert [line[0] for line in lines] == list(sample.TASKS)
    assert all(len(line) == len(BY_TASK) for line in lines)
    assert by_task(verdicts(group_of(tmp_path, [*two([0.7], [0.8]), *COSTS]))) == []


def test_without_an_average_each_task_has_its_answer(tmp_path: Path) -> None:
    group = group_of(tmp_path, [*runs("read", "rte", [0.7, 0.71]), *runs("lora", "cr", [0.8, 0.81])])
    assert [verdict.about for verdict in first_verdicts(group)] == ["rte", "cr"]


def test_names_with_commas_are_told_apart() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(["dtl+, class token", "b"]) == "dtl+, class token; b"
