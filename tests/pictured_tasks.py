"""Tiny vision-language backbones with their processors, saved to disk, and rows whose answer only the picture tells."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

MARK = "<|image_pad|>"
MARKS = (MARK, "<|video_pad|>", "<vision>", "</vision>")
COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
TEXT = ("user", "model", *COLOURS, "which", "colour", "is", "it", "this", "very", "says", "?")
WORDS = ("<pad>", "</s>", "<s>", "<unk>", *TEXT, *MARKS)
PICTURE = WORDS.index(MARK)
CHAT = (
    "{% for turn in messages %}user {% for part in turn.content %}"
    "{% if part.type == 'image' %}<vision> <|image_pad|> </vision> {% else %}{{ part.text }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}model {% endif %}"
)
"""A turn of the user in front of that of the model."""
QUESTIONS = ("which colour is it ?", "which colour ?", "this is very very")
LANGUAGE: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.2,
}
"""Weights that are large enough for a frozen head to tell its words apart."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Splits at spaces and around special tokens. One token a word."""
    ids = {word: place for place, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    further = {"additional_special_tokens": list(MARKS)}
    return PreTrainedTokenizerFast(tokenizer_object=words, **named, **further)


def llava_processor(*, side: int = 8, chat: str | None = None, **changes: Any) -> LlavaProcessor:
    """Four tokens a picture, which is brought to 8 pixels a side."""
    size = {"height": side, "width": side}
    images = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    how = {
        "patch_size": 4,
        "image_token": MARK,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        **changes,
    }
    return LlavaProcessor(images, tokenizer(), chat_template=chat, **how)


def llava_backbone(folder: Path, *, chat: str | None = None, seed: int = 0) -> Path:
    """A Llava of two blocks a tower. Without a chat template the picture stands right before the text."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        projection_dim=16,
        image_size=8,
        patch_size=4,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**LANGUAGE),
        image_token_index=PICTURE,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    llava_processor(chat=chat).save_pretrained(folder)
    return folder


def qwen_backbone(folder: Path, seed: int = 0) -> Path:
    """A Qwen2-VL of two blocks a tower, with a chat template. A picture has as many tokens as cells of 8 pixels."""
    torch.manual_seed(seed)
    vision = {
        "depth": 2,
        "embed_dim": 16,
        "hidden_size": 16,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text = {**LANGUAGE, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    config = Qwen2VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=PICTURE,
        video_token_id=WORDS.index("<|video_pad|>"),
        vision_start_token_id=WORDS.index("<vision>"),
        vision_end_token_id=WORDS.index("</vision>"),
    )
    Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    cells = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    sizes = {"size": {"shortest_edge": 64, "longest_edge": 1024}}
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**cells, **sizes),
        tokenizer(),
        Qwen2VLVideoProcessor(**cells, **sizes),
        chat_template=CHAT,
    )
    processor.save_pretrained(folder)
    return folder


def pictured(folder: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a question, the path of a picture of one colour, the colour's name, and how bright the picture's blue is.

    The pictures are of several shapes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw, rows = random.Random(seed), []
    for number in range(count):
        name = sorted(COLOURS)[number % len(COLOURS)]
        shape = (8 * draw.randint(1, 2), 8 * draw.randint(1, 3))
        colour = tuple(value + draw.randint(-20, 20) for value in COLOURS[name])
        path = folder / f"{seed}_{number}.png"
        PIL.Image.new("RGB", shape, colour).save(path)
        question = QUESTIONS[draw.randrange(len(QUESTIONS))]
        rows.append({"prompt": question, "picture": str(path), "answer": name, "blue": colour[2] / 255})
    return rows
