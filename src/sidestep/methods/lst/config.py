"""How LST is configured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sidestep.interface.config import MethodConfig, is_ascending
from sidestep.interface.sites import BlockWeights

#: The release's blocks with a rung, by width and depth: T5-base leaves out every fourth, T5-large every second.
PUBLISHED = {
    (768, 12): tuple(block for block in range(12) if block % 4),
    (1024, 24): tuple(range(1, 24, 2)),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of a side block: its width, heads, channels of a head and inner width of the MLP."""

    width: int
    heads: int
    head_width: int
    inner_width: int


@dataclass(frozen=True, kw_only=True)
class LSTConfig(MethodConfig):
    """Settings of LST.

    A method sees the blocks of T5 with ReLU alone. There a None of `heads`, `head_width` or `inner_width` is the
    backbone's own value. On others it follows from the width d as on T5-base: set the three where the backbone differs.

    Attributes:
        reduction: the side's widths are the backbone's over this. The side has as many heads as the backbone.
        layers: blocks with a rung, ascending, the same in both stacks of an encoder-decoder. None is the release's on
            T5-base and T5-large (by their width and depth), and all elsewhere. T5-3B: 23 alone.
        heads: of the backbone. None is the backbone's own on T5 with ReLU, and elsewhere d / 64, at least one.
        head_width: channels of a head of the backbone. None is the backbone's own on T5 with ReLU, and elsewhere d /
            heads.
        inner_width: of the backbone's MLP. None is the backbone's own on T5 with ReLU, and elsewhere 4 d.
        positions: "relative" (T5's bias, one table for each stack) or "rotary". None is "relative" on encoder-decoders,
            "rotary" elsewhere.
        buckets: rows of the table of relative positions.
        dropout: T5's, in the side network, in training.
        init: what side blocks start from. "random": random weights. "magnitude": the backbone's blocks without the
            channels whose weights are smallest (T5 only). "fisher", the release's: without the channels whose weights
            the loss on training rows depends on least. Until `ss.initialise` has seen such rows, "fisher" is
            "magnitude".
    """

    rates = (1e-3, 3e-3, 6e-3)

    reduction: int = 8
    layers: tuple[int, ...] | None = None
    heads: int | None = None
    head_width: int | None = None
    inner_width: int | None = None
    positions: Literal["relative", "rotary"] | None = None
    buckets: int = 32
    dropout: float = 0.1
    init: Literal["random", "magnitude", "fisher"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("reduction", self.reduction >= 1, "a whole number of at least 1")
        self.require("layers", self.layers is None or is_ascending(self.layers), "block numbers from 0, ascending")
        for name in ("heads", "head_width", "inner_width"):
            value = getattr(self, name)
            self.require(name, value is None or value >= 1, "a whole number of at least 1, or None")
        even = self.buckets >= 4 and self.buckets % 4 == 0
        self.require("buckets", even, "a multiple of 4, because each direction has half of them, half of those exact")
        self.require("dropout", 0 <= self.dropout < 1, "at least 0 and less than 1")

    def sizes(self, width: int, weights: BlockWeights | None = None) -> Sizes:
        """The side's sizes beside a backbone of this width, with blocks of these weights where they are known.

        Raises:
            ValueError: if the reduction does not divide the backbone's.
        """
        heads = self.heads or (weights.attention.heads if weights else max(1, width // 64))
        full = {
            "width": width,
            "head_width": self.head_width or (weights.attention.head_width if weights else width // heads),
            "inner_width": self.inner_width or (weights.inner.out_features if weights else 4 * width),
        }
        for name, value in full.items():
            if value % self.reduction:
                raise ValueError(
                    f"reduction={self.reduction} does not divide the backbone's {name}, {value}: choose a divisor"
                    + ("" if name == "width" else f", or set {name} to a multiple")
                )
        return Sizes(heads=heads, **{name: value // self.reduction for name, value in full.items()})
