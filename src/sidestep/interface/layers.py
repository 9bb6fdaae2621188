"""Layers that two methods or more share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

ROTARY_BASE = 10_000.0


_KEEPS: ContextVar[bool] = ContextVar("keeps", default=False)


@contextmanager
def keeping_all() -> Iterator[None]:
    """Within it `recompute` keeps what a function makes, where time is short and memory is not."""
    token = _KEEPS.set(True)
    try:
        yield
    finally:
        _KEEPS.reset(token)


def recompute(function: Callable[..., Any], *args: Any, random: bool = False) -> Any:
    """`function(*args)`, keeping only its inputs for backward: what it makes in between is computed again.

    Args:
        function: of tensors and whatever else.
        args: its arguments.
        random: whether it may draw random numbers, so that the generator's state has to be saved.
    """
    if not torch.is_grad_enabled() or _KEEPS.get():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=random)


def matmul_precision(x: Tensor) -> torch.dtype:
    """In which matrix products take `x`: under autocast its precision, else its own."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


def masked_mean(tokens: Tensor, keep: Tensor | None) -> Tensor:
    """(batch, width): mean of the kept tokens of (batch, tokens, width).

    `keep` is (batch, tokens) bool. None keeps all tokens.
    """
    if keep is None:
        return tokens.mean(1)
    weights = keep.to(tokens.dtype)
    # One matrix product keeps the mask, not a masked copy of the tokens.
    total = torch.bmm(weights[:, None], tokens)[:, 0]
    return total / weights.sum(1, keepdim=True).clamp(min=1)


def last_kept(keep: Tensor) -> Tensor:
    """(batch,) position of each row's last kept token, from (batch, tokens) bool."""
    return keep.shape[1] - 1 - keep.flip(1).int().argmax(1)


def take_rows(hidden: Tensor, index: Tensor) -> Tensor:
    """(batch, 1, width): one token of each row of (batch, tokens, width), copied."""
    # not by `gather`, which keeps all tokens for backward
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), index][:, None]


def own_token(tokens: Tensor, keep: Tensor | None, *, causal: bool) -> Tensor:
    """(batch,) position of the token that stands for a row of (batch, tokens, width).

    Where a token sees only earlier ones it is the last kept one (CLIP's end of text), else the first (a class token).
    """
    if causal and keep is not None:
        return last_kept(keep)
    return torch.full((len(tokens),), tokens.shape[1] - 1 if causal else 0, device=tokens.device)


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions: channel i and its partner half the channels on turn by an angle that grows with the position.

    Args:
        x: (batch, heads, tokens, channels), an even number of channels.
        positions: (tokens,).

    Returns:
        The same shape and precision.
    """
    half = x.shape[-1] // 2
    precision = torch.promote_types(x.dtype, torch.float32)
    powers = torch.arange(half, device=x.device, dtype=precision) / half
    angles = positions.to(precision)[:, None] * ROTARY_BASE**-powers
    cos, sin = angles.cos(), angles.sin()
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1).to(x.dtype)


def regrid(
    tokens: Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    prefixes: tuple[int, int] = (0, 0),
    pool: Callable[[Tensor, tuple[int, int]], Tensor] = F.adaptive_avg_pool2d,
) -> Tensor:
    """Pool tokens (batch, prefix + rows x columns, width) from one grid to a coarser one, as patch merging does.

    Args:
        tokens: before.
        old, new: rows and columns before and after.
        prefixes: how many tokens stand before the grid, before and after. A new one begins as the mean of the grid.
        pool: from one grid to the other. By default the average.
    """
    before, after = prefixes
    grid = rearrange(tokens[:, before:], "b (h w) c -> b c h w", h=old[0])
    pooled = rearrange(pool(grid, new), "b c h w -> b (h w) c")
    if after == 0:
        return pooled
    made = pooled.mean(1, keepdim=True).expand(-1, max(0, after - before), -1)
    return torch.cat([tokens[:, : min(before, after)], made, pooled], 1)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map: torch's, or that of GPT-2 and ImageGPT, whose weight is (in, out)."""
    return isinstance(module, nn.Linear | Conv1D)
