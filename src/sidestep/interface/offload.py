"""Frozen weights that accelerate keeps elsewhere, on disk or in the host's memory, and brings for each call.

Between calls such a weight is an empty tensor on the meta device. A call of its module needs nothing else. Who reads
the weight itself reads it here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

HOOK = "_hf_hook"
"""Attribute in which accelerate keeps its hook of a module."""


def is_dispatched(model: nn.Module) -> bool:
    """Whether accelerate brings the weights or the inputs of any of a model's modules to a device."""
    return any(HOOK in vars(module) for module in model.modules())


def is_offloaded(module: nn.Module) -> bool:
    """Whether any weight of a module or of its parts is kept elsewhere between calls."""
    return any(_kept(part) is not None for part in module.modules())


def value_of(module: nn.Module, name: str) -> Any:
    """A tensor of a module (or None) by its own name, read from where it is kept, if it is kept elsewhere."""
    tensor = getattr(module, name)
    if tensor is None or not tensor.is_meta or (kept := _kept(module)) is None:
        return tensor
    return kept[name].to(tensor.dtype)


def values_in(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What gives a tensor of a model as it is, or its value, if it is kept elsewhere."""
    elsewhere = {
        id(tensor): (module, name)
        for module in model.modules()
        if _kept(module) is not None
        for name, tensor in module._parameters.items()
        if tensor is not None and tensor.is_meta
    }
    return lambda tensor: value_of(*elsewhere[id(tensor)]) if id(tensor) in elsewhere else tensor


def offloaded_tensors(model: nn.Module) -> set[int]:
    """Identities that a model's weights have at present which are kept elsewhere between calls.

    A recomputed block may end in the middle of a module. That module's weights then stay until its next call.
    """
    parts = (part for part in model.modules() if _kept(part) is not None)
    return {id(tensor) for part in parts for tensor in part.parameters(recurse=False)}


def offloaded_size(model: nn.Module, *, at_once: bool = False) -> int:
    """Bytes of a model's weights that are kept elsewhere between calls. `at_once`: the largest module's alone."""
    elsewhere = offloaded_tensors(model)
    if not at_once:
        return sum(tensor.nbytes for tensor in model.parameters() if id(tensor) in elsewhere)
    own = (part.parameters(recurse=False) for part in model.modules())
    return max((sum(tensor.nbytes for tensor in tensors if id(tensor) in elsewhere) for tensors in own), default=0)


def retie(model: nn.Module) -> None:
    """Make tied weights that are kept elsewhere one tensor again, as each call leaves one for each name."""
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        (module, name), (owner, own) = (_owner(model, path) for path in (target, source))
        if getattr(module, name).is_meta and getattr(owner, own).is_meta:
            module._parameters[name] = owner._parameters[own]


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a tensor belongs to, and its name there."""
    prefix, _, name = path.rpartition(".")
    return model.get_submodule(prefix), name


def _kept(module: nn.Module) -> Mapping[str, Tensor] | None:
    """What accelerate has of a module's own weights, by their names in it. None: the weights are the module's."""
    hook: Any = vars(module).get(HOOK)
    return next((own.weights_map for own in getattr(hook, "hooks", (hook,)) if getattr(own, "offload", False)), None)
