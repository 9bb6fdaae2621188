"""SHERL: features of all blocks are merged without their redundancy and take the place of the last block's input.

Source: Diao et al., "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning",
ECCV 2024, arXiv 2407.07523, and its official code (Paranioar/SHERL), whose outputs and gradients the tests reproduce.
The early blocks are read only; gradients flow through the frozen last block alone (the "late route"). On an
encoder-decoder the encoder's merged features are what the decoder's last block attends to.
Differs: a level's projection and the merge are computed again in backward, so that of each level only its input and
its code are kept (of a convolutional network's only the pooled features); a level of zeros gets no weight (in the
release its score is 0/0). Decoder-only models and vision Transformers are not in the paper: the former are treated as
T5's decoder, the latter as BERT. CLIP4Clip's form writes nothing: it corrects the vector that the head makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.interface.config import MethodConfig, is_ascending
from sidestep.interface.layers import own_token, recompute, regrid
from sidestep.interface.registry import register
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site, not_plain, of_stack, stacks
from sidestep.interface.taps import Tap

Projecting = Literal["gated", "linear_norm", "relu_linear", "conv_norm"]

#: Blocks that the release reads, by depth of an encoder-decoder's stack: T5-base and T5-large.
PUBLISHED_LAYERS = {12: (1, 2, 3, 5, 6, 7, 9, 10, 11), 24: (*range(1, 23, 2), 22, 23)}
GATE_SCALE = 0.1
"""What a trained gate is divided by: it learns that many times faster."""


@dataclass(frozen=True, kw_only=True)
class SherlConfig(MethodConfig):
    """Settings of SHERL. What is None is chosen by the kind of backbone.

    The release's: T5 and CLIP-ViL have the gated projection, eps 1e-6 and no norm behind the output map; BERT
    (retrieval) has `projection="linear_norm"`, `norm_out=True`, eps 1e-8; the ResNet beside it has
    `projection="conv_norm"`, eps 1e-8; MDETR has `projection="linear_norm"`, `norm_out=True`, `norm_out_eps=1e-5`,
    `merge_mlp=True`, `eps=1e-6`; CLIP4Clip has `pool_tokens=True`, `hidden=512`, and on MSR-VTT `level_gates=True`.

    Attributes:
        reduction: the backbone's width over the side network's.
        hidden: the side network's width itself; None: by `reduction`.
        layers: blocks that are read besides the embeddings, from 0 and ascending; the last of them is the guide. Where
            a stack's last block is the late one, its own output is left out. What the gate lets through to it is the
            output of the block before it, listed or not. None:
            of an encoder-decoder with 12 or 24 blocks a stack the release's (T5-base, T5-large), of a convolutional
            network, whose embeddings are not read, the last of each stage and the guide, else all. T5-3B has (22, 23).
        projection: how a level is brought to the side network's width: "gated" (W1, ReLU, then two maps of which one
            is the sigmoid gate), "linear_norm" (linear map and LayerNorm), "relu_linear" (ReLU before the map) or
            "conv_norm" (1x1 convolution and batch norm; on convolutional networks, and nothing else there). None:
            "linear_norm" on bidirectional encoders, with `pool_tokens` "relu_linear", else "gated".
        norm_out: whether a LayerNorm follows the output map; None: with "linear_norm".
        norm_out_eps: its epsilon.
        merge_mlp: whether what is merged goes through an MLP before the guide is added (MDETR).
        eps: added to the norms that are divided by; None: 1e-8 with "linear_norm" and "conv_norm", else 1e-6.
        init_std: deviation of the linear maps at the start, with biases of zero. None: 0.01 with "gated" (CLIP-ViL:
            0.02), else PyTorch's own start, and with `merge_mlp` Xavier's for the weights.
        dropout: in training, of what `norm_out` gives and of what an encoder hands to its decoder.
        pool_tokens: CLIP4Clip's form: each level's tokens are pooled by how well they fit the guide, which is made of
            the vector that the head reads or (`Retrieve`) projects, and that vector is corrected. All blocks are read
            by default, the last one too, and none is written into.
        level_gates: whether a level's own token (end of text, class token) has a trained gate there.
    """

    reduction: int = 8
    hidden: int | None = None
    layers: tuple[int, ...] | None = None
    projection: Projecting | None = None
    norm_out: bool | None = None
    norm_out_eps: float = 1e-12
    merge_mlp: bool = False
    eps: float | None = None
    init_std: float | None = None
    dropout: float = 0.1
    pool_tokens: bool = False
    level_gates: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("reduction", self.reduction >= 1, "a whole number of at least 1")
        self.require("hidden", self.hidden is None or self.hidden >= 1, "a whole number of at least 1, or None")
        self.require("layers", self.layers is None or is_ascending(self.layers), "block numbers from 0, ascending")
        for name in ("norm_out_eps", "eps", "init_std"):
            value = getattr(self, name)
            self.require(name, value is None or value > 0, "a number above 0")
        self.require("dropout", 0 <= self.dropout < 1, "a number of at least 0 and less than 1")
        plain = not (self.norm_out or self.merge_mlp or self.projection == "conv_norm")
        self.require("pool_tokens", plain or not self.pool_tokens, "False with norm_out, merge_mlp and conv_norm")
        self.require("level_gates", self.pool_tokens or not self.level_gates, "False without pool_tokens")

    def filled(self, sites: Sequence[Site]) -> SherlConfig:
        """This config with what depends on the kind of backbone alone filled in."""
        natural: Projecting = "gated" if any(site.causal for site in sites) else "linear_norm"
        natural = "relu_linear" if self.pool_tokens else natural
        projection = self.projection or ("conv_norm" if any(site.convolutional for site in sites) else natural)
        return replace(
            self,
            projection=projection,
            norm_out=projection == "linear_norm" and not self.pool_tokens if self.norm_out is None else self.norm_out,
            eps=self.eps or (1e-8 if projection in ("linear_norm", "conv_norm") else 1e-6),
            init_std=self.init_std or (0.01 if projection == "gated" and not self.merge_mlp else None),
        )

    def side_width(self, width: int) -> int:
        """The side network's width beside a backbone of this one."""
        return self.hidden or width // self.reduction

    def blocks_read(self, stack: Sequence[Site], *, encoder_decoder: bool) -> tuple[int, ...]:
        """Numbers of the blocks of a stack whose outputs are read, the guide last."""
        depth = stack[0].depth
        published = PUBLISHED_LAYERS.get(depth) if encoder_decoder else None
        if stack[0].convolutional:
            ends = {site.stage: site.index for site in stack if site.kind == "block"}
            published = tuple(sorted({*ends.values(), depth - 2}))
        chosen = self.layers or published or tuple(range(depth))
        return tuple(block for block in chosen if block < depth - 1 or not self.has_late_route(stack))

    def has_late_route(self, stack: Sequence[Site]) -> bool:
        """Whether a stack's last block reads what is merged: of the stack that the head reads, unless pooled."""
        return stack[0].head and not self.pool_tokens


