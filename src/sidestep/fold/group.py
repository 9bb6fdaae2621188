"""Many side networks of one shape along one pass, as one: their parameters are stacked, and each product is batched.

What the pass brings is noted. At its end all of them run over it at once (`torch.vmap`), each with its own parameters.
Each may have rows of its own. Then those with about as many rows run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from sidestep.fold.home import Home
from sidestep.fold.passes import Reading, mean_tokens
from sidestep.fold.rows import Rows
from sidestep.fold.strand import Strand
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site

AT_ONCE = 16
"""How many run at once at most. What a batch of them makes at a site is in memory at one time."""


@dataclass(frozen=True)
class Group:
    """Side networks of one config that run as one. One alone may be anything, if it has rows of its own.

    Attributes:
        methods: the side networks. Where there are several, none corrects the head's vector or learns.
        home: where they are.
        rows: of the batch, for each. None: all of them run on all rows.
    """

    methods: Sequence[SideNet]
    home: Home
    rows: Sequence[Rows] | None = None

    def at_once(self) -> list[list[int]]:
        """The numbers of those that run at once. As their rows are padded to as many, none has half of that or less."""
        sizes: dict[int, list[int]] = {}
        for number in range(len(self.methods)):
            rows = 0 if self.rows is None else len(self.rows[number].index)
            sizes.setdefault((rows - 1).bit_length(), []).append(number)
        return [own[start : start + AT_ONCE] for own in sizes.values() for start in range(0, len(own), AT_ONCE)]


@dataclass
class GroupStrand(Strand):
    """The strand of a group. `method` is its first side network, which stands for all.

    Attributes:
        group: the side networks.
        mean_first: the head reads the tokens' mean, which is taken before the final norm.
        given: what an encoder that ran before gave along. `carried` is then what stands for that of each.
        events: what the pass brought, as calls of a strand.
        readings: what the head of each reads, at the end.
    """

    group: Group = field(kw_only=True)
    mean_first: bool = field(kw_only=True)
    given: Tensor | None = field(init=False)
    events: list[Callable[[_Alone], None]] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.given = self.carried

    def start(self, site: Site) -> None:
        """Note that a stack begins."""
        self.events.append(partial(_Alone.begin, site=self.group.home.site(site)))

    def advance(self, hidden: Tensor, site: Site) -> Tensor:
        """Note what came by, and hand it on."""
        home = self.group.home
        self.events.append(partial(_Alone.pass_site, hidden=home.tensor(hidden), site=home.site(site)))
        return hidden

    def memory(self, site: Site) -> None:
        """None: the encoder's own output."""
        return

    def finish(self, raw: Tensor, normed: Tensor, site: Site, own: Callable[[Tensor], slice]) -> Tensor:
        """Note that a stack ends. At the last one, run them all."""
        home, mean = self.group.home, self.mean_first and site.head
        at_end = partial(_Alone.end, site=home.site(site), own=own, mean_first=mean)
        self.events.append(partial(at_end, raw=home.tensor(raw), normed=home.tensor(normed)))
        if site.head:
            self.readings = self._run()
        elif type(self.method).carry is not SideNet.carry:
            self.carried = normed[:, own(normed)]  # only its size is asked for
        return normed

    def _run(self) -> list[Reading]:
        found: dict[int, Reading] = {}
        for numbers in self.group.at_once():
            if len(numbers) == 1 and self.group.rows is not None:
                alone = _Run(self.group.methods[numbers[0]])
                found[numbers[0]] = alone(self.events, self.given, self.group.rows[numbers[0]])
            else:
                found |= zip(numbers, self._at_once(numbers), strict=True)
        return [found[number] for number in range(len(self.group.methods))]

    def _at_once(self, numbers: Sequence[int]) -> list[Reading]:
        run = _Run(self.method)
        stacked = stack_module_state([_Run(self.group.methods[number]) for number in numbers])
        rows = None if self.group.rows is None else [self.group.rows[number] for number in numbers]
        index = [] if rows is None else [pad_sequence([one.index for one in rows], batch_first=True)]
        sites: list[Site] = []

        def one(parameters: Any, buffers: Any, *index: Tensor) -> dict[str, Tensor]:
            own = None if rows is None else Rows(index[0], rows[0].of)
            reading: Reading = functional_call(run, (parameters, buffers), (self.events, self.given, own))
            sites.append(reading.site)
            made = {"hidden": reading.hidden, "pooled": reading.pooled, "keep": reading.site.keep if index else None}
            return {name: tensor for name, tensor in made.items() if tensor is not None}

        # fused attention has no batched form for a further dimension
        with sdpa_kernel(SDPBackend.MATH):
            made = torch.vmap(one, randomness="error")(*stacked, *index)
        readings = []
        for place in range(len(numbers)):
            own = {name: tensors[place] for name, tensors in made.items()}
            site = sites[0]
            if rows is not None:
                own = {name: tensor[: len(rows[place].index)] for name, tensor in own.items()}
                site = replace(site, keep=own.get("keep"), key_keep=None, memory_keep=None)
            readings.append(Reading(own["hidden"], site, own.get("pooled")))
        return readings


class _Run(nn.Module):
    """A side network along what a pass brought, on all rows or on its own."""

    def __init__(self, side: SideNet) -> None:
        super().__init__()
        self.side = side

    def forward(self, events: Sequence[Callable[[_Alone], None]], carried: Tensor | None, rows: Rows | None) -> Reading:
        carried = carried if rows is None or carried is None else rows.tensor(carried)
        strand = _Alone(self.side, frozen=False, carried=carried, rows=rows)
        for event in events:
            event(strand)
        assert strand.reading is not None
        return strand.reading


@dataclass
class _Alone(Strand):
    """One of them. It is given what the bare pass had, and goes on from what it wrote itself.

    Attributes:
        rows: its own of the batch. None: all.
        own: what it wrote behind the last block.
        place: where that was.
    """

    rows: Rows | None = None
    own: Tensor | None = None
    place: Site | None = None

    def begin(self, site: Site) -> None:
        """Begin a stack."""
        self.start(self._site(site))

    def pass_site(self, hidden: Tensor, site: Site) -> None:
        """Advance at a site."""
        hidden, site = self._rows(hidden), self._site(site)
        written = self.advance(hidden, site)
        self.own, self.place = (None if written is hidden else written), site

    def end(self, raw: Tensor, normed: Tensor, site: Site, own: Callable[[Tensor], slice], *, mean_first: bool) -> None:
        """End a stack. What was written goes through the final norm in the place of what the bare pass has there."""
        if self.own is not None:
            assert self.place is not None
            norm = site.norm if site.kind == "norm" else None
            raw = mean_tokens(self.own, self.place)[:, None] if mean_first and norm is not None else self.own
            normed = raw if norm is None else norm.forward(raw)
        else:
            raw, normed = self._rows(raw), self._rows(normed)
        self.finish(raw, normed, self._site(site), own)

    def _rows(self, whole: Tensor) -> Tensor:
        return whole if self.rows is None else self.rows.tensor(whole)

    def _site(self, whole: Site) -> Site:
        return whole if self.rows is None else self.rows.site(whole)
