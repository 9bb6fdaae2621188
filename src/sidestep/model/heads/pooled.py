"""Heads that read one vector of a row: classes, or numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.backbone.families import Pool
from sidestep.metrics import Kind
from sidestep.model.heads.base import Head, HeadConfig, named, register


@register
@dataclass(frozen=True, kw_only=True)
class Classify(HeadConfig):
    """Classification with a linear map of the pooled hidden state.

    Attributes:
        num_labels: number of classes.
        labels: their names, in order. They come back in predictions.
        problem: "single" (one class per example, softmax) or "multi" (any number, one sigmoid each).
    """

    num_labels: int
    labels: Sequence[str] | None = None
    problem: Literal["single", "multi"] = "single"

    def __post_init__(self) -> None:
        if self.problem == "token":
            raise ValueError('problem="token": a class for each token is another head. Take ss.Tag(num_labels=...)')
        super().__post_init__()
        if self.num_labels < (2 if self.problem == "single" else 1):
            raise ValueError(f"num_labels={self.num_labels}: a {self.problem}-label head needs more")
        if self.labels is not None and len(self.labels) != self.num_labels:
            raise ValueError(f"num_labels={self.num_labels}, but {len(self.labels)} label names were given")

    @property
    def outputs(self) -> int:
        """One logit per class."""
        return self.num_labels

    @property
    def kind(self) -> Kind:
        """The problem."""
        return self.problem

    def described(self) -> dict[str, Any]:
        """The classes by number and by name, and whether one or several of them hold."""
        names = self.labels or [f"LABEL_{index}" for index in range(self.num_labels)]
        return {**named(names), "problem_type": f"{self.problem}_label_classification"}

    def build(self, width: int, pool: Pool) -> ClassHead:
        """With the cross-entropy of the classes."""
        return ClassHead(self, width, pool)

    def blank_labels(self, rows: int, tokens: int) -> Tensor:
        """The first class, or none of several."""
        if self.problem == "single":
            return torch.zeros(rows, dtype=torch.long)
        return torch.zeros(rows, self.num_labels)


@register
@dataclass(frozen=True, kw_only=True)
class Regress(HeadConfig):
    """Regression with a linear map of the pooled hidden state and the mean squared error.

    Attributes:
        targets: number of values per example.
        center: mean of the training targets. The head's bias starts there.
    """

    targets: int = 1
    center: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets < 1:
            raise ValueError(f"targets={self.targets}: at least 1")

    @property
    def outputs(self) -> int:
        """One value per target."""
        return self.targets

    @property
    def kind(self) -> Kind:
        """Regression."""
        return "regress"

    def described(self) -> dict[str, Any]:
        """One output per target, which is a number and no share."""
        return {**named([f"LABEL_{index}" for index in range(self.targets)]), "problem_type": "regression"}

    def build(self, width: int, pool: Pool) -> NumberHead:
        """With the squared error, and a bias that starts at the center."""
        return NumberHead(self, width, pool)

    def blank_labels(self, rows: int, tokens: int) -> Tensor:
        """Zeros."""
        return torch.zeros((rows, self.targets) if self.targets > 1 else (rows,))


class ClassHead(Head):
    """A logit for each class."""

    config: Classify

    def losses(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The cross-entropy of the classes, of several that of each for itself."""
        if self.config.problem == "single":
            return F.cross_entropy(logits, labels.long(), reduction=reduction)
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction=reduction)


class NumberHead(Head):
    """A number for each target."""

    def __init__(self, config: Regress, width: int, pool: Pool) -> None:
        super().__init__(config, width, pool)
        nn.init.constant_(self.linear.bias, config.center)

    def losses(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The squared error."""
        return F.mse_loss(logits, labels.float().view_as(logits), reduction=reduction)
