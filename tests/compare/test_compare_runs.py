"""Whole comparisons on a tiny model: one path for all, nothing chosen on dev, and a killed one continues."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

import own_process
import sidestep as ss
from sidestep.compare import bench, runs
from sidestep.compare.bench import Bench, Prepared, Rows, fingerprint, pairs
from sidestep.compare.claims import claims
from sidestep.compare.files import comparison_from
from sidestep.compare.records import Record, append, read
from sidestep.compare.runs import planned, run
from sidestep.compare.spec import Comparison, Contender
from sidestep.compare.summary import summary
from sidestep.data import DataError, Fields
from sidestep.data import read as read_rows
from sidestep.disk.atomic import OutputError
from sidestep.training.train import TrainError
from small_tasks import image_backbone, image_folder, reviews, text_backbone, write


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone and rows."""
    folder = tmp_path_factory.mktemp("compare")
    text_backbone(folder / "bert")
    write(folder / "train.tsv", reviews(32))
    write(folder / "dev.tsv", reviews(16, 1))
    return folder


def values(**changes: Any) -> dict[str, Any]:
    given = {
        "backbone": [{"model": "bert"}],
        "task": [{"name": "reviews", "train": "train.tsv", "dev": "dev.tsv", "text": "text"}],
        "contender": [{"method": "probe", "rates": [0.01, 0.1]}, {"method": "full", "rates": [1e-4, 1e-3]}],
        "seeds": [0, 1],
        "epochs": 2,
        "batch_size": 8,
        "costs": False,
    }
    return {**given, **changes}


def comparison(place: Path, **changes: Any) -> Comparison:
    return comparison_from(values(**changes), place, "the test")


def silent(text: str) -> None:
    pass


def told(found: list[Record]) -> list[tuple[Any, ...]]:
    return [(one.kind, *(one.settings[name] for name in ("contender", "rate", "seed", "part"))) for one in found]


def outcome(found: list[Record]) -> dict[str, Any]:
    """What has to be the same in every run of the same settings."""
    timing = ("train_seconds", "epoch_seconds", "run_seconds")
    return {
        one.key: {name: value for name, value in (one.measured or {}).items() if name not in timing} for one in found
    }


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    """The results file of a comparison that has ended."""
    run(comparison(place), place / "finished.jsonl", tell=silent)
    return place / "finished.jsonl"


def test_rates_are_chosen_on_training_rows_and_every_seed_is_scored_once(finished: Path) -> None:
    found, _ = read(finished)
    trials, scores = ([one for one in found if one.kind == kind] for kind in ("trial", "score"))
    assert told(trials) == [
        ("trial", "probe", 0.01, 0, "holdout"),
        ("trial", "full", 1e-4, 0, "holdout"),
        ("trial", "probe", 0.1, 0, "holdout"),
        ("trial", "full", 1e-3, 0, "holdout"),
    ]
    assert [(line[1], line[3], line[4]) for line in told(scores)] == [
        ("probe", 0, "dev"),
        ("full", 0, "dev"),
        ("probe", 1, "dev"),
        ("full", 1, "dev"),
    ]
    for name in ("probe", "full"):
        own = [one for one in trials if one.settings["contender"] == name]
        best = max(own, key=lambda one: (one.measured["score"], -one.measured["history"][-1]["dev_loss"]))
        assert {one.settings["rate"] for one in scores if one.settings["contender"] == name} == {best.settings["rate"]}
    assert {one.settings["rows"] for one in trials} == {25}
    assert {one.settings["rows"] for one in scores} == {32}
    assert all(one.settings["trials"] == {"rates": 2, "rows": 25} for one in scores)


def test_a_line_says_what_it_takes_to_get_it_again(finished: Path) -> None:
    record = read(finished)[0][-1]
    asked, measured = record.settings, record.measured
    assert measured is not None
    assert (asked["backbone"], asked["model"]) == ("bert", "BertModel of the folder 'bert'")
    assert (asked["method"], asked["config"], asked["checkpoint"], asked["noise"]) == ("full", {}, False, "own")
    assert (asked["precision"], asked["attention"], asked["device"]) == ("float32", "sdpa", "cpu")
    assert (asked["epochs"], asked["batch"], asked["schedule"], asked["optimizer"]) == (2, 8, "linear", "AdamW")
    assert str(finished.parent) not in json.dumps(asked)
    assert [entry["epoch"] for entry in measured["history"]] == [1.0, 2.0]
    assert measured["score"] == measured["history"][-1]["score"] == measured["scores"]["accuracy"]
    assert measured["best_epoch_score"] == max(entry["score"] for entry in measured["history"])
    assert measured["constant"].keys() == measured["scores"].keys()
    assert 0.5 <= measured["constant"]["accuracy"] < 1  # of two classes the larger
    assert measured["parameters"] > 5000
    assert 0 < measured["epoch_seconds"] < measured["train_seconds"] < record.seconds
    assert (record.machine["threads"], record.machine["gpu"]) == (1, None)


