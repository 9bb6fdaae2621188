"""Strands of a pass whose wide inputs are not kept: the first pass reads, the second weighs.

Before its border a method needs nothing of a hidden state but its codes. So the states wait until the border, and are
then computed from the codes in one go, in backward again. Only the codes are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sidestep.fold.passes import Pass
from sidestep.fold.reads import Reads, form_of, formed
from sidestep.fold.strand import Strand
from sidestep.interface.layers import recompute
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site


class Ended(BaseException):
    """The second pass has seen all that it is for.

    It is no `Exception`, so that no model takes it for an error of its own.
    """


@dataclass
class DeferredStrand(Strand):
    """A method along a pass, whose reads leave their inputs to `reads`.

    Attributes:
        reads: of this pass.
        cached: whether a key-value cache was given that a second pass would be given again.
        sites: those of the stack so far, the first at its start, and the codes of the others.
        root: see `Reads.root`.
        first: the number of the stack's first read.
        settled: whether the states up to here have been computed.
    """

    reads: Reads = field(kw_only=True)
    cached: bool = field(kw_only=True)
    sites: list[tuple[Site, Any]] = field(default_factory=list)
    first: int = 0
    root: Tensor | None = None
    settled: bool = False

    def check(self, passed: Pass) -> None:
        """Refuse a cache that was given, or that the method writes to: both passes would add their tokens to it.

        A cache that the model makes for itself is made in each pass.

        Raises:
            ValueError: saying what to do.
        """
        if self.cached or (self.method.caches and passed.cache is not None):
            raise ValueError(
                "a key-value cache in a pass with gradients, which is not kept in full (keep=): pass use_cache=False"
            )

    def start(self, site: Site) -> None:
        """Begin a stack. Until the border the state is not known."""
        if self.crossed:
            super().start(site)
            return
        self.settled, self.sites, self.first = False, [], len(self.reads.reads)

    def advance(self, hidden: Tensor, site: Site) -> Tensor:
        """Read, and at the border settle and write."""
        if self.crossed:
            return super().advance(hidden, site)
        self.sites.append((self.home.site(site), self.reads.read(hidden, site)))
        if not self.crosses(site):
            return hidden
        self._settle()
        return self.write(self.home.tensor(hidden), self.home.site(site), hidden)

    def memory(self, site: Site) -> Tensor | None:
        """The encoder's own output before the border, as the first write says."""
        return super().memory(site) if self.crossed else None

    def finish(self, raw: Tensor, normed: Tensor, site: Site, own: Callable[[Tensor], slice]) -> Tensor:
        """End a stack: at the latest here its states are needed."""
        if not self.settled and not self.crossed:
            self._settle()
        self.crosses(site)
        return super().finish(raw, normed, site, own)

    def _settle(self) -> None:
        """Compute the states of this stack from its codes, and keep only these."""
        if self.root is None:
            self.root = self.reads.root()
        sites, codes = [site for site, _ in self.sites], [codes for _, codes in self.sites]
        leaves, forms = self.reads.joined(self.root, self.first, codes), [form_of(one) for one in codes]
        self.state = recompute(run, self.method, sites, forms, self.carried, *leaves, random=self.method.training)
        self.settled, self.sites = True, []


def run(method: SideNet, sites: list[Site], forms: list[int | None], carried: Tensor | None, *codes: Tensor) -> Any:
    """The state behind some sites, by what was read at each: tensors in a row, and in which form they were (`form_of`).

    The tensors are arguments of their own, because only such arguments are seen by autograd.
    """
    state, waiting = method.start(sites[0], carried), iter(codes)
    for site, form in zip(sites, forms, strict=True):
        state = method.step(state, formed(form, waiting), site)
    return state


@dataclass
class SecondStrand(Strand):
    """The second pass: each hidden state is weighed as it comes by, up to the last that was read."""

    reads: Reads = field(kw_only=True)

    def start(self, site: Site) -> None:
        """A second pass has no state."""

    def advance(self, hidden: Tensor, site: Site) -> Tensor:
        """Weigh, and end the pass when all is seen.

        Raises:
            Ended: then.
        """
        self.reads.weigh(hidden, site)
        if self.reads.complete:
            raise Ended
        return hidden

    def memory(self, site: Site) -> Tensor | None:
        """The encoder's own output."""
        return None

    def finish(self, raw: Tensor, normed: Tensor, site: Site, own: Callable[[Tensor], slice]) -> Tensor:
        """The stack's own output."""
        return normed
