"""Fields that make a config's model tiny, found by the names of the fields."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

WIDTH, LAYERS, HEADS, HEAD_WIDTH, VOCABULARY = 64, 3, 4, 16, 160
ORDINARY = range(5, 60)
"""Tokens that stand for words."""
FIRST_SPECIAL = 120
"""From here on are the tokens that stand for pictures, sounds and the like. A part's own start four later."""
IMAGE, STAGED_IMAGE, PATCH = 32, 64, 8
"""Sides of images, of images for models in stages, and of patches."""

RULES: tuple[tuple[float, tuple[str, ...]], ...] = (
    (
        LAYERS,
        (
            r"(max_)?(n_|num_)?(hidden_layers|layers|layer|encoder_layers|decoder_layers|num_blocks)",
            r"depth",
            r"num_(encoder|decoder)_(hidden_)?layers",
            r"(encoder|decoder)_(num_)?(hidden_)?(layers|depth)",
            r"num_hidden_groups_?",
        ),
    ),
    (2, (r".*(key_value|kv)_heads", r"num_kv_heads", r"multi_query_group_num")),
    (
        HEADS,
        (
            r"(.*_)?(n|num)_(attention_|attn_|local_)?heads?(_.*)?",
            r"(.*_)?attention_heads",
            r"n_head|nhead|heads",
            r"linear_num_.*_heads",
            r"(.*_)?num_heads",
        ),
    ),
    (HEAD_WIDTH, (r"qk_(rope|nope)_head_dim", r"rotary_dim", r"v_head_dim|qk_head_dim")),
    (HEAD_WIDTH, (r"(.*_)?(head_dim|head_size|kv_channels|d_kv|attention_head_size|linear_.*_head_dim)",)),
    (16, (r"(q|kv|o)_lora_rank", r".*low_rank.*", r".*_lora_dim")),
    (
        WIDTH // 2,
        (
            r"(.*_)?moe(_shared_expert)?_intermediate_size",
            r"expert_dim|expert_ffn_hidden_size",
            r".*shared_expert.*intermediate_size|shared_intermediate_size",
        ),
    ),
    (
        WIDTH + WIDTH // 2,
        (
            r"(.*_)?(intermediate_size|intermediate_dim|ffn_dim|ffn_hidden_size|block_ff_dim)",
            r"(.*_)?(d_ff|n_inner|mlp_dim|dim_feedforward|mlp_hidden_size)",
        ),
    ),
    (
        WIDTH,
        (
            r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|hidden_channels|lru_width)",
            r"(.*_)?(model_dim|word_embed_proj_dim|emb_dim|projection_dim|embedding_dim|text_dim|vision_dim)",
            r"(.*_)?(out_hidden_size|output_hidden_size|output_dim)",
            r"dim|width|encoder_hidden_dim",
        ),
    ),
    (
        4,
        (
            r"(n_|num_)?(routed_|local_|moe_)?(num_)?experts",
            r"n_routed_experts|num_local_experts|moe_num_experts|num_experts_total",
        ),
    ),
    (
        2,
        (
            r"(num_)?experts_per_(tok|token)|num_experts_per_tok|num_selected_experts",
            r"moe_k|moe_topk|top_k_experts|moe_top_k|expert_top_k",
        ),
    ),
    (1, (r"n_group|topk_group|num_expert_groups?", r"n_shared_experts|num_shared_experts|first_k_dense_replace")),
    (VOCABULARY, (r"vocab_size(_per_layer_input)?", r".*_vocab_size")),
    (
        128,
        (
            r"max_position_embeddings|n_positions|n_ctx|context_length",
            r"max_seq_len|max_sequence_length|seq_length|max_(source|target)_positions",
        ),
    ),
    (16, (r"hidden_size_per_layer_input",)),
    (8, (r"sliding_window|local_window_size|attention_window_size|local_attention|block_size",)),
    (IMAGE, (r"image_size|img_size|pretrain_image_size|input_size",)),
    (16, (r"num_mel_bins",)),
    (8, (r"(num_)?(state|ssm_state)_size|mamba_d_state|conv_state_size|d_state|chunk_size",)),
    (4, (r"(num_)?query_tokens|num_queries|n_queries|num_latents|num_image_tokens|qformer_num_query_tokens",)),
    (8, (r"(mamba_)?n_heads|mamba_num_heads",)),
    (1, (r"mamba_n_groups|n_groups",)),
    (64, (r"max_2d_position_embeddings|num_position_embeddings",)),
    (0.1, (r"initializer_range|init_std",)),
    (2, (r"temporal_patch_size",)),
    (0, (r"num_mtp_layers|num_nextn_predict_layers|mtp_num_hidden_layers",)),
    (0.0, (r"(.*_)?layerdrop",)),
)
"""Sizes, and the names of the fields that hold them. The first that fits a name counts."""
STAGES: tuple[tuple[str, list[int]], ...] = (
    (r"depths|num_blocks_per_stage|layers_per_stage", [1, 1, 2, 1]),
    (r"hidden_sizes|encoder_hidden_sizes|embed_dims|dims|embed_dim|channels", [16, 32, 64, 128]),
    (r"num_heads|num_attention_heads|heads", [1, 2, 4, 8]),
)
"""The same for lists with one entry a stage."""
IDS: dict[str, int | None] = {
    **{"pad_token_id": 0, "padding_idx": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **{"forced_bos_token_id": None, "forced_eos_token_id": None},
}
PLACEHOLDER = r".*token_(id|index)|.*_token_ids?|.*_index"
"""Fields with the id of a token that stands for something else than a word."""
MAY_BE_NONE = r"(encoder|decoder)_num_key_value_heads|sliding_window|n_inner|image_size|hidden_size_per_layer_input"
"""Fields whose None has a meaning of its own."""
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}