def test_a_comparison_that_has_ended_runs_nothing_and_leaves_no_litter(place: Path, finished: Path) -> None:
    before = finished.read_bytes()
    again = run(comparison(place), finished, tell=silent)
    assert (again.ran, len(again.records), again.broken) == (0, 8, 0)
    assert finished.read_bytes() == before
    assert {file.name for file in place.glob(".*")} == {".finished.jsonl.lock"}


def test_sparse_diffs_are_compared_with_or_without_a_stage_before_them(place: Path, tmp_path: Path) -> None:
    sparse = {"density": 0.05, "full_epochs": 1, "samples": 4}
    contenders = [
        {"method": "diff_pruning", "set": {"density": 0.05, "lambda_l0": 1e-5, "finetune_epochs": 1}, "rates": [1e-3]},
        {"method": "sparse", "set": sparse, "rates": [1e-2]},
        {
            "method": "sparse",
            "name": "magnitude",
            "set": {**sparse, "select": "magnitude", "rewind": False},
            "rates": [1e-2],
        },
        {"method": "full", "rates": [1e-3]},
    ]
    costs = {"batch": 2, "length": 8, "repeats": 1, "warmup": 0}
    asked = comparison(place, contender=contenders, seeds=[0], costs=costs)
    output = tmp_path / "results.jsonl"
    found = run(asked, output, tell=silent)
    assert [one.reason for one in found.records] == [None] * 8
    scores, taken = (
        {one.settings["contender"]: one.measured for one in found.records if one.kind == kind}
        for kind in ("score", "cost")
    )
    kept = scores["sparse"]["nonzeros"]
    for name in ("diff_pruning", "sparse", "magnitude"):
        assert (scores[name]["nonzeros"], scores[name]["parameters"] - kept) == (kept, taken[name]["parameters"] - kept)
        # positions and values, whatever else a file says
        assert 5 * kept < taken[name]["task_bytes"] < scores[name]["task_bytes"] < taken["full"]["task_bytes"]
        assert taken[name]["planned_peak_bytes"] == pytest.approx(taken[name]["peak_bytes"], rel=0.05)
        assert taken[name]["step_seconds"]["median"] > 0
    assert "nonzeros" not in scores["full"]
    words = {
        name: round(cost["optimizer_bytes"] / taken["full"]["optimizer_bytes"] * 2) for name, cost in taken.items()
    }
    assert words == {"diff_pruning": 7, "sparse": 0, "magnitude": 3, "full": 2}
    first = scores["diff_pruning"]["first_stage"]
    assert 0 < first["open"] < 1
    assert scores["diff_pruning"]["train_seconds"] > sum(first["epoch_seconds"]) > 0
    assert "first_stage" not in scores["sparse"]
    assert run(asked, output, tell=silent).ran == 0


