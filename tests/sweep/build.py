"""A tiny random model of any type."""

from __future__ import annotations

import warnings
from contextlib import suppress

import timm
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING

from sweep.catalogue import ModelType
from sweep.configs import IDS, LAYERS, tiny_fields

LABELS = 3
LARGEST = 350_000_000
"""Parameters of a model that the rules did not make small."""
PLAIN = ("vit_", "deit", "beit", "eva02", "naflexvit", "samvit", "cait", "mixer")
"""How the names of those timm models begin that may have fewer blocks."""
SMALL_IMAGE = 112
"""Side of the images of timm models that are not bound to their own size."""


class TooLarge(Exception):
    """A model that the rules did not make small."""


def build(kind: ModelType, seed: int = 0) -> nn.Module:
    """A tiny model in eval mode. Its weights are random, biases and norms too, because zeros hide errors.

    Raises:
        TooLarge: if the model is not tiny.
        Exception: whatever transformers or timm raises for a config that does not fit together.
    """
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _timm_model(kind.name.removeprefix("timm:")) if kind.group == "timm" else _transformers_model(kind)
    _randomise(model)
    return model.eval()


def _transformers_model(kind: ModelType) -> nn.Module:
    config_class = CONFIG_MAPPING[kind.config]
    config = config_class(**tiny_fields(config_class))
    if kind.auto.endswith("Classification"):
        config.num_labels = LABELS
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = IDS["decoder_start_token_id"]
    config.architectures = config.architectures or []  # some classes look into it
    model: nn.Module = getattr(transformers, kind.auto).from_config(config).float()
    if (size := sum(parameter.numel() for parameter in model.parameters())) > LARGEST:
        raise TooLarge(f"{size / 1e6:.0f} million parameters")
    return model


def _timm_model(name: str) -> nn.Module:
    depth = {"depth": LAYERS} if name.startswith(PLAIN) else {}
    with suppress(Exception):  # many designs know no other size, or do not run on it
        small = timm.create_model(name, num_classes=LABELS, img_size=SMALL_IMAGE, **depth).eval()
        with torch.no_grad():
            small(torch.zeros(1, 3, SMALL_IMAGE, SMALL_IMAGE))
        return small
    return timm.create_model(name, num_classes=LABELS, **depth)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Random biases, norms and running statistics, and finite numbers where a class leaves memory as it finds it.

    Maps that begin at zero are random too (NeoMME), because behind them nothing would have a gradient.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if (
            not parameter.isfinite().all()
            or parameter.abs().max() > 1e3
            or (parameter.ndim > 1 and not parameter.any())
        ):
            parameter.normal_(std=0.02)
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, buffer in model.named_buffers():
        if "running_" in name:
            buffer.add_(0.1 * torch.rand_like(buffer))
