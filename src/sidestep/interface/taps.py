"""Tap: how a site is read. One class, so that how a tap's input is kept for backward is decided in one place."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Form = Literal["none", "rms", "relu"]


class Tap(nn.Module):
    """A trainable linear map from a site's width to a rank, behind an optional fixed form.

    For backward the tap keeps its input: the block's own output, shared with whoever else keeps it. With "rms" it also
    keeps one scalar per token. The norm's trainable scale is folded into the map, so no normalised copy exists. The
    input's gradient is returned where the input requires one.

    A tap runs on its input's device: the map goes there, and the narrow result comes back.

    Args:
        width: channels of the site.
        rank: channels of the result.
        form: "rms" (root-mean-square norm with a trainable scale), "relu" or "none".
        bias: whether the map has one.
        eps: of the norm.
    """

    def __init__(self, width: int, rank: int, *, form: Form = "none", bias: bool = True, eps: float = 1e-6) -> None:
        super().__init__()
        self.form, self.eps = form, eps
        self.weight = nn.Parameter(torch.randn(rank, width) * width**-0.5)
        self.bias = nn.Parameter(torch.zeros(rank)) if bias else None
        self.scale = nn.Parameter(torch.ones(width)) if form == "rms" else None

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, tokens, width) in any precision -> (batch, tokens, rank) in the tap's own, on its device."""
        if self.form == "relu":
            hidden = hidden.relu()
        weight = self.weight if self.scale is None else self.weight * self.scale
        # The map runs in the input's precision: upcasting the input would keep a second, wider copy of it.
        out = F.linear(hidden, weight.to(hidden)).to(self.weight.dtype)
        if self.form == "rms":
            out = out * self._inverse_rms(hidden)
        out = out.to(self.weight.device)
        return out if self.bias is None else out + self.bias

    def _inverse_rms(self, hidden: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=self.weight.dtype)
        return (norm.square() / hidden.shape[-1] + self.eps).rsqrt()
