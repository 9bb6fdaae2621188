"""LST: a small Transformer beside the frozen one, a ladder of which each rung reads one block's output.

Source: Sung, Cho, Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", NeurIPS 2022,
arXiv 2206.06522, and its official code (ylsung/Ladder-Side-Tuning), whose outputs and gradients on T5 the tests
reproduce.
Differs: what a rung makes is computed again in backward. So of each block its hidden state and the narrow state beside
it are kept. Side blocks start at random as T5's do at their width. If `init` asks for it, they start as the release's
do, from a pruned copy of T5's own. On backbones with one stack (not in the release) rotary positions take the relative
bias's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.interface.layers import recompute
from sidestep.interface.offload import value_of
from sidestep.interface.pruning import Score, magnitude, pruned_block, residual_channels
from sidestep.interface.registry import register
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import Site, of_stack, stacks
from sidestep.interface.taps import Tap
from sidestep.methods.lst.config import PUBLISHED, LSTConfig, Sizes
from sidestep.methods.lst.parts import DOWN_STD, TEMPERATURE, SideBlock, is_relative, norm_of, relative_buckets


class Ladder(nn.Module):
    """The side network of one stack.

    Args:
        site: any of the stack's.
        sizes: of its blocks.
        config: of the method.
        layers: the blocks with a rung.
        relative: whether positions are a bias of the ladder's own. Else they are rotary.
        crosses: whether rungs read an encoder's ladder.
    """

    def __init__(
        self, site: Site, sizes: Sizes, config: LSTConfig, layers: Sequence[int], *, relative: bool, crosses: bool
    ) -> None:
        super().__init__()
        self.causal, self.buckets, self.dropout = site.causal, config.buckets, nn.Dropout(config.dropout)
        self.first = _down(site.width, sizes.width)
        # One gate a block, as in the release: those of blocks without a rung are never read.
        self.gates = nn.Parameter(torch.zeros(site.depth))
        self.downs = nn.ModuleDict({str(block): _down(site.width, sizes.width) for block in layers})
        self.blocks = nn.ModuleDict(
            {
                str(block): SideBlock(sizes, config.dropout, crosses=crosses, number=number)
                for number, block in enumerate(layers)
            }
        )
        self.norm = norm_of(sizes.width)
        self.bias = nn.Parameter(torch.randn(config.buckets, sizes.heads) * sizes.width**-0.5) if relative else None

    def read(self, hidden: Tensor, site: Site) -> Tensor | None:
        """(batch, tokens, side width) of the embeddings, or of the output of a block with a rung, else None."""
        if site.kind == "stage":
            first: Tensor = self.first(self.dropout(hidden))
            return first
        name = str(site.index)
        return self.downs[name](hidden) if name in self.downs else None

    def step(self, code: Tensor, state: Tensor, memory: Tensor | None, site: Site) -> Tensor:
        """The state behind a rung.

        Args:
            code: (batch, tokens, side width), what was read of the block's output.
            state: (batch, tokens, side width).
            memory: (batch, source tokens, side width) of the encoder's ladder, where this one reads it.
            site: the block's.
        """
        return self._kept_small(self._rung, code, state, memory, site)

    def climb(self, hidden: Tensor, state: Tensor, memory: Tensor | None, site: Site) -> Tensor:
        """`step` of the code of `hidden` (batch, tokens, width), which is computed again in backward."""
        return self._kept_small(self._read_rung, hidden, state, memory, site)

    def _kept_small(self, rung: Callable[..., Tensor], *args: Any) -> Tensor:
        """What a rung gives, with only its arguments kept for backward, of which the last is the site."""
        if args[-1].cache is not None:  # computed again, it would be added to the cache again
            return rung(*args)
        # random, because dropout is in every part of a block
        result: Tensor = recompute(rung, *args, random=self.training and self.dropout.p > 0)
        return result

    def _read_rung(self, hidden: Tensor, state: Tensor, memory: Tensor | None, site: Site) -> Tensor:
        return self._rung(self.downs[str(site.index)](hidden), state, memory, site)

    def _rung(self, code: Tensor, state: Tensor, memory: Tensor | None, site: Site) -> Tensor:
        name = str(site.index)
        share = torch.sigmoid(self.gates[site.index] / TEMPERATURE)
        state = share * state + (1 - share) * code
        positions = site.positions(state)
        distance = torch.arange(site.past + state.shape[1], device=state.device) - positions[:, None]
        seen = None if site.key_keep is None else site.key_keep[:, None, None]
        if self.causal:
            seen = distance <= 0 if seen is None else seen & (distance <= 0)
        memory_seen = None if site.memory_keep is None else site.memory_keep[:, None, None]
        turned, bias = positions if self.bias is None else None, None
        if self.bias is not None:
            numbers = relative_buckets(distance, self.buckets, causal=self.causal)
            bias = F.embedding(numbers, self.bias).permute(2, 0, 1)[None]
        result: Tensor = self.blocks[name](state, bias, seen, turned, memory, memory_seen, site.cache)
        return result


@dataclass(frozen=True)
class LSTState:
    """Where a stack's ladder stands (batch, tokens, side width), and the encoder's, normed, seen from a decoder."""

    side: Tensor | None = None
    memory: Tensor | None = None


@register("lst", LSTConfig)
class LST(SideNet):
    """LST: a small Transformer beside the frozen one reads its blocks and gives the last hidden state.

    A stack has N blocks of width d, of which n have a rung. The side network has width s, H heads of side width k and
    inner side width f. Parameters of the stack: (n + 1)(ds + s) + n(4sHk + 2sf + 2s) + N + s. A decoder that crosses
    has n(4sHk + s) more. Relative positions have H for each bucket more. The map back to
    the backbone's width has sd + d, once.
    """

    caches = True

    def __init__(self, config: LSTConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.config = config
        names = stacks(sites)
        relative = is_relative(config, sites)
        self.ladders = nn.ModuleDict()
        for name in names:
            site = of_stack(sites, name)[0]
            crosses = len(names) > 1 and name == "decoder"
            layers = _layers(config, site, len(names))
            sizes = _sizes(config, of_stack(sites, name))
            self.ladders[name] = Ladder(site, sizes, config, layers, relative=relative, crosses=crosses)
        end = next(site for site in reversed(sites) if site.head)
        self.up = nn.Linear(end.width // config.reduction, end.width)
        nn.init.normal_(self.up.weight, std=DOWN_STD)
        nn.init.zeros_(self.up.bias)
        if config.init != "random":
            self.from_data = config.init == "fisher"
            self.initialise(sites, magnitude)

    @classmethod
    def check(cls, config: LSTConfig, sites: Sequence[Site]) -> None:
        """Raise on hierarchical backbones, and if blocks are asked for that are not there or sizes do not divide."""
        if any(site.stage > 0 or site.convolutional for site in sites):
            raise ValueError("the ladder has one width and one set of tokens, and this backbone is hierarchical")
        for name in stacks(sites):
            site = of_stack(sites, name)[0]
            if config.layers is not None and config.layers[-1] >= site.depth:
                raise ValueError(
                    f"layers={config.layers}, but the {name} has {site.depth} blocks: choose from 0 to {site.depth - 1}"
                )
            head_width = _sizes(config, of_stack(sites, name)).head_width
            if head_width % 2 and not is_relative(config, sites):
                raise ValueError(
                    f"rotary positions turn pairs of channels, but a side head has {head_width}: choose another "
                    "reduction, heads or head_width"
                )
        if config.init != "random":
            _check_prunable(config, sites)

    @classmethod
    def first_write(cls, config: LSTConfig, sites: Sequence[Site]) -> Site | None:
        """The end of the stack that the head reads."""
        return sites[-1]

    @classmethod
    def kept_per_token(cls, config: LSTConfig, site: Site) -> int:
        """The embeddings and the blocks with a rung, each with the state beside it, and at the end that twice more."""
        if site.kind == "norm":
            return 0
        side = site.width // config.reduction
        rung = config.layers is None or site.kind == "stage" or site.index in config.layers
        return (site.width + side if rung else 0) + (2 * side if site.last else 0)

    @torch.no_grad()
    def initialise(self, sites: Sequence[Site], score: Score) -> None:
        """Start side blocks, norms and tables from the backbone's, without the channels that are worth least."""
        reduction = self.config.reduction
        blocks: dict[Any, Any] = {(site.stack, str(site.index)): site.weights for site in sites if site.weights}
        residual = residual_channels(list(blocks.values()), reduction, score)
        for stack in stacks(sites):
            ladder: Any = self._ladder(stack)
            norm: Any = of_stack(sites, stack)[-1].norm
            for name, block in ladder.blocks.items():
                block.load_state_dict(pruned_block(blocks[stack, name], residual, reduction, score))
            ladder.bias.copy_(value_of(blocks[stack, "0"].attention.table, "weight"))
            ladder.norm.weight.copy_(value_of(norm, "weight")[residual])

    def start(self, site: Site, carried: Tensor | None) -> LSTState:
        """Nothing yet, except that a decoder has the encoder's side states."""
        return LSTState(memory=carried)

    def read(self, hidden: Tensor, site: Site) -> Tensor | None:
        """The embeddings with dropout, or the output of a block with a rung, at the side's width."""
        codes: Tensor | None = self._ladder(site.stack).read(hidden, site)
        return codes

    def step(self, state: LSTState, codes: Tensor | None, site: Site) -> LSTState:
        """Begin at the embeddings, and climb at a block that has a rung."""
        if codes is None:
            return state
        if site.kind == "stage":
            return replace(state, side=codes)
        return replace(state, side=self._ladder(site.stack).step(codes, state.side, state.memory, site))

    def advance(self, state: LSTState, hidden: Tensor, site: Site) -> LSTState:
        """A rung's code is computed again in backward, so that only the block's output and the state are kept."""
        ladder = self._ladder(site.stack)
        if site.kind == "stage" or str(site.index) not in ladder.blocks:
            return super().advance(state, hidden, site)
        return replace(state, side=ladder.climb(hidden, state.side, state.memory, site))

    def finish(self, state: LSTState, raw: Tensor, normed: Tensor, site: Site) -> Tensor:
        """What the ladder ends with, in place of the stack's last hidden state.

        An encoder's last hidden state stays the backbone's.
        """
        if not site.head:
            return normed
        ladder = self._ladder(site.stack)
        random = self.training and self.config.dropout > 0
        result: Tensor = recompute(self._result, ladder, state.side, random=random)
        return result.to(normed.dtype)

    def carry(self, state: LSTState) -> Tensor | None:
        """The encoder's last side states, normed: (batch, tokens, side width)."""
        carried: Tensor = recompute(self._ladder("encoder").norm, state.side)
        return carried

    def _result(self, ladder: Ladder, side: Tensor) -> Tensor:
        result: Tensor = self.up(ladder.dropout(ladder.norm(side)))
        return result

    def _ladder(self, stack: str) -> Any:
        return self.ladders[stack]


