"""What kinds have in common whose answers are made of outputs for every token, over windows of long texts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from sidestep.data import DataError, Fields, Generation, LabelSpace
from sidestep.kinds.assess import Assessment
from sidestep.kinds.base import Probabilities, TaskKind
from sidestep.kinds.running import token_logits
from sidestep.kinds.task_data import Asked, TaskData
from sidestep.model.attach import Attached
from sidestep.model.side_model import SideModel

Outputs = Sequence[NDArray[Any]]
"""(tokens, outputs) of each window, without padding."""


class FromTokens(TaskKind):
    """A kind that is scored and predicted from outputs for every token.

    Its encoded rows are windows, with what is needed to put them together again in columns besides.
    """

    of_tokens = True

    def strata(self, fields: Fields) -> str | None:
        """None: rows are of no class."""
        return None

    def prepare(self, train: Dataset, dev: Dataset | None, fields: Fields, processor: Any, asked: Asked) -> TaskData:
        """The rows as windows."""
        if asked.shots is not None:
            raise DataError(f"shots={asked.shots}: kind={self.name!r} has no classes of rows. Leave --shots out")
        return super().prepare(train, dev, fields, processor, asked)

    @abstractmethod
    def score(self, outputs: Outputs, encoded: Dataset, labels: LabelSpace) -> Assessment:
        """The scores of outputs of encoded rows with labels."""

    @abstractmethod
    def columns(
        self, outputs: Outputs, encoded: Dataset, labels: LabelSpace, probabilities: Probabilities
    ) -> dict[str, list[Any]]:
        """What is predicted, with an entry for each row of the user's."""

    def compute_metrics(self, data: TaskData) -> Callable[[Any], dict[str, float]]:
        """Scores of a Trainer's evaluation of the dev rows."""
        return lambda evaluation: self.assess_evaluation(evaluation, data).scores

    def assess_evaluation(self, evaluation: Any, data: TaskData) -> Assessment:
        """The assessment of what a Trainer's evaluation of the dev rows gave."""
        found = evaluation.predictions
        if isinstance(found, tuple):  # an own head of spans: beginnings and ends
            found = np.stack(found[:2], axis=-1)
        lengths = data.dev.with_format(None)["length"][:]
        outputs = [row[:length] for row, length in zip(found, lengths, strict=True)]
        return self.score(finite(outputs), data.dev, data.labels)

    def judge(
        self, model: Attached, encoded: Dataset, fields: Fields, labels: LabelSpace, generation: Generation, **how: Any
    ) -> Assessment:
        """Scores of the outputs."""
        assert isinstance(model, SideModel)
        collate = how.pop("collate", None) or self.collate(fields, model.extras["processor"])
        return self.score(finite(token_logits(model, encoded, fields, collate=collate, **how)), encoded, labels)

    def predict(
        self,
        model: Attached,
        rows: Dataset,
        fields: Fields,
        labels: LabelSpace,
        probabilities: Probabilities,
        **how: Any,
    ) -> dict[str, list[Any]]:
        """Columns of the outputs."""
        assert isinstance(model, SideModel)
        collate = self.collate(fields, model.extras["processor"])
        outputs = finite(token_logits(model, rows, fields, collate=collate, **how))
        return self.columns(outputs, rows, labels, probabilities)


def finite(outputs: Outputs) -> Outputs:
    """The outputs, if all are finite numbers.

    Raises:
        ValueError: if some are not.
    """
    if bad := sum(not np.isfinite(each).all() for each in outputs):
        raise ValueError(
            f"predictions are not finite in {bad} of {len(outputs)} windows: the model may have diverged. Train with a "
            "lower learning rate, or in fp32"
        )
    return outputs
