"""Tiny backbones that write text, saved to disk, and rows that they can learn to answer in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from small_tasks import WORDS, reviews

SPECIAL = ("<pad>", "</s>", "<s>", "<unk>")
VOCABULARY = len(SPECIAL) + len(WORDS)
ANSWERS = {"pos": "very good", "neg": "bad"}


def t5_backbone(folder: Path, seed: int = 0) -> Path:
    """A T5 of two blocks a stack, with a word tokenizer that ends a text in </s>."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer("$A </s>", "$A </s> $B </s>").save_pretrained(folder)
    return folder


def llama_backbone(folder: Path, seed: int = 0, *, positions: int = 32, pad: bool = True) -> Path:
    """A Llama of two blocks, with a word tokenizer that begins a text with <s>."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        bos_token_id=2,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer("<s> $A", "<s> $A $B", pad=pad).save_pretrained(folder)
    return folder


def tokenizer(single: str, pair: str, *, pad: bool = True) -> PreTrainedTokenizerFast:
    """Splits at spaces; one token a word. It says no limit of its own."""
    ids = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    fast = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(name, ids[name]) for name in ("<s>", "</s>")]
    fast.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ends)
    names: dict[str, Any] = {"pad_token": "<pad>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=fast, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **names)


def answered(rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """Texts of three to nine words, and what they are answered with."""
    return [{"text": row["text"], "answer": ANSWERS[row["label"]]} for row in reviews(rows, seed)]
