"""A first stage in which all weights are free, then projected. After it a sparse diff is trained.

The stage has a Trainer and checkpoints of its own, in a folder among those of the run. It ends when the projected diff
is written there. So a run can be resumed in the stage, after it, and between the two.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from transformers import Trainer

from sidestep import ranks
from sidestep.disk.atomic import whole
from sidestep.interface.sparse_delta import SparseDelta
from sidestep.measure.step import Batch, StepCost, measure_step
from sidestep.model.attach import Attached
from sidestep.model.side_model import SideModel
from sidestep.training import checkpoints
from sidestep.training.callbacks import EpochClock
from sidestep.training.settings import TrainSettings

FOLDER = "relax"
PROJECTED = "projected.safetensors"
STAGE = "stage"  # the key of what came of it, in the file's metadata

MakeTrainer = Callable[[TrainSettings, Path | None, EpochClock, Callable[[], Optimizer]], Trainer]
"""The Trainer for settings, from a checkpoint on, with a clock and the optimizer that the function makes."""


def relaxes(model: Attached) -> TypeGuard[SideModel]:
    """Whether training has this stage.

    Raises:
        ValueError: if it would have, but the model has two towers.
    """
    if not model.parts[0].relaxes:
        return False
    if not isinstance(model, SideModel):
        raise ValueError(f"{model.record.name} trains one backbone, and this is a pair: choose sparse for the two")
    return True


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """The outcome of the stage.

    Attributes:
        found: see `SparseDelta.project`.
        log: the Trainer's log.
        seconds: of the session that ended the stage.
        epoch_seconds: of the stage's optimizer steps alone, for each epoch.
        cost: of the stage's step, where that was measured.
    """

    found: dict[str, Any]
    log: list[dict[str, Any]]
    seconds: float
    epoch_seconds: list[float]
    cost: StepCost | None

    def told(self, history: list[dict[str, float]]) -> dict[str, Any]:
        """What the results say of the stage. `history` is read from the log."""
        return {
            **self.found,
            "seconds": round(self.seconds, 3),
            "epoch_seconds": self.epoch_seconds,
            "history": history,
        }


def projected(
    model: SideModel,
    settings: TrainSettings,
    identity: Mapping[str, Any],
    start: Path | None,
    make_trainer: MakeTrainer,
    batch: Batch | None,
) -> FirstStage:
    """Run the stage, or what is left of it. Afterwards the model's diff has its positions.

    Args:
        model: with a diff pruning method, not trained yet.
        settings: of the run.
        identity: what the run is. A resumed run has to share it.
        start: the checkpoint of the second stage to continue from. With one, nothing is left to do here.
        make_trainer: see `MakeTrainer`.
        batch: on which a step's memory is measured. None: it is not measured.
    """
    folder = settings.output / checkpoints.FOLDER / FOLDER
    done = folder / PROJECTED
    if not ranks.first(done.is_file):
        stage = _relaxed(model, settings, identity, make_trainer, batch)
        ranks.first(lambda: _write(model, stage, done))
    elif start is None:
        model.load_state_dict(load_file(done))
    # as large as all of AdamW's state
    ranks.first(lambda: shutil.rmtree(folder / checkpoints.FOLDER, ignore_errors=True))
    return _read(done)


def check(model: SideModel, settings: TrainSettings) -> None:
    """Raise where settings do not fit the epochs of a stage, before anything is trained.

    Raises:
        ValueError: naming the stage.
    """
    for name, stage in (("first", own), ("last", last_stage)):
        try:
            stage(model, settings)
        except ValueError as error:
            raise ValueError(f"in the {name} stage of {model.record.name}: {error}") from error


def epochs(model: SideModel, settings: TrainSettings) -> int:
    """Epochs of both stages."""
    return own(model, settings).epochs + last_stage(model, settings).epochs


def last_stage(model: SideModel, settings: TrainSettings) -> TrainSettings:
    """How the projected diff is trained in the second stage."""
    _, (epochs, rate) = _method(model).stages(settings.epochs, settings.rate(model.record.config))
    return replace(settings, epochs=epochs, learning_rate=rate)


def _method(model: SideModel) -> SparseDelta:
    assert isinstance(model.delta, SparseDelta)
    return model.delta


def _relaxed(
    model: SideModel,
    settings: TrainSettings,
    identity: Mapping[str, Any],
    make_trainer: MakeTrainer,
    batch: Batch | None,
) -> FirstStage:
    """The stage from its last checkpoint on, and its outcome."""
    method, diff, how = _method(model), model.sparse, own(model, settings)
    assert diff is not None
    made: list[Any] = []

    def make() -> Any:
        rate = how.rate(model.record.config)
        made.append(
            model.relax(
                rate=rate, weight_decay=settings.weight_decay, max_norm=settings.max_grad_norm, seed=settings.seed
            )
        )
        return made[-1]

    begin, clock = time.perf_counter(), EpochClock()
    try:
        cost = None if batch is None else measure_step(model, batch, bf16=settings.bf16)
        start = ranks.first(lambda: checkpoints.begin(how, identity))
        trainer = make_trainer(how, start, clock, make)
        if start is not None and checkpoints.is_finished(start):
            model.load_state_dict(load_file(start / checkpoints.WEIGHTS))
            make().load_state_dict(torch.load(start / "optimizer.pt", map_location=model.device, weights_only=True))
            trainer.state.log_history = checkpoints.read_state(start)["log_history"]
        else:
            trainer.train(resume_from_checkpoint=None if start is None else str(start.resolve()))
        found = method.project(made[-1], diff)
    except BaseException:
        for optimizer in made:
            model.unrelax(optimizer)
        raise
    seconds = time.perf_counter() - begin
    return FirstStage(
        found=found, log=trainer.state.log_history, seconds=seconds, epoch_seconds=clock.seconds, cost=cost
    )


def own(model: SideModel, settings: TrainSettings) -> TrainSettings:
    """The run's settings for this stage. It has a folder of its own and ends with its last epoch."""
    output = settings.output / checkpoints.FOLDER / FOLDER
    (epochs, rate), _ = _method(model).stages(settings.epochs, settings.rate(model.record.config))
    return replace(
        settings,
        output=output,
        epochs=epochs,
        learning_rate=rate,
        keep="last",
        patience=0,
        max_grad_norm=0.0,  # the optimizer cuts the gradients of w and of the gates, which this one's are not
        resume=settings.resume and (output / checkpoints.FOLDER / checkpoints.RUN).is_file(),
        overwrite=False,
    )


def _write(model: SideModel, stage: FirstStage, path: Path) -> None:
    """Write the stage's end, in one step."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with whole(path) as beside:
        save_file(tensors, beside, metadata={STAGE: json.dumps(asdict(stage))})


def _read(path: Path) -> FirstStage:
    with safe_open(path, framework="pt") as reader:
        stage = json.loads(reader.metadata()[STAGE])
    return FirstStage(**{**stage, "cost": stage["cost"] and StepCost(**stage["cost"])})
