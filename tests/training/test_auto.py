"""Choosing a method by trials on held-out training rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import sidestep as ss
from sidestep.data import DataError
from sidestep.disk.atomic import OutputError
from sidestep.training import auto as module
from sidestep.training.auto import CANDIDATES, Candidate, Trial, auto
from small_tasks import reviews, text_backbone, write

READOUT = Candidate(name="readout", config=ss.ReadoutConfig(), rate=1e-2)
SLOW = Candidate(name="read, slow", config=ss.ReadConfig(rank=4), rate=1e-6)
QUICK = Candidate(name="read, quick", config=ss.ReadConfig(rank=4), rate=3e-2)
PROBE = Candidate(name="probe", config=ss.ProbeConfig(), rate=1e-6)
LATE = Candidate(name="late_lora", config=ss.LateLoraConfig(rank=2), rate=2e-2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    text_backbone(folder / "bert")
    write(folder / "train.jsonl", reviews(80))
    write(folder / "dev.jsonl", reviews(30, 1))
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps, rounds and fifths than a search needs to find anything."""
    monkeypatch.setattr(module, "STEPS", 24)
    monkeypatch.setattr(module, "MOST", 6)
    monkeypatch.setattr(module, "FIFTHS", 3)


def spec(place: Path, output: Path, **data: Any) -> ss.RunSpec:
    return ss.RunSpec(
        data=ss.DataSpec(train=place / "train.jsonl", dev=place / "dev.jsonl", text="text", **data),
        model=ss.ModelSpec(backbone=place / "bert", method=ss.ReadConfig()),
        training=ss.TrainSettings(output=output, batch_size=8, progress=False, measure=False),
    )


