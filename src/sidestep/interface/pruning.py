"""Structured pruning of a Transformer's blocks: which channels stay when every width is divided by a number.

Channels of the residual stream are chosen once for all blocks of all stacks, because each block adds to them. Channels
of a head and of an MLP are chosen in each block. The number of heads stays.

Source: Sung, Cho, Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", NeurIPS 2022,
and its release ("fisher-v2"), for what is kept: one channel in `reduction`, the same ones in all blocks.
Ours: how the matrices that a channel runs through are weighed against each other; each has the sum of its entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidestep.interface.offload import value_of
from sidestep.interface.sites import AttentionWeights, BlockWeights


@dataclass(frozen=True)
class Scores:
    """How much a weight's rows and columns matter: (outputs,) and (inputs,), and the same twice for a vector."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Scores:
        """The sums of how much each entry of a matrix (outputs, inputs) or of a vector matters."""
        return cls(values, values) if values.ndim == 1 else cls(values.sum(1), values.sum(0))


Score = Callable[[Tensor], Scores]
"""What a weight's rows and columns are worth."""


def magnitude(weight: Tensor) -> Scores:
    """Scores by the weight's absolute values."""
    return Scores.of(weight.detach().abs())


def residual_channels(blocks: Sequence[BlockWeights], reduction: int, score: Score) -> Tensor:
    """(width / reduction,) channels of the residual stream that stay in all of the blocks, ascending."""
    votes = []
    for block in blocks:
        attentions = [block.attention] if block.cross is None else [block.attention, block.cross]
        reads = [linear for a in attentions for linear in (a.query, a.key, a.value)] + [block.inner]
        writes = [a.out for a in attentions] + [block.outer]
        norms = [a.norm for a in attentions] + [block.norm_mlp]
        votes += [score(_weight(module)).columns for module in [*reads, *norms]]
        votes += [score(_weight(module)).rows for module in writes]
    return _most(torch.stack(votes).sum(0), reduction)


def pruned_block(block: BlockWeights, residual: Tensor, reduction: int, score: Score) -> dict[str, Tensor]:
    """A block's weights without the channels that matter least, by the names of a side block's parameters.

    Args:
        block: of the backbone.
        residual: what `residual_channels` gave.
        reduction: what the channels of a head and the width of the MLP are divided by.
        score: what weights are worth.
    """
    inner = _most(score(_weight(block.inner)).rows + score(_weight(block.outer)).columns, reduction)
    named = {
        "norm_mlp.weight": _weight(block.norm_mlp)[residual],
        "inner.weight": _weight(block.inner)[inner][:, residual],
        "outer.weight": _weight(block.outer)[residual][:, inner],
        **_pruned_attention("attention", block.attention, residual, reduction, score),
    }
    if block.cross is not None:
        named |= _pruned_attention("cross", block.cross, residual, reduction, score)
    return {name: weight.detach() for name, weight in named.items()}


def _pruned_attention(
    name: str, attention: AttentionWeights, residual: Tensor, reduction: int, score: Score
) -> dict[str, Tensor]:
    """Queries and keys keep the same channels of each head, as values and the map behind them do."""
    maps = (attention.query, attention.key, attention.value, attention.out)
    query, key, value, out = map(_weight, maps)
    matched = _most_of_heads(score(query).rows + score(key).rows, attention.heads, reduction)
    handed = _most_of_heads(score(value).rows + score(out).columns, attention.heads, reduction)
    return {
        f"norm_{name}.weight": _weight(attention.norm)[residual],
        f"{name}.query.weight": query[matched][:, residual],
        f"{name}.key.weight": key[matched][:, residual],
        f"{name}.value.weight": value[handed][:, residual],
        f"{name}.out.weight": out[residual][:, handed],
    }


def _weight(module: nn.Module) -> Tensor:
    weight: Tensor = value_of(module, "weight")
    return weight


def _most(scores: Tensor, reduction: int) -> Tensor:
    """Positions of the highest scores, one in `reduction`, ascending."""
    return scores.topk(len(scores) // reduction).indices.sort().values


def _most_of_heads(scores: Tensor, heads: int, reduction: int) -> Tensor:
    """The same within each of the heads, which lie one after another."""
    each = len(scores) // heads
    return torch.cat([_most(head, reduction) + number * each for number, head in enumerate(scores.split(each))])
