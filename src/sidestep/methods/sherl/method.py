"""SHERL: features of all blocks are merged without their redundancy and take the place of the last block's input.

Source: Diao et al., "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning",
ECCV 2024, arXiv 2407.07523, and its official code (Paranioar/SHERL), whose outputs and gradients the tests reproduce.
The early blocks are read only; gradients flow through the frozen last block alone (the "late route"). On an
encoder-decoder the encoder's merged features are what the decoder's last block attends to.
Differs: a level's projection and the merge are computed again in backward. So of each level only its input and its code
are kept (of a convolutional network's only the pooled features). A level of zeros gets no weight (in the release its
score is 0/0). Decoder-only models and vision Transformers are not in the paper. The former are treated as T5's decoder,
the latter as BERT. CLIP4Clip's form writes nothing: it corrects the vector that the head makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from sidestep.interface.layers import own_token, recompute
from sidestep.interface.registry import register
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site, not_plain, of_stack, stacks
from sidestep.methods.sherl.config import SherlConfig
from sidestep.methods.sherl.parts import Aggregation, ConvAggregation, Maps, PooledAggregation, RMSNorm


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

    Parameters of a stack of width d and side width h are these. Each level has dh + h, with "gated" 2(h^2 + h) and with
    "linear_norm" 2h more. The merge has h + 1, with `merge_mlp` 2dh + d + 3h more. The way out has hd + d + 1, with
    `norm_out` 2d more. Some stacks have a norm of SHERL's own, with d, in place of the backbone's final norm. These are
    causal stacks and an encoder that feeds a decoder, where the backbone has such a norm. On a convolutional network a
    level of width d_l has d_l h + 3h, and the way out hd + 3d + 1. With `pool_tokens`, for a vector of e channels, a
    level has h + 1 more, and one more with `level_gates`. Then the guide has eh + h, and the way out he + e.
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
                f"layers={config.layers} lack the guide, block {depth - 2}. Maps are pooled to its grid, on which the "
                "last block reads them, so it has to be among them"
            )

    @classmethod
    def first_write(cls, config: SherlConfig, sites: Sequence[Site]) -> Site | None:
        """The output of the last block but one, in the stack that the head reads.

        None where a vector is corrected.
        """
        if config.pool_tokens:
            return None
        return next(site for site in sites if _writes_here(config, site))

    @classmethod
    def kept_per_token(cls, config: SherlConfig, site: Site) -> int:
        """Each level's input and its code, if all blocks are read, and the final norm's input, and the head's.

        On a convolutional network it is, at the guide, as many features as there are stages up to it. All are pooled to
        the guide's grid, and none is wider.
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
        """No level yet, except that a decoder has the encoder's merged features."""
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
        """A level more.

        After an encoder's guide the levels are merged into what its decoder remembers.
        """
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
    def splits(self) -> bool:
        """Not on a convolutional network, whose maps are read before they are pooled."""
        return self.least_rows == 1

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
