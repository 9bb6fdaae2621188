"""How SHERL is configured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sidestep.interface.config import MethodConfig, is_ascending
from sidestep.interface.sites import Site

Projecting = Literal["gated", "linear_norm", "relu_linear", "conv_norm"]

#: Blocks that the release reads, by depth of an encoder-decoder's stack: T5-base and T5-large.
PUBLISHED_LAYERS = {12: (1, 2, 3, 5, 6, 7, 9, 10, 11), 24: (*range(1, 23, 2), 22, 23)}


@dataclass(frozen=True, kw_only=True)
class SherlConfig(MethodConfig):
    """Settings of SHERL. What is None is chosen by the kind of backbone.

    The release's settings. T5 and CLIP-ViL have the gated projection, eps 1e-6 and no norm behind the output map. BERT
    (retrieval) has `projection="linear_norm"`, `norm_out=True`, eps 1e-8. The ResNet beside it has
    `projection="conv_norm"`, eps 1e-8. MDETR has `projection="linear_norm"`, `norm_out=True`, `norm_out_eps=1e-5`,
    `merge_mlp=True`, `eps=1e-6`. CLIP4Clip has `pool_tokens=True`, `hidden=512`, and on MSR-VTT `level_gates=True`.

    Attributes:
        reduction: the backbone's width over the side network's.
        hidden: the side network's width itself. None takes it from `reduction`.
        layers: blocks that are read besides the embeddings, from 0 and ascending. The last of them is the guide. Where
            a stack's last block is the late one, its own output is left out. What the gate lets through to it is the
            output of the block before it, listed or not. None depends on the kind of backbone. On an encoder-decoder
            with 12 or 24 blocks a stack it is the release's (T5-base, T5-large). On a convolutional network, whose
            embeddings are not read, it is the last of each stage and the guide. Elsewhere it is all. T5-3B has (22,
            23).
        projection: how a level is brought to the side network's width. "gated": W1, ReLU, then two maps of which one is
            the sigmoid gate. "linear_norm": linear map and LayerNorm. "relu_linear": ReLU before the map. "conv_norm":
            1x1 convolution and batch norm, on convolutional networks, and nothing else there. None: "linear_norm" on
            bidirectional encoders, with `pool_tokens` "relu_linear", else "gated".
        norm_out: whether a LayerNorm follows the output map. None: with "linear_norm".
        norm_out_eps: its epsilon.
        merge_mlp: whether what is merged goes through an MLP before the guide is added (MDETR).
        eps: added to the norms that are divided by. None: 1e-8 with "linear_norm" and "conv_norm", else 1e-6.
        init_std: deviation of the linear maps at the start, with biases of zero. None: 0.01 with "gated" (CLIP-ViL:
            0.02), else PyTorch's own start, and with `merge_mlp` Xavier's for the weights.
        dropout: in training, of what `norm_out` gives and of what an encoder hands to its decoder.
        pool_tokens: CLIP4Clip's form, in which each level's tokens are pooled by how well they fit the guide. The guide
            is made of the vector that the head reads or (`Retrieve`) projects, and that vector is corrected. All blocks
            are read by default, the last one too, and none is written into.
        level_gates: whether a level's own token (end of text, class token) has a trained gate there.
    """

    rates = (5e-4, 1e-3, 3e-3)

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