class Lines:
    """A watch that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def read(self, rows: int) -> None: ...
    def started(self, model: Any, data: Any, settings: Any) -> None: ...
    def tell(self, line: str) -> None:
        self.lines.append(line)


def test_the_better_half_goes_on_with_three_times_the_epochs_and_the_best_is_trained_on_all_rows(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEPS", 1)
    monkeypatch.setattr(module, "FIFTHS", 1)
    watch = Lines()
    model, data, results = auto(
        spec(place, tmp_path / "task"), budget=600, watch=watch, candidates=[READOUT, SLOW, QUICK, PROBE]
    )
    assert results.auto is not None
    trials = [(trial["candidate"], trial["epochs"]) for trial in results.auto["trials"]]
    first, later = trials[:4], trials[4:]
    assert first == [("readout", 1), ("read, slow", 2), ("read, quick", 2), ("probe", 2)]
    scores = {trial["candidate"]: trial["score"] for trial in results.auto["trials"][1:4]}
    assert {name for name, _ in later} <= set(scores)
    assert len(later) == 2  # of three that are trained
    assert all(epochs == 6 for _, epochs in later)
    assert len(data.train) == results.data["train_rows"] == 80
    assert results.auto["chosen"] in dict(trials)
    assert json.loads((tmp_path / "task" / "results.json").read_text())["auto"] == results.auto
    assert watch.lines[0].startswith("auto: 4 candidates in about 10 min: readout; read, slow; read, quick; probe")
    assert model.record.name in results.auto["chosen"]
    assert ss.load(tmp_path / "task").record.name == model.record.name


def test_few_rows_are_tried_for_as_many_steps_at_least(place: Path, tmp_path: Path) -> None:
    """64 rows in batches of 8 are 8 steps."""
    _, _, results = auto(spec(place, tmp_path / "task"), budget=600, candidates=[PROBE])
    assert results.auto is not None
    assert results.auto["trials"][0]["epochs"] == module.STEPS // 8


@pytest.mark.parametrize(
    ("metric", "rows", "expected"),
    [
        ("accuracy", 50, "sure"),  # 0.9 has a standard error of 0.042, so that 0.87 is no worse
        ("accuracy", 5000, "better"),
        ("pearson", 20, "sure"),
        ("mse", 50, "best"),
    ],
)
def test_scores_within_a_standard_error_are_equal_and_the_loss_decides(metric: str, rows: int, expected: str) -> None:
    search = object.__new__(module._Search)
    search.metric, search.sign, search.rows = metric, -1 if metric == "mse" else 1, SimpleNamespace(dev=range(rows))
    scores = {"better": (0.9, 0.6), "sure": (0.87, 0.2), "best": (0.3, 0.9)}
    trials = [
        Trial(candidate=name, epochs=2, score=score, loss=loss, seconds=1.0) for name, (score, loss) in scores.items()
    ]
    assert search._ranked([[trial] for trial in trials])[0][0].candidate == expected


def test_the_same_seed_gives_the_same_trials_and_dev_rows_take_no_part(place: Path, tmp_path: Path) -> None:
    found = []
    for number, dev in enumerate((reviews(30, 1), reviews(9, 5))):
        write(tmp_path / "dev.jsonl", dev)
        asked = spec(place, tmp_path / str(number))
        asked = ss.RunSpec(
            data=ss.DataSpec(train=place / "train.jsonl", dev=tmp_path / "dev.jsonl", text="text"),
            model=asked.model,
            training=asked.training,
        )
        results = auto(asked, budget=600, candidates=[READOUT, QUICK])[2]
        assert results.auto is not None
        found.append([(one["candidate"], one["epochs"], one["score"], one["loss"]) for one in results.auto["trials"]])
    assert found[0] == found[1]


def test_late_lora_reads_what_the_others_read(place: Path, tmp_path: Path) -> None:
    _, _, results = auto(spec(place, tmp_path / "task"), budget=600, candidates=[QUICK, LATE])
    assert results.auto is not None
    assert all(trial["score"] is not None for trial in results.auto["trials"])


def test_a_candidate_that_does_not_work_leaves_with_its_reason(place: Path, tmp_path: Path) -> None:
    wrong = Candidate(name="late_lora", config=ss.LateLoraConfig(blocks=9), rate=1e-3)
    _, _, results = auto(spec(place, tmp_path / "task"), budget=600, candidates=[wrong, READOUT])
    assert results.auto is not None
    assert results.auto["chosen"] == "readout"
    assert "blocks=9, but there are 2 blocks" in results.auto["trials"][0]["reason"]


def test_if_all_fail_the_error_says_why(place: Path, tmp_path: Path) -> None:
    wrong = Candidate(name="late_lora", config=ss.LateLoraConfig(blocks=9), rate=1e-3)
    with pytest.raises(ValueError, match=r"no candidate came through in about 10 min: late_lora: .*choose from 1 to 2"):
        auto(spec(place, tmp_path / "task"), budget=600, candidates=[wrong])


def test_a_time_that_is_too_short_is_refused_with_the_least(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"budget: 0.001s is too short, as the frozen pass and the first trial took .* Give at least \d+s",
    ):
        auto(spec(place, tmp_path / "task"), budget=1e-3, candidates=[READOUT, QUICK])


def test_two_rows_a_class_are_enough_and_one_is_not(place: Path, tmp_path: Path) -> None:
    rows = reviews(80)
    some = [[row for row in rows if row["label"] == name][:2] for name in ("neg", "pos")]
    for number, (few, asked) in enumerate(((some[0] + some[1], True), (some[0] + some[1][:1], False))):
        write(tmp_path / "few.jsonl", few)
        run = spec(place, tmp_path / str(number))
        run = replace(run, data=replace(run.data, train=tmp_path / "few.jsonl"))
        if asked:
            _, _, results = auto(run, budget=600, candidates=[QUICK])
            assert results.auto is not None
            assert results.auto["trials"][0]["reason"] is None
        else:
            with pytest.raises(DataError, match=r"3 rows for 2 classes\. Give at least two of each"):
                auto(run, budget=600, candidates=[QUICK])


def test_a_kind_that_cannot_be_judged_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a decoder"):
        auto(spec(place, tmp_path / "task", kind="lm", label="other"), budget=600)


def test_numbers_are_judged_too(place: Path, tmp_path: Path) -> None:
    _, _, results = auto(
        spec(place, tmp_path / "task", kind="regress", label="score"), budget=600, candidates=[READOUT, PROBE]
    )
    assert results.auto is not None
    assert results.auto["chosen"] == "readout"


def test_time_is_left_for_the_last_training() -> None:
    """With a pace of 1 s an epoch, a trial of 6 epochs and a last training of 7.5 need 13.5 s."""
    search = object.__new__(module._Search)
    search.trials = [Trial(candidate="read, quick", epochs=2, score=0.5, loss=1.0, seconds=0.0)] * 2
    search.paces, search.data = {QUICK.config: 1.0}, SimpleNamespace(train=range(8), dev=range(2))
    for budget, affords in ((13.4, False), (13.6, True)):
        search.budget, search.begin = budget, module.time.perf_counter()
        assert search._affordable(QUICK, 6, {}) == (6 if affords else None)


def test_a_leader_has_fewer_epochs_if_three_times_as_many_take_too_long() -> None:
    """At 1 s an epoch, 4 epochs and a last training of 5 take 9 s."""
    search = object.__new__(module._Search)
    tried = Trial(candidate=QUICK.name, epochs=2, score=0.5, loss=1.0, seconds=2.0)
    search.trials, search.metric, search.sign = [tried] * 2, "accuracy", 1
    search.paces, search.data = {QUICK.config: 1.0}, SimpleNamespace(train=range(8), dev=range(0))
    search.rows = SimpleNamespace(dev=range(8))
    for budget, epochs in ((9.2, 4), (5.0, None), (14, 6)):
        search.budget, search.begin = budget, module.time.perf_counter()
        assert search._affordable(QUICK, 6, {QUICK.name: [tried]}) == epochs


def test_the_leading_ones_are_tried_on_further_fifths_and_their_means_decide(place: Path, tmp_path: Path) -> None:
    watch = Lines()
    _, _, results = auto(spec(place, tmp_path / "task"), watch, budget=600, candidates=[READOUT, QUICK])
    assert results.auto is not None
    trials = results.auto["trials"]
    assert {trial["fifth"] for trial in trials} == set(range(module.FIFTHS))
    last = [trial for trial in trials if trial["fifth"] == 1]
    assert [trial["candidate"] for trial in last] != []
    assert any("fifth 2" in line for line in watch.lines)


def test_a_lucky_score_on_one_fifth_does_not_win_over_those_that_were_confirmed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The leading two fall from 0.9 to 0.7 on further fifths. A third with 0.8 on one fifth is not among them."""
    monkeypatch.setattr(module, "LEADING", 2)
    search = object.__new__(module._Search)
    search.metric, search.sign, search.rows = "accuracy", 1, SimpleNamespace(dev=range(10000))
    search.trials = [Trial(candidate="readout", epochs=1, score=0.5, loss=1.0, seconds=0.0)]
    search.data, search.budget, search.begin = SimpleNamespace(train=range(8), dev=[]), 60, module.time.perf_counter()

    def trial(one: Candidate, score: float, fifth: int = 0) -> Trial:
        return Trial(candidate=one.name, epochs=1, fifth=fifth, score=score, loss=1.0, seconds=0.0)

    fallen = {READOUT.name: 0.6, QUICK.name: 0.7}
    monkeypatch.setattr(search, "_try", lambda one, epochs, fifth: trial(one, fallen[one.name], fifth))
    found = search._ranked([[trial(READOUT, 0.9)], [trial(QUICK, 0.89)], [trial(SLOW, 0.8)]])
    named = {one.name: one for one in (READOUT, QUICK, SLOW)}
    assert search._confirmed(named, found[: module.LEADING]).candidate == QUICK.name


