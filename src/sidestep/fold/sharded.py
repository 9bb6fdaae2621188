"""How a pass of the backbone is run: directly, or within the root of a backbone whose blocks are sharded.

FSDP2 keeps account of a pass by hooks on a root. A second pass ends by an exception, which would leave that account
open. So the root is a module around the pass, in which the exception ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from sidestep.fold.deferred import Ended

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def directly(call: Callable[[], Any], *, again: bool) -> Any:
    """The result of a pass of a backbone whose weights are all here. None: it was a second pass, which has ended."""
    try:
        return call()
    except Ended:
        if not again:
            raise
        return None


class Root(nn.Module):
    """What the passes of a sharded backbone run in.

    Args:
        units: the modules whose weights are sharded, each by itself.
    """

    def __init__(self, units: Iterable[nn.Module]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def run(self, call: Callable[[], Any], *, again: bool) -> Any:
        """As `directly`."""
        if not again:
            # what a pass that failed left open is closed, and the list of passes that had no backward is emptied
            cast("FSDPModule", self).reset_iter_state()
        return self(call, again=again)()

    def forward(self, call: Callable[[], Any], *, again: bool) -> Callable[[], Any]:
        """A function that gives the result, because on tensors themselves FSDP would put hooks of the root."""
        output = directly(call, again=again)
        return lambda: output
