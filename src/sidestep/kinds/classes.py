"""Classes: one of several for each row, or any number of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sidestep.data import LabelSpace
from sidestep.data.labels import SEPARATOR
from sidestep.disk.table_files import DIGITS
from sidestep.kinds.assess import Assessment, OfClass
from sidestep.kinds.base import OWN, PREDICTION, PROBABILITY, Probabilities, register
from sidestep.kinds.from_logits import FromLogits
from sidestep.kinds.task_data import TaskData
from sidestep.metrics import GREATER_IS_BETTER, METRICS, scores
from sidestep.model.heads import Classify


class Classes(FromLogits):
    """What both kinds have in common: a logit for each class."""

    problem: ClassVar[Literal["single", "multi"]]

    def head(self, data: TaskData, pool: Any = None) -> Classify:
        """One output for each class."""
        return Classify(num_labels=data.labels.outputs, labels=data.labels.names, problem=self.problem, pool=pool)

    def blank_head(self, outputs: int, pool: Any = None) -> Classify:
        """The same for a plan."""
        return Classify(num_labels=outputs, problem=self.problem, pool=pool)

    def columns(
        self, labels: LabelSpace, found: NDArray[Any], probabilities: Probabilities = "all"
    ) -> dict[str, list[Any]]:
        """Predictions and probabilities by column name, from logits (rows, classes)."""
        shares = self.shares(torch.from_numpy(found).double())
        columns: dict[str, dict[str, list[Any]]] = {
            "all": {f"{PROBABILITY}{name}": each for name, each in zip(labels.names, shares.T.tolist(), strict=True)},
            "one": {OWN: self.own(found, shares)},
            "none": {},
        }
        return {PREDICTION: self.answers(labels.names, found), **columns[probabilities]}

    @abstractmethod
    def shares(self, values: torch.Tensor) -> torch.Tensor:
        """Probabilities of classes."""

    @abstractmethod
    def answers(self, names: Sequence[str], found: NDArray[Any]) -> list[str]:
        """What is predicted, as a text."""

    @abstractmethod
    def own(self, found: NDArray[Any], shares: torch.Tensor) -> list[Any]:
        """The probability of what is predicted. For several classes, their probabilities as a text."""

    @abstractmethod
    def chosen(self, found: NDArray[Any]) -> NDArray[np.bool_]:
        """(rows, classes): which classes are predicted."""

    @abstractmethod
    def true(self, targets: NDArray[Any], classes: int) -> NDArray[np.bool_]:
        """(rows, classes): which classes a row is of."""

    @abstractmethod
    def usual(self, classes: int, targets: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Logits of answers for all rows. For every score the best answer is among them."""

    def assess(
        self, predictions: NDArray[Any], targets: NDArray[Any], names: Sequence[str] | None = None
    ) -> Assessment:
        """The scores with the best single answer for all rows, and the recall of each class."""
        predictions, targets = np.asarray(predictions), np.asarray(targets)
        classes = np.arange(predictions.shape[1])
        found = scores(self.name, predictions, targets, names)
        answers = [
            scores(self.name, np.tile(answer, (len(targets), 1)), targets)
            for answer in self.usual(predictions.shape[1], targets)
        ]
        true = self.true(targets, len(classes))
        rows, hits = true.sum(axis=0), (true & self.chosen(predictions)).sum(axis=0)
        return Assessment(
            scores=found,
            constant={
                name: (max if GREATER_IS_BETTER[name] else min)(each[name] for each in answers) for name in answers[0]
            },
            classes={
                name: OfClass(rows=int(count), recall=float(hit / count) if count else None)
                for name, count, hit in zip(names or map(str, classes.tolist()), rows, hits, strict=True)
            },
        )


@register
class Single(Classes):
    """One class of several."""

    name = problem = "single"
    answer = "one label of {names}"
    metrics, best = METRICS["single"], "accuracy"
    smooths = True

    def scored(self, classes: int) -> Sequence[str]:
        """F1 is there of two classes alone."""
        return [name for name in self.metrics if name != "f1" or classes == 2]

    def shares(self, values: torch.Tensor) -> torch.Tensor:
        """They sum to one."""
        return values.softmax(-1)

    def answers(self, names: Sequence[str], found: NDArray[Any]) -> list[str]:
        """The class of the largest output."""
        return [names[index] for index in found.argmax(axis=1)]

    def own(self, found: NDArray[Any], shares: torch.Tensor) -> list[float]:
        """The largest one."""
        return shares.amax(-1).tolist()

    def chosen(self, found: NDArray[Any]) -> NDArray[np.bool_]:
        """One of each row."""
        return self.true(found.argmax(axis=1), found.shape[1])

    def true(self, targets: NDArray[Any], classes: int) -> NDArray[np.bool_]:
        """One of each row."""
        return targets[:, None] == np.arange(classes)

    def usual(self, classes: int, targets: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The largest class. Of two classes, both."""
        largest = np.bincount(targets, minlength=classes).argmax()
        for each in (0, 1) if classes == 2 else (largest,):
            yield np.eye(classes)[each]


@register
class Multi(Classes):
    """Any number of classes, each for itself."""

    name = problem = "multi"
    answer = "any number of the labels {names}"
    metrics, best = METRICS["multi"], "f1_micro"
    problem_type = "multi_label_classification"

    def shares(self, values: torch.Tensor) -> torch.Tensor:
        """Each for itself."""
        return values.sigmoid()

    def answers(self, names: Sequence[str], found: NDArray[Any]) -> list[str]:
        """All classes above 0."""
        return [_joined(names, row) for row in self.chosen(found)]

    def own(self, found: NDArray[Any], shares: torch.Tensor) -> list[str]:
        """Those of the predicted classes."""
        texts = ([f"{share:.{DIGITS}f}" for share in row] for row in shares.tolist())
        return [_joined(row, yes) for row, yes in zip(texts, self.chosen(found), strict=True)]

    def chosen(self, found: NDArray[Any]) -> NDArray[np.bool_]:
        """Those above 0."""
        return found > 0

    def true(self, targets: NDArray[Any], classes: int) -> NDArray[np.bool_]:
        """As the targets say."""
        return targets > 0

    def usual(self, classes: int, targets: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The most frequent set, all labels, and the best of the frequent."""
        true = targets.astype(int)
        sets, times = np.unique(true, axis=0, return_counts=True)
        yield sets[times.argmax()] - 0.5
        yield np.full(true.shape[1], 0.5)
        counts = true.sum(axis=0)
        order = np.argsort(-counts, kind="stable")
        # f1_micro of the k most frequent labels: twice the hits over all that is predicted and all that is true
        taken = np.arange(1, len(order) + 1)
        f1 = 2 * np.cumsum(counts[order]) / (taken * len(true) + counts.sum())
        yield np.isin(np.arange(len(order)), order[: f1.argmax() + 1]) - 0.5


def _joined(names: Sequence[str], chosen: NDArray[np.bool_]) -> str:
    return SEPARATOR.join(name for name, yes in zip(names, chosen, strict=True) if yes)