def test_further_seeds_and_contenders_are_added_to_what_is_there(place: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "more.jsonl"
    output.write_bytes(finished.read_bytes())
    bitfit = {"method": "bitfit", "rates": [1e-3, 1e-2]}
    more = run(comparison(place, contender=[*values()["contender"], bitfit]), output, tell=silent)
    assert {one.settings["contender"] for one in read(output)[0][8:]} == {"bitfit"}
    assert more.ran == 4


def test_runs_of_the_same_settings_give_the_same_numbers_whatever_was_attached_before(
    place: Path, finished: Path, tmp_path: Path
) -> None:
    other_way = list(reversed(values()["contender"]))
    run(comparison(place, contender=other_way), tmp_path / "again.jsonl", tell=silent)
    assert outcome(read(tmp_path / "again.jsonl")[0]) == outcome(read(finished)[0])


def test_other_dev_rows_change_no_trial(place: Path, finished: Path, tmp_path: Path) -> None:
    write(place / "other.tsv", reviews(12, 5))
    output = tmp_path / "results.jsonl"
    output.write_bytes(finished.read_bytes())
    run(comparison(place, task=[{**values()["task"][0], "dev": "other.tsv"}], seeds=[0]), output, tell=silent)
    new = read(output)[0][8:]
    assert [one.kind for one in new] == ["score", "score"]


def test_the_backbone_is_as_before_when_a_contender_is_done(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = comparison(place, seeds=[0], epochs=1)
    loaded = Bench.load(asked.backbones[0])
    plain = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    monkeypatch.setattr(runs.Bench, "load", lambda *args, **how: loaded)
    run(asked, place / "restored.jsonl", tell=silent)
    after = loaded.model.state_dict()
    assert plain.keys() == after.keys()
    assert all(torch.equal(plain[name], after[name]) for name in plain)


def test_what_the_backbone_or_a_missing_library_refuses_is_a_line_and_no_run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: Bench, one: Contender) -> str | None:
        return 'install it: pip install "sidestep[compare]"' if one.name == "full" else None

    monkeypatch.setattr(bench.Bench, "refusal", missing)
    asked = comparison(place, seeds=[0], epochs=1, costs={"batch": 2, "repeats": 1})
    found = run(asked, tmp_path / "results.jsonl", tell=silent)
    refused = [one for one in found.records if one.status == "refused"]
    assert [(one.kind, one.settings["contender"]) for one in refused] == [("score", "full"), ("cost", "full")]
    assert {one.reason for one in refused} == {'install it: pip install "sidestep[compare]"'}
    again = run(asked, tmp_path / "results.jsonl", tell=silent)
    assert (again.ran, len(again.records)) == (0, len(found.records))
    assert ["bert", "full", "refused", None, None, None, None] in summary(found.records)[1]


def test_a_method_that_does_not_work_on_the_backbone_is_refused_with_its_reason(tmp_path: Path) -> None:
    image_backbone(tmp_path / "vit")
    loaded = Bench.load(comparison(tmp_path, backbone=[{"model": "vit"}]).backbones[0])
    swin = replace(loaded, model=_hierarchical())
    reason = swin.refusal(Contender.named("late_writer"))
    assert reason is not None
    assert "late_writer does not work on SwinModel: its state does not change its grid" in reason
    assert loaded.refusal(Contender.named("late_writer")) is None


def _hierarchical() -> torch.nn.Module:
    from tiny import FAMILIES

    return FAMILIES["swin"].model().swin


def test_a_run_that_fails_is_written_down_passed_over_and_tried_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, output = runs.train, tmp_path / "results.jsonl"

    def breaks(spec: Any, *args: Any, **how: Any) -> Any:
        if isinstance(spec.model.method, ss.FullConfig) and spec.training.learning_rate == 1e-3:
            raise TrainError("training diverged (loss is nan at step 3)")
        return train(spec, *args, **how)

    monkeypatch.setattr(runs, "train", breaks)
    found = run(comparison(place, seeds=[0], epochs=1), output, tell=silent)
    (failed,) = (one for one in found.records if one.status == "failed")
    assert (failed.kind, failed.reason) == ("trial", "training diverged (loss is nan at step 3)")
    assert [one.settings["rate"] for one in found.records if one.kind == "score"][1] == 1e-4  # what came through
    monkeypatch.setattr(runs, "train", train)
    again = run(comparison(place, seeds=[0], epochs=1), output, tell=silent)
    assert all(one.status == "ok" for one in again.records)
    assert 1 <= again.ran <= 2  # the trial, and the score if that rate is the better one


def test_a_contender_that_fails_at_every_rate_does_not_stop_the_others(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = runs.train

    def breaks(spec: Any, *args: Any, **how: Any) -> Any:
        if isinstance(spec.model.method, ss.ProbeConfig):
            raise MemoryError
        return train(spec, *args, **how)

    monkeypatch.setattr(runs, "train", breaks)
    found = run(comparison(place, seeds=[0], epochs=1), tmp_path / "results.jsonl", tell=silent)
    scores = [one for one in found.records if one.kind == "score"]
    assert [(one.settings["contender"], one.status) for one in scores] == [("probe", "failed"), ("full", "ok")]
    assert scores[0].reason == "the trial of every learning rate failed"
    assert [one.reason for one in found.records if one.kind == "trial"][::2] == ["MemoryError: "] * 2


def test_costs_are_measured_together_and_once(place: Path, tmp_path: Path) -> None:
    contenders = [{"method": "full", "rates": [1e-3]}, {"method": "full", "checkpoint": True, "rates": [1e-3]}]
    asked = comparison(place, contender=contenders, seeds=[0], epochs=1, costs={"batch": 2, "repeats": 2})
    found = run(asked, tmp_path / "results.jsonl", tell=silent)
    plain, recomputed = (one for one in found.records if one.kind == "cost")
    assert (plain.settings["batch"], plain.settings["length"], plain.settings["image_size"]) == (2, 32, None)
    assert plain.settings["head"] == "Classify(num_labels=2, pool=mean)"
    assert (plain.settings["score_of"], recomputed.settings["score_of"]) == (None, "full")
    assert plain.measured is not None
    assert recomputed.measured is not None
    assert recomputed.measured["kept_bytes"] < plain.measured["kept_bytes"]
    assert plain.measured["planned_peak_bytes"] == pytest.approx(plain.measured["peak_bytes"], rel=0.1)
    assert len(plain.measured["step_seconds"]["values"]) == 2
    # one rate needs no trial, and recomputing blocks changes no score
    assert [one.settings["contender"] for one in found.records if one.kind != "cost"] == ["full"]
    assert run(asked, tmp_path / "results.jsonl", tell=silent).ran == 0
    columns, lines = summary(found.records)
    assert columns == ["backbone", "contender", "reviews", "parameters", "kept", "peak", "step, s"]
    assert lines[0][2] == lines[1][2]


RUNNING = """
import json, sys
from pathlib import Path
from sidestep.compare.files import comparison_from
from sidestep.compare.runs import run
file, place, output = map(Path, sys.argv[1:4])
run(comparison_from(json.loads(file.read_text()), place, "x"), output, shared=len(sys.argv) > 4)
"""


@pytest.mark.skipif(os.name == "nt", reason="no process can be stopped there")
def test_a_second_process_is_refused_and_the_first_is_not_disturbed(place: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "results.jsonl", tmp_path / "values.json"
    few = {"contender": [{"method": "probe", "rates": [0.01]}], "epochs": 1}
    file.write_text(json.dumps(values(**few)))
    (tmp_path / "link.jsonl").symlink_to(output)
    first = own_process.start(RUNNING, file, place, output)
    wait_for(1, output, first)
    os.kill(first.pid, signal.SIGSTOP)  # before its second run
    before = output.read_bytes()
    try:
        for other in (output, tmp_path / "link.jsonl", tmp_path / ".." / tmp_path.name / "results.jsonl"):
            with pytest.raises(OutputError, match=r"another process is writing .*: try again when it is done"):
                run(comparison(place, **few), other, tell=silent)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert output.read_bytes() == before
    assert own_process.ended(first) == 0
    assert [(one.settings["seed"], one.status) for one in read(output)[0]] == [(0, "ok"), (1, "ok")]
    assert run(comparison(place, **few), output, tell=silent).ran == 0


def wait_for(lines: int, output: Path, process: Any = None) -> None:
    """Until a file has so many lines, which a process writes, or a thread."""
    deadline = time.monotonic() + 600
    while len(read(output)[0]) < lines:
        assert process is None or process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processes_share_the_runs_and_each_ends_with_all_results(place: Path, finished: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "results.jsonl", tmp_path / "values.json"
    file.write_text(json.dumps(values()))
    other = own_process.start(RUNNING, file, place, output, "share")
    wait_for(1, output, other)
    with pytest.raises(OutputError, match=r"other processes share the runs of .*: join them with --share"):
        run(comparison(place), output, tell=silent)
    own = run(comparison(place), output, tell=silent, shared=True)
    assert own_process.ended(other) == 0
    found = read(output)[0]
    assert len(own.records) == len(found) == 8
    assert own.ran < 8
    assert outcome(found) == outcome(read(finished)[0])
    assert {file.name for file in tmp_path.glob(".*")} == {".results.jsonl.lock"}


@pytest.mark.parametrize("ends", ["well", "badly", "killed"])
def test_what_another_process_runs_is_waited_for(place: Path, finished: Path, tmp_path: Path, ends: str) -> None:
    """Its result is taken, also if it failed. If the process ended before, the run is done here."""
    output, found = tmp_path / "results.jsonl", read(finished)[0]
    theirs = found[1]
    with claims(output, shared=True) as other:
        with other.of(theirs.key, wait=False):
            results: list[Any] = []
            here = Thread(target=lambda: results.append(run(comparison(place), output, tell=silent, shared=True)))
            here.start()
            wait_for(3, output)  # all other trials
            if ends != "killed":
                failed = (
                    replace(theirs, measured=None, status="failed", reason="of memory") if ends == "badly" else theirs
                )
                append(output, failed)
        here.join(600)
    (outcome_here,) = results
    assert outcome_here.ran == (8 if ends == "killed" else 7)
    status = [one.status for one in outcome_here.records if one.key == theirs.key]
    assert status == ["failed" if ends == "badly" else "ok"]


def test_equal_time_is_shared_contender_by_contender(place: Path, tmp_path: Path) -> None:
    output, timed = tmp_path / "results.jsonl", comparison(place, budget="2s", seeds=[0])
    with claims(output, shared=True) as other:
        with other.of("the search of probe on reviews", wait=False):
            results: list[Any] = []
            here = Thread(target=lambda: results.append(run(timed, output, tell=silent, shared=True)))
            here.start()
            wait_for(1, output)
            assert {one.settings["contender"] for one in read(output)[0]} == {"full"}
        here.join(600)
    assert {one.settings["contender"] for one in results[0].records if one.kind == "score"} == {"probe", "full"}


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_a_killed_comparison_continues(place: Path, finished: Path, tmp_path: Path) -> None:
    output, file = tmp_path / "results.jsonl", tmp_path / "values.json"
    file.write_text(json.dumps(values()))
    process = own_process.start(RUNNING, file, place, output)
    wait_for(3, output, process)
    process.kill()
    assert own_process.ended(process) == -signal.SIGKILL
    there = len(read(output)[0])
    assert 3 <= there < 8
    with output.open("a") as lines:
        lines.write('{"format": 1, "kind": "score", "sett')  # as if killed within a write
    lines_said: list[str] = []
    found = run(comparison(place), output, tell=lines_said.append)
    assert (found.ran, found.broken) == (8 - there, 1)
    assert "1 broken lines are passed over" in lines_said[0]
    assert outcome(found.records) == outcome(read(finished)[0])
    assert {file.name for file in tmp_path.glob(".*")} == {".results.jsonl.lock"}


def test_rows_that_the_last_backbone_cannot_read_end_a_comparison_before_the_first_run(
    place: Path, tmp_path: Path
) -> None:
    image_backbone(tmp_path / "vit")
    image_folder(tmp_path / "photos", per_class=8)
    (tmp_path / "photos" / sorted(path.name for path in (tmp_path / "photos").iterdir())[0] / "0.png").write_bytes(b"")
    photos, texts = {"train": "photos", "image": "image"}, {**values()["task"][0], "train": str(place / "train.tsv")}
    both = [{"model": str(place / "bert")}, {"model": "vit"}]
    asked = comparison(tmp_path, backbone=both, task=[{**texts, "dev": None}, photos], seeds=[0], epochs=1)
    with pytest.raises(DataError, match="task 'photos'"):
        run(asked, tmp_path / "results.jsonl", tell=silent)
    assert not (tmp_path / "results.jsonl").exists()


def test_a_run_without_a_finite_score_fails_and_is_told(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, scores, told_lines = runs.train, [math.inf, math.nan], list[str]()

    def diverged(*args: Any, **how: Any) -> Any:
        model, data, found = train(*args, **how)
        return model, data, replace(found, scores={**found.scores, found.metric: scores.pop()})

    monkeypatch.setattr(runs, "train", diverged)
    asked = comparison(place, contender=[{"method": "probe", "rates": [0.01]}], epochs=1)
    found = run(asked, tmp_path / "results.jsonl", tell=told_lines.append)
    assert [one.status for one in found.records] == ["failed", "failed"]
    assert [line.partition("failed: ")[2] for line in told_lines] == [
        "accuracy on dev is nan, no finite number",
        "accuracy on dev is inf, no finite number",
    ]
    assert summary(found.records)[1][0][2] == "failed"


def test_images_and_texts_go_to_the_backbones_that_read_them(place: Path, tmp_path: Path) -> None:
    image_backbone(tmp_path / "vit")
    image_folder(tmp_path / "photos", per_class=8)
    (tmp_path / "bert").symlink_to(place / "bert")
    photos = {"train": "photos", "image": "image"}
    texts = {**values()["task"][0], "train": str(place / "train.tsv"), "dev": None}
    both = [{"model": "bert"}, {"model": "vit"}]
    asked = comparison(tmp_path, backbone=both, task=[photos, texts], seeds=[0], epochs=1, rows=12)
    assert {name: [task.name for task in tasks] for name, tasks in pairs(asked).items()} == {
        "bert": ["reviews"],
        "vit": ["photos"],
    }
    assert [(one.backbone, one.trials, one.scores) for one in planned(asked)] == [("bert", 2, 1)] * 2 + [
        ("vit", 2, 1)
    ] * 2
    found = run(asked, tmp_path / "results.jsonl", tell=silent).records
    assert all(one.status == "ok" for one in found)
    assert {one.settings["rows"] for one in found if one.kind == "score"} == {12}
    with pytest.raises(ValueError, match="backbone 'vit' reads images, but no task has any"):
        pairs(replace(asked, tasks=asked.tasks[1:]))
    with pytest.raises(ValueError, match="task 'photos' is of images, but no backbone reads images"):
        pairs(replace(asked, backbones=asked.backbones[:1]))


def test_shots_are_drawn_anew_with_every_seed_and_rates_without_dev(place: Path, tmp_path: Path) -> None:
    task = {**values()["task"][0], "shots": 3}
    asked = comparison(place, task=[task], rows=2)
    rows = Rows.of(asked.tasks[0], asked)
    assert len(rows.train) == 32  # all, to draw from
    prepared = Prepared.of(rows, Bench.load(asked.backbones[0]).processor, asked)
    texts = [[tuple(row["input_ids"]) for row in prepared.data[seed].train] for seed in (0, 1)]
    assert texts[0] != texts[1]
    assert [len(found) for found in texts] == [6, 6]
    assert (len(prepared.trial.train), len(prepared.trial.dev)) == (6, 7)
    found = run(asked, tmp_path / "results.jsonl", tell=silent).records
    assert {(one.settings["shots"], one.settings["rows"]) for one in found} == {(3, 6)}
    assert len({one.key for one in found if one.kind == "score"}) == 4
    assert run(asked, tmp_path / "results.jsonl", tell=silent).ran == 0


def test_without_shots_no_line_speaks_of_them(finished: Path) -> None:
    assert all("shots" not in one.settings for one in read(finished)[0])


def test_data_that_cannot_be_read_stops_the_comparison_before_anything_is_run(place: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    with pytest.raises(DataError, match=r"task 'reviews': .*none\.tsv does not exist"):
        run(comparison(place, task=[{**values()["task"][0], "train": "none.tsv"}]), output, tell=silent)
    with pytest.raises(DataError, match="task 'reviews': there is no column 'txt'"):
        run(comparison(place, task=[{**values()["task"][0], "text": "txt"}]), output, tell=silent)
    assert not output.exists()


def test_rows_are_cut_the_same_way_every_time_and_known_by_their_cells(place: Path) -> None:
    asked = comparison(place, rows=20, dev_rows=10)
    rows = Rows.of(asked.tasks[0], asked)
    assert (len(rows.train), len(rows.dev)) == (20, 10)
    fields = asked.tasks[0].fields
    assert fingerprint(rows.train, fields) == fingerprint(Rows.of(asked.tasks[0], asked).train, fields)
    whole = read_rows(place / "train.tsv")
    assert fingerprint(whole, fields) != fingerprint(whole, Fields(text="text", label="other"))
    prepared = Prepared.of(rows, Bench.load(asked.backbones[0]).processor, asked)
    assert len(prepared.trial.train) + len(prepared.trial.dev) == 20


def test_attention_is_the_same_for_all_and_in_every_line(place: Path, tmp_path: Path) -> None:
    asked = comparison(place, attention="eager", seeds=[0], epochs=1)
    assert {one.settings["attention"] for one in run(asked, tmp_path / "eager.jsonl", tell=silent).records} == {"eager"}
