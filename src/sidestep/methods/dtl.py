"""DTL and DTL+: low-rank reads of every block, summed and added back after the late blocks.

Source: Fu, Zhu, Wu, "DTL: Disentangled Transfer Learning for Visual Recognition", AAAI 2024, arXiv 2312.07856, and its
official code (heekhero/DTL), whose outputs and gradients the tests reproduce.
Differs: the side state is rebuilt in backward from the rank-r codes of the reads. So a write keeps no tensor of the
backbone's width (the release keeps two, with DTL+ three). Reads and convolutions that never get a gradient are not
created. On text, and on an encoder-decoder's decoder, DTL works token by token (not in the paper).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.interface.config import MethodConfig
from sidestep.interface.layers import recompute
from sidestep.interface.registry import register
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site
from sidestep.interface.taps import Tap


@dataclass(frozen=True, kw_only=True)
class DTLConfig(MethodConfig):
    """Settings of DTL and DTL+.

    Blocks are numbered over all stages of the stack that the head reads. The defaults are the release's on ViT-B/16:
    reads before blocks 0 to 11, writes after blocks 6 to 11 (on Swin-B rank=4, first_read=4, late_blocks=10).

    Attributes:
        rank: r of each read.
        late_blocks: how many blocks, the last one included, are written after. None is half of all.
        first_read: the first block whose input is read. The inputs of all later blocks are read too.
        beta: steepness of the state's gate h * sigmoid(beta * h).
        kernel: 0 for DTL. For DTL+ the side of its depthwise convolution over the token grid (the release: 3, 4 or 5).
            An even one pads one more row and column after the grid than before it.
    """

    rates = (1e-3, 3e-3, 8e-3)

    rank: int = 2
    late_blocks: int | None = None
    first_read: int = 0
    beta: float = 100.0
    kernel: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("rank", self.rank >= 1, "a whole number of at least 1")
        late = self.late_blocks
        self.require("late_blocks", late is None or late >= 1, "a whole number of at least 1, or None")
        self.require("first_read", self.first_read >= 0, "a whole number of at least 0")
        self.require("beta", self.beta > 0, "a number above 0")
        self.require("kernel", self.kernel >= 0, "a whole number: 0 for DTL, or the side of a convolution")

    def first_late(self, depth: int) -> int:
        """The first block of `depth` that is written after."""
        return depth - (max(1, depth // 2) if self.late_blocks is None else self.late_blocks)


@dataclass(frozen=True)
class DTLState:
    """The codes (batch, tokens, rank) of this stage's reads, in order, each with the block that it was read before."""

    blocks: tuple[str, ...] = ()
    codes: tuple[Tensor, ...] = ()


