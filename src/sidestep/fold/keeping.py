"""Which strand a pass gets, by how what is read is kept for backward."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sidestep.fold.deferred import DeferredStrand
from sidestep.fold.forms import ELSEWHERE, FORMS, fitting, warn_if_idle
from sidestep.fold.home import Home
from sidestep.fold.passes import FoldError
from sidestep.fold.reads import Reads
from sidestep.fold.strand import Strand
from sidestep.interface.keep import Keep
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site

_log = logging.getLogger("sidestep")


class Keeping:
    """How what a method reads before its border is kept for backward.

    Args:
        method: the side network.
        frozen: whether nothing before its first write may require a gradient.
        border: the site of that write, or None if it never writes.
        keep: the way. "auto" replays one step, sees in it how much there is to keep, and then takes what fits.
        home: where the method is.

    Attributes:
        way: `keep`, or what "auto" has chosen.
        on_gpu: whether a pass without values stands for one on a GPU (a plan's).
        proved: whether a second pass has read what the first had read.
    """

    def __init__(self, method: SideNet, border: Site | None, keep: Keep, *, frozen: bool, home: Home) -> None:
        self.method, self.border, self.frozen, self.home = method, border, frozen, home
        self.way: Keep = keep
        self.proved, self.on_gpu = False, False
        self._warned = False

    def strand(
        self,
        carried: Tensor | None,
        call: Callable[[], Any],
        second_pass: Callable[[Callable[[], Any], Reads], None],
        *,
        cached: bool,
    ) -> Strand:
        """The method along a pass.

        Args:
            carried: what an encoder that ran before gave along.
            call: runs the same pass again.
            second_pass: runs a call as a second pass for some reads.
            cached: whether the call was given a key-value cache.
        """
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.method.parameters())
        if self.way == "full" or not self.frozen or not learns:
            return self.plain(carried)
        form = ELSEWHERE if self.way == "offload" and self.on_gpu else FORMS.get(self.way)
        twice = form is None
        again = partial(self._again, call, second_pass, _versions(call) if twice else [])
        reads = Reads(self.method, form, again, twice and not self.proved, self.home)
        own: dict[str, Any] = {"border": self.border, "home": self.home, "cached": cached and twice}
        return DeferredStrand(self.method, self.frozen, carried, reads=reads, **own)

    def plain(self, carried: Tensor | None) -> Strand:
        """The method along a pass in which autograd keeps what it needs."""
        return Strand(self.method, self.frozen, carried, border=self.border, home=self.home)

    @property
    def is_proved(self) -> bool:
        """Whether no step has a pass to compare any more."""
        return self.proved or self.way not in ("replay", "auto")

    def check_compiler(self) -> None:
        """Refuse a compiled model, which would run as if it were not compiled.

        Raises:
            ValueError: saying what to do.
        """
        if torch.compiler.is_compiling() and self.way != "full" and torch.is_grad_enabled():
            _refuse_compiler(self.way)

    def _again(
        self,
        call: Callable[[], Any],
        second_pass: Callable[[Callable[[], Any], Reads], None],
        versions: list[tuple[Tensor, int]],
        reads: Reads,
    ) -> None:
        if any(tensor._version != version for tensor, version in versions):
            raise FoldError(
                "the batch was changed in place between the forward pass and backward, and keep='replay' reads it "
                "again there: give each step tensors of its own"
            )
        second_pass(call, reads)
        if not reads.complete:
            raise FoldError(
                f"keep='replay' runs the frozen blocks twice, and the second pass came by {reads.again} of "
                f"{len(reads.reads)} places. The model does not run the same blocks each time. Choose another keep, "
                "such as 'int8'"
            )
        self.proved = True

    def ended(self, strand: Strand) -> None:
        """A pass has ended: "auto" has seen how much there is to keep."""
        if not isinstance(strand, DeferredStrand) or not strand.reads.reads or strand.reads.imagined:
            return
        device = strand.reads.reads[0].device
        if not self._warned:
            self._warned = True
            warn_if_idle(self.way, device)
        if self.way == "auto" and device.type in ("cpu", "cuda"):
            self.way = fitting(strand.reads.wide, device)
            _log.info("keep='auto': %s, for %.1f MiB that are read in a step", self.way, strand.reads.wide / 2**20)


@torch.compiler.disable
def _refuse_compiler(way: str) -> None:
    # outside of what is compiled: an error inside would have the compiler run all of it uncompiled
    raise ValueError(
        f"keep={way!r} in a compiled model: a compiler does not follow what backward reads again. Attach with "
        "keep='full', or leave torch.compile out"
    )


def _versions(call: Any) -> list[tuple[Tensor, int]]:
    """The tensors of a call, and how often each was changed in place so far."""
    given = tree_leaves((call.args, call.keywords))
    return [(one, one._version) for one in given if isinstance(one, Tensor) and not one.is_inference()]
