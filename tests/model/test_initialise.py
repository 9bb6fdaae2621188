"""Starts that hang on training rows: Fisher information by hand, a backbone left as it was, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sidestep as ss
from sidestep.interface.pruning import Scores, magnitude, pruned_block, residual_channels
from sidestep.model import initialise as starts
from tiny import FAMILIES

FISHER = ss.LSTConfig(reduction=2, heads=2, head_width=8, inner_width=32, init="fisher")


def rows(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    drawn = [torch.randint(3, 40, (1, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids[:, :8], "labels": ids[:, 8:]} for ids in drawn]


def side(model: ss.SideModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.side.state_dict().items()}


def test_the_scores_are_sums_of_squared_gradients_over_rows() -> None:
    model = ss.attach(FAMILIES["t5"].model(), FISHER)
    before = side(model)
    assert ss.initialise(model, rows(3)) == 3
    backbone: Any = FAMILIES["t5"].model()
    squares = {name: torch.zeros_like(p) for name, p in backbone.named_parameters()}
    for row in rows(3):
        backbone.zero_grad()
        backbone(**row).loss.backward()
        for name, p in backbone.named_parameters():
            squares[name] += p.grad.square()
    same = dict(model.backbone.named_parameters())
    scores = {same[name]: Scores.of(square) for name, square in squares.items() if square.ndim < 3}
    blocks = [place.site.weights for place in model.places if place.site.weights is not None]
    residual = residual_channels(blocks, 2, lambda weight: scores[weight])
    assert residual.tolist() != residual_channels(blocks, 2, magnitude).tolist()
    expected = pruned_block(blocks[4], residual, 2, lambda weight: scores[weight])
    found: Any = model.side.ladders["decoder"].blocks["1"]
    for name, weight in expected.items():
        assert torch.equal(found.state_dict()[name], weight), name
    moved = {name.split(".")[2] for name, tensor in side(model).items() if not torch.equal(tensor, before[name])}
    assert moved == {"blocks", "norm"}  # magnitude had copied the same tables; the samplers stay random


def test_the_backbone_is_left_as_it_was() -> None:
    model = ss.attach(FAMILIES["t5"].model(), FISHER).train()
    plain = FAMILIES["t5"].model().state_dict()
    ss.initialise(model, rows(2))
    assert all(torch.equal(tensor, plain[name]) for name, tensor in model.backbone.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.backbone.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.backbone.parameters())
    assert model.training
    assert not model.backbone.training
    with torch.no_grad():
        assert ss.initialise(model, rows(1)) == 1  # gradients are its own matter


def test_no_more_rows_are_read_than_asked_for() -> None:
    read: list[int] = []

    def endless() -> Iterator[dict[str, Tensor]]:
        while True:
            read.append(1)
            yield rows(1)[0]

    assert ss.initialise(ss.attach(FAMILIES["t5"].model(), FISHER), endless(), samples=3) == len(read) == 3
    assert starts.SAMPLES == 1024


def test_what_cannot_be_initialised_is_refused() -> None:
    random = ss.attach(FAMILIES["t5"].model(), ss.LSTConfig(reduction=2, heads=2))
    with pytest.raises(ValueError, match="lst as configured starts without data: there is nothing to initialise"):
        ss.initialise(random, rows(1))
    with pytest.raises(ValueError, match=r"on training rows, and a Classify head is none\. Let the backbone write"):
        ss.attach(FAMILIES["t5"].model(), FISHER, head=ss.Classify(num_labels=2))
    with pytest.raises(ValueError, match="there are no rows to initialise from"):
        ss.initialise(ss.attach(FAMILIES["t5"].model(), FISHER), [])
