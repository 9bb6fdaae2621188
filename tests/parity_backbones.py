"""The frozen backbones of the oracles, with the files' weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import isqrt

from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel

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
        depth=depth(weights, "blocks"),
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


def t5(oracle: Oracle) -> T5ForConditionalGeneration:
    """transformers' T5 with tied embeddings."""
    weights = {name: value for name, value in oracle.group("w.").items() if "side" not in name}
    shared = oracle["w.shared.weight"]
    weights |= dict.fromkeys(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"), shared)
    model = T5ForConditionalGeneration(
        T5Config(
            vocab_size=shared.shape[0],
            d_model=shared.shape[1],
            d_kv=int(oracle.number("meta.d_kv")),
            d_ff=oracle["w.encoder.block.0.layer.1.DenseReluDense.wi.weight"].shape[0],
            num_layers=depth(weights, r"encoder\.block"),
            num_decoder_layers=depth(weights, r"decoder\.block"),
            num_heads=int(oracle.number("meta.num_heads")),
            relative_attention_num_buckets=int(oracle.number("meta.relative_buckets")),
            dropout_rate=0.0,
        )
    )
    load(model, weights)
    return model.eval()


def bert(oracle: Oracle) -> BertModel:
    """transformers' BERT."""
    weights = oracle.group("w.bert.")
    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    model = BertModel(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=depth(weights, r"encoder\.layer"),
            num_attention_heads=int(oracle.number("meta.num_heads")),
            intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
            max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
            type_vocab_size=weights["embeddings.token_type_embeddings.weight"].shape[0],
        ),
        add_pooling_layer="pooler.dense.weight" in weights,
    )
    load(model, weights)
    return model.eval()


def depth(names: Iterable[str], blocks: str) -> int:
    """How many numbered blocks there are whose names begin with this pattern."""
    return 1 + max(int(found[1]) for name in names if (found := re.match(rf"{blocks}\.(\d+)\.", name)))


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
