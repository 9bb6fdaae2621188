"""Where a method is, beside a backbone whose blocks run on several devices.

A method is in one place, its home. It reads a hidden state where the block has left it, and only the codes go home.
What is wide goes home where a method has no narrower codes, and where it may write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site


@dataclass(frozen=True)
class Home:
    """Where a method is.

    Attributes:
        device: that place. None: wherever the backbone is, which runs on one device.
    """

    device: torch.device | None = None

    def is_away(self, hidden: Tensor) -> bool:
        """Whether a hidden state is elsewhere."""
        return self.device is not None and hidden.device != self.device

    def tensor(self, x: Tensor) -> Tensor:
        """A tensor, brought home. It is the same one if it is there."""
        return x if self.device is None else x.to(self.device)

    def site(self, site: Site) -> Site:
        """A site, with what belongs to a pass brought home."""
        return site if self.device is None else site.at(self.device)

    def read(self, method: SideNet, hidden: Tensor, site: Site) -> Any:
        """The codes of a hidden state: read where it is, and brought home."""
        codes = method.read(hidden, site)
        if codes is None or isinstance(codes, Tensor):
            return None if codes is None else self.tensor(codes)
        return tuple(map(self.tensor, codes))


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two hidden states of one shape have other values, wherever they are. Fake tensors have none."""
    return one is not other and not isinstance(other, FakeTensor) and not torch.equal(one, other.to(one.device))
