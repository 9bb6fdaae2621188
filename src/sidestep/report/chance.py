"""Scores beside that of one answer for all dev rows: what cannot be told from it is at chance."""

from __future__ import annotations

from sidestep.report.estimates import Estimate

AT, BELOW = "at chance", "below chance"
#: The name of the line that holds what one answer for all scores.
ONE_ANSWER = "one answer for all"
#: Two sums of the same scores may differ by so much.
ROUNDING = 1e-9


def beside(found: Estimate, constant: float | None, *, greater: bool) -> str:
    """`AT` if the interval reaches what one answer for all scores, `BELOW` if it lies on the worse side, else "".

    A single seed has no interval: it is at chance if it is not better.

    Args:
        found: a mean over seeds.
        constant: what one answer for all scores; None if that is not known.
        greater: whether a greater score is better.
    """
    if constant is None:
        return ""
    ahead = found.mean - constant if greater else constant - found.mean
    half = found.half or 0.0
    if ahead > half + ROUNDING:
        return ""
    return BELOW if found.half is not None and ahead < -half - ROUNDING else AT
