"""What few dev rows can tell: differences that the choice of the rows alone makes."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import fmean

from sidestep.report.rows import Results

#: So many dev rows are few: what `sidestep compare --quick` takes at most.
FEW = 128
#: Metrics that are a share of the dev rows, so that a binomial standard error is theirs.
SHARES = frozenset({"accuracy", "exact_match"})
#: How many standard errors are noise.
ERRORS = 2


@dataclass(frozen=True, kw_only=True)
class Doubt:
    """What a task's dev rows leave open.

    Attributes:
        task: its name.
        metric: of its scores.
        rows: of dev, the fewest that a score was taken on.
        seeds: the most that a contender has.
        noise: differences of scores under it are noise; None where the metric is no share of rows.
    """

    task: str
    metric: str
    rows: int
    seeds: int
    noise: float | None


def noise_of(share: float, rows: int) -> float:
    """Two binomial standard errors of a share of rows, and at least one row: a smaller difference cannot be.

    Args:
        share: 0 to 1.
        rows: that it was counted on.
    """
    share = min(max(share, 0.0), 1.0)
    return max(ERRORS * sqrt(share * (1 - share) / rows), 1 / rows)


def doubts(results: Results) -> list[Doubt]:
    """A doubt for each task whose dev rows are known."""
    found = []
    for name in dict.fromkeys(task.name for group in results.groups for task in group.tasks):
        tasks = [task for group in results.groups for task in group.tasks if task.name == name]
        scores = [row.scores[name].estimate for group in results.groups for row in group.rows if name in row.scores]
        rows = min((task.dev_rows for task in tasks if task.dev_rows), default=None)
        if rows is not None and scores:
            share = tasks[0].metric in SHARES
            found.append(
                Doubt(
                    task=name,
                    metric=tasks[0].metric,
                    rows=rows,
                    seeds=max(score.count for score in scores),
                    noise=noise_of(fmean(score.mean for score in scores), rows) if share else None,
                )
            )
    return found


def quick_line(results: Results) -> str:
    """What to think of scores on few dev rows; "" if no task has few."""
    few = [doubt for doubt in doubts(results) if doubt.rows <= FEW]
    if not few:
        return ""
    begin = "Quick" if all(doubt.seeds == 1 for doubt in few) else "Coarse"
    shares = [doubt for doubt in few if doubt.noise is not None]
    other = [f"{doubt.task} ({doubt.rows} dev rows, {doubt.metric})" for doubt in few if doubt.noise is None]
    parts = []
    if len(shares) == 1:
        parts.append(
            f"{shares[0].rows} dev rows of {shares[0].task}. Differences under {_points(shares[0])} are noise."
        )
    elif shares:
        said = "; ".join(f"{doubt.task} {_points(doubt)} ({doubt.rows} dev rows)" for doubt in shares)
        parts.append(f"few dev rows. Differences under these are noise: {said}.")
    if shares:
        parts.append(
            "That is two binomial standard errors, 2 √(p(1 − p)/n): p is the mean score of all contenders, "
            "n the number of dev rows."
        )
    if other:
        parts.append(f"No such noise is known where the metric is no share of rows: {'; '.join(other)}.")
    return f"{begin}: {' '.join(parts)}"


def _points(doubt: Doubt) -> str:
    return f"{100 * (doubt.noise or 0.0):.1f} points"
