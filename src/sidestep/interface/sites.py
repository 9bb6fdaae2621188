"""Sites: what a method sees of the place in the backbone at which it is called. Plain data, no hooks.

A frozen backbone is one or two *stacks* ("encoder", "decoder"). A stack is a sequence of *stages* (one, except on
hierarchical models such as Swin). A stage is a sequence of *blocks*. Most stacks end in a final norm. Each of these
places is a `Site`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.interface.offload import value_of

Kind = Literal["stage", "block", "norm"]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear map of an attention: a module of its own, or one of the equal parts of a fused one.

    Weight and bias are looked up at each use. So they are where the backbone is, also after it was moved.
    """

    module: nn.Linear
    part: int = 0
    parts: int = 1

    @property
    def weight(self) -> Tensor:
        """(channels of the attention, width)."""
        whole: Tensor = value_of(self.module, "weight")
        return whole.chunk(self.parts)[self.part]

    @property
    def dtype(self) -> torch.dtype:
        """The weight's precision."""
        return self.module.weight.dtype

    @property
    def bias(self) -> Tensor | None:
        """(channels of the attention,), where the map has one."""
        bias: Tensor | None = value_of(self.module, "bias")
        return None if bias is None else bias.chunk(self.parts)[self.part]

    def __call__(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) -> (batch, tokens, channels of the attention)."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True)
class FrozenBlock:
    """The parts of one attention block, for methods that run their own queries through it (SynQT).

    Every callable maps (batch, tokens, width) to (batch, tokens, width). `scale_attention` and `scale_mlp` are what
    the block does to a branch before it is added: LayerScale, and the backbone's noise where that is on.
    """

    heads: int
    pre_norm: bool
    norm_attention: Callable[[Tensor], Tensor]
    query: Projection
    key: Projection
    value: Projection
    project: Callable[[Tensor], Tensor]
    scale_attention: Callable[[Tensor], Tensor]
    norm_mlp: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    scale_mlp: Callable[[Tensor], Tensor]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Multi-head attention of projected queries (batch, queries, width) over (batch, tokens, width)."""
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        return self.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def replay(self, hidden: Tensor) -> Tensor:
        """The block's own output for its own input (batch, tokens, width): the proof that the parts are right."""
        source = self.norm_attention(hidden) if self.pre_norm else hidden
        attended = self.attend(self.query(source), self.key(source), self.value(source))
        hidden = hidden + self.scale_attention(attended)
        if self.pre_norm:
            return hidden + self.scale_mlp(self.mlp(self.norm_mlp(hidden)))
        hidden = self.norm_attention(hidden)
        return self.norm_mlp(hidden + self.scale_mlp(self.mlp(hidden)))


@dataclass(frozen=True, kw_only=True)
class AttentionWeights:
    """The maps of an attention behind its norm, without biases, and its table of relative positions if it has one."""

    heads: int
    norm: Any
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    table: nn.Embedding | None = None

    @property
    def head_width(self) -> int:
        """Channels of a head."""
        return self.query.out_features // self.heads


@dataclass(frozen=True, kw_only=True)
class BlockWeights:
    """The weights of a T5-type block, for methods that start from a copy of them (LST).

    Self-attention, in a decoder cross-attention, and an MLP of two maps with ReLU between, each behind an RMS norm.
    """

    attention: AttentionWeights
    cross: AttentionWeights | None
    norm_mlp: Any
    inner: nn.Linear
    outer: nn.Linear


