"""The learning rate over a run: one function of the number of optimizer steps taken."""

from __future__ import annotations

import math
from collections.abc import Callable

from sidestep.training.settings import TrainSettings


def rate_factor(settings: TrainSettings, rate: float, steps_per_epoch: int) -> Callable[[int], float]:
    """What the learning rate is multiplied with at each optimizer step.

    The rate rises from `start_rate` to its value over the warm-up. Then it stays ("constant") or goes to `end_rate`, in
    a line ("linear") or half a cosine ("cosine"). Both begin where the warm-up ends and are evaluated at every step.
    "step" divides the rate by 10 after each of the epochs in `milestones`.
    "cosine_epochs" sets the rate once per epoch. It counts the cosine from the run's first epoch, not from the end of
    the warm-up. The cosine lasts as many epochs as follow the warm-up. The run's last epochs, as many as the warm-up
    has, are at `end_rate`. That is timm's `CosineLRScheduler` as its training script steps it.

    Args:
        settings: `schedule`, `epochs`, the warm-up in one of its three forms, `start_rate`, `end_rate`, `milestones`.
        rate: the learning rate at its height.
        steps_per_epoch: optimizer steps of an epoch.

    Returns:
        A function from the steps taken so far (0 in the first one) to the factor.
    """
    epochwise = settings.schedule == "cosine_epochs"
    unit = steps_per_epoch if epochwise else 1
    total = settings.epochs * steps_per_epoch // unit
    rise = settings.rise(steps_per_epoch) // unit
    falls = [epoch * steps_per_epoch for epoch in settings.milestones]
    start, end = settings.start_rate / rate, settings.end_rate / rate

    def factor(step: int) -> float:
        time = step // unit
        if time < rise:
            return start + (1 - start) * time / rise
        if falls:
            return 0.1 ** sum(step >= fall for fall in falls)
        return end + (1 - end) * _SHAPES[settings.schedule](time, rise, total)

    return factor


def _constant(time: int, rise: int, total: int) -> float:
    return 1.0


def _linear(time: int, rise: int, total: int) -> float:
    return max(0.0, (total - time) / max(1, total - rise))


def _cosine(time: int, rise: int, total: int) -> float:
    return _half_cosine((time - rise) / max(1, total - rise))


def _cosine_from_the_start(time: int, rise: int, total: int) -> float:
    return _half_cosine(time / (total - rise))


def _half_cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


_SHAPES: dict[str, Callable[[int, int, int], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_epochs": _cosine_from_the_start,
}
