"""Quantised weights: told from plain ones, and read without being changed."""

from __future__ import annotations

import copy

from torch import Tensor, nn


def is_quantised(module: nn.Module) -> bool:
    """Whether a module's own weights are codes."""
    weight = module._parameters.get("weight")
    codes = weight is not None and not (weight.is_floating_point() and weight.itemsize > 1)
    return codes or "qweight" in module._buffers or "qweight" in module._parameters


def as_loaded(tensor: Tensor) -> Tensor:
    """A weight as it was loaded.

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
