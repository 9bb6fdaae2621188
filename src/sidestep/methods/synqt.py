"""SynQT: a few query tokens are refined beside the frozen model and read it through its own frozen blocks.

Source: Zhang et al., "Parameter-Efficient and Memory-Efficient Tuning for Vision Transformer: A Disentangled Approach",
ECCV 2024, arXiv 2407.06964; taolinzhang/SynQT.

Before every block, queries are synthesized from learned ones and from what the block before gave. Then the queries run
through the frozen block. There they attend to the block's input, which never sees them. The head reads a weighted mean
of what came out of all blocks.
Differs: a block's keys and values are never formed. The key map is folded into the query, and the value map is applied
to the attention's mean of the tokens. What runs through the frozen block is computed again in backward, so of each
block only its (normed) input is kept. Parameters of the release that get no gradient are left out: twelve norms and the
head's unused weights. With one query the query and key adapters are left out too, as a softmax over one key is 1.
Post-norm blocks (BERT) are not in the paper. There queries are normed where the block's own tokens are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestep.interface.config import MethodConfig
from sidestep.interface.layers import matmul_precision, recompute
from sidestep.interface.offload import value_of
from sidestep.interface.registry import register
from sidestep.interface.side_net import SideNet
from sidestep.interface.sites import FrozenBlock, Site, not_plain


@dataclass(frozen=True, kw_only=True)
class SynQTConfig(MethodConfig):
    """Settings of SynQT.

    The release searches queries in 1, 4, 16 and each scale in 0.1, 1, task by task.

    Attributes:
        queries: query tokens T.
        hidden: inner width of the adapters.
        attention_hidden: inner width of the adapters inside of the queries' own attention.
        attn_scale: what the queries' own attention is multiplied with at the start (then it is trained).
        ffn_scale: the same for the adapter behind it.
        feat_scale: the same for what the block before gave.
        dropout: in the adapters, on attention weights and on the queries, in training.
        head_drop_path: share of the tokens that the head's mean leaves out, in training.
    """

    queries: int = 4
    hidden: int = 48
    attention_hidden: int = 8
    attn_scale: float = 0.1
    ffn_scale: float = 0.1
    feat_scale: float = 0.1
    dropout: float = 0.1
    head_drop_path: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("queries", "hidden", "attention_hidden"):
            self.require(name, getattr(self, name) >= 1, "a whole number of at least 1")
        for name in ("dropout", "head_drop_path"):
            self.require(name, 0 <= getattr(self, name) < 1, "at least 0 and less than 1")


class Adapter(nn.Module):
    """x + up(GELU(down(x))), with dropout behind both maps: (..., width) -> (..., width)."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """What comes out has the input in it."""
        return x + self.dropout(self.up(self.dropout(F.gelu(self.down(x)))))


class Synthesizer(nn.Module):
    """The queries of one block: an adapter, one head of attention among the queries, another adapter.

    Args:
        width: channels d.
        config: of the method. With one query there is nothing to weigh, so there are no query and key adapters.
    """

    def __init__(self, width: int, config: SynQTConfig) -> None:
        super().__init__()
        inner = config.attention_hidden
        self.project = Adapter(width, config.hidden, config.dropout)
        self.norm_attention = nn.LayerNorm(width)
        self.norm_value = nn.LayerNorm(width)
        self.value, self.out = Adapter(width, inner), Adapter(width, inner)
        self.weighs = config.queries > 1
        if self.weighs:
            self.norm_query = nn.LayerNorm(width)
            self.query, self.key = Adapter(width, inner), Adapter(width, inner)
        self.attn_scale = nn.Parameter(torch.full((1,), float(config.attn_scale)))
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Adapter(width, config.hidden, config.dropout)
        self.ffn_scale = nn.Parameter(torch.full((1,), float(config.ffn_scale)))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, queries: Tensor) -> Tensor:
        """(batch, queries, width) -> the same."""
        queries = self.project(queries)
        weights, values = recompute(self._weights_and_values, queries)
        read = self.out(self.dropout(weights) @ values)
        queries = queries + self.attn_scale * self.dropout(read)
        queries = queries + self.ffn_scale * self.mlp(self.norm_mlp(queries))
        return self.dropout(queries)

    def _weights_and_values(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, queries, queries) and (batch, queries, width)."""
        normed = self.norm_attention(queries)
        source = self.norm_value(normed)  # normed twice, as in the release
        values = self.value(source)
        if not self.weighs:
            return values.new_ones(len(values), 1, 1), values
        scores = self.query(self.norm_query(normed)) @ self.key(source).transpose(1, 2)
        return (scores * values.shape[-1] ** -0.5).softmax(-1), values


