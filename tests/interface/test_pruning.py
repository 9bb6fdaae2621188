"""Structured pruning: the channels that matter most stay, the same ones wherever they run through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sidestep.backbone import find_places
from sidestep.interface.pruning import Scores, magnitude, pruned_block, residual_channels
from sidestep.interface.sites import BlockWeights
from tiny import FAMILIES

KEPT = [1, 2, 7, 8, 9, 12, 13, 15]


def blocks() -> list[BlockWeights]:
    """Those of a tiny T5: width 16, two heads of 8 channels, an MLP of 32, three blocks in each of two stacks."""
    found = [place.site.weights for place in find_places(FAMILIES["t5"].model()) if place.site.kind == "block"]
    return [weights for weights in found if weights is not None]


def linears(block: BlockWeights) -> list[tuple[Any, Any]]:
    """Maps that read the residual stream and maps that write to it, in pairs."""
    attentions = [a for a in (block.attention, block.cross) if a is not None]
    pairs = [(linear, a.out) for a in attentions for linear in (a.query, a.key, a.value)]
    return [*pairs, (block.inner, block.outer)]


def test_scores_are_sums_over_rows_and_columns() -> None:
    scores = magnitude(torch.tensor([[1.0, -2.0, 0.0], [0.5, 0.0, -4.0]]))
    assert scores.rows.tolist() == [3.0, 4.5]
    assert scores.columns.tolist() == [1.5, 2.0, 4.0]
    vector = Scores.of(torch.tensor([1.0, 3.0]))
    assert vector.rows.tolist() == vector.columns.tolist() == [1.0, 3.0]


@torch.no_grad()
@pytest.mark.parametrize("side", ["read", "written"])
def test_the_residual_channels_that_matter_stay_in_all_blocks(side: str) -> None:
    found = blocks()
    assert len(found) == 6
    for block in found:
        for reads, writes in linears(block):
            if side == "read":
                reads.weight[:, KEPT] *= 10
            else:
                writes.weight[KEPT] *= 10
    assert residual_channels(found, 2, magnitude).tolist() == KEPT
    assert residual_channels(found, 1, magnitude).tolist() == list(range(16))


@torch.no_grad()
def test_one_block_is_outvoted_by_the_others() -> None:
    found = blocks()
    for number, block in enumerate(found):
        for reads, writes in linears(block):
            channels = [0, 3] if number == 0 else KEPT
            reads.weight[:, channels] *= 10
            writes.weight[channels] *= 10
    assert residual_channels(found, 2, magnitude).tolist() == KEPT


@torch.no_grad()
def test_a_pruned_block_keeps_its_heads_and_matching_channels() -> None:
    block = blocks()[3]
    assert block.cross is not None
    attention = block.attention
    attention.query.weight[[1, 3]] *= 10  # head 0
    attention.key.weight[[2, 6, 9, 10, 11, 12]] *= 10  # four of them are head 1's
    attention.value.weight[[0, 1, 2, 3]] *= 10
    attention.out.weight[:, [12, 13, 14, 15]] *= 10
    block.inner.weight[::4] *= 10
    block.outer.weight[:, 1::4] *= 10
    residual = torch.tensor(KEPT)
    pruned = pruned_block(block, residual, 2, magnitude)
    matched, handed = [1, 2, 3, 6, 9, 10, 11, 12], [0, 1, 2, 3, 12, 13, 14, 15]
    inner = [n for n in range(32) if n % 4 in (0, 1)]

    def part(weight: Tensor, rows: list[int], columns: list[int]) -> Tensor:
        return weight[rows][:, columns]

    expected = {
        "attention.query.weight": part(attention.query.weight, matched, KEPT),
        "attention.key.weight": part(attention.key.weight, matched, KEPT),
        "attention.value.weight": part(attention.value.weight, handed, KEPT),
        "attention.out.weight": part(attention.out.weight, KEPT, handed),
        "norm_attention.weight": attention.norm.weight[KEPT],
        "norm_mlp.weight": block.norm_mlp.weight[KEPT],
        "norm_cross.weight": block.cross.norm.weight[KEPT],
        "inner.weight": part(block.inner.weight, inner, KEPT),
        "outer.weight": part(block.outer.weight, KEPT, inner),
    }
    for name, weight in expected.items():
        assert torch.equal(pruned[name], weight), name
    assert pruned["cross.query.weight"].shape == (8, 8)
    assert pruned.keys() - expected.keys() == {f"cross.{part}.weight" for part in ("query", "key", "value", "out")}


def test_a_division_by_one_is_the_block() -> None:
    block = blocks()[0]
    whole = pruned_block(block, torch.arange(16), 1, magnitude)
    assert torch.equal(whole["attention.out.weight"], block.attention.out.weight)
    assert torch.equal(whole["inner.weight"], block.inner.weight)
    assert not any(weight.requires_grad for weight in whole.values())
