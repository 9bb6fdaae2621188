"""A backbone whose weights are the same with every version of every library, for tasks that are kept as files."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ("[PAD]", "[UNK]", "a", "bad", "dull", "fine", "film", "good", "not", "plot", "so", "the", "very", "was")
TEXTS = ["the plot was not so good", "a very fine film", "dull"]


def backbone() -> BertModel:
    """Width 16, two blocks; each weight is a fraction that floats hold exactly, drawn from no generator."""
    model = BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(fractions(parameter.shape, number))
    return model.eval()


def fractions(shape: torch.Size, number: int) -> Tensor:
    """Values from -0.25 to 0.25 in a fixed order, another one for each number."""
    places = torch.arange(shape.numel())
    return (((places * 7919 + number * 613) * (places + 31) % 257 - 128) / 512).view(shape)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", model_max_length=16)
