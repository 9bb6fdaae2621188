"""Several cards on a machine that has none: CPU tensors that say which card they are on.

An operation on tensors of two cards raises, as it does on real ones. Values are computed, by the CPU's kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

KIND = "lazy"
"""A type of device that torch knows without a library, so that autograd needs no driver of it."""
FIRST, SECOND = torch.device(KIND, 0), torch.device(KIND, 1)
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
"""What may see two cards."""


class OnCard(Tensor):
    """A CPU tensor that says it is on a card."""

    value: Tensor

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:  # as accelerate makes a parameter of the same class
            return nn.Parameter(value, requires_grad)
        how: dict[str, Any] = {"strides": value.stride(), "dtype": value.dtype, "device": device}
        card: Any = Tensor._make_wrapper_subclass(cls, value.shape, **how)
        card.value = value
        return card

    def data_ptr(self) -> int:
        """By which accelerate tells tied weights."""
        return self.value.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with Cards():
            return func(*args, **(kwargs or {}))


class Cards(TorchDispatchMode):
    """Within it tensors can be made on cards, and each operation is on one card.

    Attributes:
        moved: shapes of what went from one card to another.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        asked = kwargs.get("device")
        made_on = None if asked is None else torch.device(asked)
        cards = {one.device for one in given if isinstance(one, OnCard)}
        if not cards and (made_on is None or made_on.type != KIND):
            return func(*args, **kwargs)
        # as everywhere, a number may be on the CPU
        beside = {one.device for one in given if one.ndim and not isinstance(one, OnCard)}
        if len(cards | beside) > 1 and func not in COPIES:
            raise RuntimeError(f"{func} on tensors of {sorted(map(str, cards | beside))}")
        if made_on is not None and made_on.type == KIND:
            kwargs["device"] = "cpu"
        out = func(*tree_map(_value, args), **tree_map(_value, kwargs))
        if func._schema.is_mutable:
            return args[0] if not isinstance(args[0], list | tuple) else None
        if func is COPIES[0] and made_on is not None and cards and made_on not in cards:
            self.moved.append(tuple(given[0].shape))
        device = made_on or next(iter(cards))
        return tree_map(lambda x: OnCard(x, device) if isinstance(x, Tensor) and device.type == KIND else x, out)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, OnCard) else x


def values(x: Any) -> Any:
    """Tensors as what they hold, without a card."""
    return tree_map(lambda one: _value(one.detach()) if isinstance(one, Tensor) else one, x)


@contextmanager
def cards(monkeypatch: Any) -> Iterator[Cards]:
    """Within it there are cards. Recomputation asks torch for the module of their type, and there is no autocast."""
    monkeypatch.setattr(torch, KIND, SimpleNamespace(), raising=False)
    with Cards() as mode:
        yield mode