# --- a level's projection: (batch, tokens, width) -> (batch, tokens, hidden) ------------------------------------------


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


# --- the merge --------------------------------------------------------------------------------------------------------


class Merge(nn.Module):
    """Levels weighted by how well they fit the guide, the less the more they repeat each other; plus the guide.

    Args:
        hidden: width of levels and guide.
        eps: added to the norms that are divided by.
        mlp: inner width of the MLP that the weighted sum goes through; None: none.
    """

    def __init__(self, hidden: int, eps: float, mlp: int | None = None) -> None:
        super().__init__()
        self.eps = eps
        self.score = nn.Linear(hidden, 1)
        self.mlp: nn.Module = nn.Identity()
        if mlp is not None:
            self.mlp = nn.Sequential(nn.Linear(hidden, mlp), nn.ReLU(), nn.Linear(mlp, hidden), nn.LayerNorm(hidden))

    def forward(self, guide: Tensor, *levels: Tensor) -> Tensor:
        """Levels and guide (..., hidden) -> (..., hidden) in the weights' precision; within in float32 at least."""
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
        return torch.tanh(self.gate / GATE_SCALE) * last.to(self.gate.dtype)

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
            keep: (batch, tokens) bool, False on padding; None when nothing is padded.
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


# --- the same of feature maps: (batch, rows x columns, channels) ------------------------------------------------------


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
            (regrid(largest, old, grid, F.adaptive_max_pool2d), regrid(mean, old, grid)) for largest, mean in self.pairs
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
        """Move the running statistics by a batch's variance and mean, (2, channels); None: they stay."""
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


