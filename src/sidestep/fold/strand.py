"""What one method owns along a pass: its state, its cache, what it wrote, and what the head reads of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sidestep.fold.caches import SideCache
from sidestep.fold.passes import FoldError, Pass, Reading
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site


@dataclass
class Strand:
    """One method along one pass.

    Attributes:
        method: the side network.
        frozen: whether nothing before the method's first write may require a gradient.
        carried: what an encoder gave its decoder, (batch, tokens, any).
        state: the method's own.
        cache: its part of the stack's key-value cache, where it keeps one.
        written: whether it has returned another hidden state.
        row: (batch, 1, width) what the head reads, on its way through the final norm, where the fold is narrowed.
        reading: what the head reads, at the end.
    """

    method: SideNet
    frozen: bool
    carried: Tensor | None = None
    state: Any = None
    cache: SideCache | None = None
    written: bool = False
    row: Tensor | None = None
    reading: Reading | None = None

    def check(self, passed: Pass) -> None:
        """Raise if the method cannot follow a pass, at a stack's start."""

    def start(self, site: Site) -> None:
        """Begin a stack at its first site."""
        self.state = self.method.start(site, self.carried)

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
        """What goes on in the place of a hidden state."""
        self.state = self.method.advance(self.state, hidden, site)
        self.state, written = self.method.write(self.state, hidden, site)
        self.written |= written is not hidden
        return written

    def memory(self, site: Site) -> Tensor | None:
        """What a decoder block reads in the place of the encoder's output, or None for the encoder's."""
        memory = self.method.memory(self.state, site)
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
        method, state = self.method, self.state
        output = method.finish(state, raw, normed, site)
        self.written |= output is not normed
        if site.head:
            correct = partial(method.correct, state, site) if method.corrects else None
            read = own(output)
            keep = site.keep if site.keep is None else site.keep[:, read]
            self.reading = Reading(output[:, read], replace(site, keep=keep), method.pooled(state, site), correct)
            return output
        carried = method.carry(state)
        self.carried = None if carried is None else carried[:, own(carried)]
        return output

    def read_output(self, hidden: Tensor, site: Site) -> None:
        """Note that the head reads the trunk's own output, (batch, tokens, any). A read-out of the method's own stays.

        Args:
            hidden: that output.
            site: the end of the stack, with the padding and the prefix of these tokens.
        """
        if self.reading is None:
            self.finish(hidden, hidden, site, lambda _: slice(None))
        else:
            self.reading = replace(self.reading, hidden=hidden, site=site)
