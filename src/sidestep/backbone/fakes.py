"""Copies of a model without values: on the meta device, or of fake tensors on which its forward can be traced."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from sidestep.backbone.quantised import is_packed, is_quantised
from sidestep.backbone.shards import is_shard
from sidestep.interface.offload import HOOK, is_dispatched, offloaded_tensors


def without_values(model: nn.Module) -> nn.Module:
    """A copy on the meta device: a task can be tried on it, and it takes no memory for weights."""
    memo, elsewhere = unhooked({}, model), offloaded_tensors(model)
    for parameter in model.parameters():
        # a packed one cannot be emptied alike
        empty = (
            torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            if is_packed(parameter)
            else (torch.empty_like(parameter, device="meta"))
        )
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        memo[id(parameter)].__dict__.update(parameter.__dict__)  # transformers' mark of what was loaded
        if id(parameter) in elsewhere:  # which comes from a file, and has lost the mark
            memo[id(parameter)]._is_hf_initialized = True
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return without_hooks(copy.deepcopy(model, memo))


def fake_like(tensor: Tensor) -> Tensor:
    """An empty tensor on the CPU of the same shape, strides and precision, which is a parameter if the original is."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def fakes_of(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Add a fake tensor for each tensor of a model to the memo of a deepcopy, which then copies nothing large.

    To be called under a `FakeTensorMode`.
    """
    for module in model.modules():
        for tensor in _tensors(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = fake_like(tensor)
    return memo


def hollow(model: nn.Module) -> nn.Module:
    """A copy of fake tensors, of which only shapes can be asked, with plain maps in place of quantised ones.

    To be called under a `FakeTensorMode`.
    """
    memo = unhooked({}, model)
    for module in model.modules():
        if is_quantised(module) and hasattr(module, "in_features"):
            memo[id(module)] = _plain(module)
    return without_hooks(copy.deepcopy(model, fakes_of(model, memo)))


def unhooked(memo: dict[int, Any], model: nn.Module) -> dict[int, Any]:
    """Add what accelerate put on a model's modules to the memo of a deepcopy, which then leaves it out.

    A copy of it would read or run the original.
    """
    for module in model.modules():
        if HOOK in vars(module):
            own = {name: vars(module)[name] for name in AROUND & vars(module).keys()}
            forward = own.get("forward")
            while (before := getattr(forward, "before", None)) is not None:  # ours around it stays
                forward = before
            memo |= {id(value): None for value in {**own, "forward": forward}.values()}
    return memo


def without_hooks(copied: nn.Module) -> nn.Module:
    """A copy, without the places where hooks of accelerate were that it has left out."""
    for module in copied.modules():
        for name in AROUND & vars(module).keys():
            if vars(module)[name] is None or name in MOVES:
                delattr(module, name)
    return copied


@contextmanager
def unlogged() -> Iterator[None]:
    """Within it torch logs no tracebacks of what fails on fake tensors, which it raises anyway."""
    log = logging.getLogger(FakeTensorMode.__module__)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _plain(module: Any) -> nn.Linear:
    return nn.Linear(module.in_features, module.out_features, module.bias is not None, device="cpu")


MOVES = {"to", "cuda"}
"""Methods that accelerate replaces on a model, by functions that a copy would share."""
AROUND = {HOOK, "_old_forward", "forward", *MOVES}
"""What accelerate puts on a module that it moves or offloads."""


def has_values(model: nn.Module) -> bool:
    """Whether a model can be run as it is, here and now, and its weights are plain numbers that running leaves alone.

    Not on the meta device, sharded, dispatched by accelerate, quantised, or of fake tensors.
    """
    tensors = (*model.parameters(), *model.buffers())
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) or is_shard(tensor) for tensor in tensors):
        return False
    return not is_dispatched(model) and not any(is_quantised(module) for module in model.modules())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes."""
    held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return (value for value in held if isinstance(value, Tensor))