# --- the method -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SherlState:
    """The codes (batch, tokens, hidden) of the levels so far, and the encoder's merged features for the decoder.

    On a convolutional network the features themselves, pooled as far as the grid has become coarser. Where tokens are
    pooled at the end, which of them are real.
    """

    codes: tuple[Tensor, ...] = ()
    maps: Maps | None = None
    memory: Tensor | None = None
    keep: Tensor | None = None


@register("sherl", SherlConfig)
class Sherl(SideNet):
    """SHERL: merges the features of all blocks into the input of the last one.

    Parameters of a stack of width d and side width h: each level has dh + h, with "gated" 2(h^2 + h) and with
    "linear_norm" 2h more; the merge h + 1, with `merge_mlp` 2dh + d + 3h more; the way out hd + d + 1, with `norm_out`
    2d more. A norm of the stack's own has d: where the backbone has one, causal stacks have theirs in its place, and so
    has an encoder that feeds a decoder. On a convolutional network a level of width d_l has d_l h + 3h, the way out
    hd + 3d + 1. With `pool_tokens`, for a vector of e channels, a level has h + 1 more, and one with `level_gates`; the
    guide has eh + h, the way out he + e.
    """

    def __init__(self, config: SherlConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.config = config.filled(sites)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks: dict[str, tuple[int, ...]] = {}
        self.stacks, self.norms = nn.ModuleDict(), nn.ModuleDict()
        convolutional = any(site.convolutional for site in sites)
        self.corrects = config.pool_tokens
        self.tokenwise = not (convolutional or config.pool_tokens)
        self.least_rows = 2 if convolutional else 1
        for name in stacks(sites):
            stack = of_stack(sites, name)
            first = stack[0]
            blocks = self.blocks[name] = config.blocks_read(stack, encoder_decoder=len(stacks(sites)) > 1)
            if convolutional:
                widths = {site.index: site.width for site in stack if site.kind == "block"}
                self.stacks[name] = ConvAggregation([widths[block] for block in blocks], self.config)
                continue
            if config.pool_tokens:
                self.stacks[name] = PooledAggregation(first.width, 1 + len(blocks), first.features, self.config)
                continue
            self.stacks[name] = Aggregation(first.width, 1 + len(blocks), self.config)
            if first.final_norm and (first.causal or not first.head):
                self.norms[name] = RMSNorm(first.width, eps=1e-6)

    @classmethod
    def check(cls, config: SherlConfig, sites: Sequence[Site]) -> None:
        """Raise on hierarchical Transformers, a single block, and a projection, layers or a width that do not fit."""
        if config.pool_tokens and (reason := not_plain(sites, causal=True)):
            raise ValueError(f"pool_tokens=True takes one stack of one stage, and this backbone {reason}")
        convolutional = any(site.convolutional for site in sites)
        if not convolutional and any(site.stage > 0 for site in sites):
            raise ValueError(
                "it weighs the features of all blocks token by token, and this backbone is hierarchical: its stages "
                "have other tokens and widths"
            )
        if convolutional and (config.filled(sites).projection != "conv_norm" or config.norm_out or config.merge_mlp):
            raise ValueError(
                f"projection={config.projection!r}, norm_out={config.norm_out} and merge_mlp={config.merge_mlp}, but "
                "on convolutional networks there is one form, of 1x1 convolutions and batch norms: leave all three out"
            )
        if not convolutional and config.projection == "conv_norm":
            raise ValueError(
                "projection='conv_norm' is for convolutional networks: leave it out, or choose "
                '"gated", "linear_norm" or "relu_linear"'
            )
        for name in stacks(sites):
            cls._check_stack(config, of_stack(sites, name), encoder_decoder=len(stacks(sites)) > 1)

    @classmethod
    def _check_stack(cls, config: SherlConfig, stack: Sequence[Site], *, encoder_decoder: bool) -> None:
        site, depth, late = stack[0], stack[0].depth, config.has_late_route(stack)
        if late and depth < 2:
            raise ValueError(f"the last block's input is made of what those before it gave, and there is {depth} block")
        guide = config.blocks_read(stack, encoder_decoder=encoder_decoder)[-1:]
        width = next((site.width for site in stack if site.kind == "block" and site.index in guide), site.width)
        if config.hidden is None and width % config.reduction:
            raise ValueError(
                f"reduction={config.reduction} does not divide the width {width}: choose one that does, or set hidden"
            )
        if config.layers is None:
            return
        if config.layers[-1] >= depth:
            raise ValueError(
                f"layers={config.layers}, but the {site.stack} has {depth} blocks: choose from 0 to {depth - 1}"
            )
        if not guide:
            raise ValueError(
                f"layers={config.layers} name no block before the last of the {site.stack}, {depth - 1}, whose input "
                f"is made of them: choose from 0 to {depth - 2}"
            )
        if late and site.convolutional and depth - 2 not in config.layers:
            raise ValueError(
                f"layers={config.layers} lack the guide, block {depth - 2}: maps are pooled to its grid, on which the "
                "last block reads them, so it has to be among them"
            )

    @classmethod
    def first_write(cls, config: SherlConfig, sites: Sequence[Site]) -> Site | None:
        """The output of the last block but one, of the stack that the head reads; none where a vector is corrected."""
        if config.pool_tokens:
            return None
        return next(site for site in sites if _writes_here(config, site))

    @classmethod
    def kept_per_token(cls, config: SherlConfig, site: Site) -> int:
        """Each level's input and its code, if all blocks are read; the final norm's input, and the head's.

        On a convolutional network, at the guide, as many features as there are stages up to it: all are pooled to its
        grid, and none is wider.
        """
        if site.kind == "norm":
            return 2 * site.width + 2 if site.head and not config.pool_tokens else 0
        if site.head and site.last and not config.pool_tokens:
            return 0
        if site.convolutional:
            guide = site.kind == "block" and site.index == site.depth - 2
            return (site.stage + 1) * site.width if guide else 0
        if config.layers is None or site.kind == "stage" or site.index in config.layers:
            return site.width + config.side_width(site.width)
        # the gate's gradient needs the output of the block before the late one
        return site.width if _writes_here(config, site) else 0

    @classmethod
    def kept_per_row(cls, config: SherlConfig, site: Site) -> int:
        """With `pool_tokens`: each level's pooled tokens, and at the end the vector, the guide and the correction."""
        if not config.pool_tokens or site.kind == "norm":
            return 0
        hidden = config.side_width(site.width)
        return 2 * hidden + (2 * site.features + hidden if site.last else 0)

    def start(self, site: Site, carried: Tensor | None) -> SherlState:
        """No level yet; a decoder has the encoder's merged features."""
        return SherlState(memory=carried)

    def read(self, hidden: Tensor, site: Site) -> Tensor | tuple[Tensor, Tensor] | None:
        """A level's code (batch, tokens, hidden), and for the encoder's memory what the gate lets through beside it.

        Of a convolutional network the map itself: what is trained comes behind the pooling.
        """
        blocks, aggregation = self.blocks[site.stack], self._aggregation(site)
        if site.kind == "block" and site.index not in blocks:
            return None
        if site.convolutional:
            return hidden if site.kind == "block" else None
        level = 0 if site.kind == "stage" else 1 + blocks.index(site.index)
        code: Tensor = recompute(aggregation.levels[level], hidden)
        return (code, aggregation.let_through(hidden)) if self._remembers_here(site) else code

    def step(self, state: SherlState, codes: Any, site: Site) -> SherlState:
        """A level more; after an encoder's guide they are merged into what its decoder remembers."""
        if site.convolutional:
            maps = (state.maps or Maps()).at(site.grid)
            return replace(state, maps=maps if codes is None else maps.adding(codes))
        if self._remembers_here(site):
            code, rest = codes
            memory = recompute(self._remember, site.stack, rest, *state.codes, code, random=self._noisy)
            return SherlState(memory=memory)
        if codes is not None:
            state = replace(state, codes=(*state.codes, codes))
        return replace(state, keep=site.keep) if self.corrects else state

    def advance(self, state: SherlState, hidden: Tensor, site: Site) -> SherlState:
        """What the gate lets through to a decoder is computed again in backward, from the hidden state that is kept."""
        if not self._remembers_here(site):
            return super().advance(state, hidden, site)
        level = self._aggregation(site).levels[-1]
        code = recompute(level, hidden)
        memory = recompute(self._remember_all, site.stack, hidden, *state.codes, code, random=self._noisy)
        return SherlState(memory=memory)

    def write(self, state: SherlState, hidden: Tensor, site: Site) -> tuple[SherlState, Tensor]:
        """Merge all levels into the last block's input."""
        if not _writes_here(self.config, site):
            return state, hidden
        aggregation = self._aggregation(site)
        if site.convolutional:
            return SherlState(), aggregation(hidden, state.maps).to(hidden.dtype)
        written = recompute(aggregation, hidden, *state.codes, random=self._noisy)
        return replace(state, codes=()), written.to(hidden.dtype)

    def memory(self, state: SherlState, site: Site) -> Tensor | None:
        """The last decoder block reads the encoder's merged features, the others its output."""
        return state.memory if site.last else None

    def finish(self, state: SherlState, raw: Tensor, normed: Tensor, site: Site) -> Tensor:
        """The stack's own norm of what came out of the last block, where it has one."""
        if not site.head or site.stack not in self.norms:
            return normed
        return recompute(self.norms[site.stack], raw).to(normed.dtype)

    def carry(self, state: SherlState) -> Tensor | None:
        """The encoder's merged and normed features (batch, tokens, width)."""
        return state.memory

    def correct(self, state: SherlState, site: Site, vector: Tensor) -> Tensor:
        """The head's vector, corrected by the levels' pooled tokens."""
        position = own_token(state.codes[-1], state.keep, causal=site.causal)
        corrected: Tensor = self.stacks[site.stack](vector, state.codes, position, state.keep)
        return corrected

    @property
    def _noisy(self) -> bool:
        return self.training and self.config.dropout > 0

    def _aggregation(self, site: Site) -> Any:
        return self.stacks[site.stack]

    def _remembers_here(self, site: Site) -> bool:
        """Whether this is the guide of an encoder, whose merged features its decoder reads."""
        return not site.head and site.kind == "block" and site.index == self.blocks[site.stack][-1]

    def _remember(self, stack: str, rest: Tensor, *codes: Tensor) -> Tensor:
        """(batch, tokens, width): the merged features, normed where the stack ends in a norm."""
        merged = cast(Aggregation, self.stacks[stack]).merged(rest, *codes)
        return self.dropout(self.norms[stack](merged) if stack in self.norms else merged)

    def _remember_all(self, stack: str, last: Tensor, *codes: Tensor) -> Tensor:
        return self._remember(stack, cast(Aggregation, self.stacks[stack]).let_through(last), *codes)


def _writes_here(config: SherlConfig, site: Site) -> bool:
    """Whether this is the output of the block before the late one, whose input is replaced."""
    return not config.pool_tokens and site.head and site.kind == "block" and site.index == site.depth - 2


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
