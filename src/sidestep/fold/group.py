"""Many side networks of one shape along one pass, as one: their parameters are stacked, and each product is batched.

What the pass brings is noted. At its end all of them run over it at once (`torch.vmap`), each with its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel

from sidestep.fold.passes import Reading, mean_tokens
from sidestep.fold.strand import Strand
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site

AT_ONCE = 16
"""How many run at once at most. What a batch of them makes at a site is in memory at one time."""


@dataclass
class GroupStrand(Strand):
    """Side networks of one config, of which none corrects the head's vector or learns.

    Attributes:
        methods: the side networks. `method` is the first one, which stands for all.
        mean_first: the head reads the tokens' mean, which is taken before the final norm.
        events: what the pass brought, as calls of a strand.
        readings: what the head of each reads, at the end.
    """

    methods: Sequence[SideNet] = field(kw_only=True)
    mean_first: bool = field(kw_only=True)
    events: list[Callable[[_Alone], None]] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    def start(self, site: Site) -> None:
        """Note that a stack begins."""
        self.events.append(partial(_Alone.start, site=site))

    def advance(self, hidden: Tensor, site: Site) -> Tensor:
        """Note what came by, and hand it on."""
        self.events.append(partial(_Alone.pass_site, hidden=hidden, site=site))
        return hidden

    def memory(self, site: Site) -> None:
        """None: the encoder's own output."""
        return

    def finish(self, raw: Tensor, normed: Tensor, site: Site, own: Callable[[Tensor], slice]) -> Tensor:
        """Note that a stack ends. At the last one, run them all."""
        mean = self.mean_first and site.head
        self.events.append(partial(_Alone.end, raw=raw, normed=normed, site=site, own=own, mean_first=mean))
        if site.head:
            self.readings = self._run()
        return normed

    def _run(self) -> list[Reading]:
        run = _Run(self.method)
        stacked = stack_module_state([_Run(method) for method in self.methods])
        last: list[Reading] = []

        def one(*state: Any) -> tuple[Tensor, ...]:
            reading = functional_call(run, state, (self.events, self.carried))
            last.append(reading)
            return (reading.hidden,) if reading.pooled is None else (reading.hidden, reading.pooled)

        # fused attention has no batched form for a further dimension
        with sdpa_kernel(SDPBackend.MATH):
            made = torch.vmap(one, randomness="error", chunk_size=AT_ONCE)(*stacked)
        site, pooled = last[0].site, made[1] if len(made) > 1 else [None] * len(self.methods)
        return [Reading(hidden, site, own) for hidden, own in zip(made[0], pooled, strict=True)]


class _Run(nn.Module):
    """A side network along what a pass brought."""

    def __init__(self, side: SideNet) -> None:
        super().__init__()
        self.side = side

    def forward(self, events: Sequence[Callable[[_Alone], None]], carried: Tensor | None) -> Reading:
        strand = _Alone(self.side, frozen=False, carried=carried)
        for event in events:
            event(strand)
        assert strand.reading is not None
        return strand.reading


@dataclass
class _Alone(Strand):
    """One of them. It is given what the bare pass had, and goes on from what it wrote itself.

    Attributes:
        own: what it wrote behind the last block.
        place: where that was.
    """

    own: Tensor | None = None
    place: Site | None = None

    def pass_site(self, hidden: Tensor, site: Site) -> None:
        """Advance at a site."""
        written = self.advance(hidden, site)
        self.own, self.place = (None if written is hidden else written), site

    def end(self, raw: Tensor, normed: Tensor, site: Site, own: Callable[[Tensor], slice], *, mean_first: bool) -> None:
        """End a stack. What was written goes through the final norm in the place of what the bare pass has there."""
        if self.own is not None:
            assert self.place is not None
            norm = site.norm if site.kind == "norm" else None
            raw = mean_tokens(self.own, self.place)[:, None] if mean_first and norm is not None else self.own
            normed = raw if norm is None else norm.forward(raw)
        self.finish(raw, normed, site, own)
