"""A sparse diff of the backbone's weights on a support that is chosen before training, or moved while it runs.

Its trained state is as large as the diff: forward and backward use the dense weights, into which the diff is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from sidestep.diffs import SparseDiff
from sidestep.methods.base import SparseDelta, SparseDeltaConfig, is_whole, register

Select = Literal["random"]


@dataclass(frozen=True, kw_only=True)
class SparseConfig(SparseDeltaConfig):
    """A sparse diff with memory for its nonzeros alone.

    Attributes:
        select: how the support is chosen.
        seed: of a random support.
    """

    select: Select = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("seed", is_whole(self.seed, 0), "a whole number of at least 0")


@register("sparse", SparseConfig)
class Sparse(SparseDelta):
    """Sparse tuning: trains a small share of the backbone's weights."""

    def diff(self, tensors: Mapping[str, nn.Parameter]) -> SparseDiff | None:
        """The diff, with its positions where no data are needed to choose them."""
        diff = super().diff(tensors)
        if diff is not None:
            diff.place_at_random(self.config.seed)
        return diff
