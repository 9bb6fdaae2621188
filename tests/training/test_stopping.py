"""When a run stops: by default where no epoch is better for a while, and never where nothing may be chosen on dev."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.compare.files import comparison_from
from sidestep.compare.records import read
from sidestep.compare.runs import run
from sidestep.data import Fields
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.methods import MethodConfig
from sidestep.metrics import ComputeMetrics
from sidestep.training import checkpoints, recipes
from sidestep.training.callbacks import StopIfDiverged
from sidestep.training.checkpoints import OutputError
from sidestep.training.settings import PATIENCE, TrainSettings
from sidestep.training.train import head_for, train
from small_tasks import reviews, text_backbone, write

WORSE_AND_WORSE = [0.5, 0.9, *(0.8 - number / 100 for number in range(50))]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_backbone(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(backbone: Path) -> TaskData:
    parts = [Dataset.from_list(reviews(count, seed)) for count, seed in ((16, 0), (8, 1))]
    return prepare(*parts, Fields(text="text", label="label"), load_processor(backbone))


@pytest.fixture
def worse(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second epoch of every run is the best."""
    scores: Iterator[float] = iter(())

    def judge(self: Any, evaluation: Any) -> dict[str, float]:
        return {"accuracy": next(scores)}

    def begin(self: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal scores
        scores = iter(WORSE_AND_WORSE)

    monkeypatch.setattr(ComputeMetrics, "__call__", judge)
    monkeypatch.setattr(StopIfDiverged, "on_train_begin", begin, raising=False)


def attached(backbone: Path, data: TaskData, method: MethodConfig | None = None) -> ss.SideModel:
    torch.manual_seed(0)
    return ss.attach(load_backbone(backbone), method or ss.ReadConfig(rank=4), head=head_for(data))


def settings(output: Path, **changes: Any) -> TrainSettings:
    how = {"batch_size": 8, "learning_rate": 0.01, "progress": False, "measure": False}
    return TrainSettings(output=output, **{**how, **changes})


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize(
    ("changes", "trained", "told"),
    [
        ({}, 2 + PATIENCE, PATIENCE),
        ({"patience": 1}, 3, 1),
        ({"patience": 0}, 10, None),
        ({"epochs": 4}, 4, PATIENCE),
        ({"keep": "last"}, 10, None),
        ({"keep": "last", "patience": 0, "checkpoints": False}, 10, None),
    ],
)
def test_how_many_epochs_are_trained(
    backbone: Path, data: TaskData, tmp_path: Path, changes: dict[str, Any], trained: int, told: int | None
) -> None:
    results = train(attached(backbone, data), data, settings(tmp_path, **changes))
    assert results.epochs == trained
    assert results.planned_epochs == changes.get("epochs", 10)
    assert results.best_epoch == (trained if changes.get("keep") == "last" else 2)
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["patience"] == told


@pytest.mark.parametrize("name", recipes.names())
def test_a_published_run_trains_all_its_epochs(name: str, tmp_path: Path) -> None:
    recipe = recipes.load(name)
    assert recipe.settings(output=tmp_path).waits == 0
    if recipe.training["keep"] == "best":
        assert recipe.settings(output=tmp_path, patience=2).waits == 2


@pytest.mark.usefixtures("worse")
@pytest.mark.parametrize(
    ("method", "first", "last"),
    [
        (ss.DiffPruningConfig(density=0.05, finetune_epochs=8), 6, 8),
        (ss.SparseConfig(density=0.05, select="magnitude", full_epochs=8), 8, 6),
    ],
)
def test_a_stage_whose_end_is_needed_is_not_cut(
    backbone: Path, data: TaskData, tmp_path: Path, method: MethodConfig, first: int, last: int
) -> None:
    """Weights are chosen by the whole of the first stage; the second stops as every run does."""
    results = train(attached(backbone, data, method), data, settings(tmp_path, epochs=6))
    assert results.first_stage is not None
    assert len(results.first_stage["history"]) == first
    assert (results.epochs, results.planned_epochs) == (2 + PATIENCE, last)


@pytest.mark.usefixtures("worse")
def test_a_comparison_trains_all_alike(tmp_path: Path) -> None:
    text_backbone(tmp_path / "bert")
    write(tmp_path / "rows.csv", reviews(24))
    values = {
        "backbone": [{"model": "bert"}],
        "task": [{"train": "rows.csv", "text": "text"}],
        "contender": [{"method": "probe", "rates": [0.01]}],
        "seeds": [0],
        "epochs": 7,
        "costs": False,
    }
    run(comparison_from(values, tmp_path, "the test"), tmp_path / "out.jsonl", tell=lambda text: None)
    (found,), _ = read(tmp_path / "out.jsonl")
    assert found.measured is not None
    assert len(found.measured["history"]) == 7


# --- resuming ----------------------------------------------------------------------------------------------


def interrupted(backbone: Path, data: TaskData, output: Path, monkeypatch: pytest.MonkeyPatch, **how: Any) -> None:
    """A run that was stopped within its third epoch."""

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(StopIfDiverged, "on_step_begin", stop, raising=False)
        with pytest.raises(KeyboardInterrupt):
            train(attached(backbone, data), data, settings(output, **how))


@pytest.mark.parametrize(("began", "waits"), [({}, PATIENCE), ({"patience": 2}, 2), ({"patience": 0}, 0)])
def test_a_resumed_run_waits_as_it_began(
    backbone: Path,
    data: TaskData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    began: dict[str, Any],
    waits: int,
) -> None:
    interrupted(backbone, data, tmp_path, monkeypatch, epochs=4, **began)
    assert checkpoints.as_begun(settings(tmp_path, resume=True)).waits == waits
    results = train(attached(backbone, data), data, settings(tmp_path, epochs=4, resume=True))
    assert results.settings["patience"] == (waits or None)


def test_a_run_of_before_there_was_a_default_goes_on_without_one(
    backbone: Path, data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run.json says null, which was the default and meant never."""
    interrupted(backbone, data, tmp_path, monkeypatch, epochs=4, patience=0)
    assert json.loads((tmp_path / checkpoints.FOLDER / checkpoints.RUN).read_text())["patience"] is None
    other = settings(tmp_path, epochs=4, resume=True, patience=2)
    with pytest.raises(OutputError, match="holds another run \\(patience is 2 and was null\\)"):
        train(attached(backbone, data), data, other)
    results = train(attached(backbone, data), data, settings(tmp_path, epochs=4, resume=True))
    assert (results.epochs, results.settings["patience"]) == (4, None)


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_a_damaged_run_is_told_by_what_reads_it(tmp_path: Path, content: str) -> None:
    (tmp_path / checkpoints.FOLDER).mkdir()
    (tmp_path / checkpoints.FOLDER / checkpoints.RUN).write_text(content)
    asked = settings(tmp_path, resume=True)
    assert checkpoints.as_begun(asked) == asked
