"""Classes: one of several for each row, or any number of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from sidestep.data import Fields, Generation, LabelSpace
from sidestep.data.labels import SEPARATOR
from sidestep.disk.table_files import DIGITS
from sidestep.kinds.assess import Assessment, OfClass
from sidestep.kinds.base import OWN, PREDICTION, PROBABILITY, Probabilities, TaskKind, register, targets_of
from sidestep.kinds.running import logits
from sidestep.kinds.task_data import TaskData
from sidestep.metrics import GREATER_IS_BETTER, METRICS, scores
from sidestep.model.attach import Attached
from sidestep.model.heads import Classify
from sidestep.model.side_model import SideModel


class Classes(TaskKind):
    """What both kinds have in common: a logit for each class."""

    problem: ClassVar[Literal["single", "multi"]]

    def head(self, data: TaskData, pool: Any = None) -> Classify:
        """One output for each class."""
        return Classify(num_labels=data.labels.outputs, labels=data.labels.names, problem=self.problem, pool=pool)

    def judge(
        self, model: Attached, encoded: Dataset, fields: Fields, labels: LabelSpace, generation: Generation, **how: Any
    ) -> Assessment:
        """Scores of logits."""
        assert isinstance(model, SideModel)
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
        """The class of each row, and probabilities."""
        assert isinstance(model, SideModel)
        return self.columns(labels, logits(model, rows, fields, **how), probabilities)

    def columns(
        self, labels: LabelSpace, found: NDArray[Any], probabilities: Probabilities = "all"
    ) -> dict[str, list[Any]]:
        """Predictions and probabilities by column name, from logits (rows, classes)."""
        shares = self.shares(torch.from_numpy(found).double())
        chosen = self.chosen(found)
        texts = ([f"{share:.{DIGITS}f}" for share in row] for row in shares.tolist())
        columns: dict[str, dict[str, list[Any]]] = {
            "all": {f"{PROBABILITY}{name}": each for name, each in zip(labels.names, shares.T.tolist(), strict=True)},
            "one": {OWN: self.own(shares, texts, chosen)},
            "none": {},
        }
        return {PREDICTION: [_joined(labels.names, row) for row in chosen], **columns[probabilities]}

    def shares(self, values: torch.Tensor) -> torch.Tensor:
        """Probabilities of classes."""
        return values.softmax(-1) if self.name == "single" else values.sigmoid()

    def chosen(self, found: NDArray[Any]) -> NDArray[np.bool_]:
        """(rows, classes): which classes are predicted."""
        if self.name == "multi":
            return found > 0
        return found.argmax(axis=1)[:, None] == np.arange(found.shape[1])

    def own(self, shares: torch.Tensor, texts: Iterator[list[str]], chosen: NDArray[np.bool_]) -> list[Any]:
        """The probability of what is predicted. For several classes, their probabilities as a text."""
        if self.name == "single":
            return shares.amax(-1).tolist()
        return [_joined(row, yes) for row, yes in zip(texts, chosen, strict=True)]

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
        true = targets[:, None] == classes if self.name == "single" else targets > 0
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

    def usual(self, classes: int, targets: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """Logits of answers for all rows. For every score the best answer is among them."""
        raise NotImplementedError


@register
class Single(Classes):
    """One class of several."""

    name = problem = "single"
    answer = "one label of {names}"
    metrics, best = METRICS["single"], "accuracy"
    smooths = True

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
