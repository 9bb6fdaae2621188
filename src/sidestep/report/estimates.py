"""Means over seeds and differences between them, with Student's t interval."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev, variance

from scipy.special import stdtrit

CONFIDENCE = 0.95
#: A task's scores by seed.
BySeed = Mapping[Hashable, float]


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
    return Estimate(mean=fmean(values), half=_quantile(count - 1) * stdev(values) / sqrt(count), count=count)


def difference(one: Sequence[BySeed], other: Sequence[BySeed]) -> Estimate | None:
    """How far one contender's mean over tasks is above another's; None where a task has no spread.

    Scores are paired by task and seed. A task in which two seeds are not shared is compared by its two means. The
    tasks' variances are pooled as Welch and Satterthwaite do, because a seed's noise on one task says nothing of its
    noise on the next.

    Args:
        one, other: the scores of each task, in the same order of tasks.
    """
    means: list[float] = []
    parts: list[tuple[float, int]] = []
    count = 0
    for ours, theirs in zip(one, other, strict=True):
        shared = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        samples = [shared] if len(shared) > 1 else [list(ours.values()), list(theirs.values())]
        fewest = min(map(len, samples))
        if fewest < 2:
            return None
        means.append(fmean(shared) if len(shared) > 1 else fmean(ours.values()) - fmean(theirs.values()))
        parts += [(variance(sample) / len(sample), len(sample) - 1) for sample in samples]
        count += fewest
    if not means:
        return None
    largest = max(part for part, _ in parts)
    if largest == 0:
        return Estimate(mean=fmean(means), half=0.0, count=count)
    # in shares of the largest, whose squares neither vanish nor overflow
    shares = [(part / largest, freedom) for part, freedom in parts]
    total = sum(share for share, _ in shares)
    freedom = total**2 / sum(share**2 / freedom for share, freedom in shares)
    half = _quantile(freedom) * sqrt(total) * sqrt(largest) / len(means)
    return Estimate(mean=fmean(means), half=half, count=count)


def _quantile(freedom: float) -> float:
    """Student's t for the interval, with so many degrees of freedom."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2))
