"""VQA: the answer to a question about a picture, one of a list, learned by the soft scores of several people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from scipy.special import expit

from sidestep.data import Fields, LabelSpace
from sidestep.data.answers import Answers, Said, answer_list
from sidestep.kinds.assess import FEW, Assessment, OfClass
from sidestep.kinds.base import OWN, PREDICTION, PROBABILITY, Probabilities, register
from sidestep.kinds.from_logits import FromLogits
from sidestep.kinds.pictured import Pictured
from sidestep.kinds.task_data import Asked, TaskData
from sidestep.metrics import METRICS, of_evaluation
from sidestep.model.heads import Answer

COLUMNS = 50
"""Up to so many answers have a column of probabilities each. Of more, that of the predicted one is told."""
CREDIT, USUAL = (Said._fields.index(name) for name in ("credit", "usual"))


@register
class Vqa(Pictured, FromLogits):
    """An answer of a list."""

    name = "vqa"
    answer = "an answer to a question about a picture"
    metrics, best = METRICS["vqa"], "vqa_accuracy"
    asks = ("answers",)

    def labels_asked(self, rows: Dataset, fields: Fields, asked: Asked) -> LabelSpace:
        """The most frequent answers of the training rows."""
        assert fields.label is not None
        return Answers(self.name, answer_list(rows, fields.label, asked.answers))

    def labels(self, rows: Dataset, fields: Fields) -> LabelSpace:
        """The answers that are not rare."""
        return self.labels_asked(rows, fields, Asked())

    def stored_labels(self, names: Sequence[str]) -> LabelSpace:
        """The list of answers."""
        return Answers(self.name, tuple(names))

    def head(self, data: TaskData, pool: Any = None) -> Answer:
        """One output for each answer."""
        return Answer(num_labels=data.labels.outputs, labels=data.labels.names, pool=pool)

    def blank_head(self, outputs: int, pool: Any = None) -> Answer:
        """One output for each answer."""
        return Answer(num_labels=outputs, pool=pool)

    def columns(
        self, labels: LabelSpace, found: NDArray[Any], probabilities: Probabilities = "all"
    ) -> dict[str, list[Any]]:
        """The answer of the largest output, with its probability or those of all answers."""
        chosen = found.argmax(axis=1)
        columns: dict[str, list[Any]] = {PREDICTION: [labels.names[index] for index in chosen]}
        if probabilities == "none":
            return columns
        shares = expit(found.astype(np.float64))
        if probabilities == "all" and len(labels.names) <= COLUMNS:
            return columns | {
                f"{PROBABILITY}{name}": own for name, own in zip(labels.names, shares.T.tolist(), strict=True)
            }
        return columns | {OWN: shares.max(axis=1).tolist()}

    def compute_metrics(self, data: TaskData) -> Callable[[Any], dict[str, float]]:
        """The two accuracies."""
        return lambda evaluation: self.assess(*of_evaluation(self.name, evaluation)).scores

    def assess(
        self, predictions: NDArray[Any], targets: NDArray[Any], names: Sequence[str] | None = None
    ) -> Assessment:
        """VQA accuracy, and the share of rows whose most frequent answer is predicted, with the best single answer.

        Args:
            predictions: (rows, answers) logits.
            targets: (rows, own, fields of `Said`), with the number of the answer first.
            names: of the answers.
        """
        predictions, targets = np.asarray(predictions), np.asarray(targets, dtype=np.float64)
        chosen, count = predictions.argmax(axis=1), predictions.shape[1]
        numbers = targets[..., 0].astype(int)
        scored = {"vqa_accuracy": targets[..., CREDIT], "accuracy": targets[..., USUAL]}
        hits = numbers == chosen[:, None]
        usual = targets[..., USUAL] > 0
        rows, found = (np.bincount(numbers[which], minlength=count) for which in (usual, usual & hits))
        few = (names or ()) if count <= FEW else ()
        return Assessment(
            scores={name: float((values * hits).sum(axis=1).mean()) for name, values in scored.items()},
            constant={
                name: float(np.bincount(numbers.ravel(), values.ravel(), count).max() / len(targets))
                for name, values in scored.items()
            },
            classes={
                name: OfClass(rows=int(all_), recall=float(own / all_) if all_ else None)
                for name, all_, own in zip(few, rows, found, strict=False)
            },
        )
