"""The frozen backbones of the vision oracles, with the files' weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from math import isqrt

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from parity_files import Names, Oracle, load, rename

TRAINED = re.compile(r"head\.|lora_|synqt\.")

TRANSFORMERS_NAMES: Names = (
    (r"cls_token", "embeddings.cls_token"),
    (r"pos_embed", "embeddings.position_embeddings"),
    (r"patch_embed\.proj\.(\w+)", r"embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1\.(\w+)", r"layers.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2\.(\w+)", r"layers.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"layers.\1.attention.{}_proj.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"layers.\1.attention.o_proj.\2"),
    (r"blocks\.(\d+)\.mlp\.(\w+)\.(\w+)", r"layers.\1.mlp.\2.\3"),
    (r"norm\.(\w+)", r"layernorm.\1"),
)


def timm_vit(oracle: Oracle) -> VisionTransformer:
    """timm's ViT; of a SynQT file's two epsilons the first is the backbone's."""
    weights = frozen_weights(oracle)
    width, channels, patch = oracle["w.patch_embed.proj.weight"].shape[:3]
    model = VisionTransformer(
        img_size=isqrt(oracle["w.pos_embed"].shape[1] - 1) * patch,
        patch_size=patch,
        in_chans=channels,
        embed_dim=width,
        depth=1 + max(int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))),
        num_heads=oracle.numbers("meta.num_heads")[0],
        mlp_ratio=oracle["w.blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="blocks.0.attn.qkv.bias" in weights,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=epsilon(oracle)),
    )
    load(model, weights)
    return model


def transformers_vit(oracle: Oracle) -> ViTModel:
    """transformers' ViT: queries, keys and values are three maps, and the names are others."""
    like = timm_vit(oracle)
    block = like.blocks[0]
    model = ViTModel(
        ViTConfig(
            image_size=like.patch_embed.img_size[0],
            patch_size=like.patch_embed.patch_size[0],
            num_channels=like.patch_embed.proj.in_channels,
            hidden_size=like.embed_dim,
            num_hidden_layers=len(like.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            qkv_bias=block.attn.qkv.bias is not None,
            layer_norm_eps=block.norm1.eps,
        ),
        add_pooling_layer=False,
    )
    load(model, dict(_for_transformers(like.state_dict())))
    return model


def timm_swin(oracle: Oracle) -> SwinTransformer:
    """timm's Swin."""
    official = frozen_weights(oracle)
    width, channels, patch = oracle["w.patch_embed.proj.weight"].shape[:3]
    model = SwinTransformer(
        img_size=tuple(oracle["in.x"].shape[-2:]),
        patch_size=patch,
        in_chans=channels,
        embed_dim=width,
        depths=tuple(oracle.numbers("meta.depths")),
        num_heads=tuple(oracle.numbers("meta.num_heads")),
        window_size=int(oracle.number("meta.window")),
        mlp_ratio=oracle["w.layers.0.blocks.0.mlp.fc1.weight"].shape[0] / width,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in official,
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=epsilon(oracle)),
    )
    load(model, {current_swin_name(name): value for name, value in official.items()})
    return model


def current_swin_name(name: str) -> str:
    """The release's timm merges patches at the end of a stage, today's at the beginning of the next one."""
    return re.sub(r"^layers\.(\d+)\.downsample\.", lambda found: f"layers.{int(found[1]) + 1}.downsample.", name)


def frozen_weights(oracle: Oracle) -> dict[str, Tensor]:
    """The backbone's weights, by their official names."""
    return {name: value for name, value in oracle.group("w.").items() if not TRAINED.match(name)}


def epsilon(oracle: Oracle) -> float:
    """Of the backbone's norms."""
    return oracle.number("meta.ln_eps" if "meta.ln_eps" in oracle.tensors else "meta.ln_eps_backbone_synqt")


def _for_transformers(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, value in weights.items():
        renamed = rename(name, TRANSFORMERS_NAMES)
        parts = "qkv" if "{}" in renamed else " "
        yield from ((renamed.format(part), piece) for part, piece in zip(parts, value.chunk(len(parts)), strict=True))
