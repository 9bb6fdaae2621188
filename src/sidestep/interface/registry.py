"""The registered methods, by name and by the class of their configs.

To add a method, write one file in `sidestep/methods`, or in a package of your own. It holds a frozen config dataclass
and a class with the decorator `@register`. The laws in `tests/laws` then cover it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from sidestep.interface.config import MethodConfig
from sidestep.interface.side_net import SideNet
from sidestep.interface.third_parties import import_third_parties
from sidestep.interface.weight_delta import WeightDelta


@dataclass(frozen=True)
class Method:
    """A registered method: its name, config class and implementation."""

    name: str
    config: type[MethodConfig]
    implementation: type[SideNet] | type[WeightDelta]

    @property
    def summary(self) -> str:
        """First line of the implementation's module docstring."""
        return (self.implementation.__doc__ or "").strip().partition("\n")[0]

    @property
    def solved(self) -> bool:
        """Whether training takes no steps: the head is solved from what the method reads."""
        return issubclass(self.implementation, SideNet) and self.implementation.solved


Implementation = TypeVar("Implementation", bound=type[SideNet] | type[WeightDelta])
_REGISTRY: dict[str, Method] = {}


def register(name: str, config: type[MethodConfig]) -> Callable[[Implementation], Implementation]:
    """Class decorator: make a method known under `name`, chosen by its config's class.

    Raises:
        ValueError: if the name or the config class is taken.
    """

    def add(implementation: Implementation) -> Implementation:
        taken = _REGISTRY.get(name)
        if taken is not None and taken.implementation.__qualname__ != implementation.__qualname__:
            raise ValueError(f"a method named {name!r} is registered already: choose another name")
        for other in _REGISTRY.values():
            if other.config is config and other.name != name:
                raise ValueError(f"{config.__name__} belongs to the method {other.name!r}: give {name!r} its own")
        _REGISTRY[name] = Method(name, config, implementation)
        return implementation

    return add


def methods() -> dict[str, Method]:
    """Every registered method by name.

    Modules under the entry point group "sidestep.methods" are imported first.
    """
    import_third_parties("sidestep.methods")
    return dict(sorted(_REGISTRY.items()))


def method_named(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: if no method has this name (the message lists the known).
    """
    known = methods()
    if name not in known:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(known)}")
    return known[name]


def method_of(config: MethodConfig) -> Method:
    """The method that a config belongs to.

    Raises:
        TypeError: if the object is no registered config.
    """
    for method in methods().values():
        if type(config) is method.config:
            return method
    known = ", ".join(f"ss.{method.config.__name__}" for method in methods().values())
    raise TypeError(f"{config!r} is no method config: pass one of {known}")
