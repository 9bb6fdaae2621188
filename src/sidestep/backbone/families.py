"""The only per-architecture table: what cannot be read off a model's modules.

A family is found by `config.model_type` (Hugging Face) or by the class name (timm). A model that is not listed gets
`DEFAULT`. Its blocks and norms are found by structure, so most text models need no row. Add a row when a model has
prefix tokens, an unusual layout, or a head of its own that reads a single token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from sidestep.backbone.grids import TokenGrid, patch_grid, told_grid
from sidestep.interface.sites import AttentionWeights, BlockWeights, FrozenBlock, Projection

Pool = Literal["cls", "mean", "mean_pre_norm", "last", "own", "gpo", "all"]


@dataclass(frozen=True)
class Chain:
    """Modules that run one after another."""

    modules: tuple[nn.Module, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """What the last module gives."""
        for module in self.modules:
            x = module(x)
        return x


def vit_block(block: Any) -> FrozenBlock:
    """Hugging Face's ViT and DeiT layer."""
    attention = block.attention
    return FrozenBlock(
        heads=attention.num_attention_heads,
        pre_norm=True,
        norm_attention=block.layernorm_before,
        query=Projection(module=attention.q_proj),
        key=Projection(module=attention.k_proj),
        value=Projection(module=attention.v_proj),
        project=attention.o_proj,
        scale_attention=block.dropout,
        norm_mlp=block.layernorm_after,
        mlp=block.mlp,
        scale_mlp=block.dropout,
    )


def dinov2_block(block: Any) -> FrozenBlock:
    """Hugging Face's DINOv2 layer: LayerScale and one drop path for both branches."""
    attention = block.attention
    if hasattr(attention, "q_proj"):
        source, names, project = attention, ("q_proj", "k_proj", "v_proj"), attention.o_proj
    else:  # transformers 5.16
        source, names, project = attention.attention, ("query", "key", "value"), attention.output.dense
    query, key, value = (Projection(module=getattr(source, name)) for name in names)
    return FrozenBlock(
        heads=source.num_attention_heads,
        pre_norm=True,
        norm_attention=block.norm1,
        query=query,
        key=key,
        value=value,
        project=project,
        scale_attention=Chain((block.layer_scale1, block.drop_path)),
        norm_mlp=block.norm2,
        mlp=block.mlp,
        scale_mlp=Chain((block.layer_scale2, block.drop_path)),
    )


def bert_block(block: Any) -> FrozenBlock:
    """Hugging Face's BERT layer (post-norm), which RoBERTa and ELECTRA share."""
    attention, out = block.attention.self, block.attention.output
    return FrozenBlock(
        heads=attention.num_attention_heads,
        pre_norm=False,
        norm_attention=out.LayerNorm,
        query=Projection(module=attention.query),
        key=Projection(module=attention.key),
        value=Projection(module=attention.value),
        project=out.dense,
        scale_attention=out.dropout,
        norm_mlp=block.output.LayerNorm,
        mlp=Chain((block.intermediate, block.output.dense)),
        scale_mlp=block.output.dropout,
    )


def timm_block(block: Any) -> FrozenBlock | None:
    """timm's plain ViT block, with LayerScale and drop path where it has them.

    None for timm's other kinds of block.
    """
    if type(block).__name__ != "Block" or type(block.attn).__name__ != "Attention":
        return None
    attention = block.attn
    return FrozenBlock(
        heads=attention.num_heads,
        pre_norm=True,
        norm_attention=block.norm1,
        query=Projection(module=attention.qkv, part=0, parts=3),
        key=Projection(module=attention.qkv, part=1, parts=3),
        value=Projection(module=attention.qkv, part=2, parts=3),
        project=attention.proj,
        scale_attention=Chain((attention.proj_drop, block.ls1, block.drop_path1)),
        norm_mlp=block.norm2,
        mlp=block.mlp,
        scale_mlp=Chain((block.ls2, block.drop_path2)),
    )


def t5_weights(block: Any) -> BlockWeights | None:
    """Hugging Face's T5 block.

    None for blocks whose MLP is gated or has another activation (T5 1.1 and later).
    """
    layers = list(block.layer)
    attention, mlp = layers[0], layers[-1]
    if type(mlp.DenseReluDense).__name__ != "T5DenseActDense" or not isinstance(mlp.DenseReluDense.act, nn.ReLU):
        return None
    return BlockWeights(
        attention=_t5_attention(attention.SelfAttention, attention.layer_norm),
        cross=_t5_attention(layers[1].EncDecAttention, layers[1].layer_norm) if len(layers) > 2 else None,
        norm_mlp=mlp.layer_norm,
        inner=mlp.DenseReluDense.wi,
        outer=mlp.DenseReluDense.wo,
    )


def _t5_attention(attention: Any, norm: nn.Module) -> AttentionWeights:
    table = attention.relative_attention_bias if attention.has_relative_attention_bias else None
    return AttentionWeights(
        heads=attention.n_heads,
        norm=norm,
        query=attention.q,
        key=attention.k,
        value=attention.v,
        out=attention.o,
        table=table,
    )


