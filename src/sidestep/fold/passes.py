"""One run of the backbone, whoever reads along: its inputs, how far it has come, and what a head reads in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sidestep.backbone import StackFacts
from sidestep.backbone.grids import Grid, counted_grid, fits, sides
from sidestep.interface.layers import masked_mean
from sidestep.interface.sites import Site

KEY_VALUES = "past_key_values"
"""Name of a key-value cache among a model's inputs."""


class FoldError(RuntimeError):
    """The backbone's loop did not do what a fold needs, and the message says where and what to do."""


@dataclass(frozen=True)
class Reading:
    """What a head reads after a pass.

    Attributes:
        hidden: (batch, tokens, width) output of the stack that the head reads. It has one token if the fold is
            narrowed.
        site: the end of that stack, with the pass's padding and grid.
        pooled: (batch, width) read-out of the method's own, or None.
        correct: the method's correction of the vector that the head makes of all this, or None.
    """

    hidden: Tensor
    site: Site
    pooled: Tensor | None
    correct: Callable[[Tensor], Tensor] | None = None

    def corrected(self, vector: Tensor) -> Tensor:
        """The head's vector (batch, features) as the method would have it."""
        return vector if self.correct is None else self.correct(vector)


@dataclass
class Pass:
    """What all methods share in one run of the backbone.

    Attributes:
        inputs: of the backbone by name, and what its trunk is given where the model reshapes them first.
        began: the outermost module of the run.
        stack: that is running, or None before the first.
        visited: how many of its sites have been seen.
        grid: rows and columns of the tokens there, or None for text.
        cache: the stack's key-value cache, if it counts tokens.
        past: how many tokens that held before this run.
        cached: whether the model remembers earlier tokens in any way.
        told: (batch, tokens) bool: which tokens are real, as a block was told. None: no pictures are padded.
        output: what went on after the last site.
        skips: whether blocks may be left out (layer drop), because no method reads them.
    """

    inputs: Mapping[str, Any]
    began: nn.Module
    stack: str | None = None
    visited: int = 0
    grid: tuple[int, int] | None = None
    cache: Any = None
    past: int = 0
    cached: bool = False
    told: Tensor | None = None
    output: Tensor | None = None
    skips: bool = False

    def visit(self, site: Site, order: int) -> bool:
        """Count a site, and return whether it is the first of its stack.

        Raises:
            FoldError: if sites come twice or out of order, and a method reads them.
        """
        starts = self.stack != site.stack and (order == 0 or self.skips)
        if starts:
            self.stack, self.visited = site.stack, 0
        if not self.skips and (self.stack != site.stack or self.visited != order):
            raise FoldError(
                f"block {site.index} of the {site.stack} ran out of turn (site {order}, expected {self.visited})."
                " Blocks that run twice or are skipped where attach saw them run once cannot be folded over"
            )
        self.visited = order + 1
        return starts

    def seen(self, stack: str) -> int:
        """How many sites of a stack came by."""
        return self.visited if self.stack == stack else 0

    def is_turn(self, site: Site, order: int) -> bool:
        """Whether a norm is called as the end of its stack.

        A model may use the same norm before its blocks too. Where no block is read, whatever comes last counts.
        """
        return self.skips or (self.stack, self.visited) == (site.stack, order)

    def open_cache(self, site: Site, call: Mapping[str, Any], *, last: bool, names: tuple[str, ...]) -> None:
        """Note at a stack's start what its key-value cache holds, to which the blocks add this run's tokens on the way.

        Args:
            site: the stack's first.
            call: the arguments of the block there, by name.
            last: whether it is the last stack, which alone has such a cache.
            names: of the inputs in which the model remembers earlier tokens.
        """
        self.cached = any(self.inputs.get(name) is not None for name in names)
        given = (call.get("past_key_values"), call.get("layer_past"), self.inputs.get("past_key_values"))
        cache = next((one for one in given if one is not None), None) if last else None
        self.cache = cache if cache is not None and _counts(cache) else None
        self.past = 0 if self.cache is None else self.cache.get_seq_length()
        self.cached |= self.cache is not None

    def see_mask(self, call: Mapping[str, Any], tokens: int, facts: StackFacts) -> None:
        """Note which tokens a block is told are real, where pictures of several shapes are padded beside texts."""
        mask = call.get("attention_mask")
        if self.inputs.get("pixel_mask") is None or facts.causal != "no" or not isinstance(mask, Tensor):
            return
        if mask.ndim == 4 and mask.shape[-1] == tokens:
            seen = mask[:, 0, 0]  # the same for all tokens that look
            self.told = seen.clone() if seen.dtype == torch.bool else seen == 0

    def text_tokens(self, *, decoding: bool) -> int | None:
        """How many tokens a stack's text has, or None where the stack reads no text."""
        names = ("decoder_input_ids", "decoder_inputs_embeds") if decoding else ("input_ids", "inputs_embeds", "inputs")
        given = (self.inputs.get(name) for name in names)
        text = next((tensor for tensor in given if isinstance(tensor, Tensor) and tensor.ndim > 1), None)
        return None if text is None else text.shape[1]


def grid_at(hidden: Tensor, site: Site, facts: StackFacts, inputs: Mapping[str, Any], told: Grid | None) -> Grid | None:
    """Rows and columns of a hidden state's tokens: its own, or those that are told or counted."""
    if hidden.ndim == 4:
        rows, columns = hidden.shape[2:] if facts.layout == "channels" else hidden.shape[1:3]
        return rows, columns
    image = sides(inputs)
    if facts.prefixes is None or image is None or fits(told, hidden.shape[1]):
        return told
    return counted_grid(image, hidden.shape[1] - site.prefix)


def mean_tokens(hidden: Tensor, site: Site) -> Tensor:
    """(batch, width): mean of the kept tokens of (batch, tokens, width), without those before the grid."""
    keep = None if site.keep is None else site.keep[:, site.prefix :]
    return masked_mean(hidden[:, site.prefix :], keep)


def single_token(site: Site) -> Site:
    """The site as a fold that is narrowed to one token sees it: nothing padded, no grid."""
    return replace(site, keep=None, grid=None)


def wrong_norm(stack: str, why: str) -> str:
    """What is wrong where another module than a stack's final norm was taken for it."""
    return (
        f"the wrong module was taken for the {stack}'s final norm ({why}): the model does not run as it did on the "
        "tiny inputs with which attach looked at it, or it could not be looked at; attach to a part that always runs "
        "alike"
    )


def _counts(cache: Any) -> bool:
    """Whether a cache holds keys and values of tokens, and so knows how many (state-space layers do not)."""
    try:
        cache.get_seq_length()
    except (AttributeError, ValueError):
        return False
    return True
