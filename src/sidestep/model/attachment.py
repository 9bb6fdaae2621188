"""What a task puts on its backbone, taken off and put on again, so that many tasks can share the backbone in turns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sidestep.backbone import checkpoint_blocks, uncheckpoint_blocks
from sidestep.fold import Fold, Hooks
from sidestep.methods import WeightDelta
from sidestep.model.before import Before
from sidestep.model.build import check_attachable
from sidestep.model.trained import Trained


@dataclass(frozen=True)
class Rest:
    """What a task was on its backbone besides hooks: values of tensors that are its own, gradient flags and modes."""

    values: dict[str, Tensor]
    flags: Before


@dataclass
class Attachment:
    """A task on its backbone.

    Attributes:
        backbone: as given.
        trunk: the backbone without its own head.
        before: flags, modes and configs of before `attach`.
        trained: the backbone's tensors that are the task's own.
        delta: the method, if it changes weights.
        fold: runs the method along a pass.
        hooks: bring the passes to the fold.
        recomputed: the blocks that are recomputed in backward.
    """

    backbone: nn.Module
    trunk: nn.Module
    before: Before
    trained: Trained
    delta: WeightDelta | None
    fold: Fold
    hooks: Hooks
    recomputed: list[nn.Module]

    def leave(self) -> None:
        """Take all off, within the fold's turn: the backbone is as before `attach`."""
        torch.clear_autocast_cache()  # of a context that is still open
        self.hooks.remove()
        uncheckpoint_blocks([place.module for place in self.hooks.places])
        self.trained.put_back()
        if self.delta is not None:
            self.delta.remove(self.trunk)
        self.before.restore(self.backbone)

    @property
    def can_rest(self) -> bool:
        """Whether `rest` and `resume` work: the method has no modules of its own inside the backbone."""
        return self.delta is None or type(self.delta).remove is WeightDelta.remove

    def rest(self) -> Rest:
        """Take all off. `resume` takes what this returns."""
        with self.fold.turn:
            rest = Rest(self.trained.values(), Before.of(self.backbone))
            self.leave()
        return rest

    def resume(self, rest: Rest) -> None:
        """Put all on again, exactly as before `rest`, or leave the backbone as it was.

        Raises:
            ValueError: if another task is attached to the backbone meanwhile.
        """
        check_attachable(self.backbone)
        with self.fold.turn:  # no thread calls the model before all is there
            self.hooks.put()
            try:
                torch.clear_autocast_cache()
                self.trained.put(rest.values)
                checkpoint_blocks(self.recomputed)
                rest.flags.restore(self.backbone)
            except BaseException:  # out of memory, or stopped by hand
                self.leave()
                raise
