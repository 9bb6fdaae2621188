"""Compiled blocks. What is attached to a backbone stays outside of them, so that no task has them compiled again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sidestep.backbone.find import find_places


class CompiledBlocks:
    """Has each block of a backbone compiled at its next call, until `undo`.

    It wraps `forward`, not `__call__`, so hooks stay outside.

    Args:
        backbone: with nothing attached.
        options: of `torch.compile`.

    Attributes:
        paused: whether blocks run as they are. A task that puts modules of its own into them would have them compiled
            again at each switch.
    """

    def __init__(self, backbone: nn.Module, **options: Any) -> None:
        # each once, though one that is shared has several places
        self.blocks = {place.module for place in find_places(backbone) if place.site.kind == "block"}
        self.paused = False
        for block in self.blocks:
            # by the dictionary: an attribute of a module is looked for among its parts first
            vars(block)["forward"] = self._chosen(block.forward, torch.compile(block.forward, **options))

    def _chosen(self, plain: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (plain if self.paused else compiled)(*args, **kwargs)

    def undo(self) -> None:
        """Let the blocks run as they are."""
        for block in self.blocks:
            vars(block).pop("forward", None)
