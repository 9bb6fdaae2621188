"""Heads for questions about a picture (an answer of a list) and for phrases that name a part of it (a box)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from sidestep.backbone.families import Pool
from sidestep.metrics import Kind
from sidestep.model.heads.base import Head, HeadConfig, named, register
from sidestep.model.heads.pooled import ClassHead, Classify

INDEX, SCORE = 0, 1
"""Where the number of an answer and its soft score stand, in what a row's labels tell of an answer."""


@register
@dataclass(frozen=True, kw_only=True)
class Answer(Classify):
    """A question's answer, one of a list, learned by soft scores: those of VQA.

    Attributes:
        problem: always "multi": each answer has a probability of its own.
    """

    problem: Literal["multi"] = "multi"

    @property
    def kind(self) -> Kind:
        """VQA."""
        return "vqa"

    def described(self) -> dict[str, Any]:
        """The answers by number and by text."""
        names = self.labels or [f"LABEL_{index}" for index in range(self.num_labels)]
        return {**named(names), "problem_type": "multi_label_classification"}

    def build(self, width: int, pool: Pool) -> AnswerHead:
        """A linear map with a loss on soft scores."""
        return AnswerHead(self, width, pool)


class AnswerHead(ClassHead):
    """A logit for each answer."""

    def loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Binary cross-entropy with the soft scores: summed over the answers, and the mean over the rows.

        Args:
            logits: (rows, answers).
            labels: soft scores (rows, answers), or those of each row's own answers (rows, own, fields): see
                `soft_scores`.
            num_items_in_batch: how many numbers the labels of all batches of the step have, as the Trainer counts them.
        """
        loss = F.binary_cross_entropy_with_logits(logits.float(), soft_scores(logits, labels), reduction="sum")
        return loss / _rows(labels, num_items_in_batch)


def soft_scores(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows, answers): the soft score of each answer, where labels may tell of a row's own answers alone.

    Args:
        logits: (rows, answers).
        labels: (rows, answers), or (rows, own, fields) of which the first two are an answer's number and its score.
            What fills a row up has the score 0.
    """
    if labels.ndim == 2:
        return labels.float()
    scores = torch.zeros_like(logits, dtype=torch.float32)
    return scores.scatter_add(1, labels[..., INDEX].long(), labels[..., SCORE].float())


@register
@dataclass(frozen=True, kw_only=True)
class Box(HeadConfig):
    """One box of a picture: centre, width and height as shares of the picture's own.

    Attributes:
        l1, giou: what the two parts of the loss are multiplied by. The defaults are DETR's (arXiv 2005.12872).
    """

    l1: float = 5.0
    giou: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.l1, self.giou) < 0 or not self.l1 + self.giou > 0:
            raise ValueError(f"l1={self.l1}, giou={self.giou} of a Box: give numbers of at least 0, one above it")

    @property
    def outputs(self) -> int:
        """Centre (across, down), width and height."""
        return 4

    @property
    def kind(self) -> Kind:
        """Grounding."""
        return "grounding"

    def build(self, width: int, pool: Pool) -> BoxHead:
        """A linear map to numbers between 0 and 1, with a loss on boxes."""
        return BoxHead(self, width, pool)

    def blank_labels(self, rows: int, tokens: int) -> Tensor:
        """The middle of the picture."""
        return torch.full((rows, self.outputs), 0.5)


class BoxHead(Head):
    """A linear map with a sigmoid: numbers between 0 and 1."""

    def map(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        """(rows, 4): boxes."""
        return super().map(features).sigmoid()

    def loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """L1 of the four numbers and 1 - generalised IoU, weighted: the mean over the rows.

        Args:
            logits: (rows, 4) boxes as the head gives them.
            labels: (rows, 4) in the same form.
            num_items_in_batch: how many numbers the labels of all batches of the step have, as the Trainer counts them.
        """
        from torchvision.ops import generalized_box_iou

        assert isinstance(self.config, Box)
        boxes, labels = logits.float(), labels.float()
        far = F.l1_loss(boxes, labels, reduction="sum")
        # each pair as sets of one: torchvision's own loss of pairs asks for values, which a plan has none of
        overlap = generalized_box_iou(corners(boxes)[:, None], corners(labels)[:, None])
        apart = (1 - overlap).sum()
        return (self.config.l1 * far + self.config.giou * apart) / _rows(labels, num_items_in_batch)


def corners(boxes: Tensor) -> Tensor:
    """Boxes (..., 4) by left, top, right and bottom, of those by centre, width and height."""
    across, down, width, height = boxes.unbind(-1)
    left, top = across - width / 2, down - height / 2
    return torch.stack((left, top, left + width, top + height), -1)


def _rows(labels: Tensor, items: Tensor | int | None) -> Tensor | float:
    """Rows of all batches of the step. `items`: how many numbers their labels have. None: this batch is all."""
    return labels.shape[0] if items is None else items * labels.shape[0] / labels.numel()
