"""Some rows of a batch: of its inputs, of what a pass brings, and of what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only

from sidestep.fold.passes import FoldError, Reading
from sidestep.interface.sites import Site


@dataclass(frozen=True)
class Rows:
    """Rows of a batch.

    Attributes:
        index: (rows,) their numbers.
        of: how many rows the batch has.
    """

    index: Tensor
    of: int

    def tensor(self, whole: Tensor) -> Tensor:
        """(rows, ...) of a tensor (batch, ...).

        Raises:
            FoldError: if its first axis is not the batch.
        """
        if whole.shape[0] != self.of:
            raise FoldError(
                f"the pass has {whole.shape[0]} rows for a batch of {self.of}. A task's own rows cannot be told there: "
                "leave rows= out"
            )
        return whole.index_select(0, self.index.to(whole.device))

    def site(self, whole: Site) -> Site:
        """The site as these rows see it, in a pass without a cache."""
        keep, key_keep, memory_keep = (
            None if mask is None else self.tensor(mask) for mask in (whole.keep, whole.key_keep, whole.memory_keep)
        )
        return replace(whole, keep=keep, key_keep=key_keep, memory_keep=memory_keep, cache=None)

    def reading(self, whole: Reading) -> Reading:
        """What the head reads of these rows, of a method that corrects nothing."""
        pooled = None if whole.pooled is None else self.tensor(whole.pooled)
        return Reading(self.tensor(whole.hidden), self.site(whole.site), pooled)

    def part(self, whole: Any) -> Any:
        """The rows of all tensors in a value whose first axis is the batch. Others are as they were."""
        return tree_map_only(Tensor, lambda x: self.tensor(x) if x.shape[:1] == (self.of,) else x, whole)

    def can_part(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a model can be given these rows of its inputs alone: each tensor has the batch as its first axis."""
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        positions = tensors.get(
            "position_ids"
        )  # a model of pictures may have three positions a token, which come first
        if positions is not None and positions.ndim == 3:
            return False
        return all(value.shape[:1] == (self.of,) for value in tensors.values())
