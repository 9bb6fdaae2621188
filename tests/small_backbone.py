"""A backbone whose weights are the same with every version of every library, for tasks that are kept as files."""

from __future__ import annotations

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


CHARACTERS = ("<pad>", "<end>", "<?>", "\n", *" abcdefghijklmnopqrstuvwxyz.?")
PAIRS = [("the film", "it was good"), ("not so dull", "fine. so?"), ("a plot", "bad")]


def decoder() -> LlamaForCausalLM:
    """The same of a decoder, whose language model head is tied to its embeddings."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(CHARACTERS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=1,
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            parameter.copy_(fractions(parameter.shape, number) + (1 if parameter.ndim == 1 else 0))
    return model.eval()


def character_tokenizer(*, pair: str | None = None) -> PreTrainedTokenizerFast:
    """One token a character, white space included. It glues the texts of a pair, as GPT-2's does, without `pair`."""
    ids = {character: place for place, character in enumerate(CHARACTERS)}
    characters = Tokenizer(models.WordLevel(ids, unk_token="<?>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    if pair is not None:
        characters.post_processor = processors.TemplateProcessing(
            single="$A", pair=pair, special_tokens=[("<end>", ids["<end>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, unk_token="<?>", pad_token="<pad>", eos_token="<end>", model_max_length=64
    )
