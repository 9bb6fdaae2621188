"""Tiny random causal models, and the methods that can be attached to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import nn

import sidestep as ss
from architectures import CAUSAL, TEXT, VOCABULARY

TIED = dict(CAUSAL, tie_word_embeddings=True)
GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}
OPT: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 32}
#: Those whose masks keep the texts of a row apart.
APART: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**CAUSAL)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**TIED)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(bos_token_id=1, eos_token_id=1, **GPT2)),
}
#: Those that read a row as one text, whatever its positions are; the last two ignore them.
TOGETHER: dict[str, Callable[[], nn.Module]] = {
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(vocab_size=VOCABULARY, word_embed_proj_dim=16, **OPT)),
    "biogpt": lambda: t.BioGptForCausalLM(t.BioGptConfig(**TEXT)),
    "bert as a decoder": lambda: t.BertLMHeadModel(t.BertConfig(is_decoder=True, **TEXT)),
    "bloom": lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=3, n_head=2)),
    "mpt": lambda: t.MptForCausalLM(t.MptConfig(vocab_size=VOCABULARY, d_model=16, n_layers=3, n_heads=2)),
}
METHODS: dict[str, ss.MethodConfig] = {
    "read": ss.ReadConfig(rank=4),
    "dtl": ss.DTLConfig(rank=4),
    "sherl": ss.SherlConfig(reduction=4),
    "lora": ss.LoraConfig(rank=4),
    "dora": ss.DoraConfig(rank=4),
    "ia3": ss.IA3Config(),
    "bitfit": ss.BitFitConfig(),
    "full": ss.FullConfig(),
    "diff_pruning": ss.DiffPruningConfig(density=0.1),
    "sparse": ss.SparseConfig(density=0.1),
}


def bare(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def attached(
    build: Callable[[], nn.Module], config: ss.MethodConfig, *, train_head: bool | None = None
) -> ss.SideModel:
    """With random values for all that is trained: zeros hide errors."""
    model = ss.attach(bare(build), config, train_head=train_head)
    model.place_anywhere()
    with torch.no_grad():
        for _, parameter in model.trained_parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model
