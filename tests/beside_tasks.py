"""A tiny ViLT with its processor, and rows of pictures, questions with several answers, and phrases with boxes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, ViltConfig, ViltImageProcessor, ViltModel, ViltProcessor

COLOURS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
WORDS = ("<pad>", "<s>", "<unk>", *COLOURS, "which", "colour", "is", "it", "the", "very", "part", "?")
QUESTIONS = ("which colour is it ?", "which colour ?", "it is very very which colour ?")
PATCH = 8


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, behind the token of a beginning."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    named = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **named)


def image_processor(**changes: Any) -> ViltImageProcessor:
    """Brings the shorter side to 24 pixels. Pictures of other shapes are padded, and masked."""
    return ViltImageProcessor(**{"size": {"shortest_edge": 3 * PATCH}, "size_divisor": PATCH, **changes})


def vilt(seed: int = 0) -> ViltModel:
    """Three blocks, whose weights are large enough for pictures to matter."""
    torch.manual_seed(seed)
    config = ViltConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        image_size=4 * PATCH,
        patch_size=PATCH,
        initializer_range=0.2,
    )
    return ViltModel(config).eval()


def vilt_backbone(folder: Path, seed: int = 0) -> Path:
    """A folder with the model and its processor."""
    vilt(seed).save_pretrained(folder)
    ViltProcessor(image_processor(), tokenizer()).save_pretrained(folder)
    return folder


def beside(folder: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a picture with a coloured rectangle on grey: a question, what ten people answered, a phrase, its box.

    Two of ten name another colour. The pictures are of several shapes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw, rows = random.Random(seed), []
    for number in range(count):
        name = sorted(COLOURS)[number % len(COLOURS)]
        width, height = draw.choice([(48, 48), (64, 48), (48, 56)])
        left, top = draw.randint(0, width // 2), draw.randint(0, height // 2)
        box = [left, top, left + draw.randint(12, width // 2), top + draw.randint(12, height // 2)]
        picture = PIL.Image.new("RGB", (width, height), (110, 110, 110))
        picture.paste(COLOURS[name], tuple(box))
        path = folder / f"{seed}_{number}.png"
        picture.save(path)
        other = draw.choice([colour for colour in COLOURS if colour != name])
        people = [{"answer": name.title()}] * 8 + [{"answer": other}] * 2
        question = QUESTIONS[draw.randrange(len(QUESTIONS))]
        phrase = f"the {name} part"
        rows.append({"picture": str(path), "question": question, "answers": people, "phrase": phrase, "box": box})
    return rows
