"""What a GPU would run, for a plan that is traced with the CPU's kernels.

Autograd needs a real GPU to run backward over fake CUDA tensors. So a GPU is planned on fake CPU tensors. Where CUDA
has a kernel that keeps something else for backward, that kernel's stand-in takes the CPU kernel's place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

ALLOCATION = 512
"""CUDA's caching allocator rounds every size up to a multiple of so many bytes."""


class CudaKernels(TorchFunctionMode):
    """Within this mode dropout, attention and norms keep for backward what they do on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return KERNELS.get(func, func)(*args, **(kwargs or {}))


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002 - F's name
    """`F.dropout` with a mask of one byte a value. The CPU's mask is as wide as the input."""
    if not training or p == 0:
        return input
    return torch.native_dropout(input, p, training)[0]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` by a fused kernel, which also drops scores without keeping them.

    Flash attention takes half precision without a mask, the memory-efficient kernel everything else. Both keep the
    inputs, the output and one value per query. What is not (batch, heads, tokens, width) is computed plainly.
    """
    if query.ndim != 4:
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    keeps = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    bias = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, keeps, dropout_p, is_causal, scale=scale)[0]


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that CUDA's autocast runs in float32, where the CPU's leaves the precision as it is."""

    def run(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(_widened(arg) for arg in args)
            kwargs = {name: _widened(arg) for name, arg in kwargs.items()}
        return function(*args, **kwargs)

    return run


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


KERNELS: dict[Any, Callable[..., Tensor]] = {
    F.dropout: dropout,
    F.scaled_dot_product_attention: attention,
    F.layer_norm: in_float32(F.layer_norm),
    F.group_norm: in_float32(F.group_norm),
    F.softmax: in_float32(F.softmax),
}
"""CUDA's behaviour by the function that is called."""