@dataclass(frozen=True, kw_only=True)
class Family:
    """What Sidestep has to be told about an architecture.

    Attributes:
        pool: default read-out of Sidestep's heads: "cls" (first token), "mean" (kept tokens) or "last".
        causal: whether tokens see earlier ones only. It is for models that cannot be run as they are: a plan's,
            quantised and dispatched ones. It counts where their config and modules do not say so. None: as those say.
        prefix: tokens before the grid, a number or the model's attribute that holds it.
        blocks: pattern of the names of the stages' lists of blocks. None: found by structure.
        grid: the token grid at a site, from the model, the pass's inputs, the block's arguments and its output. By
            default what the model tells its blocks. If hidden states have rows and columns, those are the grid.
        first_token_heads: model classes whose own head (or read-out, of a tower) reads the first token only.
        frozen_block: the parts of a block, for methods that replay it.
        block_weights: the weights of a block, for methods that start from them.
        shuffles: whether the patches of a picture are drawn in a random order in each pass. See `in_order`.
    """

    pool: Pool = "mean"
    causal: bool | None = None
    prefix: int | str = 0
    blocks: str | None = None
    grid: TokenGrid = told_grid
    first_token_heads: tuple[str, ...] = ()
    frozen_block: Callable[[nn.Module], FrozenBlock | None] | None = None
    block_weights: Callable[[nn.Module], BlockWeights | None] | None = None
    shuffles: bool = False


DEFAULT = Family()

_VIT = Family(
    pool="cls",
    prefix=1,
    grid=patch_grid,
    first_token_heads=("ViTForImageClassification", "DeiTForImageClassification"),
    frozen_block=vit_block,
)
_CLIP_VISION = Family(
    pool="cls",
    prefix=1,
    grid=patch_grid,
    first_token_heads=("CLIPVisionModel", "ChineseCLIPVisionModel"),
)

FAMILIES: dict[str, Family] = {
    "bert": Family(first_token_heads=("BertForSequenceClassification",), frozen_block=bert_block),
    "roberta": Family(first_token_heads=("RobertaForSequenceClassification",), frozen_block=bert_block),
    "xlm-roberta": Family(first_token_heads=("XLMRobertaForSequenceClassification",), frozen_block=bert_block),
    "distilbert": Family(first_token_heads=("DistilBertForSequenceClassification",)),
    "electra": Family(first_token_heads=("ElectraForSequenceClassification",), frozen_block=bert_block),
    "deberta": Family(first_token_heads=("DebertaForSequenceClassification",)),
    "deberta-v2": Family(first_token_heads=("DebertaV2ForSequenceClassification",)),
    "vit": _VIT,
    "deit": replace(_VIT, prefix=2),
    "dinov2": Family(pool="cls", prefix=1, grid=patch_grid, frozen_block=dinov2_block),
    "t5": Family(block_weights=t5_weights),
    "clip_text_model": Family(causal=True),
    "imagegpt": Family(causal=True),
    # among the causal language models, and a decoder's attention says so itself
    "bert-generation": Family(causal=False),
    "cpmant": Family(causal=False),
    # among the causal language models, and told by a mask of its own which tokens come later
    "xlnet": Family(causal=False),
    "beit": Family(pool="cls", prefix=1, grid=patch_grid),
    # text, then a class token and the patches of a picture. Its own heads read the text's first token
    "vilt": Family(pool="cls", shuffles=True),
    "clip_vision_model": _CLIP_VISION,
    "chinese_clip_vision_model": _CLIP_VISION,
    "VisionTransformer": Family(pool="cls", prefix="num_prefix_tokens", grid=patch_grid, frozen_block=timm_block),
    "resnet": Family(blocks=r"encoder\.stages\.\d+\.layers"),
    "ResNet": Family(blocks=r"layer\d+"),
}


@dataclass(frozen=True)
class DualFamily:
    """How a dual encoder (`vision_model`, `text_model`, a projection of each and `logit_scale`) reads its towers."""

    image_pool: Pool = "own"
    text_pool: Pool = "own"


DUAL_FAMILIES: dict[str, DualFamily] = {
    "clip": DualFamily(),
    # projects the text's first token itself, without its pooler
    "chinese_clip": DualFamily(text_pool="cls"),
    "vision-text-dual-encoder": DualFamily(),
}


def dual_family_of(model: nn.Module) -> DualFamily | None:
    """The row for a dual encoder, or None for other models. One tower alone (CLIPForImageClassification) is none."""
    config = getattr(model, "config", None)
    if not all(hasattr(model, tower) for tower in ("vision_model", "text_model")):
        return None
    return DUAL_FAMILIES.get(getattr(config, "model_type", ""))


def family_of(model: nn.Module) -> Family:
    """The row for a model, or `DEFAULT` when the table has none for it."""
    config = getattr(model, "config", None)
    key = getattr(config, "model_type", None) or type(model).__name__
    return FAMILIES.get(key, DEFAULT)


def prefix_tokens(model: nn.Module, family: Family) -> int:
    """Number of leading tokens that belong to no grid."""
    return getattr(model, family.prefix) if isinstance(family.prefix, str) else family.prefix
