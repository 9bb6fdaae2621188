"""The outcome of a run: its scores and costs, as results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer

from sidestep import ranks
from sidestep.backbone.source import source_of
from sidestep.data import Generation
from sidestep.disk.task_folder import WEIGHTS
from sidestep.kinds.assess import Assessment
from sidestep.kinds.prepare import TaskData
from sidestep.measure.step import StepCost
from sidestep.model.attach import Attached
from sidestep.tasks.predict import judge_encoded
from sidestep.training import checkpoints
from sidestep.training.callbacks import (
    EpochClock,
)
from sidestep.training.notes import notes_of
from sidestep.training.results import PACKAGES, Results, device_name
from sidestep.training.settings import TrainSettings
from sidestep.versions import versions


def ends_scored(settings: TrainSettings) -> bool:
    """Whether the last epoch's evaluation scored the kept weights. Under autocast it is not `sidestep eval`'s."""
    return settings.keep == "last" and not settings.bf16


def last_scores(history: list[dict[str, float]]) -> dict[str, float]:
    """The dev scores of the last epoch."""
    scored = {name.removeprefix("dev_"): value for name, value in history[-1].items() if name.startswith("dev_")}
    return {name: value for name, value in scored.items() if name != "loss"}


def judge_run(model: Attached, data: TaskData, settings: TrainSettings) -> Assessment:
    """The scores of a model on the dev rows."""
    how = data.generation or Generation()
    size, workers = settings.eval_rows, settings.workers
    return judge_encoded(
        model, data.dev, data.fields, data.labels, how, batch_size=size, workers=workers, collate=data.collate
    )


def told_of(
    model: Attached, data: TaskData, settings: TrainSettings, recipe: Mapping[str, Any] | None, judged: Assessment
) -> dict[str, Any]:
    """The fields of the results that do not depend on how the weights were found."""
    return {
        "scores": judged.scores,
        "constant": judged.constant,
        "classes": judged.classes,
        "head": model.head_config,
        "backbone": {**source_of(model.backbone).to_dict(), "dtype": model.precisions, "digest": model.digest.exact},
        "keep": "/".join(dict.fromkeys(part.fold.keeping.way for part in model.parts)),
        "labels": list(data.labels.names),
        "data": {
            "train_rows": len(data.train),
            "dev_rows": len(data.dev),
            "dev_source": data.dev_source,
            "truncated": data.truncated,
            **data.handling,
        },
        "trainable_parameters": sum(parameter.numel() for _, parameter in model.trained_parameters()),
        "task_bytes": (settings.output / WEIGHTS).stat().st_size,
        "device": device_name(model.device),
        "versions": versions(PACKAGES),
        "processes": ranks.started(),
        "seed": settings.seed,
        "learning_rate": settings.rate(model.record.config),
        "settings": settings.to_dict(),
        "recipe": dict(recipe) if recipe else None,
        "notes": list(notes_of(model, writes=data.generation is not None)),
    }


def results_of(
    trainer: Trainer,
    data: TaskData,
    settings: TrainSettings,
    recipe: Mapping[str, Any] | None,
    judged: Assessment,
    cost: StepCost | None,
    seconds: float,
    estimate: float | None,
    start: Path | None,
    history: list[dict[str, float]],
    clock: EpochClock,
) -> Results:
    """The results of a run that has ended."""
    model, state, steps = trainer.model, trainer.state, settings.steps_per_epoch(len(data.train))
    kept = (state.best_global_step if settings.keep == "best" else None) or state.global_step
    return Results(
        **told_of(model, data, settings, recipe, judged),
        metric=str(trainer.args.metric_for_best_model),
        best_epoch=round(kept / steps, 3),
        epochs=round(state.global_step / steps, 3),
        planned_epochs=round(trainer.args.num_train_epochs),
        method={"name": model.record.name, **model.settings.method.to_dict()},
        step=cost,
        seconds=round(seconds, 3),
        estimated_seconds=None if estimate is None else round(estimate, 3),
        epoch_seconds=clock.seconds,
        resumed_from=None if start is None else checkpoints.step_of(start),
        history=history,
    )


def history_of(log: list[dict[str, Any]]) -> list[dict[str, float]]:
    """The dev scores of each epoch, with the training loss logged at its end."""
    history, loss = [], float("nan")
    for entry in log:
        loss = entry.get("loss", loss)
        if "eval_loss" in entry:
            own = {name: value for name, value in entry.items() if name.startswith("eval_")}
            timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
            dev = {name.replace("eval_", "dev_"): value for name, value in own.items() if name not in timing}
            history.append({"epoch": entry["epoch"], "train_loss": loss, **dev})
    return history
