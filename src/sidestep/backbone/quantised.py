"""Quantised weights: told from plain ones, counted, and read without being changed or unpacked."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sidestep.backbone.shards import is_shard


def stored_quantization(config: Any) -> dict[str, Any] | None:
    """The quantization config in a model's config, as JSON gives it back. None: its weights are plain."""
    found = getattr(config, "quantization_config", None)
    if found is None or isinstance(found, dict):
        return found
    return json.loads(found.to_json_string(use_diff=False))


def format_text(quantization: Mapping[str, Any]) -> str:
    """A quantization config in words."""
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        return f"{4 if quantization.get('load_in_4bit') else 8} bit by bitsandbytes"
    kind = quantization.get("quant_type")
    if isinstance(kind, dict):
        return f"{kind.get('default', {}).get('_type', 'quantised')} by torchao"
    return f"quantised by {quantization.get('quant_method', 'an unknown package')}"


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's own weights are codes."""
    weight = module._parameters.get("weight")
    codes = weight is not None and not (weight.is_floating_point() and weight.itemsize > 1)
    return codes or is_packed(weight) or "qweight" in module._buffers or "qweight" in module._parameters


def is_packed(tensor: Tensor | None) -> bool:
    """Whether a tensor is a stand-in for tensors inside it, which are its codes and scales (torchao's)."""
    return tensor is not None and is_traceable_wrapper_subclass(tensor) and not is_shard(tensor)


def as_loaded(tensor: Tensor) -> Tensor:
    """A weight's codes as they were loaded.

    bitsandbytes packs 4-bit codes in another order when the codes are first used on a CPU. Its `state_dict` puts them
    back in place, which changes the model's outputs. Here a copy is put back. So the digest does not depend on whether
    the model has run, and the model stays as it is.
    """
    state = getattr(tensor, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return tensor.detach()
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    codes, _ = _convert_weight_packed_for_cpu_inverse(tensor.detach(), copy.copy(state))
    return codes


def identity_of(name: str, tensor: Tensor, owner: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What identifies a weight: its values, or its codes, scales and what else they are read with, under own names.

    All but codes are given as bytes. So they are compared exactly, whatever the precision of the other weights is.
    """
    if is_packed(tensor):
        for part, inner in _inside(tensor):
            yield f"{name}.{part}", inner if not inner.is_floating_point() else _as_bytes(inner)
        return
    yield name, as_loaded(tensor)
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        yield f"{name}.scales", _as_bytes(_scales_of_blocks(state))
        yield f"{name}.code", _as_bytes(state.code)
    elif (scales := _scales_of_rows(tensor, owner)) is not None:
        yield f"{name}.scales", _as_bytes(scales)


def stored_tensors(model: nn.Module) -> Iterator[Tensor]:
    """All tensors in which a model's parameters and buffers lie, with the scales of quantised ones."""
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if is_packed(tensor):
                yield from (inner for _, inner in _inside(tensor))
                continue
            yield tensor
            if (state := getattr(tensor, "quant_state", None)) is not None:
                nested = getattr(state, "state2", None)
                held = (state.absmax, state.code, *((nested.absmax, nested.code, state.offset) if nested else ()))
                yield from (value for value in held if isinstance(value, Tensor))
            elif (scales := _scales_of_rows(tensor, module)) is not None:
                yield scales


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they lie in memory, shared ones once."""
    storages = {tensor.untyped_storage() for tensor in stored_tensors(model)}
    return sum(storage.nbytes() for storage in storages)


def _inside(tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors inside a packed one, by the names that it gives them."""
    for name in tensor.__tensor_flatten__()[0]:
        inner = getattr(tensor, name)
        if is_packed(inner):
            yield from ((f"{name}.{part}", value) for part, value in _inside(inner))
        else:
            yield name, inner.detach()


def _scales_of_blocks(state: Any) -> Tensor:
    """The scale of each block of bitsandbytes' 4-bit codes.

    Rounded as bitsandbytes rounds the scales when it packs the codes for a CPU, because the rest is gone then.
    """
    if getattr(state, "packing_format_for_cpu", False):
        return state.absmax.T.reshape(-1)
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(scales, state.state2) + state.offset
    return scales.reshape(-1).to(torch.bfloat16)


def _scales_of_rows(tensor: Tensor, owner: nn.Module) -> Tensor | None:
    """The scale of each row of bitsandbytes' 8-bit codes. They move from the weight to its module at the first pass."""
    if tensor.dtype is not torch.int8:  # a bias
        return None
    scales = getattr(tensor, "SCB", None)
    return getattr(getattr(owner, "state", None), "SCB", None) if scales is None else scales


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
