"""Readout: a linear map of the pooled states of all levels of the frozen model, solved and not learned by steps.

Source: Sidestep's own. That intermediate levels help a linear probe is Head2Toe's finding (Evci et al., arXiv
2201.03529). Of each level two vectors are read: the token that stands for all, and the mean of the kept tokens. The map
is ridge regression or logistic regression (`kinds.solve`), and becomes the head's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sidestep.interface.config import MethodConfig, spread
from sidestep.interface.layers import masked_mean, own_token, take_rows
from sidestep.interface.registry import register
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site

Weights = Literal["none", "balanced"]


@dataclass(frozen=True, kw_only=True)
class ReadoutConfig(MethodConfig):
    """Settings of the readout.

    Attributes:
        levels: how many blocks are read, spread evenly, the last one among them, besides the embeddings. None: all.
        class_weights: "balanced" lets each class count the same, however many rows it has.
        penalty: weight of the squared norm of the map, per row, for standardised features. None: chosen on training
            rows. A regression leaves out each row in turn. Classes are held out by a fifth.
    """

    rates = (3e-3, 1e-2, 5e-2)

    levels: int | None = None
    class_weights: Weights = "none"
    penalty: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("levels", self.levels is None or self.levels >= 1, "a whole number of at least 1, or None")
        self.require("penalty", self.penalty is None or self.penalty > 0, "a number above 0, or None")

    def blocks(self, depth: int) -> tuple[int, ...]:
        """The blocks of `depth` that are read."""
        return spread(depth, self.levels or depth)


@register("readout", ReadoutConfig)
class Readout(SideNet):
    """Readout: the pooled states of all levels, for a head that is solved.

    If the head reads every token, each token's own states of all levels are read.

    Parameters: none. The head has 2d for each output and level of width d (d if it reads every token), and one for each
    output.
    """

    solved = True

    def __init__(self, config: ReadoutConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        own = [site for site in sites if site.head]
        blocks = config.blocks(own[0].depth)
        # the input of a later stage is what the stage before gave
        first = [site for site in own if site.kind == "stage" and site.stage == 0]
        read = [*first, *(site for site in own if site.kind == "block" and site.index in blocks)]
        self.names = tuple(map(_name, read))
        self.per_token = own[-1].per_token
        self.pooled_from = f"{'each token' if self.per_token else 'own token and mean'} of {', '.join(self.names)}"
        self.pooled_width = sum(site.width * (2 if _has_own(site) and not self.per_token else 1) for site in read)

    @property
    def gives_tokens(self) -> bool:
        """The states of each token are its vector."""
        return True

    def start(self, site: Site, carried: Tensor | None) -> tuple[Tensor, ...]:
        """Nothing yet."""
        return ()

    def read(self, hidden: Tensor, site: Site) -> Tensor | None:
        """(batch, 2 width) of a level that is read, (batch, width) where no token stands for all. Else None.

        (batch, tokens, width), if the head reads every token.
        """
        if not site.head or _name(site) not in self.names:
            return None
        if self.per_token:
            return hidden[:, site.prefix :]
        keep = None if site.keep is None else site.keep[:, site.prefix :]
        mean = masked_mean(hidden[:, site.prefix :], keep)
        if not _has_own(site):
            return mean
        own = take_rows(hidden, own_token(hidden, site.keep, causal=site.causal))[:, 0]
        return torch.cat([own, mean], dim=-1)

    def step(self, state: tuple[Tensor, ...], codes: Tensor | None, site: Site) -> tuple[Tensor, ...]:
        """With one level more."""
        return state if codes is None else (*state, codes)

    def pooled(self, state: tuple[Tensor, ...], site: Site) -> Tensor:
        """(batch, pooled_width), or of every token: all levels behind each other, in float32."""
        return torch.cat([level.float() for level in state], dim=-1)


def _has_own(site: Site) -> bool:
    """Whether a token stands for all: a text's first or last one, or an image's class token."""
    return site.prefix > 0 or not site.spatial


def _name(site: Site) -> str:
    return f"{site.kind}{site.index}"
