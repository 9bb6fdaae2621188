"""Stand-ins without memory: a model's tensors are replaced by fake ones, which have shapes and no values."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.pair import Attached


def fake_copy(model: Attached) -> Attached:
    """A copy of an attached model (of real weights, or on the meta device) whose tensors are fake ones on the CPU.

    To be called under a `FakeTensorMode`. Hooks, recomputed blocks and gradient flags come along; the model itself
    stays as it is.
    """
    # by its memo, deepcopy takes these for what they stand for: nothing large is copied
    memo: dict[int, Any] = {id(model.extras): {}, **{id(part._originals): {} for part in model.parts}}
    for module in model.modules():
        for tensor in _tensors(module):
            if id(tensor) not in memo:
                memo[id(tensor)] = fake_like(tensor)
    return copy.deepcopy(model, memo)


def fake_batch(model: Attached, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fake tensors in place of a batch, without the columns that the model does not take."""
    names = inspect.signature(model.forward).parameters
    return {name: fake_like(tensor) for name, tensor in batch.items() if name in names}


def fake_like(tensor: Tensor) -> Tensor:
    """An empty tensor on the CPU of the same shape, strides and precision; a parameter of a parameter."""
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and tensors that are plain attributes."""
    held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return (value for value in held if isinstance(value, Tensor))


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    storages = {tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages)