DETECTORS = ("conditional_detr", "dab-detr", "deformable_detr", "detr", "table-transformer")
RESNET: dict[str, Any] = {
    **{"model_type": "resnet", "layer_type": "basic", "out_features": ["stage4"]},
    **{"embedding_size": 8, "hidden_sizes": [16, 32, 64, 128], "depths": [1, 1, 1, 1]},
}

OWN: dict[str, dict[str, Any]] = {
    **{kind: {"backbone_config": RESNET} for kind in DETECTORS},
    "chameleon": {"vocabulary_map": {"<image>": 130}},
    "emu3": {"vocabulary_map": {"<image>": 130, "<|extra_200|>": 131}},
    "cosmos3_edge_text": {"rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [3, 3, 2]}}},
    "bit": {"num_groups": 4},
    "efficientnet": {"hidden_dim": 2560},
    "textnet": {"hidden_sizes": [64, 64, 128, 256, 512]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "mistral4": {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    "blip-2": {"image_token_index": 150},
    "instructblip": {"image_token_index": 150},
    "instructblipvideo": {"image_token_index": 150},
    "glm4v_moe_text": {"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0, "mrope_section": [3, 3, 2]}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 140},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 140},
    "molmo2_adapter": {"vision_feature_layers": [-1, -2], "vision_feature_layer": [-1, -2]},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "ministral3": {"rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}},
    "zamba2": {
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
        "hybrid_layer_ids": [1, 3],
    },
    "esmc": {"num_key_value_heads": 4},
    "reformer": {"axial_pos_embds": False},
    "lilt": {"hidden_size": 96},
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "swin2sr": {"image_size": 16},
    "step3p7_text": {"sliding_window": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": None, "activation_sparsity_pattern": None},
    "roberta": {"pad_token_id": 1, "bos_token_id": 0},
}
"""What the rules get wrong, by the type of a model or of a part of it."""


def tiny_fields(kind: type[PreTrainedConfig], depth: int = 0) -> dict[str, Any]:
    """Keyword arguments of a config class that make its models tiny, those of its parts included.

    Args:
        kind: the config class.
        depth: how many configs it stands in.
    """
    defaults = _defaults(kind)
    staged = any(isinstance(defaults.get(n), list | tuple) and len(defaults[n]) > 1 for n in ("depths", "hidden_sizes"))
    special = iter(range(FIRST_SPECIAL + 4 * depth, VOCABULARY))
    tiny: dict[str, Any] = {}
    for name, value in defaults.items():
        if name in kind.sub_configs:
            if isinstance(value, PreTrainedConfig):
                tiny[name] = {**tiny_fields(type(value), depth + 1), "model_type": value.model_type}
        elif name in IDS:
            tiny[name] = IDS[name]
        elif type(value) is int and value >= 0 and re.fullmatch(PLACEHOLDER, name):
            tiny[name] = next(special)
        else:
            for small in _smaller(name, value, staged=staged):
                tiny[name] = small
    if staged:
        whole = {"image_size": STAGED_IMAGE, "embed_dim": 16, "window_size": 2}
        tiny |= {name: size for name, size in whole.items() if type(defaults.get(name)) is int}
    if "kv_lora_rank" in defaults:
        tiny["num_key_value_heads"] = HEADS
    if "rope_parameters" in defaults and "mrope_section" in _modeling_code(kind):
        tiny["rope_parameters"] = _with_sections(tiny.get("rope_parameters", {}))
    for name, value in OWN.get(kind.model_type, {}).items():
        inner = tiny.get(name) if name in kind.sub_configs else None
        tiny[name] = {**inner, **value} if isinstance(inner, dict) else value
    return tiny


def _defaults(kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """A config class's fields and what they are in its default config, or where that cannot be made, in the class."""
    try:
        made = kind()
    except Exception:  # some have no default
        made = None
    return {field.name: _default(field, made) for field in fields(kind)}


def _default(field: Field[Any], made: PreTrainedConfig | None) -> Any:
    with suppress(Exception):  # where layers differ in a field, transformers gives an error of its own
        return getattr(made, field.name)
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def _smaller(name: str, value: Any, *, staged: bool) -> Iterator[Any]:
    """The small value of a field, or nothing where the field stays as it is."""
    if name == "patch_size" and type(value) is int:
        yield from () if staged else (PATCH,)
    elif isinstance(value, list | tuple) and value and all(type(size) is int for size in value):
        if name in ("image_size", "img_size"):
            yield type(value)([IMAGE] * len(value))
        yield from (type(value)((own * 3)[: len(value)]) for names, own in STAGES if re.fullmatch(names, name))
    elif name == "rope_parameters" and isinstance(value, dict):
        yield _plain_rope(value)
    elif type(value) in (int, float) or (value is None and not re.fullmatch(MAY_BE_NONE, name)):
        size = next((size for size, names in RULES if any(re.fullmatch(one, name) for one in names)), None)
        # what is small already stays so, but heads have to fit the width
        small = type(value) is int and size and 0 <= value < size and "heads" not in name
        yield from () if size is None or small else (size,)


def _plain_rope(value: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions without the scaling of long texts, for each kind of layer that has its own."""
    value = {name: _plain_rope(part) if isinstance(part, dict) else part for name, part in value.items()}
    return value if value.get("rope_type") in (None, "default", "proportional") else dict(ROPE)


def _with_sections(rope: dict[str, Any]) -> dict[str, Any]:
    """With the share of each axis of pictures among the rotary positions of tiny heads."""
    own = {**ROPE, "mrope_section": [3, 3, 2]}
    if any(isinstance(part, dict) for part in rope.values()):
        return {name: {**own, **part} for name, part in rope.items()}
    return {**own, **rope}


def _modeling_code(kind: type[PreTrainedConfig]) -> str:
    """The text of the files with models beside a config class's own."""
    folder = Path(inspect.getfile(kind)).parent
    return "".join(file.read_text(encoding="utf-8") for file in folder.glob("modeling_*.py"))
