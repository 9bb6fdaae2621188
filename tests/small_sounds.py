"""Tiny backbones of sounds saved to disk, and files of tones whose pitch can be learned, for tests of whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    ASTModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForAudioClassification,
)

RATE = 4000
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
WINDOW = 20
"""Samples that the front of `waves` needs at least."""


def waves(folder: Path, *, masks: bool = True) -> Path:
    """A wav2vec2 of two blocks. It reads samples, with a mask or, if `masks` is False, without one."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **SIZES,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        conv_bias=True,
        feat_extract_norm="layer" if masks else "group",
        do_stable_layer_norm=masks,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        classifier_proj_size=16,
    )
    Wav2Vec2Model(config).save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=True, return_attention_mask=masks)
    extractor.save_pretrained(folder)
    return folder


def spectrograms(folder: Path) -> Path:
    """An AST of two blocks. It reads 32 frames of 16 bins, the first 0.335 seconds of a sound."""
    torch.manual_seed(0)
    ASTModel(
        ASTConfig(**SIZES, patch_size=8, frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16)
    ).save_pretrained(folder)
    ASTFeatureExtractor(sampling_rate=16000, num_mel_bins=16, max_length=32).save_pretrained(folder)
    return folder


def frames(folder: Path) -> Path:
    """A w2v-BERT of two blocks. It reads spectrograms of any length, with a mask."""
    torch.manual_seed(0)
    config = Wav2Vec2BertConfig(
        **SIZES, conv_depthwise_kernel_size=3, layerdrop=0.0, mask_time_prob=0.0, classifier_proj_size=16
    )
    Wav2Vec2BertModel(config).save_pretrained(folder)
    SeamlessM4TFeatureExtractor().save_pretrained(folder)
    return folder


def whisper(folder: Path) -> Path:
    """Whisper's encoder of two blocks, with a head of its own. It reads one second."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        vocab_size=20,
        num_mel_bins=16,
        max_source_positions=50,
        classifier_proj_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    WhisperForAudioClassification(config).save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    return folder


BACKBONES: dict[str, Callable[[Path], Path]] = {
    "waves": waves,
    "frames": frames,
    "spectrograms": spectrograms,
    "whisper": whisper,
}


def tone(pitch: float, seconds: float, rate: int = RATE, seed: int = 0) -> NDArray[np.float32]:
    """(samples,): a tone of so many hertz in some noise."""
    samples = round(seconds * rate)
    noise = 0.02 * np.random.default_rng(seed).standard_normal(samples)
    return (0.5 * np.sin(2 * np.pi * pitch * np.arange(samples) / rate) + noise).astype(np.float32)


def sound_folder(folder: Path, per_class: int = 12, rates: tuple[int, ...] = (RATE,)) -> Path:
    """Sounds in one folder per class, of low and of high tones, of different lengths and at these rates in turn."""
    chance = np.random.default_rng(0)
    for name, low in (("high", 1200), ("low", 200)):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            rate = rates[index % len(rates)]
            pitch, seconds = chance.uniform(low, low + 200), chance.uniform(0.1, 0.3)
            soundfile.write(folder / name / f"{index}.wav", tone(pitch, seconds, rate, seed=index), rate)
    return folder
