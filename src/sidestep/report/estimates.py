"""Means over seeds, with Student's t interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values.
        half: half the width of the 95 % interval for the mean; None for a single value, which has no spread.
        count: of values.
    """

    mean: float
    half: float | None
    count: int

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean itself where there is none."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean itself where there is none."""
        return self.mean + (self.half or 0.0)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value per seed, with its interval by Student's t.

    Raises:
        ValueError: if there is no value.
    """
    if not values:
        raise ValueError("an estimate needs at least one value")
    count = len(values)
    if count == 1:
        return Estimate(mean=values[0], half=None, count=1)
    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))
    return Estimate(mean=fmean(values), half=quantile * stdev(values) / sqrt(count), count=count)
