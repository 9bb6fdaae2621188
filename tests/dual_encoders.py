"""Tiny dual encoders of images and texts."""

from __future__ import annotations

import torch
from transformers import CLIPConfig, CLIPModel

END = 39
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
IMAGE = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}


def clip(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    ends = {"eos_token_id": END, "bos_token_id": 38, "pad_token_id": 0}
    return CLIPModel(CLIPConfig(text_config={**TEXT, **ends}, vision_config=IMAGE, projection_dim=8)).eval()
