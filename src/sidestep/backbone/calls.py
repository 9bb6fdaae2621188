"""What a hooked module was called with, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def argument_names(module: nn.Module) -> list[str]:
    """Parameter names of a module's forward, in order, without `self` and the open-ended ones."""
    return list(_signature(type(module).forward)[0])


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward takes an argument of this name, or hands whatever it is given on to parts that do."""
    names, hands_on = _signature(type(module).forward)
    return name in names or (hands_on and any(takes(part, name) for part in module.children()))


def _signature(forward: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    """The names of a forward's parameters, and whether it takes any others by name."""
    parameters = inspect.signature(forward).parameters
    names = [name for name, parameter in parameters.items() if parameter.kind not in _OPEN][1:]
    return tuple(names), any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Put a function in the place of a module's forward, below its hooks. Returns what puts back what was there."""
    # by the dictionary: an attribute of a module is looked for among its parts first
    own = vars(module)
    before = own.get("forward")
    own["forward"] = forward

    def undo() -> None:
        if before is None:
            own.pop("forward")
        else:
            own["forward"] = before

    return undo


def bound(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def with_argument(
    names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with one argument replaced, whether it was given by position or by name."""
    if name in kwargs or list(names).index(name) >= len(args):
        return args, {**kwargs, name: value}
    position = list(names).index(name)
    return (*args[:position], value, *args[position + 1 :]), kwargs


def part_of(output: Any, number: int) -> Any:
    """The hidden state of a block's output: one of its elements, where it is a tuple or a list, else all of it."""
    return output[number] if isinstance(output, tuple | list) else output


def with_part(output: Any, number: int, hidden: Tensor) -> Any:
    """A block's output with another hidden state."""
    if not isinstance(output, tuple | list):
        return hidden
    parts = [*output[:number], hidden, *output[number + 1 :]]
    if hasattr(output, "_make"):
        return output._make(parts)
    return parts if isinstance(output, list) else tuple(parts)
