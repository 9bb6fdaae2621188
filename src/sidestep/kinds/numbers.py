"""A number for each row."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidestep.data import LabelSpace
from sidestep.kinds.assess import Assessment
from sidestep.kinds.base import PREDICTION, Probabilities, register
from sidestep.kinds.from_logits import FromLogits
from sidestep.kinds.task_data import TaskData
from sidestep.metrics import METRICS, ScoreWarning, scores
from sidestep.model.heads import Regress


@register
class Regression(FromLogits):
    """A number."""

    name = "regress"
    answer = "a number"
    metrics, best = METRICS["regress"], "pearson"

    def head(self, data: TaskData, pool: Any = None) -> Regress:
        """One output, which starts at the mean of the targets."""
        return Regress(pool=pool, center=float(np.mean(data.train.with_format(None)["labels"][:])))

    def blank_head(self, outputs: int, pool: Any = None) -> Regress:
        """The same for a plan."""
        return Regress(pool=pool)

    def columns(
        self, labels: LabelSpace, found: NDArray[Any], probabilities: Probabilities = "all"
    ) -> dict[str, list[Any]]:
        """The number of each row."""
        return {PREDICTION: found[:, 0].astype(float).tolist()}

    def assess(
        self, predictions: NDArray[Any], targets: NDArray[Any], names: Sequence[str] | None = None
    ) -> Assessment:
        """The scores with the mean as the single answer for all rows."""
        targets = np.asarray(targets)
        with warnings.catch_warnings():
            # that a correlation with the mean is not defined is plain here
            warnings.simplefilter("ignore", ScoreWarning)
            constant = scores(self.name, np.full(len(targets), targets.mean(dtype=np.float64)), targets)
        return Assessment(scores=scores(self.name, predictions, targets), constant=constant)
