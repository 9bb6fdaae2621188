"""UniPT: one anchor, the last level, gathers from all levels below it by token-to-token attention without a softmax.

Source: Diao et al., "UniPT: Universal Parallel Tuning for Transfer Learning with Efficient Parameter and Memory", CVPR
2024, arXiv 2308.14316, and its official code (Paranioar/UniPT), whose outputs and gradients the tests reproduce.
Differs: the result takes the last hidden state's place at its own width (with VSE the release reads a text embedding
out of it). Weights are formed again in backward, so that of each level its hidden state and its projection are kept.
The confidence's bias is left out, which a softmax over the levels does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from sidestep.interface.config import MethodConfig
from sidestep.interface.layers import masked_mean, own_token, recompute
from sidestep.interface.registry import register
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site, not_plain
from sidestep.interface.taps import Tap

Variant = Literal["vse", "vil", "clip4clip"]


@dataclass(frozen=True, kw_only=True)
class UniPTConfig(MethodConfig):
    """Settings of UniPT.

    Attributes:
        reduction: the levels are compared at the backbone's width over this.
        hidden: that width itself (512 in the release's image-text retrieval). None takes it from `reduction`.
        variant: what the release does with one kind of model. "vse" and "vil" give an output for every token. Their
            levels are projected and normed. What the anchor gathers is mapped once ("vse"), or twice with a ReLU
            between ("vil"). "clip4clip" corrects one vector, what the head reads or (`Retrieve`) projects of that.
            There a ReLU comes before the projections, and the last level is gathered from as well.
    """

    rates = (2e-4, 5e-4, 2e-3)

    reduction: int = 2
    hidden: int | None = None
    variant: Variant = "vse"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("reduction", self.reduction >= 1, "a whole number of at least 1")
        self.require("hidden", self.hidden is None or self.hidden >= 1, "a whole number of at least 1, or None")

    def width(self, backbone: int) -> int:
        """Channels at which the levels of a backbone of this width are compared."""
        return self.hidden or backbone // self.reduction


class Level(nn.Module):
    """A level's tokens at the width at which levels are compared: (batch, tokens, width) -> (batch, tokens, hidden)."""

    def __init__(self, width: int, hidden: int, *, relu: bool) -> None:
        super().__init__()
        self.tap = Tap(width, hidden, form="relu" if relu else "none")
        self.norm = nn.Identity() if relu else nn.LayerNorm(hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Linear and LayerNorm, or ReLU and Linear."""
        normed: Tensor = self.norm(self.tap(tokens))
        return normed


class Interaction(nn.Module):
    """UniPT's side network, apart from where its levels come from.

    Args:
        width: channels of the levels.
        hidden: channels at which they are compared.
        levels: how many there are, the embeddings included.
        out: channels of the result.
        variant: as in the config.
    """

    def __init__(self, width: int, hidden: int, levels: int, out: int, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        relu = variant == "clip4clip"
        self.levels = nn.ModuleList(Level(width, hidden, relu=relu) for _ in range(levels))
        self.confidence = nn.Linear(hidden, 1, bias=False)
        self.up = nn.Linear(hidden, out)
        if variant == "clip4clip":
            self.anchor = Level(out, hidden, relu=True)
        else:
            wide = [] if variant == "vse" else [nn.Linear(hidden, width), nn.ReLU()]
            self.mix = nn.Sequential(*wide, nn.Linear(width if wide else hidden, hidden), nn.LayerNorm(hidden))

    def read(self, level: int, tokens: Tensor) -> Tensor:
        """(batch, tokens, hidden): one level's projection."""
        projected: Tensor = recompute(self.levels[level], tokens)
        return projected

    def tokens(self, levels: Sequence[Tensor], keep: Tensor | None) -> Tensor:
        """The result for every token ("vse", "vil").

        Args:
            levels: projections (batch, tokens, hidden) of all levels. The last is the anchor, and the others are
                gathered.
            keep: (batch, tokens) bool, False on padding, or None when nothing is padded.

        Returns:
            (batch, tokens, out).
        """
        *targets, anchor = levels
        weights = recompute(self._weights, anchor, keep, keep, *targets)
        gathered = [recompute(_gather, anchor, *part, keep) for part in zip(targets, weights.unbind(1), strict=True)]
        result: Tensor = recompute(self._result, anchor, sum(gathered[1:], gathered[0]))
        return result

    def vector(self, levels: Sequence[Tensor], vector: Tensor, position: Tensor, keep: Tensor | None) -> Tensor:
        """One vector, corrected ("clip4clip").

        Args:
            levels: projections (batch, tokens, hidden) of all levels, which are gathered from.
            vector: (batch, out), which is the anchor and is corrected.
            position: (batch,) the token of which each level's own value is added.
            keep: as `tokens`'.

        Returns:
            (batch, out).
        """
        anchor = recompute(self.anchor, vector[:, None])
        weights = recompute(self._weights, anchor, None, keep, *levels)
        gathered = [
            recompute(_gather_at, anchor, *part, position, keep) for part in zip(levels, weights.unbind(1), strict=True)
        ]
        correction: Tensor = recompute(self._correction, sum(gathered[1:], gathered[0]))
        return vector + correction

    def _weights(self, anchor: Tensor, anchor_keep: Tensor | None, keep: Tensor | None, *targets: Tensor) -> Tensor:
        """(batch, targets): how far each target is trusted, with a sum of one in each row."""
        means = torch.stack([masked_mean(target, keep) for target in targets], dim=1)
        scores: Tensor = self.confidence(masked_mean(anchor, anchor_keep)[:, None] * means)
        return scores.squeeze(-1).to(anchor.dtype).softmax(-1)

    def _result(self, anchor: Tensor, gathered: Tensor) -> Tensor:
        total = anchor + self.mix(gathered)
        result: Tensor = self.up(total.relu() if self.variant == "vse" else total)
        return result

    def _correction(self, gathered: Tensor) -> Tensor:
        correction: Tensor = self.up(gathered.relu())
        return correction[:, 0]


def _gather(anchor: Tensor, target: Tensor, weight: Tensor, keep: Tensor | None) -> Tensor:
    """(batch, tokens, hidden): what each of the anchor's tokens finds in a target, with that of its own place."""
    scores = _agreement(anchor, target, keep)
    found = (scores / (scores.sum(-1, keepdim=True) + 1e-8)).to(target.dtype) @ target + target
    return weight[:, None, None] * found


def _gather_at(anchor: Tensor, target: Tensor, weight: Tensor, position: Tensor, keep: Tensor | None) -> Tensor:
    """(batch, 1, hidden): what an anchor of one token finds in a target, with the token at `position`."""
    scores = _agreement(anchor, target, keep)
    own = target[torch.arange(len(target), device=target.device), position]
    found = (scores / scores.sum(-1, keepdim=True).clamp(min=1e-6)).to(target.dtype) @ target + own[:, None]
    return weight[:, None, None] * found


def _agreement(anchor: Tensor, target: Tensor, keep: Tensor | None) -> Tensor:
    """(batch, anchor's tokens, target's): products where they are positive, and zero on padding, in full precision.

    Small numbers keep the sums of the products from 0. In half precision these numbers would be 0.
    """
    scores = (anchor @ target.transpose(1, 2)).to(torch.promote_types(anchor.dtype, torch.float32)).relu()
    return scores if keep is None else scores * keep[:, None]


@dataclass(frozen=True)
class UniPTState:
    """The projections of the levels read so far, and which of their tokens are real."""

    levels: tuple[Tensor, ...] = ()
    keep: Tensor | None = None


@register("unipt", UniPTConfig)
class UniPT(SideNet):
    """UniPT: the last hidden state gathers from all levels below it, and the result takes its place.

    Parameters for L levels (the embeddings and all blocks) of width d that are compared at h: "vse" L(dh + 3h) + h^2 +
    4h + hd + d. "vil" has 2dh + d - h^2 more. "clip4clip" for a vector of e channels has L(dh + h) + 2(eh + h) + e.
    """

    def __init__(self, config: UniPTConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.config = config
        width, levels = sites[0].width, sites[0].depth + 1
        self.corrects = config.variant == "clip4clip"
        out = sites[-1].features if self.corrects else width
        self.interaction = Interaction(width, config.width(width), levels, out, config.variant)

    @classmethod
    def check(cls, config: UniPTConfig, sites: Sequence[Site]) -> None:
        """Raise on all but one stack of one width, or if the reduction does not fit.

        For tokens the stack has to be bidirectional.
        """
        vector = config.variant == "clip4clip"
        if reason := not_plain(sites, causal=vector):
            what, stack = ("a vector", "stack") if vector else ("each token", "bidirectional stack")
            raise ValueError(
                f"{what} gathers from all tokens of all levels, so it takes one {stack} of one stage, and this "
                f"backbone {reason}"
            )
        if config.hidden is None and sites[0].width % config.reduction:
            raise ValueError(
                f"reduction={config.reduction} does not divide the backbone's width, {sites[0].width}: choose a divisor"
            )

    @classmethod
    def first_write(cls, config: UniPTConfig, sites: Sequence[Site]) -> Site | None:
        """The end of the stack, or None if the result is the head's own vector."""
        return None if config.variant == "clip4clip" else sites[-1]

    @classmethod
    def kept_per_token(cls, config: UniPTConfig, site: Site) -> int:
        """Each level and its projection, and at the end what was gathered."""
        hidden = config.width(site.width)
        if site.kind == "norm":
            return 0
        return site.width + hidden * (2 if site.last and config.variant != "clip4clip" else 1)

    @classmethod
    def kept_per_row(cls, config: UniPTConfig, site: Site) -> int:
        """The levels' weights, and with "clip4clip" the vector, its projection and what it gathered."""
        vectors = 2 * site.features if site.last and config.variant == "clip4clip" else 0
        return 0 if site.kind == "norm" else site.depth + 2 + vectors

    def start(self, site: Site, carried: Tensor | None) -> UniPTState:
        """Nothing was read yet."""
        return UniPTState()

    def read(self, hidden: Tensor, site: Site) -> Tensor:
        """One level's projection, (batch, tokens, hidden): of the embeddings, or of a block's output."""
        return self.interaction.read(0 if site.kind == "stage" else site.index + 1, hidden)

    def step(self, state: UniPTState, codes: Tensor, site: Site) -> UniPTState:
        """One level more."""
        return UniPTState((*state.levels, codes), site.keep)

    def finish(self, state: UniPTState, raw: Tensor, normed: Tensor, site: Site) -> Tensor:
        """What all levels give for every token, in place of the last hidden state."""
        if self.corrects:
            return normed
        return self.interaction.tokens(state.levels, site.keep).to(normed.dtype)

    def correct(self, state: UniPTState, site: Site, vector: Tensor) -> Tensor:
        """The head's vector with what it gathers from all levels ("clip4clip")."""
        position = own_token(state.levels[-1], state.keep, causal=site.causal)
        return self.interaction.vector(state.levels, vector, position, state.keep)
