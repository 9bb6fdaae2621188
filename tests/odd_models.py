"""Tiny random models of kinds that attribute names and flags were wrong about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from architectures import CAUSAL, PAIR, TEXT, VOCABULARY

GPT2: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
XGLM = t.XGLMConfig(
    vocab_size=VOCABULARY, d_model=16, ffn_dim=32, num_layers=3, attention_heads=2, max_position_embeddings=64
)
FSMT = t.FSMTConfig(
    langs=["en", "de"],
    src_vocab_size=VOCABULARY,
    tgt_vocab_size=VOCABULARY,
    **{name: value for name, value in PAIR.items() if name != "vocab_size"},
)
LONGFORMER = t.LongformerConfig(**TEXT, attention_window=8, pad_token_id=1, max_position_embeddings=64)
LED = t.LEDConfig(**PAIR, attention_window=8, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)
PEGASUS_X = t.PegasusXConfig(**PAIR, block_size=8, num_global_tokens=4, max_position_embeddings=64)
BIG_BIRD = t.BigBirdConfig(**TEXT, block_size=4, num_random_blocks=1, attention_type="block_sparse")

RECURRENT_GEMMA = t.RecurrentGemmaConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=96,
    lru_width=16,
    attention_window_size=64,
)

#: Models of kinds that flags and names were wrong about.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mpt": lambda: t.MptModel(t.MptConfig(d_model=16, n_heads=2, n_layers=3, vocab_size=VOCABULARY, max_seq_len=64)),
    "xglm": lambda: t.XGLMModel(XGLM),
    "bloom": lambda: t.BloomModel(t.BloomConfig(vocab_size=VOCABULARY, hidden_size=16, n_layer=3, n_head=2)),
    "mamba": lambda: t.MambaModel(
        t.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, state_size=4)
    ),
    "rwkv": lambda: t.RwkvModel(t.RwkvConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3)),
    "mixtral": lambda: t.MixtralModel(t.MixtralConfig(**CAUSAL, num_local_experts=4)),
    "llama, both ways": lambda: t.LlamaModel(t.LlamaConfig(**CAUSAL, is_causal=False)),
    "bert, decoder": lambda: t.BertModel(t.BertConfig(**TEXT, is_decoder=True)),
    "xlnet": lambda: t.XLNetModel(t.XLNetConfig(vocab_size=VOCABULARY, d_model=16, n_layer=3, n_head=2, d_inner=32)),
    "fsmt": lambda: t.FSMTModel(FSMT),
    "longformer": lambda: t.LongformerModel(LONGFORMER),
    "led": lambda: t.LEDModel(LED),
    "pegasus-x": lambda: t.PegasusXModel(PEGASUS_X),
    "big bird": lambda: t.BigBirdModel(BIG_BIRD),
    "clip text": lambda: t.CLIPTextModel(t.CLIPTextConfig(**TEXT, max_position_embeddings=32, eos_token_id=39)),
    "opt": lambda: t.OPTModel(t.OPTConfig(**TEXT, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=64)),
    "blenderbot": lambda: t.BlenderbotSmallModel(t.BlenderbotSmallConfig(**PAIR, max_position_embeddings=64)),
    "recurrent gemma": lambda: t.RecurrentGemmaModel(RECURRENT_GEMMA),
    "gpt2": lambda: t.GPT2Model(t.GPT2Config(**GPT2)),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def texts(rows: int = 2, tokens: int = 11, seed: int = 0) -> Tensor:
    return torch.randint(5, VOCABULARY - 2, (rows, tokens), generator=torch.Generator().manual_seed(seed))
