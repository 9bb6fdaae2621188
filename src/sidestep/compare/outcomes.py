"""What a comparison keeps of a run, which run is best, and what is said of one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from sidestep.compare.records import Record
from sidestep.messages import counted
from sidestep.metrics import GREATER_IS_BETTER
from sidestep.model.attach import Attached
from sidestep.training.results import Results

Choice = tuple[float, int]
"""A learning rate, and how many epochs."""


def best(trials: Mapping[Choice, Record]) -> Choice | None:
    """The rate and epochs with the best score. Of equal ones those with the smaller loss."""

    def value(measured: Mapping[str, Any]) -> tuple[float, float]:
        sign = 1 if GREATER_IS_BETTER.get(measured["metric"], True) else -1
        loss = (measured.get("history") or [{}])[-1].get("dev_loss")
        return sign * measured["score"], -(loss if loss is not None else math.inf)

    came_through = {choice: record.measured for choice, record in trials.items() if record.measured is not None}
    return max(came_through, key=lambda choice: value(came_through[choice]), default=None)


def measured(results: Results, model: Attached) -> dict[str, Any]:
    """What is kept of a training run. For a sparse diff also its nonzeros, and for a first stage its outcome."""
    metric, first = results.metric, results.first_stage
    history = [
        {
            "epoch": entry["epoch"],
            "loss": entry["train_loss"],
            "dev_loss": entry["dev_loss"],
            "score": entry[f"dev_{metric}"],
        }
        for entry in results.history
    ]
    if not math.isfinite(results.scores[metric]):
        raise ValueError(f"{metric} on dev is {results.scores[metric]}, no finite number")
    pick = max if GREATER_IS_BETTER.get(metric, True) else min
    nonzeros = [len(part.sparse.values) for part in model.parts if part.sparse is not None]
    further: dict[str, Any] = {"nonzeros": sum(nonzeros)} if nonzeros else {}
    if first is not None:
        further["first_stage"] = {name: value for name, value in first.items() if name != "history"}
    return {
        "metric": metric,
        "score": results.scores[metric],
        "scores": results.scores,
        "constant": results.constant,
        "best_epoch_score": pick(entry["score"] for entry in history),
        "history": history,
        "parameters": results.trainable_parameters,
        "task_bytes": results.task_bytes,
        "train_seconds": round(sum(results.epoch_seconds) + sum(first["epoch_seconds"] if first else ()), 4),
        "epoch_seconds": statistics.median(results.epoch_seconds),
        "run_seconds": results.seconds,
        "epochs": results.planned_epochs,
        "rate": results.learning_rate,
        **({} if results.features is None else {"features": results.features}),
        **further,
    }


def told(record: Record) -> str:
    """The line of progress that a result is."""
    asked = record.settings
    text = f"{asked['task']}, {asked['contender']}, "
    if asked["rate"] is not None:
        text += f"rate {asked['rate']:g}, {counted(asked['epochs'], 'epoch')}, "
    text += f"seed {asked['seed']}, {asked['part']}: "
    if record.measured is None:
        return f"{text}failed: {record.reason}"
    return f"{text}{record.measured['metric']} {record.measured['score']:.4f} ({record.seconds:.0f} s)"
