"""Run a bare model once and note what its modules were given and what they gave."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from sidestep.backbone.calls import argument_names, bound, takes
from sidestep.backbone.dummies import Inputs
from sidestep.backbone.in_order import in_order
from sidestep.backbone.structure import Blocks
from sidestep.backbone.untouched import untouched
from sidestep.interface.layers import is_linear

Given = ParamSpec("Given")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module.

    Attributes:
        name: of the module, in the trunk.
        given: its first argument.
        arguments: all of them, by name.
        output: what it gave.
        grad: whether autograd was on.
    """

    name: str
    given: Any
    arguments: dict[str, Any]
    output: Any
    grad: bool


@dataclass(frozen=True)
class Seen:
    """A pass of a trunk.

    Attributes:
        inputs: what the trunk was given.
        calls: of its blocks and of the modules outside of them, in the order of their ends.
        output: what the trunk gave.
        linear: the names of the linear maps that were called.
    """

    inputs: Inputs
    calls: list[Call]
    output: Any
    linear: frozenset[str]

    def of(self, name: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self.calls if call.name == name]


def watch(trunk: nn.Module, blocks: Sequence[Blocks], inputs: Inputs) -> Seen:
    """Run a trunk on inputs, without a cache, and note what happens."""
    names = [name for stack in blocks for name, _ in stack.all]
    outside = [
        name for name, _ in trunk.named_modules() if name and not any(name.startswith(f"{block}.") for block in names)
    ]
    calls: list[Call] = []
    handles = [_note(trunk.get_submodule(name), name, calls) for name in outside]
    linear: set[str] = set()
    for name, module in trunk.named_modules():
        if is_linear(module):
            handles.append(module.register_forward_pre_hook(partial(_name, linear, name)))
    try:
        output = output_of(trunk, inputs)
        return Seen(inputs, calls, output, frozenset(linear))
    finally:
        for handle in handles:
            handle.remove()


def _name(names: set[str], name: str, module: nn.Module, args: Any) -> None:
    names.add(name)


def _note(module: nn.Module, name: str, calls: list[Call]) -> Any:
    names = argument_names(module)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        arguments = bound(names, args, kwargs)
        given = arguments.get(names[0]) if names else next(iter(args), None)
        calls.append(Call(name, given, arguments, output, torch.is_grad_enabled()))

    return module.register_forward_hook(note, with_kwargs=True)


def output_of(trunk: Any, inputs: Inputs) -> Any:
    """What a trunk gives for inputs, without a cache."""
    if isinstance(trunk, PreTrainedModel):
        with in_order(trunk):
            return trunk(**inputs, **({"use_cache": False} if takes(trunk, "use_cache") else {}))
    # timm's: the part in front of pooling and classifier
    return getattr(trunk, "forward_features", trunk)(*inputs.values())


def attempt(trunk: nn.Module, run: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result | None:
    """What a pass gives, or None where the model does not take its inputs.

    The model is put back after each pass. Swin, for one, makes its windows smaller for small images, and for good.
    """
    with _quiet(), untouched(trunk):
        try:
            return run(*args, **kwargs)
        except Exception:  # whatever a model raises for inputs that are not its own
            return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of models on inputs that nobody gave them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