class SideCache(Protocol):
    """Where a method that declares `caches` keeps keys and values of its own while text is generated.

    They are further layers of the model's cache, numbered by the method from 0, without gaps in one pass.
    """

    def extend(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, heads, past + tokens, channels): those of earlier passes and these (of the tokens).

        Raises:
            ValueError: if the tokens in the cache did not all come by here.
        """

    def once(
        self, number: int, make: Callable[[Tensor], tuple[Tensor, Tensor]], memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of an encoder's tokens: what `make(memory)` gave in the first pass with this cache."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place of a frozen backbone. The first group of fields is known at attach, the second belongs to one pass.

    Attributes:
        kind: "stage" (the input of a stage), "block" (the output of a block) or "norm" (the end of a stack).
        stack: "encoder" or "decoder".
        stage: number of the stage within the stack.
        index: number of the block within the stack, counted over all stages. A stage has the number of its first block.
        depth: number of blocks in the stack.
        width: channels of the hidden state here.
        prefix: leading tokens that belong to no grid (class and register tokens).
        causal: whether a token sees only earlier ones.
        final_norm: whether the stack ends in a norm of its own.
        head: whether the head reads this stack's output.
        features: channels of the vector that a Sidestep head makes of the stack's output. A method may correct that
            vector.
        per_token: whether that head reads every token, and no single vector.
        spatial: whether the tokens stand in a grid (images).
        convolutional: whether the blocks are convolutions, or change grid and width as those do. Then tokens are
            positions. A stage's first block may change both on the way, so the stage's input has those of the stage
            before.
        next_block: frozen parts of the block that this hidden state goes into, where there is one and the family table
            knows them.
        weights: those of the block whose output this is, where the family table knows them.
        norm: the stack's final norm, at a site of kind "norm".
        keep: (batch, tokens) bool, False on padding, or None when nothing is padded.
        key_keep: (batch, past + tokens) bool, the same with the tokens in the key-value cache before them.
        memory_keep: the same for the encoder's tokens, seen from a decoder.
        grid: rows and columns of the token grid, None for text.
        past: tokens that were in the key-value cache before this pass.
        cache: the method's part of the key-value cache, if the method declares `caches` and the pass has such a cache.
            Else None.
    """

    kind: Kind
    stack: str
    stage: int
    index: int
    depth: int
    width: int
    prefix: int = 0
    causal: bool = False
    final_norm: bool = False
    head: bool = True
    features: int = 0
    per_token: bool = False
    spatial: bool = False
    convolutional: bool = False
    next_block: FrozenBlock | None = None
    weights: BlockWeights | None = None
    norm: nn.Module | None = None

    keep: Tensor | None = None
    key_keep: Tensor | None = None
    memory_keep: Tensor | None = None
    grid: tuple[int, int] | None = None
    past: int = 0
    cache: SideCache | None = None

    @property
    def last(self) -> bool:
        """Whether this is the output of the stack's last block."""
        return self.kind == "block" and self.index == self.depth - 1

    def positions(self, hidden: Tensor) -> Tensor:
        """(tokens,) positions of the tokens of `hidden` in the whole sequence."""
        return torch.arange(self.past, self.past + hidden.shape[1], device=hidden.device)

    def during(
        self,
        *,
        keep: Tensor | None,
        key_keep: Tensor | None,
        memory_keep: Tensor | None,
        grid: tuple[int, int] | None,
        past: int,
        cache: SideCache | None,
    ) -> Site:
        """This site with what belongs to one pass filled in."""
        return replace(self, keep=keep, key_keep=key_keep, memory_keep=memory_keep, grid=grid, past=past, cache=cache)

    def at(self, device: torch.device) -> Site:
        """This site with the masks of its pass on a device."""
        keep, key_keep, memory_keep = (
            None if mask is None else mask.to(device) for mask in (self.keep, self.key_keep, self.memory_keep)
        )
        return replace(self, keep=keep, key_keep=key_keep, memory_keep=memory_keep)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A site and the module that it sits on (before a stage's first block, after a block, after a norm).

    Attributes:
        site: as methods see it.
        name: of the module within the trunk.
        module: the module.
        linear: names within the trunk of the module's linear maps that a pass calls. A model may read the weights of
            others itself, so that nothing in their place would run. None: not known.
    """

    site: Site
    name: str
    module: nn.Module
    linear: frozenset[str] | None = None


def same_place(a: Site, b: Site) -> bool:
    """Whether two sites are the same place of a backbone, in whatever pass."""
    return (a.kind, a.stack, a.index) == (b.kind, b.stack, b.index)


def of_stack(sites: Sequence[Site], stack: str) -> list[Site]:
    """The sites of one stack, in the order in which a pass visits them."""
    return [site for site in sites if site.stack == stack]


def stacks(sites: Sequence[Site]) -> list[str]:
    """The names of the stacks, in the order in which a pass runs them."""
    return list(dict.fromkeys(site.stack for site in sites))


def not_plain(sites: Sequence[Site], *, causal: bool = False) -> str | None:
    """Why these are not the sites of one stack of one stage, said of the backbone, or None if they are.

    Args:
        sites: all of a backbone.
        causal: whether it may be causal.
    """
    reasons = {
        "is an encoder-decoder": len(stacks(sites)) > 1,
        "is causal": not causal and any(site.causal for site in sites),
        "is convolutional": any(site.convolutional for site in sites),
        "is hierarchical": any(site.stage > 0 for site in sites),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