def _layers(config: LSTConfig, site: Site, number: int) -> tuple[int, ...]:
    """The blocks with a rung in a site's stack, on a backbone of so many stacks."""
    if config.layers is not None:
        return config.layers
    every = tuple(range(site.depth))
    return PUBLISHED.get((site.width, site.depth), every) if number > 1 else every


def _sizes(config: LSTConfig, stack: Sequence[Site]) -> Sizes:
    """The sizes of a stack's side blocks."""
    return config.sizes(stack[0].width, next((site.weights for site in stack if site.weights), None))


def _check_prunable(config: LSTConfig, sites: Sequence[Site]) -> None:
    """Raise unless the backbone's blocks can be pruned to side blocks, with the reason."""
    blocks = [site for site in sites if site.kind == "block"]
    what = f"init={config.init!r} copies the backbone's blocks, pruned"
    if any(site.weights is None for site in blocks):
        raise ValueError(
            f'{what}, which needs those of T5 (RMS norms, relative positions, an MLP with ReLU): choose init="random"'
        )
    if not is_relative(config, sites):
        raise ValueError(f'{what}, and they have relative positions: choose positions="relative", or init="random"')
    sizes = _sizes(config, blocks)
    weights: Any = blocks[0].weights
    has = {
        "heads": (sizes.heads, weights.attention.heads),
        "head_width": (sizes.head_width * config.reduction, weights.attention.head_width),
        "inner_width": (sizes.inner_width * config.reduction, weights.inner.out_features),
        "buckets": (config.buckets, weights.attention.table.num_embeddings),
    }
    wrong = {name: theirs for name, (ours, theirs) in has.items() if ours != theirs}
    if wrong:
        raise ValueError(
            f"{what}, which have other sizes than the side network is made for: set "
            + ", ".join(f"{name}={value}" for name, value in wrong.items())
        )


def _down(width: int, side: int) -> Tap:
    tap = Tap(width, side)
    nn.init.normal_(tap.weight, std=DOWN_STD)
    return tap
