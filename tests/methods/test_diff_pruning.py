"""Diff pruning in training: relaxed, projected, trained on; resumed anywhere; given back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import Fields
from sidestep.disk import task_folder
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.methods.diff_pruning import DiffPruning
from sidestep.sparse.optimizer import DiffPruningOptimizer
from sidestep.training import checkpoints
from sidestep.training import dense_stage as relax
from sidestep.training.callbacks import ExactResume
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for, train
from small_tasks import reviews, text_backbone
from tiny import FAMILIES, LABELS

DENSITY = 0.02
#: Gates that a tiny model's few steps close.
METHOD: dict[str, Any] = {"density": DENSITY, "lambda_l0": 1e-5, "alpha_init": 1.0, "finetune_epochs": 2}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_backbone(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(backbone: Path) -> TaskData:
    train_rows, dev = Dataset.from_list(reviews(48, 0)), Dataset.from_list(reviews(16, 1))
    return prepare(train_rows, dev, Fields(text="text", label="label"), load_processor(backbone))


def attached(backbone: Path, data: TaskData, **changes: Any) -> ss.SideModel:
    torch.manual_seed(0)
    method = ss.DiffPruningConfig(**{**METHOD, **changes})
    return ss.attach(load_backbone(backbone), method, head=head_for(data))


def settings(output: Path, **changes: Any) -> TrainSettings:
    how: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 2e-3, "progress": False, "log_steps": 3}
    return TrainSettings(output=output, **{**how, **changes})


def weights(model: ss.SideModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.trunk.state_dict().items()}


def task_bytes(folder: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(folder / task_folder.WEIGHTS).items()}


@pytest.fixture(scope="module")
def whole(backbone: Path, data: TaskData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task of an uninterrupted run."""
    output = tmp_path_factory.mktemp("run") / "task"
    train(attached(backbone, data), data, settings(output))
    return output


# --- one call does all stages ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"structured": False}, {"penalty": "product", "handover": "official"}, {"state_bits": 8}]
)
def test_one_call_relaxes_projects_and_trains_on(
    changes: dict[str, Any], backbone: Path, data: TaskData, tmp_path: Path
) -> None:
    model = attached(backbone, data, **changes)
    before = weights(model)
    results = train(model, data, settings(tmp_path / "task"))
    assert model.sparse is not None
    kept = int(DENSITY * model.sparse.total)
    changed = sum(int((value != before[name]).sum()) for name, value in weights(model).items())
    assert 0.9 * kept <= changed <= kept
    first = results.first_stage
    assert first is not None
    assert first["nonzeros"] == kept
    assert 0.2 < first["open"] < 0.95
    assert len(first["history"]) == 2
    assert len(results.history) == METHOD["finetune_epochs"]
    assert results.trainable_parameters < 2 * kept + 1000
    assert not (tmp_path / "task" / "checkpoints" / relax.FOLDER / checkpoints.FOLDER).exists()

    again = ss.load(tmp_path / "task", load_backbone(backbone))
    batch = {name: value for name, value in data.collate([data.dev[0], data.dev[1]]).items() if name != "row"}
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    plain = ss.detach(model)
    assert all(torch.equal(value, before[name]) for name, value in plain.base_model.state_dict().items())


def test_the_first_stages_step_is_measured(whole: Path) -> None:
    told = json.loads((whole / "results.json").read_text())
    model = ss.load(whole)
    assert model.sparse is not None
    words = 4 * model.sparse.total
    # seven words besides theta: the pretrained value, w, alpha and four averages
    assert 7 * words <= told["step"]["optimizer_bytes"] <= 7.1 * words
    assert words <= told["step"]["gradient_bytes"] <= 1.02 * words
    assert told["step"]["peak_bytes"] > words


# --- the hand-over -----------------------------------------------------------------------------------------


def relaxed_for(model: ss.SideModel, method: DiffPruning, steps: int = 4) -> DiffPruningOptimizer:
    assert model.sparse is not None
    optimizer = method.relax(model.sparse, [], rate=1e-2, weight_decay=0.0, max_norm=1.0, seed=1)
    family = FAMILIES["bert"]
    for _ in range(steps):
        model(**family.inputs()).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("handover", ["continuous", "official"])
def test_the_handover(handover: str) -> None:
    config = ss.DiffPruningConfig(density=0.05, alpha_init=0.0, handover=handover)
    torch.manual_seed(0)
    model = ss.attach(FAMILIES["bert"].model(), config, head=ss.Classify(num_labels=LABELS)).eval()
    before = weights(model)
    method = DiffPruning(config)
    optimizer = relaxed_for(model, method)
    relaxed = weights(model)
    raw = {name: w.clone() for name, w in optimizer.weights().items()}
    found = method.project(optimizer, model.sparse)
    after = weights(model)
    assert found["nonzeros"] == int(0.05 * model.sparse.total)
    places = model.sparse.support()
    smallest = min(float((relaxed[n] - before[n]).flatten()[i].abs().min()) for n, i in places.items())
    partly = 0
    for name, value in after.items():
        inside = torch.zeros(value.numel(), dtype=torch.bool)
        if name in places:
            inside[places[name]] = True
        assert torch.equal(value.flatten()[~inside], before[name].flatten()[~inside])
        if name in relaxed and value.is_floating_point():
            left_out = (relaxed[name] - before[name]).flatten()[~inside].abs()
            # differences of sums are rounded
            assert bool((left_out <= smallest + 1e-6).all())
        if name in places:
            own = relaxed[name] if handover == "continuous" else before[name] + raw[name].view_as(value)
            assert torch.equal(value.flatten()[inside], own.flatten()[inside])
            partly += int((relaxed[name] != before[name] + raw[name].view_as(value)).flatten()[inside].sum())
    assert partly > 0, "no gate is between 0 and 1, so the two hand-overs are the same"


