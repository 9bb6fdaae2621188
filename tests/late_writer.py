"""A method as a third party would write it: it writes in the late blocks, which none of the shipped ones does yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.interface.sites import Site
from sidestep.interface.taps import Tap
from sidestep.methods import MethodConfig, SideNet, register


@dataclass(frozen=True, kw_only=True)
class LateWriterConfig(MethodConfig):
    rank: int = 4
    late_blocks: int = 2


@register("late_writer", LateWriterConfig)
class LateWriter(SideNet):
    """Reads every block and adds a low-rank sum of what it read after each of the last ones."""

    tokenwise = True
    starts_as_identity = True

    def __init__(self, config: LateWriterConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        blocks = [site for site in sites if site.head and site.kind == "block"]
        self.late = config.late_blocks
        self.taps = nn.ModuleList(Tap(site.width, config.rank, form="rms") for site in blocks)
        self.outs = nn.ModuleList(nn.Linear(config.rank, site.width, bias=False) for site in blocks[-self.late :])
        for out in self.outs:
            nn.init.zeros_(out.weight)

    @classmethod
    def check(cls, config: LateWriterConfig, sites: Sequence[Site]) -> None:
        if any(site.stage > 0 for site in sites):
            raise ValueError("its state does not change its grid, and this backbone is hierarchical")

    @classmethod
    def first_write(cls, config: LateWriterConfig, sites: Sequence[Site]) -> Site | None:
        blocks = [site for site in sites if site.head and site.kind == "block"]
        return blocks[-config.late_blocks]

    @classmethod
    def kept_per_token(cls, config: LateWriterConfig, site: Site) -> int:
        return site.width * 50

    def read(self, hidden: Tensor, site: Site) -> Tensor | None:
        return torch.tanh(self.taps[site.index](hidden)) if site.kind == "block" and site.head else None

    def step(self, state: Any, codes: Tensor | None, site: Site) -> Any:
        if codes is None:
            return state
        return codes if state is None else state + codes

    def write(self, state: Any, hidden: Tensor, site: Site) -> tuple[Any, Tensor]:
        late = site.index - (site.depth - self.late)
        if site.kind != "block" or not site.head or late < 0:
            return state, hidden
        return state, hidden + self.outs[late](state).to(hidden.dtype)
