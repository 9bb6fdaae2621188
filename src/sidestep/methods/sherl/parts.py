"""SHERL's parts: projections of a block's features, and the ways in which they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.interface.layers import recompute, regrid
from sidestep.interface.taps import Tap
from sidestep.methods.sherl.config import Projecting, SherlConfig

GATE_SCALE = 0.1
"""What a trained gate is divided by: it learns that many times faster."""


class Gated(nn.Module):
    """(W2 u + b2 + u) sigmoid(W3 u + b3) with u = relu(W1 f + b1)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.tap = Tap(width, hidden)
        self.value, self.gate = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, feature: Tensor) -> Tensor:
        """(batch, tokens, hidden)."""
        code = self.tap(feature).relu()
        return (self.value(code) + code) * torch.sigmoid(self.gate(code))


class LinearNorm(nn.Module):
    """A linear map and a LayerNorm."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.tap, self.norm = Tap(width, hidden), nn.LayerNorm(hidden)

    def forward(self, feature: Tensor) -> Tensor:
        """(batch, tokens, hidden)."""
        return self.norm(self.tap(feature))


class ReluLinear(nn.Module):
    """A linear map of what ReLU leaves."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.tap = Tap(width, hidden, form="relu")

    def forward(self, feature: Tensor) -> Tensor:
        """(batch, tokens, hidden)."""
        return self.tap(feature)


PROJECTIONS: dict[Projecting, type[nn.Module]] = {
    "gated": Gated,
    "linear_norm": LinearNorm,
    "relu_linear": ReluLinear,
}


