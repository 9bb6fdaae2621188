"""Compiled blocks. What is attached to a backbone stays outside of them, so that no task has them compiled again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sidestep.backbone.calls import replace_forward
from sidestep.backbone.find import find_places


class CompiledBlocks:
    """Has the blocks of a backbone compiled at their next call, until `undo`.

    Args:
        backbone: with nothing attached.
        options: of `torch.compile`.

    Raises:
        ValueError: if another library runs the blocks in its own way, as accelerate does where it has dispatched them.

    Attributes:
        paused: whether blocks run as they are. A task that puts modules of its own into them would have them compiled
            again at each switch.
    """

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        # each once, though one that is shared has several places
        blocks = dict.fromkeys(place.module for place in find_places(backbone) if place.site.kind == "block")
        if any("forward" in vars(block) for block in blocks):
            raise ValueError(
                f"the blocks of {type(backbone).__name__} are run by another library (such as accelerate): "
                "load the backbone on one device to compile it"
            )
        self.paused = False
        kinds = {kind: torch.compile(kind.forward, **options) for kind in {type(block) for block in blocks}}
        self.undoing = [replace_forward(block, CompiledForward(self, block, kinds[type(block)])) for block in blocks]

    def undo(self) -> None:
        """Let the blocks run as they are."""
        for undo in self.undoing:
            undo()


class CompiledForward:
    """A block's `forward`, compiled. It wraps `forward`, not `__call__`, so hooks stay outside.

    It holds the block and no bound method, so that a copy of the backbone runs the copy's block.
    """

    def __init__(self, owner: CompiledBlocks, block: nn.Module, compiled: Callable[..., Any]) -> None:
        self.owner, self.block, self.compiled = owner, block, compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output for its arguments."""
        run = type(self.block).forward if self.owner.paused else self.compiled
        return run(self.block, *args, **kwargs)
