"""Side attention: a narrow residual stream beside the frozen model, which reads every level and mixes tokens.

Source: Sidestep's own. Narrow attention beside a frozen Transformer is LST's idea (Sung, Cho, Bansal, arXiv
2206.06522). Here the stream corrects the last hidden state, as READ does (arXiv 2305.15348). At level l with state s
and hidden state h: x = s + P_l rms(h), s' = x + g_l (O_l attention(rms(x)) + D_l gelu(E_l rms(x))). The last hidden
state becomes h + U s before the final norm, with U = 0 at the start.
Differs: on an encoder-decoder the decoder alone is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.interface.config import MethodConfig, spread
from sidestep.interface.layers import recompute, rotate
from sidestep.interface.registry import register
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site
from sidestep.interface.taps import Tap

MOST_LEVELS = 12
"""Blocks that are read at most, unless it is said otherwise. They are spread evenly, and the last one is among them."""


@dataclass(frozen=True, kw_only=True)
class SideAttentionConfig(MethodConfig):
    """Settings of side attention.

    Attributes:
        rank: width r of the stream.
        heads: of its attention.
        expansion: width of its MLP over r.
        levels: how many blocks are read, spread evenly, besides the embeddings. None: all, at most 12.
        positions: "rotary" turns queries and keys by the tokens' positions. None: rotary where a token sees earlier
            ones only, as hidden states of such models often hold no positions. Else none.
        dropout: of the stream's branches.
    """

    rates = (3e-4, 1e-3, 3e-3)

    rank: int = 64
    heads: int = 4
    expansion: int = 2
    levels: int | None = None
    positions: Literal["rotary", "none"] | None = None
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", self.rank >= 1, "a whole number of at least 1")
        self.require("heads", self.heads >= 1 and self.rank % self.heads == 0, f"a divisor of rank={self.rank}")
        self.require("expansion", self.expansion >= 1, "a whole number of at least 1")
        self.require("levels", self.levels is None or self.levels >= 1, "a whole number of at least 1, or None")
        self.require("dropout", 0 <= self.dropout < 1, "a share from 0 to below 1")

    def blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks of `depth` that are read."""
        return spread(depth, self.levels or MOST_LEVELS)


class Level(nn.Module):
    """One level of the stream: attention and an MLP side by side, through a gate.

    Args:
        config: of the method.
        number: under which its keys and values are in a cache.
        causal: whether a token sees only earlier ones.
        rotary: whether queries and keys are turned.
    """

    def __init__(self, config: SideAttentionConfig, number: int, *, causal: bool, rotary: bool) -> None:
        super().__init__()
        rank, inner = config.rank, config.rank * config.expansion
        self.number, self.heads, self.causal, self.rotary = number, config.heads, causal, rotary
        self.attend = nn.Linear(rank, 3 * rank, bias=False)
        self.out = nn.Linear(rank, rank, bias=False)
        self.inner, self.outer = nn.Linear(rank, inner), nn.Linear(inner, rank)
        self.gate = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        """(batch, tokens, rank) -> the same."""
        normed = F.rms_norm(x, x.shape[-1:])
        branches = self.out(self._attention(normed, site)) + self.outer(F.gelu(self.inner(normed)))
        return x + self.gate * self.dropout(branches)

    def _attention(self, x: Tensor, site: Site) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.attend(x).chunk(3, dim=-1)
        )
        places = site.positions(x)
        if self.rotary:
            query, key = rotate(query, places), rotate(key, places)
        if site.cache is not None:
            key, value = site.cache.extend(self.number, key, value)
        seen = None if site.key_keep is None else site.key_keep[:, None, None]
        if self.causal:
            earlier = torch.arange(key.shape[2], device=x.device) <= places[:, None]
            seen = earlier if seen is None else seen & earlier
        # a row that sees nothing (padding before the first token) sees all alike
        mask = None if seen is None else query.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(query.dtype).min)
        read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return read.transpose(1, 2).flatten(2)