def test_gates_that_are_all_closed_are_an_error() -> None:
    config = ss.DiffPruningConfig(density=0.05, alpha_init=-40.0)
    model = ss.attach(FAMILIES["bert"].model(), config, head=ss.Classify(num_labels=LABELS))
    method = DiffPruning(config)
    with pytest.raises(ValueError, match=r"all gates are closed.*lambda_l0"):
        method.project(relaxed_for(model, method, 1), model.sparse)


# --- interrupted -------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill."""


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Raise at the given optimizer step of the run, whichever stage it is in."""
    taken, on_step_end = [0], ExactResume.on_step_end

    def step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        taken[0] += 1
        if taken[0] == steps:
            raise Killed
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(ExactResume, "on_step_end", step_end)


@pytest.mark.parametrize(
    "steps", [3, 6, 17, *(pytest.param(steps, marks=pytest.mark.all_laws) for steps in (8, 13, 23))]
)
def test_a_run_that_was_killed_goes_on_to_the_same_task(
    steps: int, whole: Path, backbone: Path, data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six steps an epoch: within and between epochs of both stages."""
    output = tmp_path / "task"
    with monkeypatch.context() as patched:
        stop_after(patched, steps)
        with pytest.raises(Killed):
            train(attached(backbone, data), data, settings(output, save_steps=2))
    train(attached(backbone, data), data, settings(output, save_steps=2, resume=True))
    assert task_bytes(output) == task_bytes(whole)


@pytest.mark.parametrize(
    ("owner", "name"),
    [(DiffPruning, "project"), (relax, "_write"), (relax, "_read")],
    ids=["before the projection", "before it is written", "after it was written"],
)
def test_a_run_that_was_killed_between_its_stages(
    owner: Any, name: str, whole: Path, backbone: Path, data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any, **kwargs: Any) -> None:
        raise Killed

    output = tmp_path / "task"
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, die)
        with pytest.raises(Killed):
            train(attached(backbone, data), data, settings(output))
    train(attached(backbone, data), data, settings(output, resume=True))
    assert task_bytes(output) == task_bytes(whole)


def test_a_failure_in_the_first_stage_gives_the_weights_back(
    backbone: Path, data: TaskData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attached(backbone, data)
    before = weights(model)
    stop_after(monkeypatch, 5)
    with pytest.raises(Killed):
        train(model, data, settings(tmp_path / "task"))
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"density": 0.0}, "density=0.0, but it must be a number above 0"),
        ({"density": 1.5}, "density=1.5, but it must be a number above 0 and at most 1"),
        ({"stretch": (0.0, 1.5)}, "below 0 and above 1"),
        ({"density": None}, "density=None, but it must be a finite number"),
        ({"stretch": (-1.5,)}, "a list of 2: a finite number, a finite number"),
        ({"stretch": (float("-inf"), 2.0)}, "a list of 2"),
        ({"stretch": ("a", 2.0)}, "a list of 2"),
        ({"penalty": "mean"}, '"product" or "sum"'),
        ({"state_bits": 16}, "state_bits=16, but it must be 8 or 32"),
        ({"handover": "raw"}, '"continuous" or "official"'),
        ({"lambda_l0": -1.0}, "at least 0"),
        ({"alpha_rate": 0.0}, "above 0"),
        ({"finetune_epochs": 0}, "at least 1"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ss.DiffPruningConfig(**changes)


def test_weights_that_are_not_contiguous_are_refused_by_name() -> None:
    backbone = FAMILIES["timm_resnet"].model().to(memory_format=torch.channels_last)
    model = ss.attach(backbone, ss.DiffPruningConfig(density=0.1), head=ss.Classify(num_labels=LABELS))
    name = next(name for name, weight in model.sparse.tensors.items() if not weight.is_contiguous())
    with pytest.raises(
        ss.UnsupportedBackbone, match=rf"not contiguous, and {name} is not\. Make it so by \.contiguous"
    ):
        model.relax(rate=1e-3)
    assert model.sparse.is_idle  # the hooks are still there
    model.trunk.to(memory_format=torch.contiguous_format)
    model.relax(rate=1e-3)


def test_a_config_survives_its_dictionary() -> None:
    config = ss.DiffPruningConfig(density=0.01, stretch=(-0.1, 1.1))
    assert ss.DiffPruningConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_density_of_less_than_one_entry_is_refused() -> None:
    with pytest.raises(ss.UnsupportedBackbone, match="less than one"):
        ss.attach(FAMILIES["bert"].model(), ss.DiffPruningConfig(density=1e-9))
