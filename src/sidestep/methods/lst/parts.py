"""LST's parts: attention with relative, rotary or no positions, and a narrow block."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.interface.layers import rotate
from sidestep.interface.sites import SideCache, Site, stacks
from sidestep.methods.lst.config import LSTConfig, Sizes

TEMPERATURE = 0.1  # of the gates
DOWN_STD = 0.01  # at the start, of the maps to and from the side's width
MAX_DISTANCE = 128  # from which on T5's relative positions share a bucket
EPS = 1e-6  # of the norms
KeysValues = tuple[Tensor, Tensor]


def relative_buckets(distance: Tensor, buckets: int, *, causal: bool) -> Tensor:
    """T5's buckets of relative positions: small distances have one each, larger ones share them by their logarithm.

    Args:
        distance: whole numbers, the key's position less the query's.
        buckets: how many there are. Unless `causal`, each direction has half of them.
        causal: whether keys behind the query are never seen.

    Returns:
        Bucket numbers from 0, of the same shape.
    """
    ahead = torch.zeros_like(distance)
    if not causal:
        buckets //= 2
        ahead = (distance > 0) * buckets
    apart = (-distance).clamp(min=0) if causal else distance.abs()
    exact = buckets // 2
    share = (apart.clamp(min=1).float() / exact).log() / math.log(MAX_DISTANCE / exact)
    shared = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return ahead + torch.where(apart < exact, apart, shared)


class Attention(nn.Module):
    """T5's attention: no biases, and no scale beside that of the maps' start."""

    def __init__(self, sizes: Sizes, dropout: float) -> None:
        super().__init__()
        inner = sizes.heads * sizes.head_width
        self.heads, self.dropout = sizes.heads, dropout
        self.query = _linear(sizes.width, inner, (sizes.width * sizes.head_width) ** -0.5)
        self.key = _linear(sizes.width, inner, sizes.width**-0.5)
        self.value = _linear(sizes.width, inner, sizes.width**-0.5)
        self.out = _linear(inner, sizes.width, inner**-0.5)

    def forward(
        self,
        x: Tensor,
        source: KeysValues,
        bias: Tensor | None,
        seen: Tensor | None,
        positions: Tensor | None,
    ) -> Tensor:
        """What tokens (batch, tokens, width) read of a source.

        Args:
            x: what asks.
            source: keys and values of what is read.
            bias: (1, heads, tokens, source tokens), added to the scores.
            seen: bool, to (batch, heads, tokens, source tokens): which may be read. None means all.
            positions: (tokens,) for queries that are turned by them.
        """
        query = self._split(self.query(x), positions)
        dropout = self.dropout if self.training else 0.0
        mask = _mask(bias, seen, query.dtype)
        read = F.scaled_dot_product_attention(query, *source, attn_mask=mask, dropout_p=dropout, scale=1.0)
        out: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return out

    def source(self, tokens: Tensor, positions: Tensor | None = None) -> KeysValues:
        """Keys and values (batch, heads, tokens, head width) of (batch, tokens, width), keys turned by positions."""
        return self._split(self.key(tokens), positions), self._split(self.value(tokens), None)

    def _split(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """(batch, tokens, inner) by heads, turned where positions are given."""
        x = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return x if positions is None else rotate(x, positions)


class SideBlock(nn.Module):
    """Self-attention, in a decoder cross-attention, and an MLP with ReLU, each behind an RMS norm and added.

    Args:
        sizes: of the block.
        dropout: its rate.
        crosses: whether it reads an encoder's ladder.
        number: under which its keys and values are in a cache.
    """

    def __init__(self, sizes: Sizes, dropout: float, *, crosses: bool, number: int) -> None:
        super().__init__()
        self.number = number
        self.norm_attention = norm_of(sizes.width)
        self.attention = Attention(sizes, dropout)
        self.crosses = crosses
        if crosses:
            self.norm_cross = norm_of(sizes.width)
            self.cross = Attention(sizes, dropout)
        self.norm_mlp = norm_of(sizes.width)
        self.inner = _linear(sizes.width, sizes.inner_width, sizes.width**-0.5)
        self.outer = _linear(sizes.inner_width, sizes.width, sizes.inner_width**-0.5)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        seen: Tensor | None,
        positions: Tensor | None,
        memory: Tensor | None,
        memory_seen: Tensor | None,
        cache: SideCache | None,
    ) -> Tensor:
        """(batch, tokens, width) -> the same.

        Arguments are `Attention`'s, then those of the encoder's side states.
        """
        normed = self.norm_attention(x)
        source = self.attention.source(normed, positions)
        if cache:
            source = cache.extend(self.number, *source)
        x = x + self.dropout(self.attention(normed, source, bias, seen, positions))
        if self.crosses and memory is not None:
            read = self.cross.source
            source = cache.once(self.number, read, memory) if cache else read(memory)
            x = x + self.dropout(self.cross(self.norm_cross(x), source, None, memory_seen, None))
        inner = self.dropout(self.activation(self.inner(self.norm_mlp(x))))
        return x + self.dropout(self.outer(inner))


def is_relative(config: LSTConfig, sites: Sequence[Site]) -> bool:
    """Whether positions are T5's bias."""
    return config.positions == "relative" or (config.positions is None and len(stacks(sites)) > 1)


def _mask(bias: Tensor | None, seen: Tensor | None, precision: torch.dtype) -> Tensor | None:
    """What is added to attention scores.

    A row that sees nothing (padding before the first token) sees all alike.
    """
    if seen is None:
        return None if bias is None else bias.to(precision)
    base = torch.zeros((), dtype=precision, device=seen.device) if bias is None else bias.to(precision)
    return torch.where(seen, base, torch.finfo(precision).min)


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(linear.weight, std=std)
    return linear


def norm_of(width: int) -> nn.RMSNorm:
    """The norm that all of LST's parts use."""
    return nn.RMSNorm(width, eps=EPS)
