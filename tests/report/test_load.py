from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sample

from sidestep.compare.records import Record
from sidestep.report.load import load
from sidestep.report.rows import Results


def loaded(path: Path, lines: Sequence[Record]) -> Results:
    return load([sample.write(path / "results.jsonl", lines)])


def test_a_study_is_one_group_with_sidesteps_methods_first(tmp_path: Path) -> None:
    (group,) = loaded(tmp_path, sample.study()).groups
    assert [row.contender for row in group.rows] == list(sample.CONTENDERS)
    assert [row.ours for row in group.rows] == [True] * 3 + [False] * 8
    assert [task.name for task in group.tasks] == list(sample.TASKS)
    assert all(score.estimate.count == 3 for row in group.rows for score in row.scores.values())


def test_an_average_goes_over_the_seeds_averages(tmp_path: Path) -> None:
    lines = [
        sample.score("b", "read", task, seed, measured={"score": value})
        for task, values in {"rte": (0.5, 0.6), "cr": (0.9, 0.7)}.items()
        for seed, value in enumerate(values)
    ]
    (group,) = loaded(tmp_path, lines).groups
    average = group.rows[0].average
    assert average is not None
    assert average.mean == pytest.approx(0.675)
    # averages of the seeds are 0.70 and 0.65: half the distance times Student's quantile for one degree of freedom
    assert average.half == pytest.approx(12.706 * 0.025, rel=1e-4)


def test_no_average_where_a_task_is_missing_and_none_over_errors(tmp_path: Path) -> None:
    (group,) = loaded(tmp_path, sample.troubled()).groups
    rows = {row.contender: row for row in group.rows}
    assert [task.name for task in group.averaged] == ["cr", "drift"]
    assert rows["full"].average is None
    assert rows["full"].missing == {"drift": "failed"}
    read = rows["read"].average
    assert read is not None
    # one seed of "cr": only that seed has both tasks
    assert read.count == 1
    assert rows["read"].scores["drift"].estimate.mean == pytest.approx(-0.03)


def test_recomputation_shares_the_scores_of_the_plain_contender(tmp_path: Path) -> None:
    (group,) = loaded(tmp_path, sample.study()).groups
    plain, shared = group.find("lora"), group.find("lora+checkpoint")
    assert plain is not None
    assert shared is not None
    assert (shared.score_of, plain.score_of) == ("lora", None)
    assert shared.average == plain.average
    assert shared.measured("kept_bytes") < plain.measured("kept_bytes")


def test_each_setup_is_a_group_of_its_own(tmp_path: Path) -> None:
    lines = [sample.cost("b", "read"), sample.cost("b", "lora")]
    lines += [sample.cost("b", "read", settings={"batch": 8}), sample.score("b", "read", "rte", 0)]
    lines += [sample.cost("b", "read", machine=sample.GPU, settings={"device": "cuda"})]
    groups = loaded(tmp_path, lines).groups
    assert [group.remark for group in groups] == [
        "Sample CPU, 16 cores, batch 32",
        "Sample CPU, 16 cores, batch 8",
        "Sample GPU 80 GB, batch 32",
    ]
    assert all("rte" in group.rows[0].scores for group in groups)


def test_the_peak_holds_the_optimizers_state(tmp_path: Path) -> None:
    line = sample.cost("b", "full", measured={"peak_bytes": 100, "optimizer_bytes": 30})
    (group,) = loaded(tmp_path, [line]).groups
    assert group.rows[0].peak == 130


def test_other_versions_machines_and_settings_are_said_of_the_row(tmp_path: Path) -> None:
    odd = sample.cost("b", "lora", versions={**sample.VERSIONS, "torch": "2.14.0"}, settings={"repeats": 5})
    (group,) = loaded(tmp_path, [sample.cost("b", "read"), sample.cost("b", "full"), odd]).groups
    marks = {row.contender: row.cost_marks for row in group.rows}
    assert marks == {"read": (), "full": (), "lora": ("torch 2.14.0, elsewhere 2.15.0", "repeats 5, elsewhere 15")}