# --- through the frozen block -----------------------------------------------------------------------------------------


def attend(block: FrozenBlock, queries: Tensor, source: Tensor, keep: Tensor | None) -> Tensor:
    """The block's attention of queries to its own input, without its keys and values.

    Let u be a row of `source` and W_k, W_v a head's parts of the maps. Then q (W_k u + b_k) is (q W_k) u up to a
    constant that softmax does not see. The mean of W_v u + b_v is W_v (mean of u) + b_v.

    Args:
        block: the frozen block.
        queries: (batch, queries, width).
        source: (batch, tokens, width), normed where the block is pre-norm.
        keep: (batch, tokens) bool, False on padding, or None when nothing is padded.

    Returns:
        (batch, queries, width), in the queries' precision.
    """
    own = queries.to(block.query.dtype)
    query = block.query(block.norm_attention(own) if block.pre_norm else own).unflatten(-1, (block.heads, -1))
    key, value = (part.weight.unflatten(0, (block.heads, -1)) for part in (block.key, block.value))
    folded = torch.einsum("bthc,hcd->bthd", query * query.shape[-1] ** -0.5, key)
    scores = torch.einsum("bthd,bnd->bthn", folded, source.to(folded.dtype)).to(queries.dtype)
    if keep is not None:
        scores = scores.masked_fill(~keep[:, None, None], torch.finfo(scores.dtype).min)
    mean = torch.einsum("bthn,bnd->bthd", scores.softmax(-1).to(source.dtype), source)
    read = torch.einsum("bthd,hcd->bthc", mean, value).flatten(2)
    if block.value.bias is not None:
        read = read + block.value.bias
    return block.project(read).to(queries.dtype)


def transform(block: FrozenBlock, queries: Tensor) -> Tensor:
    """The block's MLP of queries (batch, queries, width), in their precision."""
    own = queries.to(block.query.dtype)
    return block.mlp(block.norm_mlp(own) if block.pre_norm else own).to(queries.dtype)


def normalize(block: FrozenBlock, norm: Any, queries: Tensor) -> Tensor:
    """A post-norm block's norm of queries (batch, queries, width), in their precision."""
    return norm(queries.to(block.query.dtype)).to(queries.dtype)


