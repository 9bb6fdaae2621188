"""What kinds have in common whose answers are made of a head's outputs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from datasets import Dataset
from numpy.typing import NDArray

from sidestep.data import Fields, Generation, LabelSpace
from sidestep.kinds.assess import Assessment
from sidestep.kinds.base import Probabilities, TaskKind, targets_of
from sidestep.kinds.running import Headed, logits
from sidestep.model.attach import Attached


class FromLogits(TaskKind):
    """A kind that is scored and predicted from the outputs of one head."""

    def judge(
        self, model: Attached, encoded: Dataset, fields: Fields, labels: LabelSpace, generation: Generation, **how: Any
    ) -> Assessment:
        """Scores of the outputs."""
        assert isinstance(model, Headed)
        return self.assess(logits(model, encoded, fields, **how), targets_of(encoded), labels.names or None)

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
        assert isinstance(model, Headed)
        return self.columns(labels, logits(model, rows, fields, **how), probabilities)

    @abstractmethod
    def columns(
        self, labels: LabelSpace, found: NDArray[Any], probabilities: Probabilities = "all"
    ) -> dict[str, list[Any]]:
        """Predictions and probabilities by column name, from outputs (rows, outputs)."""
