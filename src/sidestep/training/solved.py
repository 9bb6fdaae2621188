"""Runs whose head is solved from what the method reads, without steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sidestep.disk.features import FeatureStore
from sidestep.kinds.features import Feed
from sidestep.kinds.solve import Problem, Solution, solve
from sidestep.kinds.task_data import TaskData
from sidestep.methods.readout import ReadoutConfig
from sidestep.model.features import VECTOR
from sidestep.model.side_model import SideModel
from sidestep.tasks.features import Kept, kept_features
from sidestep.training.outcome import judge_run, told_of
from sidestep.training.results import Results
from sidestep.training.settings import TrainSettings

PROBLEMS = ("single", "multi", "regress")


def solve_run(
    model: SideModel,
    data: TaskData,
    settings: TrainSettings,
    metric: str,
    *,
    recipe: Mapping[str, Any] | None,
    tell: Callable[[str], object] | None,
    store: FeatureStore | None,
) -> Results:
    """Solve a model's head on the training rows, score it on the dev rows, and save it as a task with its results.

    Arguments and errors as of `train`.
    """
    if data.labels.kind not in PROBLEMS:
        raise ValueError(
            f"{model.record.name} solves a linear map for classes or numbers, and the problem is {data.labels.kind!r}: "
            "choose another method"
        )
    kept = _kept(model, data, settings, tell, store)
    begin = time.perf_counter()
    found = _solved(model, kept.data, settings)
    seconds = time.perf_counter() - begin
    if found.lost > 0.001 and tell is not None:
        tell(f"readout: {found.lost:.1%} of the variance of its vectors is outside of the span that it was solved in")
    model.eval()
    judged = judge_run(model, kept.data, settings)
    model.save_pretrained(settings.output, overwrite=settings.overwrite or settings.resume, scores=judged.scores)
    scored = {f"dev_{name}": value for name, value in judged.scores.items()}
    results = Results(
        **told_of(model, data, settings, recipe, judged),
        metric=metric,
        best_epoch=1.0,
        epochs=1.0,
        planned_epochs=1,
        method={"name": model.record.name, **model.settings.method.to_dict(), "chosen_penalty": found.penalty},
        step=None,
        seconds=round(seconds, 3),
        estimated_seconds=None,
        epoch_seconds=[round(seconds, 4)],
        resumed_from=None,
        history=[{"epoch": 1.0, "train_loss": found.loss, "dev_loss": _dev_loss(model, kept.data), **scored}],
        features=kept.told,
    )
    results.write(settings.output)
    return results


def _kept(
    model: SideModel,
    data: TaskData,
    settings: TrainSettings,
    tell: Callable[[str], object] | None,
    store: FeatureStore | None,
) -> Kept:
    """The vectors of all rows. They are few, and are read again and again, so they are kept in any case.

    Raises:
        ValueError: if they cannot be kept.
    """
    options = settings.feature_options
    if options.where in ("auto", "off"):
        options = replace(options, where="ram")
    found = kept_features(
        model,
        data,
        options,
        passes=1,
        batch_size=settings.eval_batch_size,
        autocast=settings.bf16,
        tell=tell,
        progress=settings.progress,
        store=store,
    )
    if found is None:
        raise ValueError(f"{model.record.name} needs the vectors of all rows, and they could not be kept")
    return found


def _solved(model: SideModel, data: TaskData, settings: TrainSettings) -> Solution:
    """Solve the head, and put the map into it."""
    config, head = cast("ReadoutConfig", model.settings.method), model.head
    assert head is not None
    found = solve(
        _vectors(data),
        torch.from_numpy(np.array(data.train.with_format(None)["labels"][:])),
        cast("Problem", data.labels.kind),
        outputs=head.linear.out_features,
        penalty=config.penalty,
        balanced=config.class_weights == "balanced",
        seed=settings.seed,
    )
    with torch.no_grad():
        head.linear.weight.copy_(found.weight)
        head.linear.bias.copy_(found.bias)
    return found


def _vectors(data: TaskData) -> Callable[[int, int], Tensor]:
    """The vectors of training rows from one number to another."""
    feed = cast("Feed", data.collate.features)

    def vectors(start: int, end: int) -> Tensor:
        return torch.cat([feed.entry.state(row, VECTOR) for row in feed.ids[start:end]]).float()

    return vectors


def _dev_loss(model: SideModel, data: TaskData) -> float:
    total, size = 0.0, 1024
    with torch.no_grad():
        for start in range(0, len(data.dev), size):
            rows = [data.dev[number] for number in range(start, min(start + size, len(data.dev)))]
            batch = data.collate(rows)
            loss = model(features=batch["features"].to(model.device), labels=batch["labels"].to(model.device)).loss
            total += float(loss) * len(rows)
    return total / len(data.dev)
