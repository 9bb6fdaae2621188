"""Patches in their own order, in models that draw them in a random one.

ViLT takes a picture's patches by a draw without replacement of all of them: a permutation. A head does not mind, as
the positions are added before. But two passes could not be compared token by token, stored, or repeated bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sidestep.backbone.families import family_of


def in_order(trunk: nn.Module) -> AbstractContextManager[Any]:
    """What a pass of a trunk is run inside of, so that its patches stand in their order. Nothing for most models."""
    return InOrder() if family_of(trunk).shuffles else nullcontext()


class InOrder(TorchFunctionMode):
    """Draws of all of several equal chances give them in their order. So do draws with replacement.

    A draw of a part of them stays as it is: it leaves patches out at random.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The function's own result, or the numbers in order."""
        if func is torch.multinomial:
            given = dict(zip(("input", "num_samples", "replacement"), args, strict=False)) | dict(kwargs or {})
            ordered = _ordered(given["input"], int(given["num_samples"]), given.get("replacement", False))
            if ordered is not None:
                return ordered
        return func(*args, **(kwargs or {}))


def _ordered(chances: Tensor, draws: int, replacement: bool) -> Tensor | None:
    """The numbers of a draw in order. None: it is no such draw."""
    count = len(chances)
    if chances.ndim != 1 or not count or not bool((chances == chances[0]).all()):
        return None
    return torch.arange(draws, device=chances.device) % count if replacement or draws == count else None
