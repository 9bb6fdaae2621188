"""What a hooked module was called with, by the names of its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def argument_names(module: nn.Module) -> list[str]:
    """Parameter names of a module's forward, in order, without `self` and the open-ended ones."""
    signature = inspect.signature(type(module).forward)
    return [name for name, parameter in signature.parameters.items() if parameter.kind not in _OPEN][1:]


def takes(module: nn.Module, name: str) -> bool:
    """Whether a module's forward takes an argument of this name, or hands whatever it is given on to its parts."""
    if name in argument_names(module):
        return True
    parameters = inspect.signature(type(module).forward).parameters.values()
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return False
    return any(name in argument_names(part) for part in module.children())


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