def test_scores_with_other_settings_are_marked(tmp_path: Path) -> None:
    lines = [sample.score("b", name, "rte", seed) for name in ("read", "lora") for seed in range(2)]
    lines += [sample.score("b", "full", "rte", seed, settings={"epochs": 10}) for seed in range(2)]
    (group,) = loaded(tmp_path, lines).groups
    assert {row.contender: row.scores["rte"].marks for row in group.rows} == {
        "read": (),
        "lora": (),
        "full": ("epochs of rte 10, elsewhere 5",),
    }


def test_seeds_of_other_settings_are_not_averaged_in(tmp_path: Path) -> None:
    lines = [sample.score("b", "read", "rte", seed) for seed in range(3)]
    lines += [sample.score("b", "read", "rte", 3, settings={"epochs": 10})]
    (group,) = loaded(tmp_path, lines).groups
    score = group.rows[0].scores["rte"]
    assert score.estimate.count == 3
    assert score.marks == ("left out: 1 of the same contender with other settings (epochs 10, here 5)",)


def test_a_cost_and_scores_of_other_configs_are_marked(tmp_path: Path) -> None:
    lines = [sample.cost("b", "read", settings={"config": {"rank": 8}}), sample.score("b", "read", "rte", 0)]
    (group,) = loaded(tmp_path, lines).groups
    assert group.rows[0].cost_marks == ("config of the cost rank=8, of the scores rank=128, cell=gru",)


def test_the_later_of_two_lines_counts_but_no_failure_hides_a_result(tmp_path: Path) -> None:
    first = sample.cost("b", "read", measured={"kept_bytes": 1})
    later = replace(first, measured={**(first.measured or {}), "kept_bytes": 2}, date="2026-11-21T10:00:00Z")
    failed = replace(first, status="failed", reason="no", measured=None, date="2026-11-22T10:00:00Z")
    results = loaded(tmp_path, [later, first, failed])
    assert results.groups[0].rows[0].measured("kept_bytes") == 2
    assert results.missing == ()
    assert len(results.records) == 1


def test_what_was_refused_or_failed_is_one_entry_a_reason(tmp_path: Path) -> None:
    lines = [
        replace(sample.score("b", "full", task, seed), status="failed", reason="no memory", measured=None)
        for task in ("rte", "cr")
        for seed in range(2)
    ]
    (entry,) = loaded(tmp_path, [*lines, sample.cost("b", "read")]).missing
    assert (entry.contender, entry.status, entry.reason) == ("full", "failed", "no memory")
    assert entry.what == "score on rte, seed 0 1; score on cr, seed 0 1"


def test_several_files_and_a_broken_line(tmp_path: Path) -> None:
    one = sample.write(tmp_path / "one.jsonl", [sample.cost("b", "read")], broken=True)
    other = sample.write(tmp_path / "other.jsonl", [sample.cost("b", "lora")])
    results = load([one, other])
    assert [(source.results, source.broken) for source in results.sources] == [(1, 1), (1, 0)]
    assert results.broken == 1
    assert results.contenders == ["read", "lora"]


def test_backbones_stand_in_the_files_order(tmp_path: Path) -> None:
    lines = [sample.cost("late", "read", date="2026-11-22T10:00:00Z"), sample.cost("early", "read")]
    assert [group.backbone for group in loaded(tmp_path, lines).groups] == ["late", "early"]


def test_only_refusals_are_no_group(tmp_path: Path) -> None:
    line = replace(sample.cost("b", "read"), status="refused", reason="no", measured=None)
    results = loaded(tmp_path, [line])
    assert results.groups == ()
    assert len(results.missing) == 1


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file\. `sidestep compare` writes one"):
        load([tmp_path / "none.jsonl"])


@pytest.mark.parametrize(("text", "said"), [("", "it is empty"), ("{}\nx\n", "none of its 2 lines can be read")])
def test_a_file_without_a_result(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        load([path])


def test_results_of_a_newer_format_ask_for_an_update(tmp_path: Path) -> None:
    path = sample.write(tmp_path / "results.jsonl", [sample.cost("b", "read")])
    with path.open("a") as file:
        file.write(json.dumps({"format": 2, "kind": "cost"}) + "\n")
    with pytest.raises(ValueError, match=r"format 2, but .* reads format 1: update it with pip install -U sidestep"):
        load([path])


def test_no_torch_is_imported() -> None:
    code = "import sys, sidestep.report.files, sidestep.report.markdown; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
