"""A method that changes the backbone's own weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from sidestep.interface.sites import Place, Site
from sidestep.sparse.diff import SparseDiff


class WeightDelta(ABC):
    """A method that changes the backbone's own weights (full tuning, BitFit, diff pruning, LoRA).

    The backbone trains with its own noise. `detach` puts every weight back bit for bit. A method that works by modules
    of its own inside the backbone puts them there in `insert`.

    Class attributes:
        starts_as_identity: before training, outputs equal the frozen model's, bit for bit.
        late: whether only blocks behind the `border` are changed. What comes before is frozen and without noise then.
    """

    starts_as_identity: ClassVar[bool] = True
    late: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def moves(self, name: str, parameter: Tensor) -> bool:
        """Whether the method trains the backbone parameter of this name (relative to the base model)."""

    def see(self, places: Sequence[Place]) -> None:  # noqa: B027 - most methods work by names alone
        """Be told of the backbone's places, before anything else."""

    def border(self, places: Sequence[Place]) -> Site:
        """The last site of which nothing before is changed: the input of the first block, unless only late ones are."""
        return places[0].site

    def insert(self, trunk: nn.Module) -> None:  # noqa: B027 - most methods insert nothing
        """Put modules of the method's own into the backbone's trunk, and raise `ValueError` if they do not fit."""

    def remove(self, trunk: nn.Module) -> None:  # noqa: B027 - as for insert
        """Undo `insert`: the trunk has its own modules under their own names again."""

    def plain_name(self, name: str) -> str | None:
        """What a tensor of this name is called in the untouched trunk, or None for the method's own."""
        return name

    def check(self, moved: Sequence[str]) -> None:  # noqa: B027 - most methods have nothing to refuse
        """Raise `ValueError` with the reason if the method cannot work on a backbone in which it moves these."""

    def diff(self, tensors: Mapping[str, nn.Parameter]) -> SparseDiff | None:
        """What is trained in place of the tensors that the method moves, if it is a sparse diff of them.

        Args:
            tensors: the moved ones by their names in the trunk, without heads and what the checkpoint did not have.
        """
        return None


def refuse_codes(trunk: nn.Module, why: str) -> None:
    """Raise `ValueError` if a trunk's weights are codes, for a method that changes them as numbers."""
    codes = {
        str(parameter.dtype).removeprefix("torch.")
        for parameter in trunk.parameters()
        if not (parameter.is_floating_point() and parameter.itemsize > 1)
    }
    if codes or getattr(getattr(trunk, "config", None), "quantization_config", None) is not None:
        raise ValueError(
            f"its weights are quantised ({', '.join(sorted(codes)) or 'by its config'}), and {why}. Load it "
            "unquantised, or train a side network (read, dtl, sherl, ...), which leaves weights alone"
        )
