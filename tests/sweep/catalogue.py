"""Every type of model that the sweep knows: transformers' own types, and timm models of many designs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

Group = Literal["causal", "encoder", "seq2seq", "vision", "vlm", "audio", "timm"]
GROUPS: dict[Group, str] = {
    "causal": "decoders",
    "encoder": "encoders of text",
    "seq2seq": "encoder-decoders",
    "vision": "images",
    "vlm": "vision-language",
    "audio": "sound",
    "timm": "timm",
}
"""What the tables call them, in their order."""
assert set(GROUPS) == set(get_args(Group))


@dataclass(frozen=True)
class ModelType:
    """One type of model.

    Attributes:
        name: transformers' name of the type, or "timm:" and the name of a timm model. Where a type is tried with two
            classes, the second has "+" and a word behind it.
        group: what it reads and how.
        auto: the class of transformers that builds it. Empty for timm.
    """

    name: str
    group: Group
    auto: str

    @property
    def config(self) -> str:
        """transformers' name of the type."""
        return self.name.partition("+")[0]

    @property
    def writes(self) -> bool:
        """Whether its own head writes text, so that it is tried with that head too."""
        return self.auto in WRITERS


WRITERS = (
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSpeechSeq2Seq",
)

TOWERS = (
    "clip_vision_model",
    "siglip_vision_model",
    "siglip2_vision_model",
    "sam_vision_model",
    "internvl_vision",
    "idefics3_vision",
    "chinese_clip_vision_model",
    "tipsv2_vision_model",
)
"""Vision towers, which no list of transformers has."""

TIMM = (
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "deit3_small_patch16_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch14_dinov2",
    "vit_base_patch16_siglip_224",
    "naflexvit_base_patch16_gap",
    "vit_relpos_small_patch16_224",
    "samvit_base_patch16",
    "cait_xxs24_224",
    "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256",
    "swinv2_cr_tiny_224",
    "pvt_v2_b0",
    "xcit_nano_12_p16_224",
    "mvitv2_tiny",
    "maxvit_tiny_tf_224",
    "coatnet_0_224",
    "convnext_atto",
    "convnextv2_atto",
    "resnet18",
    "efficientformer_l1",
    "efficientformerv2_s0",
    "levit_128s",
    "poolformer_s12",
    "twins_svt_small",
    "volo_d1_224",
    "crossvit_tiny_240",
    "tnt_s_legacy_patch16_224",
    "visformer_tiny",
    "edgenext_xx_small",
    "mobilevit_xxs",
    "hiera_tiny_224",
    "nest_tiny",
    "mixer_s32_224",
    "davit_tiny",
    "focalnet_tiny_srf",
    "gcvit_xxtiny",
    "fastvit_t8",
    "tiny_vit_5m_224",
)
"""The smallest model of each design."""

MOST_USED = (
    *("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "mixtral", "gemma2", "gemma3_text", "phi3", "gpt2"),
    *("gpt_neox", "opt", "bloom", "falcon", "olmo2", "granite", "smollm3", "deepseek_v3", "mamba2"),
    *("bert", "roberta", "xlm-roberta", "deberta-v2", "distilbert", "electra", "albert", "modernbert", "mpnet"),
    *("bart", "mbart", "t5", "mt5", "umt5", "pegasus", "marian", "whisper", "whisper+asr"),
    *("vit", "dinov2", "dinov3_vit", "siglip", "siglip_vision_model", "siglip2_vision_model", "clip"),
    *("clip_vision_model", "swin", "swinv2", "beit", "convnext", "sam_vision_model"),
    *("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paligemma", "smolvlm", "idefics3", "gemma3", "internvl"),
    *("wav2vec2", "hubert", "audio-spectrogram-transformer"),
)
"""The families that are downloaded most. The tests try them."""


def catalogue() -> dict[str, ModelType]:
    """Every type by its name. A type that several groups could take is in the first."""
    found: dict[str, ModelType] = {}
    for group, builder, names in _sources():
        for name in names:
            if name.partition("+")[0] in CONFIG_MAPPING:
                found.setdefault(name, ModelType(name, group, builder))
    found |= {f"timm:{name}": ModelType(f"timm:{name}", "timm", "") for name in TIMM}
    return {name: found[name] for name in (*MOST_USED, *found) if name in found}


def _sources() -> list[tuple[Group, str, Iterable[str]]]:
    """Groups, the classes that build their types, and the names of the types."""
    classified, causal = auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    encoders = [*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, *auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES]
    encoders += [name for name in classified if name not in causal]
    return [
        ("vlm", "AutoModelForImageTextToText", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("vlm", "AutoModelForMultimodalLM", auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES),
        ("audio", "AutoModelForAudioClassification", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
        ("audio", "AutoModel", auto.MODEL_FOR_CTC_MAPPING_NAMES),
        ("audio", "AutoModelForSpeechSeq2Seq", ["whisper+asr", *auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES]),
        ("vision", "AutoModelForImageClassification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
        ("vision", "AutoModel", [*auto.MODEL_FOR_IMAGE_MAPPING_NAMES, *TOWERS]),
        ("seq2seq", "AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("encoder", "AutoModelForSequenceClassification", [name for name in encoders if name in classified]),
        ("encoder", "AutoModel", encoders),
        ("causal", "AutoModelForCausalLM", causal),
    ]
