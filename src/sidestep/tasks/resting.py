"""A task of a bank that is in memory and not on the backbone."""

from __future__ import annotations

from dataclasses import dataclass

from sidestep.model.attach import Attached
from sidestep.model.attachment import Rest
from sidestep.model.side_model import SideModel


@dataclass(frozen=True)
class Resting:
    """An inactive task in memory."""

    model: SideModel
    rest: Rest
    identity: str

    def resume(self) -> SideModel:
        """Its model, on the backbone again."""
        self.model.attachment.resume(self.rest)
        return self.model


def is_on(model: Attached) -> bool:
    """Whether nobody has detached it."""
    return all(part.fold.attached for part in model.parts)
