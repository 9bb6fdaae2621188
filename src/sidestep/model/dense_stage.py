"""A first stage of training in which all weights are free, after which a sparse diff gets its positions."""

from __future__ import annotations

from typing import Any

import torch

from sidestep.interface.sparse_delta import SparseDelta
from sidestep.methods import WeightDelta
from sidestep.model.attached import AttachedModel


class DenseStage(AttachedModel):
    """The part of a `SideModel` that has to do with that stage.

    Attributes:
        delta: the method, if it changes weights.
    """

    delta: WeightDelta | None

    @property
    def relaxes(self) -> bool:
        """Whether training begins with that stage."""
        placed = self.sparse is None or self.sparse.is_placed
        return isinstance(self.delta, SparseDelta) and self.delta.relaxes and not placed

    def place_anywhere(self) -> None:
        """Give random positions to a sparse diff that has none. Memory and time do not depend on where they are."""
        if self.sparse is not None and not self.sparse.is_placed:
            self.sparse.place_at_random(0)

    def relax(
        self, *, rate: float, weight_decay: float = 0.0, max_norm: float = 1.0, seed: int = 0
    ) -> torch.optim.Optimizer:
        """The optimizer of that stage (see `SparseDelta.relax`), until its `project` or `unrelax`.

        Args:
            rate: learning rate. At 0 nothing moves.
            weight_decay: of the weights and of the head.
            max_norm: the norm to which gradients are cut. 0: they are not cut.
            seed: of whatever is random in the stage.
        """
        assert isinstance(self.delta, SparseDelta)
        assert self.sparse is not None
        dense = [p for _, p in self.trained_parameters() if p is not self.sparse.values]
        return self.delta.relax(self.sparse, dense, rate=rate, weight_decay=weight_decay, max_norm=max_norm, seed=seed)

    def unrelax(self, optimizer: Any) -> None:
        """Undo `relax`: the weights have their pretrained values, and gradients are the diff's again."""
        assert self.sparse is not None
        optimizer.restore()
        self.sparse.hook()
