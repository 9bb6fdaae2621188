"""The heads of answers and boxes: their losses by definition, under accumulation too, and as tasks store them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import sidestep as ss
from sidestep.model.heads import head_from_dict
from sidestep.model.heads.pictured import corners, soft_scores

WIDTH = 6


def scattered() -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of three rows with two answers each, and the same over all five answers."""
    labels = torch.zeros(3, 2, 4)
    labels[:, :, 0] = torch.tensor([[1, 4], [0, 0], [3, 0]])
    labels[:, :, 1] = torch.tensor([[1, 0.3], [0.6, 0], [1, 0]])
    dense = torch.zeros(3, 5)
    dense[0, 1], dense[0, 4], dense[1, 0], dense[2, 3] = 1, 0.3, 0.6, 1
    return labels, dense


def test_answers_are_learned_by_cross_entropy_summed_over_the_list() -> None:
    head = ss.Answer(num_labels=5).build(WIDTH, "cls")
    labels, dense = scattered()
    logits = torch.randn(3, 5)
    assert torch.equal(soft_scores(logits, labels), dense)
    expected = -(dense * F.logsigmoid(logits) + (1 - dense) * F.logsigmoid(-logits)).sum(1).mean()
    torch.testing.assert_close(head.loss(logits, labels), expected)
    torch.testing.assert_close(head.loss(logits, dense), expected)


def test_boxes_are_learned_by_l1_and_generalised_iou() -> None:
    """By hand: a box and its left half; the same box; two boxes that do not touch."""
    head = ss.Box(l1=3, giou=2).build(WIDTH, "cls")
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.3, 0.6, 0.2, 0.2], [0.2, 0.5, 0.2, 0.4]])
    labels = torch.tensor([[0.4, 0.5, 0.2, 0.4], [0.3, 0.6, 0.2, 0.2], [0.8, 0.5, 0.2, 0.4]])
    # generalised IoU: the union of the last two fills half of what encloses both
    l1, giou = torch.tensor([0.3, 0, 0.6]), torch.tensor([0.5, 1, 0 - 0.32 / 0.32 + 0.16 / 0.32])
    torch.testing.assert_close(head.loss(boxes, labels), (3 * l1 + 2 * (1 - giou)).mean())
    torch.testing.assert_close(corners(boxes[:1]), torch.tensor([[0.3, 0.3, 0.7, 0.7]]))


@pytest.mark.parametrize(
    ("config", "labels", "outputs"),
    [
        (ss.Answer(num_labels=5), scattered()[0], torch.randn(3, 5)),
        (ss.Answer(num_labels=5), scattered()[1], torch.randn(3, 5)),
        (ss.Box(), torch.rand(3, 4) / 4 + 0.3, torch.rand(3, 4) / 4 + 0.3),
    ],
)
def test_two_batches_of_a_step_have_the_loss_of_one(config: Any, labels: torch.Tensor, outputs: torch.Tensor) -> None:
    head = config.build(WIDTH, "cls")
    items = labels.numel()  # as the Trainer counts them
    parts = sum(head.loss(outputs[part], labels[part], items) for part in (slice(2), slice(2, 3)))
    torch.testing.assert_close(parts, head.loss(outputs, labels))


def test_boxes_lie_between_0_and_1_however_large_the_features() -> None:
    head = ss.Box().build(WIDTH, "mean")
    found = head.map(1000 * torch.randn(8, WIDTH))
    assert found.shape == (8, 4)
    assert bool(((found >= 0) & (found <= 1)).all())


@pytest.mark.parametrize("config", [ss.Answer(num_labels=2, labels=("no", "yes"), pool="mean"), ss.Box(l1=1.0)])
def test_a_config_comes_back_from_a_task(config: Any) -> None:
    assert head_from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ss.Box(l1=-1.0), "l1=-1.0, giou=2.0 of a Box: give numbers of at least 0"),
        (lambda: ss.Box(l1=0.0, giou=0.0), "one above it"),
        (lambda: ss.Answer(num_labels=2, labels=("a",)), "num_labels=2, but 1 label names were given"),
        (lambda: ss.Answer(num_labels=0), "a multi-label head needs more"),
        (lambda: ss.Box(pool="first"), "pool='first': choose None or one of"),
    ],
)
def test_what_makes_no_head_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
