"""Rows that are answered by several tasks of a bank: the same as by each task alone, from few passes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

import sidestep as ss
from sidestep.data import DataError, DataWarning
from sidestep.disk.feature_options import FeatureOptions
from sidestep.disk.task_folder import WEIGHTS, TaskError
from sidestep.kinds import features
from sidestep.tasks.bank_folder import BankError
from sidestep.tasks.predict import predict
from small_tasks import reviews, text_backbone, write

pytestmark = pytest.mark.filterwarnings("ignore:.*and were truncated")  # "short" cuts its texts

TASKS: dict[str, dict[str, Any]] = {
    "read": {"method": ss.ReadConfig(rank=4)},
    "score": {"method": ss.ReadConfig(rank=8), "label": "score", "kind": "regress"},
    "readout": {"method": ss.ReadoutConfig()},
    "short": {"method": ss.ProbeConfig(), "max_length": 4},
    "pair": {"method": ss.DTLConfig(rank=4, late_blocks=2), "text2": "other"},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    text_backbone(folder / "bert")
    write(folder / "train.jsonl", reviews(40))
    for name, told in TASKS.items():
        told = dict(told)
        method = told.pop("method")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # "short" cuts its texts
            ss.train(spec_of(folder, name, method, told))
    return folder


def spec_of(folder: Path, name: str, method: Any, told: dict[str, Any]) -> ss.RunSpec:
    return ss.RunSpec(
        data=ss.DataSpec(train=folder / "train.jsonl", text="text", **told),
        model=ss.ModelSpec(backbone=folder / "bert", method=method),
        training=ss.TrainSettings(
            output=folder / name, epochs=1, batch_size=8, progress=False, measure=False, learning_rate=0.02
        ),
    )


@pytest.fixture
def bank(place: Path, tmp_path: Path) -> ss.TaskBank:
    from transformers import AutoModel

    found = ss.TaskBank(AutoModel.from_pretrained(place / "bert"), tmp_path / "bank")
    for name in TASKS:
        found.add(name, place / name)
    return found


def alone(bank: ss.TaskBank, name: str, rows: Dataset) -> Dataset:
    return predict(bank.activate(name), rows, probabilities="one")


def test_each_row_has_the_answers_of_its_tasks(bank: ss.TaskBank) -> None:
    rows = Dataset.from_list(reviews(12, 4))
    asked = [list(TASKS)[n % 3 : n % 3 + 3] for n in range(12)]
    found = bank.predict(zip(asked, rows, strict=True), batch_size=5)
    assert [list(row) for row in found.rows] == asked
    for name in TASKS:
        table = alone(bank, name, rows)
        for row, prediction, number in zip(found.rows, table["prediction"], range(12), strict=True):
            if name not in row:
                continue
            if name == "score":
                assert row[name] == {"prediction": pytest.approx(prediction, rel=1e-4)}
                continue
            assert row[name]["prediction"] == prediction
            assert row[name]["probability"] == pytest.approx(table["probability"][number], abs=1e-4)


def test_tasks_that_read_rows_alike_share_their_passes(bank: ss.TaskBank) -> None:
    rows = reviews(10, 4)
    found = bank.predict((["read", "score", "readout"], row) for row in rows)
    assert (found.passes, found.batches) == (1, 1)
    found = bank.predict((["read", "score", "short"], row) for row in rows)
    assert (found.passes, found.batches) == (2, 2)  # "short" cuts its texts


def test_a_damaged_task_fails_alone(bank: ss.TaskBank) -> None:
    rows, names = reviews(6), ["read", "readout"]
    expected = bank.predict([(["read"], row) for row in rows])
    file = bank.store.path / "readout" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    fresh = ss.TaskBank(bank.backbone, bank.store.path)
    answers = fresh.predict([(names, row) for row in rows])
    assert answers.rows == expected.rows
    assert list(answers.failed) == ["readout"]
    assert "readout" in answers.failed["readout"]
    with pytest.raises(TaskError, match="readout"):
        fresh.predict([(["readout"], row) for row in rows])


def test_tasks_run_from_stored_features(bank: ss.TaskBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, names = reviews(6), ["read", "readout", "score", "short"]
    expected = bank.predict([(names, row) for row in rows])
    how: Any = {"features": FeatureOptions(where="disk", folder=tmp_path / "features")}
    first = bank.predict([(names, row) for row in rows], **how)
    computed = []
    rows_of = features.Features.record
    monkeypatch.setattr(features.Features, "record", lambda self, asked: computed.append(asked) or rows_of(self, asked))
    second = bank.predict([(names, row) for row in rows], **how)
    assert (first.passes, second.passes) == (0, 0)
    assert all(len(numbers) == 2 for numbers in computed)  # a proof of each task, and nothing else
    for found in (first, second):
        for row, other in zip(found.rows, expected.rows, strict=True):
            assert [one["prediction"] for one in row.values()] == pytest.approx(
                [one["prediction"] for one in other.values()], abs=1e-4
            )


def test_a_table_has_two_columns_for_each_task(bank: ss.TaskBank) -> None:
    rows = Dataset.from_list(reviews(3, 4))
    asked = [["read", "score"], ["read"], ["score"]]
    table = bank.predict(zip(asked, rows, strict=True)).table(rows)
    assert table.column_names[-3:] == ["prediction_read", "probability_read", "prediction_score"]
    assert table["prediction_read"][2] is None
    assert table["prediction_score"][1] is None
    with pytest.raises(DataError, match="have a column named prediction_read already"):
        bank.predict((["read"], row) for row in table).table(table)


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ([["read"], []], BankError, "row 2 has no list of tasks"),
        ([["read"], ["read", "score", "read"]], BankError, r"row 2 names a task twice \(read, score, read\)"),
        ([["read"], ["reed"]], BankError, "holds no task 'reed': did you mean 'read'"),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_runs(
    bank: ss.TaskBank, asked: list[list[str]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bank.predict(zip(asked, reviews(2), strict=True))
    assert not bank.seconds


def test_a_column_that_a_task_reads_and_is_not_there_is_named(bank: ss.TaskBank) -> None:
    with pytest.raises(DataError, match=r"no column 'text' \(read by read\)"):
        bank.predict([("read", {"words": "good"})])