def through(block: FrozenBlock, queries: Tensor, source: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What the frozen block makes of queries: the queries behind it, and what its attention and MLP added.

    Arguments as `attend`'s. All that is kept for backward is `source` and, a few times, the queries.
    """
    # LayerScale and drop path stand outside of what is recomputed.
    attended = block.scale_attention(recompute(attend, block, queries, source, keep))
    queries = queries + attended
    if not block.pre_norm:
        queries = recompute(normalize, block, block.norm_attention, queries)
    # an MLP may have a dropout inside, active with backbone_noise
    transformed = block.scale_mlp(recompute(transform, block, queries, random=True))
    queries = queries + transformed
    if not block.pre_norm:
        queries = recompute(normalize, block, block.norm_mlp, queries)
    return queries, attended, transformed


# --- the method -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SynQTState:
    """Means over the queries, (batch, width) for each block so far: of what came out, what attention and MLP added."""

    outputs: tuple[Tensor, ...] = ()
    attended: tuple[Tensor, ...] = ()
    transformed: tuple[Tensor, ...] = ()


@register("synqt", SynQTConfig)
class SynQT(SideNet):
    """SynQT: trains query tokens that read the frozen blocks through their own attention and MLP.

    Parameters, for N blocks of width d and T queries, with adapters of widths h and a:

        N(2(2dh + h + d) + 4(2da + a + d) + 8d + 2 + Td) + (2dh + h + d) + 3N(d + 1) + 4d + 1

    An adapter of width h has 2dh + h + d. With one query there are N(2(2da + a + d) + 2d) less.
    """

    replays = True

    def __init__(self, config: SynQTConfig, sites: Sequence[Site]) -> None:
        super().__init__()
        self.config = config
        depth = self.depth = sites[0].depth
        width = self.pooled_width = sites[0].width
        self.queries = nn.Parameter(torch.empty(depth, config.queries, width).uniform_(-1, 1))
        self.feat_scale = nn.Parameter(torch.full((1,), float(config.feat_scale)))
        self.blocks = nn.ModuleList(Synthesizer(width, config) for _ in range(depth))
        self.token_norm = nn.LayerNorm(width)
        self.token_adapter = Adapter(width, config.hidden, config.dropout)
        self.gate = nn.Linear(width, 3 * depth)
        self.dropout = nn.Dropout(config.dropout)
        self.head_norm = nn.LayerNorm(width)
        _copy_norm(sites[-1].norm, self.head_norm)

    @classmethod
    def check(cls, config: SynQTConfig, sites: Sequence[Site]) -> None:
        """Raise on all but plain bidirectional ViT- and BERT-type blocks in one stage."""
        ahead = [site.next_block for site in sites if site.kind != "norm" and not site.last]
        unknown = "has no frozen_block in the family table (sidestep/backbone/families.py)" if None in ahead else None
        if reason := not_plain(sites) or unknown:
            raise ValueError(
                "its queries run through the frozen blocks, which must be plain bidirectional ViT- or BERT-type "
                f"ones, and this backbone {reason}"
            )

    @classmethod
    def kept_per_token(cls, config: SynQTConfig, site: Site) -> int:
        """Each block's (normed) input, once."""
        return site.width if site.next_block is not None else 0

    @classmethod
    def kept_per_row(cls, config: SynQTConfig, site: Site) -> int:
        """A few copies of the queries per block, and of its three tokens at the end."""
        d, h, a, queries = site.width, config.hidden, config.attention_hidden, config.queries
        if site.next_block is not None:
            norms = 0 if site.next_block.pre_norm else 2
            return queries * ((14 + norms) * d + 6 * h + 2 * a + 3 * queries + 2) + d
        tokens = 1 + 3 * site.depth
        return tokens * (4 * d + 3 * h + 7) + 2 * d + 2 if site.last else 0

    @property
    def splits(self) -> bool:
        """Its queries need each block's input in backward, from the last block to the first."""
        return False

    def start(self, site: Site, carried: Tensor | None) -> SynQTState:
        """Nothing was read yet."""
        return SynQTState()

    def read(self, hidden: Tensor, site: Site) -> Tensor | None:
        """What the next block's attention reads: (batch, tokens, width).

        It is as wide as the backbone, because the queries are too. None where no block follows.
        """
        block = site.next_block
        if block is None:
            return None
        source = block.norm_attention(hidden) if block.pre_norm else hidden
        return source.to(matmul_precision(source))

    def step(self, state: SynQTState, codes: Tensor | None, site: Site) -> SynQTState:
        """Synthesize queries for the block that follows, and run them through it."""
        block = site.next_block
        if block is None or codes is None:
            return state
        order = len(state.outputs)
        queries = self.queries[order].expand(len(codes), -1, -1)
        if state.outputs:
            queries = queries + self.feat_scale * state.outputs[-1][:, None]
        queries, attended, transformed = through(block, self.blocks[order](queries), codes, site.keep)
        return SynQTState(
            (*state.outputs, queries.mean(1)),
            (*state.attended, attended.mean(1)),
            (*state.transformed, transformed.mean(1)),
        )

    def pooled(self, state: SynQTState, site: Site) -> Tensor:
        """(batch, width): the tokens of all blocks, weighted by what the last block gave."""
        tokens = torch.stack([state.outputs[-1], *state.outputs, *state.attended, *state.transformed], dim=1)
        tokens = tokens + self.token_adapter(self.token_norm(tokens))
        first, others = tokens[:, 0], tokens[:, 1:]
        weights = torch.tanh(self.dropout(F.gelu(self.gate(first))))
        # To drop a token's path is to drop its weight in the mean.
        weights = F.dropout(weights, self.config.head_drop_path, self.training)
        total = first + torch.einsum("bj,bjd->bd", weights, others)
        return self.head_norm(total / tokens.shape[1])


def _copy_norm(source: nn.Module | None, target: nn.LayerNorm) -> None:
    """Start a norm from the backbone's final one where that is a LayerNorm, without a change of the norm's eps."""
    if not isinstance(source, nn.LayerNorm):
        return
    weight, bias = value_of(source, "weight"), value_of(source, "bias")
    if weight is None or bias is None or weight.is_meta:
        return
    with torch.no_grad():
        target.weight.copy_(weight)
        target.bias.copy_(bias)
