"""Tiny random models of many architectures, and what is to be found in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import transformers as t
from torch import Tensor, nn

VOCABULARY = 40
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
# A head is half as wide as the model, so that a norm inside of the attention (Qwen3) has another width.
CAUSAL: dict[str, Any] = dict(TEXT, num_key_value_heads=1, head_dim=8, pad_token_id=0)
IMAGE: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "vocab_size"} | {
    "image_size": 16,
    "patch_size": 4,
}
PAIR: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "pad_token_id": 1,
    "decoder_start_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
SWIN: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
DEBERTA: dict[str, Any] = dict(
    TEXT,
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    norm_rel_ebd="layer_norm",
    position_buckets=8,
)


def t5_config(*, tied: bool) -> t.T5Config:
    """T5Config ties the head whatever it is given; a head of its own has to be asked for afterwards."""
    config = t.T5Config(**T5)
    config.tie_word_embeddings = tied
    return config


def timm_vit(**sizes: Any) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3} | sizes
    return timm.create_model("vit_tiny_patch16_224", **sizes)


def timm_swin() -> nn.Module:
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=32, num_classes=3, **SWIN)


def timm_resnet(name: str, **sizes: Any) -> nn.Module:
    return timm.create_model(name, layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), num_classes=3, **sizes)


@dataclass(frozen=True)
class Architecture:
    """A model, and what Sidestep has to find in it.

    Attributes:
        widths: of the blocks, stack by stack.
        norms: the final norm of every stack by its name in the trunk, or None.
        pool: the default read-out.
        causal: whether the (last) stack is causal.
        prefix: tokens before the grid.
        image: side of the input image; None for text.
    """

    build: Callable[[], nn.Module]
    widths: list[list[int]]
    norms: list[str | None]
    pool: str
    causal: bool = False
    prefix: int = 0
    image: int | None = None

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build().eval()

    def inputs(self) -> dict[str, Tensor]:
        """Two examples; of a text the second is padded."""
        if self.image is not None:
            return {"pixel_values": torch.randn(2, 3, self.image, self.image)}
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, -2:] = 0
        return {"input_ids": torch.randint(3, VOCABULARY, (2, 7)), "attention_mask": mask}


def _text(build: Callable[[], nn.Module], norm: str | None = None) -> Architecture:
    return Architecture(build, [[16] * 3], [norm], "mean")


def _causal(build: Callable[[], nn.Module], norm: str = "norm") -> Architecture:
    return Architecture(build, [[16] * 3], [norm], "last", causal=True)


def _image(build: Callable[[], nn.Module], norm: str | None, prefix: int = 1) -> Architecture:
    return Architecture(build, [[16] * 3], [norm], "cls", prefix=prefix, image=16)


def _swin(build: Callable[[], nn.Module], norm: str) -> Architecture:
    return Architecture(build, [[8, 8, 16, 16]], [norm], "mean", image=32)


def _resnet(build: Callable[[], nn.Module], widths: list[int]) -> Architecture:
    return Architecture(build, [widths], [None], "mean", image=32)


ARCHITECTURES = {
    "bert": _text(lambda: t.BertModel(t.BertConfig(**TEXT))),
    "roberta": _text(lambda: t.RobertaModel(t.RobertaConfig(**TEXT))),
    "distilbert": _text(
        lambda: t.DistilBertModel(
            t.DistilBertConfig(vocab_size=VOCABULARY, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
        )
    ),
    "electra": _text(lambda: t.ElectraModel(t.ElectraConfig(embedding_size=8, **TEXT))),
    "deberta-v2": _text(lambda: t.DebertaV2Model(t.DebertaV2Config(**DEBERTA))),
    "modernbert": _text(lambda: t.ModernBertModel(t.ModernBertConfig(pad_token_id=0, **TEXT)), "final_norm"),
    "gpt2": _causal(lambda: t.GPT2Model(t.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2)), "ln_f"),
    "llama": _causal(lambda: t.LlamaModel(t.LlamaConfig(**CAUSAL))),
    "qwen3": _causal(lambda: t.Qwen3Model(t.Qwen3Config(**CAUSAL))),
    "mistral": _causal(lambda: t.MistralModel(t.MistralConfig(**CAUSAL))),
    "gemma2": _causal(lambda: t.Gemma2Model(t.Gemma2Config(**CAUSAL))),
    "t5": Architecture(
        lambda: t.T5Model(t.T5Config(**T5)),
        [[16] * 3, [16] * 3],
        ["encoder.final_layer_norm", "decoder.final_layer_norm"],
        "cls",
        causal=True,
    ),
    "t5 encoder": _text(lambda: t.T5EncoderModel(t.T5Config(**T5)), "encoder.final_layer_norm"),
    "bart": Architecture(
        lambda: t.BartModel(t.BartConfig(**PAIR)), [[16] * 2, [16] * 3], [None, None], "cls", causal=True
    ),
    "mbart": Architecture(
        lambda: t.MBartModel(t.MBartConfig(**PAIR)),
        [[16] * 2, [16] * 3],
        ["encoder.layer_norm", "decoder.layer_norm"],
        "cls",
        causal=True,
    ),
    "vit": _image(lambda: t.ViTModel(t.ViTConfig(**IMAGE)), "layernorm"),
    "deit": _image(lambda: t.DeiTModel(t.DeiTConfig(**IMAGE)), "layernorm", prefix=2),
    "dinov2": _image(lambda: t.Dinov2Model(t.Dinov2Config(**IMAGE)), "layernorm"),
    "clip vision": _image(lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**IMAGE)), None),
    "swin": _swin(lambda: t.SwinModel(t.SwinConfig(image_size=32, **SWIN)), "layernorm"),
    "timm vit": _image(timm_vit, "norm"),
    "timm vit, registers": _image(lambda: timm_vit(reg_tokens=3), "norm", prefix=4),
    "timm swin": _swin(timm_swin, "norm"),
    "resnet": _resnet(lambda: t.ResNetModel(t.ResNetConfig(layer_type="bottleneck", **RESNET)), [16, 32, 32]),
    "resnet, basic blocks": _resnet(lambda: t.ResNetModel(t.ResNetConfig(layer_type="basic", **RESNET)), [16, 32, 32]),
    "timm resnet": _resnet(lambda: timm_resnet("resnet18"), [8, 16, 32, 64]),
    "timm resnext": _resnet(lambda: timm_resnet("resnext50_32x4d", cardinality=2, base_width=16), [32, 64, 128, 256]),
    "timm seresnet": _resnet(lambda: timm_resnet("seresnet50"), [32, 64, 128, 256]),
}
