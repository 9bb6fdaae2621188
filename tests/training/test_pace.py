"""How long a run will take: batches of all lengths are timed, and nothing is changed by it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from test_train import interrupt_at, task_bytes

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import Fields
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.methods import MethodConfig
from sidestep.tasks import load as loading
from sidestep.training import pace as paces
from sidestep.training.pace import Pace
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for, train
from small_tasks import reviews, text_backbone
from written_tasks import answered, t5_backbone

READ = ss.ReadConfig(rank=4)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_backbone(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(backbone: Path) -> TaskData:
    parts = [Dataset.from_list(reviews(count, seed)) for count, seed in ((42, 0), (20, 1))]
    return prepare(*parts, Fields(text="text", label="label"), load_processor(backbone))


def attached(backbone: Path, data: TaskData, method: MethodConfig = READ) -> ss.SideModel:
    torch.manual_seed(0)
    return ss.attach(load_backbone(backbone), method, head=head_for(data))


def settings(output: Path, **changes: Any) -> TrainSettings:
    how = {"epochs": 2, "batch_size": 8, "eval_batch_size": 8, "learning_rate": 0.01, "progress": False}
    return TrainSettings(output=output, **{**how, **changes})


@pytest.mark.parametrize(("rows", "size", "batches"), [(42, 8, 3), (420, 2, 3), (16, 8, 2), (8, 8, 1), (5, 8, 1)])
def test_batches_are_spread_over_the_lengths(rows: int, size: int, batches: int) -> None:
    lengths = np.random.default_rng(0).permutation(rows)
    found = paces._spread(Dataset.from_dict({"length": lengths}), size)
    assert [len(index) for index in found] == [min(size, rows)] * batches
    longest = [max(lengths[index]) for index in found]
    assert longest == sorted(longest)
    if rows == 420:
        # rows of one length are put together, so a batch is about as long as its rows
        assert longest == pytest.approx([70, 210, 350], abs=25)


def test_rows_without_a_length_are_taken_as_they_come() -> None:
    assert paces._spread(Dataset.from_dict({"labels": range(12)}), 2) == [[2, 3], [6, 7], [10, 11]]


def test_an_epoch_takes_its_batches_and_an_evaluation_its_rows(
    backbone: Path, data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paces, "step_seconds", lambda model, batches, bf16: [1.0, 2.0, 6.0])
    monkeypatch.setattr(paces, "evaluation_seconds", lambda model, batches, bf16: [0.5, 1.5])
    model = attached(backbone, data)
    found = Pace.measured(model, data, settings(tmp_path))
    assert found == Pace(epoch=3 * 42 / 8, evaluation=20 / 8)
    assert Pace.measured(model, data, settings(tmp_path, drop_last=True)).epoch == 3 * 5
    assert Pace.measured(model, data, settings(tmp_path, batch_size=64)).epoch == 3
    assert Pace.measured(model, data, settings(tmp_path, eval_batch_size=64)).evaluation == 1
    assert found.seconds(4, more_evaluations=1) == 4 * found.epoch + 5 * found.evaluation


def test_a_timed_step_is_timed_with_the_rows_that_it_reads(
    backbone: Path, data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = paces._batch

    def slow(*given: Any) -> Any:
        time.sleep(0.2)
        return made(*given)

    monkeypatch.setattr(paces, "_batch", slow)
    found = Pace.measured(attached(backbone, data), data, settings(tmp_path))
    assert found.epoch > 0.2 * 42 / 8
    assert found.evaluation > 0.2 * 20 / 8


@pytest.mark.parametrize(
    "method",
    [READ, ss.FullConfig(), ss.SparseConfig(density=0.05), ss.DiffPruningConfig(density=0.05, finetune_epochs=1)],
    ids=lambda method: type(method).__name__,
)
def test_a_measured_run_computes_what_an_unmeasured_one_does(
    backbone: Path, data: TaskData, tmp_path: Path, method: MethodConfig
) -> None:
    said: list[str] = []
    for name, measure in (("with", True), ("without", False)):
        how = settings(tmp_path / name, measure=measure)
        results = train(attached(backbone, data, method), data, how, tell=said.append)
        assert (results.estimated_seconds is not None) == measure
    assert task_bytes(tmp_path / "with") == task_bytes(tmp_path / "without")
    epochs = 3 if isinstance(method, ss.DiffPruningConfig) else 2
    assert [line.rpartition(" for ")[2] for line in said] == [f"{epochs} epochs"]


def test_texts_are_timed_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = t5_backbone(tmp_path / "t5")
    rows = Dataset.from_list(answered(20))
    data = prepare(rows, rows, Fields(text="text", label="answer"), load_processor(name), kind="text2text")
    model = ss.attach(load_backbone(name, writes="text2text"), READ, head=head_for(data)).train()
    wrote: list[int] = []

    def write(model: Any, rows: Dataset, generation: Any, *, batch_size: int) -> list[str]:
        wrote.append(len(rows))
        time.sleep(0.3)
        return [""] * len(rows)

    monkeypatch.setattr(paces, "written", write)
    assert Pace.measured(model, data, settings(tmp_path)).evaluation > 0.3 * 20 / 8
    assert wrote == [8]
    assert model.training


def test_a_resumed_run_is_told_of_what_is_left(
    backbone: Path, data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with monkeypatch.context() as patched:
        interrupt_at(patched, 14)  # 6 steps an epoch
        with pytest.raises(KeyboardInterrupt):
            train(attached(backbone, data), data, settings(tmp_path, epochs=5), tell=said.append)
    results = train(attached(backbone, data), data, settings(tmp_path, epochs=5, resume=True), tell=said.append)
    assert [line.rpartition(" for ")[2] for line in said] == [
        "5 epochs, less if training stops early",
        "3 epochs, less if training stops early",
    ]
    assert results.estimated_seconds is not None
    # nothing is left of a run that has ended
    results = train(attached(backbone, data), data, settings(tmp_path, epochs=5, resume=True), tell=said.append)
    assert (results.estimated_seconds, len(said)) == (None, 2)
    assert loading.load(tmp_path).record.name == "read"
