"""Weights of which each process holds a part."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_shard(tensor: Tensor) -> bool:
    """Whether a tensor is one process's part of a whole one."""
    return type(tensor).__name__ == "DTensor"  # by name, because torch may be built without


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of a model are sharded."""
    return any(is_shard(parameter) for parameter in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor. Of a shard it is gathered, which every process has to ask for."""
    shard: Any = tensor
    gathered: Tensor = shard.full_tensor() if is_shard(tensor) else tensor
    return gathered


def shard_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the sharded weights that this process holds, and of the whole of them."""
    shards: list[Any] = [parameter for parameter in model.parameters() if is_shard(parameter)]
    here = sum(one.to_local().numel() * one.dtype.itemsize for one in shards)
    return here, sum(one.numel() * one.dtype.itemsize for one in shards)
