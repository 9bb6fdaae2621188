"""Tiny backbones saved to disk and files of rows that they can learn, for tests of whole runs."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

WORDS = (
    "good",
    "fine",
    "great",
    "bad",
    "poor",
    "awful",
    "the",
    "a",
    "film",
    "book",
    "was",
    "is",
    "very",
    "not",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def text_backbone(folder: Path, seed: int = 0) -> Path:
    """A BERT of two blocks with a word tokenizer."""
    torch.manual_seed(seed)
    vocabulary = len(SPECIAL) + len(WORDS)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer(pad=True).save_pretrained(folder)
    return folder


def padless_backbone(folder: Path) -> Path:
    """A Llama of two blocks whose tokenizer has no pad token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    LlamaModel(config).save_pretrained(folder)
    tokenizer(pad=False).save_pretrained(folder)
    return folder


def image_backbone(folder: Path) -> Path:
    """A ViT of two blocks for images of 16 by 16."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def tokenizer(*, pad: bool) -> PreTrainedTokenizerFast:
    """Splits at spaces; one token a word."""
    ids = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    fast = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    names: dict[str, Any] = {"pad_token": "[PAD]"} if pad else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
        **names,
    )


def reviews(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of three to nine words, whose label is that of the judging word in them."""
    chance = random.Random(seed)
    out = []
    for _ in range(rows):
        label = chance.choice(("neg", "pos"))
        judging = chance.choice(WORDS[:3] if label == "pos" else WORDS[3:6])
        words = [*chance.choices(WORDS[6:], k=chance.randrange(2, 9)), judging]
        chance.shuffle(words)
        score = round(len(words) / 3 + (label == "pos"), 3)
        out.append({"text": " ".join(words), "other": chance.choice(WORDS), "label": label, "score": score})
    return out


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A csv, tsv or jsonl file, by its name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def image_folder(folder: Path, per_class: int = 12, seed: int = 0) -> Path:
    """Images in one folder per class: dark ones and bright ones."""
    chance = np.random.default_rng(seed)
    for name, low in (("bright", 150), ("dark", 0)):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = chance.integers(low, low + 100, (20, 20, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder
