"""A method that changes a small share of the backbone's weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sidestep.interface.config import MethodConfig
from sidestep.interface.weight_delta import WeightDelta, refuse_codes
from sidestep.sparse.diff import SparseDiff

ValueDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class SparseDeltaConfig(MethodConfig):
    """A sparse diff of the backbone's weights.

    Attributes:
        density: share of the weights' entries that are changed, above 0 and at most 1.
        value_dtype: precision of the changes, in training and in the task's file.
    """

    density: float = 0.005
    value_dtype: ValueDtype = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("density", 0 < self.density <= 1, "a number above 0 and at most 1")


class SparseDelta(WeightDelta):
    """A weight delta that ends as a sparse diff: zero but at a share `config.density` of the weights' entries.

    Attributes:
        samples: training rows that `ss.initialise` looks at for `choose`. With 0, positions are chosen without any.
    """

    samples: int = 0

    @property
    def wanders(self) -> bool:
        """Whether positions change while the diff is trained."""
        return False

    def moves(self, name: str, parameter: Tensor) -> bool:
        """Every floating-point weight may be changed."""
        return parameter.is_floating_point()

    def insert(self, trunk: nn.Module) -> None:
        """Raise if the backbone is quantised: its stored weights are codes, to which nothing can be added."""
        refuse_codes(trunk, "a diff is added to plain ones")

    def diff(self, tensors: Mapping[str, nn.Parameter]) -> SparseDiff | None:
        """The diff, without positions yet."""
        total = sum(tensor.numel() for tensor in tensors.values())
        nonzeros = int(self.config.density * total)
        if not nonzeros:
            raise ValueError(
                f"density={self.config.density} of its {total} weights is less than one: "
                f"choose at least {1 / total:.2g}"
            )
        return SparseDiff(tensors, nonzeros, getattr(torch, self.config.value_dtype))

    @property
    def relaxes(self) -> bool:
        """Whether training begins with a stage in which all weights are free, between `relax` and `project`."""
        return False

    def stages(self, epochs: int, rate: float) -> tuple[tuple[int, float], tuple[int, float]]:
        """Epochs and learning rate of that first stage and of the training of the diff, for those of the settings."""
        return (epochs, rate), (epochs, rate)

    def relax(
        self,
        diff: SparseDiff,
        dense: Iterable[nn.Parameter],
        *,
        rate: float,
        weight_decay: float,
        max_norm: float,
        seed: int,
    ) -> Any:
        """The optimizer of the first stage, which owns all weights that the diff may change from here on.

        Its `restore` gives the weights their pretrained values back. A checkpoint of the optimizer holds all that it
        needs.

        Args:
            diff: without positions.
            dense: what is trained besides: the head.
            rate: learning rate. At 0 nothing moves.
            weight_decay: of the weights and of the head.
            max_norm: where gradients are cut. At 0 they are not cut.
            seed: of what is random in it.

        Raises:
            NotImplementedError: of a method without this stage, for which nobody calls it (see `relaxes`).
        """
        raise NotImplementedError(f"{type(self).__name__} has one stage")

    def project(self, optimizer: Any, diff: SparseDiff) -> dict[str, Any]:
        """Place the diff by what the first stage learned, and return what came of it, for the results.

        Raises:
            NotImplementedError: as `relax`.
        """
        raise NotImplementedError(f"{type(self).__name__} has one stage")

    def choose(self, diff: SparseDiff, squares: Mapping[str, Tensor]) -> None:
        """Place the diff by the sums of squared gradients of all weights, by the names in `diff.tensors`."""

    def before_step(self, diff: SparseDiff, step: int, steps: int) -> None:
        """Called in training before the batches of optimizer step `step` (from 1) of `steps`."""

    def after_step(self, diff: SparseDiff, optimizer: Any) -> None:
        """Called after the same step, when gradients are gone and the optimizer holds its state of `diff.values`."""

    def check_told(self, diff: SparseDiff) -> None:
        """Called in every training pass: a method that needs `before_step` raises if nobody called it."""
