"""What one method owns along a pass: its state, its cache, what it wrote, and what the head reads of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sidestep.fold.caches import SideCache
from sidestep.fold.home import Home
from sidestep.fold.passes import FoldError, Pass, Reading
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site, same_place


@dataclass
class Strand:
    """One method along one pass.

    Attributes:
        method: the side network.
        frozen: whether nothing before the method's first write may require a gradient.
        carried: what an encoder gave its decoder, (batch, tokens, any).
        border: the method's first write, or None if it never writes.
        home: where the method is.
        state: the method's own.
        cache: its part of the stack's key-value cache, where it keeps one.
        crossed: whether the border is behind.
        written: whether it has returned another hidden state.
        row: (batch, 1, width) what the head reads, on its way through the final norm, where the fold is narrowed.
        reading: what the head reads, at the end.
    """

    method: SideNet
    frozen: bool
    carried: Tensor | None = None
    border: Site | None = field(default=None, kw_only=True)
    home: Home = field(default=Home(), kw_only=True)
    state: Any = None
    cache: SideCache | None = None
    crossed: bool = False
    written: bool = False
    row: Tensor | None = None
    reading: Reading | None = None

    def check(self, passed: Pass) -> None:
        """Raise if the method cannot follow a pass, at a stack's start."""

    def start(self, site: Site) -> None:
        """Begin a stack at its first site."""
        self.state = self.method.start(self.home.site(site), self.carried)

    def step(self, hidden: Tensor, site: Site) -> Tensor:
        """Advance the method and let it write, with the guards on the batch and on what lies before its first write.

        Raises:
            ValueError: if the batch is too small for the method's batch norms.
            FoldError: if a gradient would flow through the frozen part.
        """
        if self.method.training and hidden.shape[0] < self.method.least_rows:
            raise ValueError(
                f"{hidden.shape[0]} row in a batch, but {type(self.method).__name__} has batch norms on this backbone, "
                f"which are trained on {self.method.least_rows} or more. Give larger batches, or call model.eval()"
            )
        if self.frozen and not self.written and hidden.requires_grad and torch.is_grad_enabled():
            raise FoldError(
                f"the hidden state at {site.kind} {site.index} of the {site.stack} requires a gradient before the "
                "method's first write. So the whole backbone would be kept for backward. Do not call "
                "enable_input_require_grads, and keep the embeddings frozen"
            )
        return self.advance(hidden, site)

    def advance(self, hidden: Tensor, site: Site) -> Tensor:
        """What goes on in the place of a hidden state. One that is elsewhere stays there where its codes are enough."""
        here, may_write = self.home.site(site), self.crosses(site)
        reads_there = self.home.is_away(hidden) and self.method.splits
        if reads_there:
            self.state = self.method.step(self.state, self.home.read(self.method, hidden, site), here)
            if not may_write:
                return hidden
        own = self.home.tensor(hidden)
        if not reads_there:
            self.state = self.method.advance(self.state, own, here)
        return self.write(own, here, hidden)

    def crosses(self, site: Site) -> bool:
        """Whether the border is at this site or behind, so that the method may write here."""
        self.crossed |= self.border is not None and same_place(site, self.border)
        return self.crossed

    def write(self, own: Tensor, site: Site, hidden: Tensor) -> Tensor:
        """What goes on in the place of a hidden state, by what the method makes of it at home (`own`)."""
        self.state, written = self.method.write(self.state, own, site)
        if written is own:
            return hidden
        self.written = True
        return written.to(hidden.device)

    def memory(self, site: Site) -> Tensor | None:
        """What a decoder block reads in the place of the encoder's output, or None for the encoder's."""
        memory = self.method.memory(self.state, self.home.site(site))
        self.written |= memory is not None
        return memory

    def finish(self, raw: Tensor, normed: Tensor, site: Site, own: Callable[[Tensor], slice]) -> Tensor:
        """End a stack, and note what the head or the decoder reads.

        Args:
            raw: what went into the final norm, (batch, tokens, width).
            normed: what came out.
            site: the end of the stack.
            own: which of a tensor's tokens are in the stack's own output. A norm may stand behind what is cropped.
        """
        method, state, site = self.method, self.state, self.home.site(site)
        end = self.home.tensor(normed)
        output = method.finish(state, end if raw is normed else self.home.tensor(raw), end, site)
        self.written |= output is not end
        if site.head:
            correct = partial(method.correct, state, site) if method.corrects else None
            read = own(output)
            keep = site.keep if site.keep is None else site.keep[:, read]
            self.reading = Reading(output[:, read], replace(site, keep=keep), method.pooled(state, site), correct)
        else:
            carried = method.carry(state)
            self.carried = None if carried is None else carried[:, own(carried)]
        return normed if output is end else output.to(normed.device)

    def read_output(self, hidden: Tensor, site: Site) -> None:
        """Note that the head reads the trunk's own output, (batch, tokens, any). A read-out of the method's own stays.

        Args:
            hidden: that output.
            site: the end of the stack, with the padding and the prefix of these tokens.
        """
        if self.reading is None:
            self.finish(hidden, hidden, site, lambda _: slice(None))
        else:
            self.reading = replace(self.reading, hidden=self.home.tensor(hidden), site=self.home.site(site))
