"""Tiny random models of every family the laws are tested on, and batches for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViltConfig,
    ViltForQuestionAnswering,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from architectures import TEXT, VOCABULARY
from sidestep.backbone import facts_of, trunk_of
from sidestep.backbone.in_order import in_order

PICTURE = VOCABULARY - 1
"""The token that stands for a part of a picture in a text."""
LABELS = 3
SIZES: dict[str, Any] = {name: size for name, size in TEXT.items() if name != "vocab_size"}
WORDS: dict[str, Any] = {**TEXT, "max_position_embeddings": 64}


def bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(**WORDS, num_labels=LABELS))


def vit() -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            **SIZES,
            image_size=16,
            patch_size=4,
            num_labels=LABELS,
            hidden_dropout_prob=0.1,
        )
    )


def swin() -> nn.Module:
    return SwinForImageClassification(
        SwinConfig(embed_dim=8, depths=[2, 2], num_heads=[1, 2], image_size=32, window_size=4, num_labels=LABELS)
    )


def resnet() -> nn.Module:
    """Bottlenecks; its second stage halves the grid."""
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck", num_labels=LABELS)
    )


def timm_resnet() -> nn.Module:
    """Basic blocks of 4, 8, 16 and 32 channels; the last stage keeps the grid of the one before."""
    return timm.create_model(
        "resnet10t", layers=(1, 1, 1, 2), channels=(4, 8, 16, 32), stem_width=4, output_stride=16, num_classes=LABELS
    )


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=3,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        **WORDS,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=1,
    )


def llama() -> nn.Module:
    return LlamaForCausalLM(llama_config())


def llava() -> nn.Module:
    """Four tokens of a text stand for a picture of 8 pixels."""
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=llama_config(), image_token_index=PICTURE, vision_feature_layer=-1
        )
    )


def vilt() -> nn.Module:
    """A class token and four patches of a picture of 8 pixels stand behind the text."""
    return ViltForQuestionAnswering(ViltConfig(**WORDS, image_size=8, patch_size=4, num_labels=LABELS))


def wav2vec2() -> nn.Module:
    """Its front makes one token of ten samples."""
    return Wav2Vec2ForSequenceClassification(
        Wav2Vec2Config(
            **SIZES,
            conv_dim=(8, 8),
            conv_kernel=(10, 3),
            conv_stride=(5, 2),
            conv_bias=True,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
            mask_time_prob=0.0,
            layerdrop=0.0,
            classifier_proj_size=16,
            num_labels=LABELS,
        )
    )


def swinv2() -> nn.Module:
    return Swinv2ForImageClassification(
        Swinv2Config(embed_dim=8, depths=[2, 2], num_heads=[1, 2], image_size=32, window_size=4, num_labels=LABELS)
    )


def convnext() -> nn.Module:
    return ConvNextForImageClassification(
        ConvNextConfig(num_stages=2, hidden_sizes=[8, 16], depths=[2, 2], patch_size=4, num_labels=LABELS)
    )


def modernbert() -> nn.Module:
    return ModernBertForSequenceClassification(
        ModernBertConfig(
            **WORDS,
            local_attention=8,
            num_labels=LABELS,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
            cls_token_id=2,
            sep_token_id=1,
        )
    )


def albert() -> nn.Module:
    """Its three blocks are one, which runs three times."""
    return AlbertForSequenceClassification(
        AlbertConfig(
            **WORDS,
            embedding_size=8,
            num_labels=LABELS,
        )
    )


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=3,
        num_heads=2,
        num_classes=LABELS,
    )


@dataclass(frozen=True)
class TinyFamily:
    """One family: how its model is made and what it reads."""

    name: str
    build: Callable[[], nn.Module]
    image: int | None = None
    picture: bool = False
    beside: bool = False
    samples: int | None = None
    causal: bool = False
    encoder_decoder: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        """A random model, in eval mode, whose biases and norms are random too (zeros hide errors).

        It comes with its facts, as a copy of a model does: to trace each anew would be half of the laws' time.
        """
        made = copy.deepcopy(_traced(self, seed))
        torch.manual_seed(seed)
        return made

    def inputs(self, rows: int = 4, tokens: int = 7, seed: int = 1) -> dict[str, Tensor]:
        """Inputs without labels; the last row of a text batch is padded by two tokens."""
        generator = torch.Generator().manual_seed(seed)
        if self.samples is not None:
            sounds = torch.randn(rows, self.samples, generator=generator)
            mask = torch.ones(rows, self.samples, dtype=torch.long)
            mask[-1, self.samples // 2 :], sounds[-1, self.samples // 2 :] = 0, 0.0
            return {"input_values": sounds, "attention_mask": mask}
        if self.image is not None:
            return {"pixel_values": torch.randn(rows, 3, self.image, self.image, generator=generator)}
        ids = torch.randint(3, PICTURE if self.picture else VOCABULARY, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, -2:], ids[-1, -2:] = 0, 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if self.beside:
            batch["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=generator)
            batch["pixel_mask"] = torch.ones(rows, 8, 8, dtype=torch.long)
        if self.picture:
            place = torch.full((rows, 4), PICTURE)
            batch["input_ids"] = torch.cat([ids[:, :1], place, ids[:, 1:]], 1)
            batch["attention_mask"] = torch.cat([torch.ones_like(place), mask], 1)
            batch["pixel_values"] = torch.randn(rows, 3, 8, 8, generator=generator)
        if self.encoder_decoder:
            batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (rows, 4), generator=generator)
        return batch

    def labels(self, rows: int = 4) -> Tensor:
        """Class numbers."""
        return torch.arange(rows) % LABELS


@cache
def _traced(family: TinyFamily, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = family.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if "running_" in name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    facts_of(model)
    return model


FAMILIES = {
    family.name: family
    for family in (
        TinyFamily("bert", bert),
        TinyFamily("vit", vit, image=16),
        TinyFamily("swin", swin, image=32),
        TinyFamily("t5", t5, encoder_decoder=True),
        TinyFamily("llama", llama, causal=True),
        TinyFamily("timm_vit", timm_vit, image=16),
        TinyFamily("resnet", resnet, image=16),
        TinyFamily("timm_resnet", timm_resnet, image=32),
    )
}

FURTHER = {
    family.name: family
    for family in (
        TinyFamily("llava", llava, causal=True, picture=True),
        TinyFamily("vilt", vilt, beside=True),
        TinyFamily("wav2vec2", wav2vec2, samples=80),
        TinyFamily("swinv2", swinv2, image=32),
        TinyFamily("convnext", convnext, image=32),
        TinyFamily("modernbert", modernbert),
        TinyFamily("albert", albert),
    )
}
"""Families on which `make test` runs few methods, and `make laws-all` all."""
ALL = FAMILIES | FURTHER


def logits(output: Any) -> Tensor:
    """The logits of a model output (timm models return them bare)."""
    return output if isinstance(output, Tensor) else output.logits


def call(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """A plain backbone's output (timm models take their input by position), with a picture's patches in their order."""
    with in_order(trunk_of(model)):
        return model(*batch.values()) if not hasattr(model, "config") else model(**batch)


def randomize(model: nn.Module, seed: int = 2, scale: float = 0.2) -> None:
    """Random values for every side and head parameter, so that no zero start hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("side.", "head.")):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter))