class Merge(nn.Module):
    """A weighted sum of the levels plus the guide.

    A level weighs more if it agrees with the guide, and less if other levels say the same.

    Args:
        hidden: width of levels and guide.
        eps: added to the norms that are divided by.
        mlp: inner width of the MLP that the weighted sum goes through. With None there is no MLP.
    """

    def __init__(self, hidden: int, eps: float, mlp: int | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.score = nn.Linear(hidden, 1)
        self.mlp: nn.Module = nn.Identity()
        if mlp is not None:
            self.mlp = nn.Sequential(nn.Linear(hidden, mlp), nn.ReLU(), nn.Linear(mlp, hidden), nn.LayerNorm(hidden))

    def forward(self, guide: Tensor, *levels: Tensor) -> Tensor:
        """Levels and guide (..., hidden) -> (..., hidden) in the weights' precision, computed in float32 at least."""
        with torch.autocast(guide.device.type, enabled=False):
            guide = _at_least_float32(guide)
            stacked = torch.stack([_at_least_float32(level) for level in levels], dim=-2)
            weighted = torch.einsum("...l,...lh->...h", self.weights(guide, stacked), stacked)
            own = self.score.weight.dtype
            return (self.mlp(weighted.to(own)) + guide).to(own)

    def weights(self, guide: Tensor, levels: Tensor) -> Tensor:
        """(..., levels), which sum to one wherever a level fits the guide (..., hidden), else zeros."""
        weight, bias = _at_least_float32(self.score.weight), _at_least_float32(self.score.bias)
        fit = F.linear(levels * guide[..., None, :], weight, bias).squeeze(-1).relu()
        unit = levels / (torch.linalg.vector_norm(levels, dim=-1, keepdim=True) + self.eps)
        redundancy = (unit @ unit.transpose(-1, -2)).relu().sum(-1)
        # A level of zeros has no direction: it is not even like itself.
        score = fit / redundancy.masked_fill(redundancy == 0, torch.inf)
        return score / (score.sum(-1, keepdim=True) + self.eps)


class Aggregation(nn.Module):
    """The levels of one stack and what is made of them.

    Args:
        width: channels of the features.
        levels: how many there are, the guide included.
        config: with what depends on the backbone filled in.
    """

    def __init__(self, width: int, levels: int, config: SherlConfig) -> None:
        super().__init__()
        assert config.projection is not None
        assert config.eps is not None
        hidden = config.side_width(width)
        self.levels = nn.ModuleList(PROJECTIONS[config.projection](width, hidden) for _ in range(levels))
        self.merge = Merge(hidden, config.eps, width if config.merge_mlp else None)
        self.out = nn.Linear(hidden, width)
        self.norm_out = nn.LayerNorm(width, eps=config.norm_out_eps) if config.norm_out else None
        self.dropout = nn.Dropout(config.dropout if config.norm_out else 0.0)
        self.gate = nn.Parameter(torch.zeros(1))
        for module in self.modules():
            _start(module, config.init_std, xavier=config.merge_mlp)

    def forward(self, last: Tensor, *codes: Tensor) -> Tensor:
        """(batch, tokens, width) from the hidden state that is replaced and the levels' codes, the guide's last."""
        return self.merged(self.let_through(last), *codes)

    def let_through(self, last: Tensor) -> Tensor:
        """What the gate leaves of the hidden state that is replaced."""
        return torch.tanh(self.gate / GATE_SCALE).to(last.device) * last.to(self.gate.dtype)

    def merged(self, rest: Tensor, *codes: Tensor) -> Tensor:
        """What is made of the levels' codes, added to what the gate let through."""
        out = self.out(self.merge(codes[-1], *codes[:-1]).relu())
        if self.norm_out is not None:
            out = self.norm_out(out)
        return self.dropout(out) + rest


class PooledAggregation(nn.Module):
    """The levels of one stack with their tokens pooled, and how a vector is corrected by them.

    Args:
        width: channels of the features.
        levels: how many there are.
        features: channels of the vector.
        config: with what depends on the backbone filled in.
    """

    def __init__(self, width: int, levels: int, features: int, config: SherlConfig) -> None:
        super().__init__()
        assert config.projection is not None
        assert config.eps is not None
        hidden, project = config.side_width(width), PROJECTIONS[config.projection]
        self.levels = nn.ModuleList(project(width, hidden) for _ in range(levels))
        self.guide = project(features, hidden)
        self.spatial = nn.ModuleList(nn.Linear(hidden, 1) for _ in range(levels))
        self.level_gates = nn.Parameter(torch.ones(levels)) if config.level_gates else None
        self.merge = Merge(hidden, config.eps)
        self.out = nn.Linear(hidden, features)
        for module in self.modules():
            _start(module, config.init_std, xavier=False)

    def forward(self, vector: Tensor, codes: Sequence[Tensor], position: Tensor, keep: Tensor | None) -> Tensor:
        """The vector (batch, features) corrected.

        Args:
            vector: what the guide is made of.
            codes: the levels' projections (batch, tokens, hidden).
            position: (batch,) the token of which each level's own value is added.
            keep: (batch, tokens) bool, False on padding, or None when nothing is padded.
        """
        guide = recompute(self.guide, vector)
        pooled = [recompute(self._pool, level, guide, code, position, keep) for level, code in enumerate(codes)]
        correction: Tensor = recompute(self._correction, guide, *pooled)
        return vector + correction

    def _pool(self, level: int, guide: Tensor, code: Tensor, position: Tensor, keep: Tensor | None) -> Tensor:
        """(batch, hidden): a level's tokens by how well they fit the guide, and its own token."""
        scorer: Any = self.spatial[level]
        with torch.autocast(guide.device.type, enabled=False):
            guide, code = _at_least_float32(guide), _at_least_float32(code)
            fit = torch.einsum("bth,bh->bt", code, guide * scorer.weight[0]) + scorer.bias
            fit = (fit if keep is None else fit * keep).relu()
            own = code[torch.arange(len(code), device=code.device), position]
            if self.level_gates is not None:
                own = own * torch.sigmoid(self.level_gates[level] / GATE_SCALE)
            return torch.einsum("bt,bth->bh", fit / (fit.sum(1, keepdim=True) + self.merge.eps), code) + own

    def _correction(self, guide: Tensor, *pooled: Tensor) -> Tensor:
        correction: Tensor = self.out(self.merge(guide, *pooled).relu())
        return correction


@dataclass(frozen=True)
class Maps:
    """The features read so far, by their largest and their mean value at each position of the present grid."""

    pairs: tuple[tuple[Tensor, Tensor], ...] = ()
    grid: tuple[int, int] | None = None

    def at(self, grid: tuple[int, int] | None) -> Maps:
        """Pooled to a coarser grid: kernel and stride are as many positions as fall on one of it."""
        old = self.grid
        if old is None or grid is None or old == grid:
            return replace(self, grid=grid)
        pairs = (
            (regrid(largest, old, grid, pool=F.adaptive_max_pool2d), regrid(mean, old, grid))
            for largest, mean in self.pairs
        )
        return Maps(tuple(pairs), grid)

    def adding(self, feature: Tensor) -> Maps:
        """With a feature of this grid."""
        return replace(self, pairs=(*self.pairs, (feature, feature)))


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of (batch, tokens, channels) in two halves, of which only the first is computed again in backward."""

    def normed(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """The normed tokens in the weights' precision, and in training the batch's statistics for `follow`."""
        flat = tokens.flatten(0, 1).to(self.weight.dtype)
        running = (None, None) if self.training else (self.running_mean, self.running_var)
        out = F.batch_norm(flat, *running, self.weight, self.bias, training=self.training, eps=self.eps)
        moved = torch.stack(torch.var_mean(flat.detach(), 0)) if self.training else None
        return out.view(tokens.shape), moved

    def follow(self, statistics: Tensor | None) -> None:
        """Move the running statistics by a batch's variance and mean, (2, channels), or leave them if that is None."""
        if statistics is None:
            return
        assert self.momentum is not None
        for name, value in zip(("running_var", "running_mean"), statistics, strict=True):
            self.get_buffer(name).lerp_(value, self.momentum)
        self.get_buffer("num_batches_tracked").add_(1)


class ConvNorm(nn.Module):
    """A 1x1 convolution, which is a linear map at each position, and a batch norm."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.tap, self.norm = Tap(width, channels), BatchNorm(channels)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """(batch, positions, channels), and the norm's statistics of this batch in training."""
        return self.norm.normed(self.tap(feature))


class ConvAggregation(nn.Module):
    """The levels of a convolutional network, pooled to the guide's grid, and what is made of them.

    Args:
        widths: channels of the features, the guide's last.
        config: with what depends on the backbone filled in.
    """

    def __init__(self, widths: Sequence[int], config: SherlConfig) -> None:
        super().__init__()
        assert config.eps is not None
        hidden = config.side_width(widths[-1])
        self.levels = nn.ModuleList(ConvNorm(width, hidden) for width in widths)
        self.merge = Merge(hidden, config.eps)
        self.out = ConvNorm(hidden, widths[-1])
        self.gate = nn.Parameter(torch.zeros(1))
        for module in self.modules():
            _start(module, config.init_std, xavier=False)

    def forward(self, last: Tensor, maps: Maps) -> Tensor:
        """(batch, positions, width) from the raw feature of the guide, and all features at its grid, its own last."""
        # Pooled features need no gradient: of each only the sum of both poolings is kept, and the guide's own once.
        pooled = [largest + mean for largest, mean in maps.pairs[:-1]]
        written, *statistics = recompute(self._written, last, *pooled)
        for layer, moved in zip((*self.levels, self.out), statistics, strict=True):
            layer.norm.follow(moved)
        return written

    def _written(self, last: Tensor, *pooled: Tensor) -> tuple[Tensor | None, ...]:
        """What is written, and the statistics of every norm."""
        features = (*pooled, 2 * last)
        codes, statistics = zip(*(level(x) for level, x in zip(self.levels, features, strict=True)), strict=True)
        out, own = self.out(self.merge(codes[-1], *codes[:-1]))
        return out.relu() + torch.tanh(self.gate / GATE_SCALE) * last.to(out.dtype), *statistics, own


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm with a trainable scale, in that one's precision."""

    def forward(self, hidden: Tensor) -> Tensor:
        """(batch, tokens, width)."""
        return super().forward(hidden.to(self.weight.dtype))


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _start(module: nn.Module, std: float | None, *, xavier: bool) -> None:
    """Draw a linear map's weights: from a normal distribution, or as PyTorch does, or as Xavier does."""
    if not isinstance(module, nn.Linear | Tap) or module.bias is None:
        return
    if std is not None:
        nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
        return
    bound = module.weight.shape[1] ** -0.5
    nn.init.uniform_(module.weight, -bound, bound)
    nn.init.uniform_(module.bias, -bound, bound)
    if xavier:
        nn.init.xavier_uniform_(module.weight)