def test_the_time_of_a_candidate_that_was_not_tried_is_guessed_by_the_frozen_pass() -> None:
    """The pass takes 2 s, so an epoch takes 5 s, a trial of 6 epochs 30 s, and the last training 37.5 s."""
    search = object.__new__(module._Search)
    search.trials = [Trial(candidate="readout", epochs=1, score=0.5, loss=1.0, seconds=2.0)] * 2
    search.paces, search.data = {}, SimpleNamespace(train=range(8), dev=range(0))
    slow = replace(LATE, passes=2.5)
    for budget, affords in ((67, False), (68, True)):
        search.budget, search.begin = budget, module.time.perf_counter()
        assert search._affordable(slow, 6, {}) == (6 if affords else None)


def test_the_stated_candidates_are_those_of_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "auto.md").read_text()
    for one in CANDIDATES:
        assert f"| `{one.name.split(',')[0]}` |" in page


def test_an_output_that_is_an_input_and_an_own_head_are_refused_before_any_trial(place: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is read as an input|lies in"):
        auto(spec(place, place / "bert"), budget=600)
    asked = spec(place, tmp_path / "task")
    with pytest.raises(ValueError, match="--own-head with --method auto"):
        auto(replace(asked, model=replace(asked.model, own_head=True)), budget=600)


def test_the_time_of_the_search_is_told_apart_from_that_of_the_last_training(place: Path, tmp_path: Path) -> None:
    told = auto(spec(place, tmp_path / "task"), budget=600, candidates=[READOUT])[2].auto
    assert told is not None
    trials = sum(trial["seconds"] for trial in told["trials"])
    assert trials <= told["search_seconds"] < trials + told["final_seconds"]