@register("dtl", DTLConfig)
class DTL(SideNet):
    """DTL and DTL+: low-rank reads of every block, added back after the late blocks.

    Parameters at width d: 2 d rank for every block that is read, and d kernel^2 for every stage that is written in.
    """

    starts_as_identity = True

    def __init__(self, config: DTLConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.config = config
        self.tokenwise = config.kernel == 0
        blocks = _blocks(sites)
        self.first_late = config.first_late(len(blocks))
        self.reads, self.writes, self.mixes = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.stages = [site.stage for site in blocks]
        written = {site.stage: site.width for site in blocks[self.first_late :]}
        for site in blocks[config.first_read :]:
            # the state starts again in every stage: a read of a stage without a write would never be used
            if site.stage in written:
                self.reads[str(site.index)] = _read(site.width, config.rank)
                self.writes[str(site.index)] = _write(config.rank, site.width)
        if config.kernel:
            for stage, width in written.items():
                self.mixes[str(stage)] = nn.Conv2d(width, width, config.kernel, groups=width, bias=False)

    @classmethod
    def check(cls, config: DTLConfig, sites: Sequence[Site]) -> None:
        """Raise on convolutional networks, or if blocks or a grid are asked for that are not there."""
        blocks = _blocks(sites)
        if blocks[0].convolutional:
            raise ValueError(
                "what it adds behind a block is read in front of it. The first block of a convolutional network's "
                "stage changes width and grid in between"
            )
        depth = len(blocks)
        first_late = config.first_late(depth)
        if first_late < 0:
            raise ValueError(f"late_blocks={config.late_blocks}, but there are {depth} blocks: choose 1 to {depth}")
        if config.first_read > first_late:
            raise ValueError(
                f"first_read={config.first_read} comes after block {first_late}, the first of {depth} that is written "
                f"after: choose first_read from 0 to {first_late}, or fewer late_blocks"
            )
        if config.kernel and not blocks[0].spatial:
            raise ValueError(
                f"kernel={config.kernel} convolves over the tokens' grid, and text has none: choose kernel=0 (DTL)"
            )

    @classmethod
    def first_write(cls, config: DTLConfig, sites: Sequence[Site]) -> Site | None:
        """The first late block."""
        blocks = _blocks(sites)
        return blocks[config.first_late(len(blocks))]

    @classmethod
    def kept_per_token(cls, config: DTLConfig, site: Site) -> int:
        """The input of the next block's read and its code, however often it is written, and the final norm's input."""
        return site.width + (2 if site.kind == "norm" else config.rank) if site.head else 0

    def start(self, site: Site, carried: Tensor | None) -> DTLState:
        """No code yet."""
        return DTLState()

    def read(self, hidden: Tensor, site: Site) -> Tensor | None:
        """The code of what goes into the next block of the same stage.

        None after a late block, because the hidden state there is yet to be written.
        """
        return None if self._is_late(site) else self._code(hidden, site)

    def step(self, state: DTLState, codes: Tensor | None, site: Site) -> DTLState:
        """Add the code of one more block, and start from nothing where a stage begins."""
        if site.kind == "stage" and site.head:
            state = DTLState()
            if site.index == 0:
                self._check_grid(site)
        if codes is None:
            return state
        return replace(state, blocks=(*state.blocks, self._next(site)), codes=(*state.codes, codes))

    def write(self, state: DTLState, hidden: Tensor, site: Site) -> tuple[DTLState, Tensor]:
        """Write after a late block, then read what was written."""
        if not self._is_late(site):
            return state, hidden
        hidden = hidden + recompute(self._write, state.blocks, site, *state.codes).to(hidden.dtype)
        return self.step(state, self._code(hidden, site), site), hidden

    def _is_late(self, site: Site) -> bool:
        return site.head and site.kind == "block" and site.index >= self.first_late

    def _next(self, site: Site) -> str:
        """The block that a site's hidden state goes into."""
        return str(site.index if site.kind == "stage" else site.index + 1)

    def _code(self, hidden: Tensor, site: Site) -> Tensor | None:
        """(batch, tokens, rank), or None where no block of the stage follows that is read."""
        block = self._next(site)
        if not site.head or block not in self.reads or self.stages[int(block)] != site.stage:
            return None
        code: Tensor = self.reads[block](hidden)
        return code

    def _write(self, blocks: tuple[str, ...], site: Site, *codes: Tensor) -> Tensor:
        """(batch, tokens, width): the gated state, with DTL+ convolved over the grid."""
        writers: list[Any] = [self.writes[name] for name in blocks]
        weight = torch.cat([writer.weight for writer in writers], dim=1)
        state = F.linear(torch.cat(codes, dim=-1), weight)
        gated = state * torch.sigmoid(self.config.beta * state)
        if not self.config.kernel:
            return gated
        assert site.grid is not None
        prefix, tokens = gated[:, : site.prefix], gated[:, site.prefix :]
        grid = rearrange(tokens, "b (h w) c -> b c h w", h=site.grid[0])
        before, after = (self.config.kernel - 1) // 2, self.config.kernel // 2
        mixed = self.mixes[str(site.stage)](F.pad(grid, (before, after, before, after)))
        return torch.cat([prefix, rearrange(mixed, "b c h w -> b (h w) c")], dim=1)

    def _check_grid(self, site: Site) -> None:
        """A kernel of up to twice the grid's side less one still meets a token with each of its weights."""
        if not self.config.kernel or site.grid is None:
            return
        largest = 2 * min(site.grid) - 1
        if self.config.kernel > largest:
            raise ValueError(
                f"dtl: kernel={self.config.kernel} is too large for a token grid of {site.grid[0]} x {site.grid[1]}: "
                f"choose at most {largest}, or larger images"
            )


def _blocks(sites: Sequence[Site]) -> list[Site]:
    """The blocks of the stack that the head reads."""
    return [site for site in sites if site.head and site.kind == "block"]


def _read(width: int, rank: int) -> Tap:
    tap = Tap(width, rank, bias=False)
    nn.init.kaiming_uniform_(tap.weight, a=math.sqrt(5))
    return tap


def _write(rank: int, width: int) -> nn.Linear:
    linear = nn.Linear(rank, width, bias=False)
    nn.init.zeros_(linear.weight)
    return linear