@register("side_attention", SideAttentionConfig)
class SideAttention(SideNet):
    """Side attention: a narrow stream reads every level of a frozen model and mixes tokens.

    A level is the embeddings or a block that is read. Parameters at width d, rank r and expansion e, for n levels:
    n (dr + d + r + 4r^2 + 2er^2 + er + r + 1) + rd + d.
    """

    starts_as_identity = True
    caches = True

    def __init__(self, config: SideAttentionConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.config = config
        own = [site for site in sites if site.head]
        blocks = config.blocks(own[0].depth)
        causal = own[0].causal
        rotary = config.positions == "rotary" or (config.positions is None and causal)
        self.taps, self.levels = nn.ModuleDict(), nn.ModuleDict()
        for site in own:
            if site.kind == "stage" or (site.kind == "block" and site.index in blocks):
                number = len(self.levels)
                self.taps[_name(site)] = Tap(site.width, config.rank, form="rms")
                self.levels[_name(site)] = Level(config, number, causal=causal, rotary=rotary)
        self.up = nn.Linear(config.rank, own[-1].width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @classmethod
    def check(cls, config: SideAttentionConfig, sites: Sequence[Site]) -> None:
        """Raise on hierarchical and convolutional backbones, and on heads that rotary positions do not fit."""
        own = [site for site in sites if site.head]
        if any(site.convolutional for site in own):
            raise ValueError("it attends over one row of tokens, and this backbone is convolutional")
        if any(site.stage > 0 for site in own):
            raise ValueError("its tokens stay the same from level to level, and this backbone is hierarchical")
        if (config.rank // config.heads) % 2 and (config.positions == "rotary" or own[0].causal):
            raise ValueError(
                f"rotary positions turn pairs of channels, but a head has {config.rank // config.heads}: choose "
                'another rank or heads, or positions="none"'
            )

    @classmethod
    def first_write(cls, config: SideAttentionConfig, sites: Sequence[Site]) -> Site | None:
        """The last block of the stack that the head reads."""
        return next(site for site in reversed(sites) if site.kind == "block")

    @classmethod
    def kept_per_token(cls, config: SideAttentionConfig, site: Site) -> int:
        """What is read and the state behind it, and the corrected hidden state, which the final norm keeps."""
        if not site.head:
            return 0
        if site.kind == "norm":
            return site.width + 2
        return site.width + config.rank

    def read(self, hidden: Tensor, site: Site) -> Tensor | None:
        """(batch, tokens, rank) of a level, else None."""
        name = _name(site)
        if not site.head or name not in self.taps:
            return None
        code: Tensor = self.taps[name](hidden)
        return code

    def step(self, state: Tensor | None, codes: Tensor | None, site: Site) -> Tensor | None:
        """The stream behind a level."""
        return state if codes is None else self._kept_small(self._level, codes, state, site)

    def advance(self, state: Tensor | None, hidden: Tensor, site: Site) -> Tensor | None:
        """The code is computed again in backward, so that only the hidden state and the stream are kept."""
        if not site.head or _name(site) not in self.taps:
            return state
        return self._kept_small(self._rung, hidden, state, site)

    def write(self, state: Tensor | None, hidden: Tensor, site: Site) -> tuple[Tensor | None, Tensor]:
        """Correct the last block's output."""
        if site.last and site.head:
            assert state is not None
            hidden = hidden + self.up(state).to(hidden.dtype)
        return state, hidden

    def _rung(self, hidden: Tensor, state: Tensor | None, site: Site) -> Tensor:
        codes = self.read(hidden, site)
        assert codes is not None
        return self._level(codes, state, site)

    def _level(self, codes: Tensor, state: Tensor | None, site: Site) -> Tensor:
        level: Any = self.levels[_name(site)]
        new: Tensor = level(codes if state is None else state + codes, site)
        return new

    def _kept_small(self, function: Any, *args: Any) -> Tensor:
        if args[-1].cache is not None:  # computed again, it would be added to the cache again
            kept: Tensor = function(*args)
            return kept
        result: Tensor = recompute(function, *args, random=self.training and self.config.dropout > 0)
        return result


def _name(site: Site) -> str:
    return f"{site.kind}{site.index}"
