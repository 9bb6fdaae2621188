"""How long a run will take, by a few batches that are timed before it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from sidestep import ranks
from sidestep.kinds.prepare import TaskData
from sidestep.measure.step import Batch, evaluation_seconds, seconds_of, step_seconds
from sidestep.model.attach import Attached
from sidestep.model.side_model import SideModel
from sidestep.tasks.predict import written
from sidestep.training.settings import TrainSettings

TIMED = 3
"""Batches that are timed, of training and of dev rows."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of an epoch's batches, and of an evaluation of the dev rows. Each process takes its share of them."""

    epoch: float
    evaluation: float

    @classmethod
    def measured(cls, model: Attached, data: TaskData, settings: TrainSettings) -> Pace:
        """The pace of a model on a run's rows. Mode, weights and random generators stay as they are.

        The pace leaves out the clipping of gradients, logs and checkpoints.
        """
        size, bf16 = settings.batch_size, settings.bf16
        whole, rest = divmod(len(data.train), size)
        steps = step_seconds(model, _batches(data, data.train, ranks.share(size)), bf16=bf16)
        checks = evaluation_seconds(model, _batches(data, data.dev, ranks.share(settings.eval_rows)), bf16=bf16)
        count = whole if settings.drop_last else whole + rest / size
        shares = len(data.dev) / min(settings.eval_rows, len(data.dev))
        writing = _writing_seconds(model, data, settings) if data.generation is not None else 0.0
        return cls(
            epoch=statistics.mean(steps) * max(count, 1),
            evaluation=(statistics.mean(checks) + writing) * shares,
        )

    def seconds(self, epochs: float, *, more_evaluations: int = 0) -> float:
        """Seconds of so many epochs with an evaluation after each, and of more evaluations."""
        return epochs * self.epoch + (epochs + more_evaluations) * self.evaluation


def _batches(data: TaskData, rows: Dataset, size: int) -> list[Callable[[], Batch]]:
    """What makes a few of the Trainer's whole batches, of all lengths. Their mean is that of all batches."""
    return [partial(_batch, data, rows, index) for index in _spread(rows, size)]


def _batch(data: TaskData, rows: Dataset, index: list[int]) -> Batch:
    return data.collate([rows[row] for row in index])


def _spread(rows: Dataset, size: int) -> list[list[int]]:
    """The rows of at most `TIMED` such batches. Their lengths are spread evenly over those of all batches."""
    order, lengths = list(range(len(rows))), [0] * len(rows)
    if "length" in rows.column_names:
        lengths = rows["length"][:]
        # seeded: the order of a run itself, which comes from the global generator, is left alone
        order = get_length_grouped_indices(lengths, size, generator=torch.Generator().manual_seed(0))
    whole = max(len(rows) // size, 1)
    batches = [order[size * place : size * (place + 1)] for place in range(whole)]
    batches.sort(key=lambda batch: max(lengths[row] for row in batch))
    timed = min(whole, TIMED)
    return [batches[(2 * part + 1) * whole // (2 * timed)] for part in range(timed)]


def _writing_seconds(model: Attached, data: TaskData, settings: TrainSettings) -> float:
    """Seconds for writing the texts of one batch. Texts are written from the shortest on, and it is a middle one."""
    assert isinstance(model, SideModel)
    assert data.generation is not None
    size, generation = ranks.share(settings.eval_rows), data.generation
    order = np.argsort(data.dev["length"][:], kind="stable")
    first = max(len(order) - size, 0) // 2
    rows, training = data.dev.select(order[first : first + size]), model.training
    try:
        with ranks.alone():
            return seconds_of(lambda: written(model, rows, generation, batch_size=size), model.device)
    finally:
        model.train(training)
