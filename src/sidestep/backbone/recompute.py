"""Blocks that keep their inputs alone, and run again in backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

Checkpoint = Literal["late"]
"""Which blocks are recomputed in backward: those after the method's first write."""


class CheckpointedForward:
    """A block's `forward` that keeps only its inputs and runs again in backward.

    It wraps `forward`, not `__call__`, so hooks stay outside and run once. A cache would be written twice, so no cache
    is passed on. Running statistics of batch norms move the first time only.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block, self.before = block, vars(block).get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output for its arguments."""
        # accelerate's own, where it moves the block's inputs or weights
        run = self.before or MethodType(type(self.block).forward, self.block)
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        for name in ("past_key_values", "layer_past"):
            if kwargs.get(name) is not None:
                kwargs[name] = None
        norms = [module for module in self.block.modules() if isinstance(module, _BatchNorm) and module.training]
        if norms:
            kwargs["context_fn"] = lambda: (nullcontext(), _statistics_stay(norms))
        return checkpoint(run, *args, use_reentrant=False, **kwargs)


@contextmanager
def _statistics_stay(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Batch norms compute as ever, and their running statistics stay as they are."""
    before = [(norm, norm.momentum, norm.get_buffer("num_batches_tracked").clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.get_buffer("num_batches_tracked").copy_(batches)


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Make each of the blocks recompute itself in backward."""
    for block in blocks:
        if not isinstance(vars(block).get("forward"), CheckpointedForward):  # else it is there twice, as it runs
            block.forward = CheckpointedForward(block)


def uncheckpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Undo `checkpoint_blocks`."""
    for block in blocks:
        if isinstance(block.__dict__.get("forward"), CheckpointedForward):
            before = vars(block).pop("forward").before
            if before is not None:
                vars(block)["forward"] = before
