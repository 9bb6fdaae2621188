"""Models without weights: a backbone by its config alone, on the meta device, and the shapes of a batch for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig

from sidestep.backbone import positions
from sidestep.backbone.configs import config_of
from sidestep.backbone.dummies import PATCHES
from sidestep.backbone.families import family_of
from sidestep.backbone.formats import Format, check_quantizable
from sidestep.backbone.gguf import is_gguf
from sidestep.backbone.load import OwnHead, classifier_of, headless_of, paired
from sidestep.backbone.pixels import image_shape
from sidestep.backbone.processors import require_dual
from sidestep.backbone.source import CONFIG, TIMM, VIT, LoadError
from sidestep.backbone.timm_models import import_timm
from sidestep.backbone.trunk import SOUND_INPUTS, reads_mixed
from sidestep.measure.plan.packed import pack
from sidestep.measure.plan.pictures import Picture
from sidestep.metrics import Written
from sidestep.model.attach import Attached
from sidestep.model.outputs import gives_spans
from sidestep.model.side_model import SideModel
from sidestep.model.two_towers import TwoTowers

Backbone: TypeAlias = str | Path | PreTrainedConfig | Callable[[], nn.Module]

WRITING: tuple[tuple[Written, Any, Any], ...] = (
    ("lm", transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, transformers.AutoModelForImageTextToText),
    ("lm", transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.AutoModelForCausalLM),
    ("text2text", transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, transformers.AutoModelForSeq2SeqLM),
)
IMAGE_SIZE = 224
"""Rows and columns where a model takes images of any size."""
LENGTH = 128
SAMPLES = 160_000
"""Of a sound: ten seconds at the usual 16,000 a second."""
TARGET = 4
"""Tokens of a text that an encoder-decoder writes: a word or two."""


def build(
    backbone: Backbone,
    *,
    own_head: OwnHead | None = None,
    writes: Written | None = None,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    quantize: Format | None = None,
) -> nn.Module:
    """The backbone with random weights, on the default device. Under `torch.device("meta")` it has no weights.

    Args:
        backbone: a folder with a config.json, such a file, a hub id, "timm:NAME", "vit:FILE.npz",
            "gguf:FOLDER@FILE", a config, or what makes the model.
        own_head: the head of its own for classification with which the backbone comes.
        writes: the head of its own that writes text with which it comes.
        num_labels: classes of the head for classification. None: the config's.
        dtype: of the weights.
        revision: branch, tag or commit of a hub id.
        quantize: the format of its linear maps, which only stand for quantised ones then. None: the config's, or plain.

    Raises:
        LoadError: if there is no such config, or transformers or timm has no model for it.
    """
    if quantize is not None:
        check_quantizable(quantize, str(backbone) if isinstance(backbone, str | Path) else "")
    if isinstance(backbone, str | Path) and str(backbone).startswith(TIMM):
        if writes is not None:
            raise LoadError(f"{backbone} reads images and writes no text: leave --kind {writes} out")
        return _timm(str(backbone), num_labels if own_head is not None else 0).to(dtype)
    if callable(backbone) and not isinstance(backbone, PreTrainedConfig):
        if quantize is not None:
            raise LoadError(f"quantize={quantize!r} with a function that makes the model: give a config, or make it so")
        return backbone().to(dtype)
    config = backbone if isinstance(backbone, PreTrainedConfig) else read_config(backbone, revision)
    if own_head is not None and num_labels is not None:
        config.num_labels = num_labels
    if own_head is not None:
        kind = classifier_of(config, own_head)
    else:
        kind = _writing(config, writes) if writes else headless_of(config)
    if own_head is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # by which a decoder's head finds the last token of a row
    try:
        return pack(kind.from_config(config, dtype=dtype), quantize, own_head=own_head is not None)
    except ValueError as error:
        raise LoadError(f"transformers has no model for {type(config).__name__}: {_first_line(error)}") from error


def build_pair(
    backbone: Backbone,
    text: Backbone | None,
    *,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    quantize: Format | None = None,
) -> nn.Module:
    """A dual encoder with random weights, as `build` makes it, or of an encoder of images and one of texts.

    Raises:
        LoadError: as `build`. If there are no two towers.
    """
    made = build(backbone, dtype=dtype, revision=revision, quantize=quantize)
    if text is not None:
        return paired(made, build(text, dtype=dtype, quantize=quantize)).to(dtype)
    require_dual(str(backbone), getattr(getattr(made, "config", None), "model_type", "timm model"))
    return made


def read_config(name: str | Path, revision: str | None = None) -> Any:
    """The config of a folder, a file, a hub id, "vit:FILE.npz" or "gguf:FOLDER@FILE". No weights are needed.

    Raises:
        LoadError: if there is none.
    """
    if str(name).startswith(VIT) or is_gguf(name):
        return config_of(str(name), revision)
    path = Path(name)
    if path.is_dir() and not (path / CONFIG).is_file():
        raise LoadError(f"{path} has no {CONFIG}, which is all that a plan needs of a model")
    try:
        return AutoConfig.from_pretrained(str(name), revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if path.exists():
            raise LoadError(f"the config of {name} cannot be read: {_first_line(error)}") from error
        raise LoadError(
            f"{name!r} cannot be planned: there is no such folder or file here, and as a hub id its {CONFIG} cannot be "
            f"had ({_first_line(error)})"
        ) from error


def _writing(config: Any, writes: Written) -> Any:
    for able, mapping, kind in WRITING:
        if able == writes and type(config) in mapping:
            return kind
    raise LoadError(f"transformers has no model for {config.model_type!r} that writes text as --kind {writes} does")


def _timm(name: str, classes: int | None) -> nn.Module:
    timm, model = import_timm(), name.removeprefix(TIMM).partition("@")[0]
    try:
        return timm.create_model(model, pretrained=False, num_classes=classes)
    except (RuntimeError, ValueError, TypeError) as error:
        raise LoadError(f"{name!r} cannot be planned ({_first_line(error)}): see timm.list_models()") from error


def blank_batch(
    model: Attached,
    rows: int,
    length: int | None,
    image_size: int | None,
    frames: int | None = None,
    picture: Picture | None = None,
) -> dict[str, Tensor]:
    """A batch without content, on the default device. It has labels and, for texts, padding.

    Args:
        model: says whether it reads texts, images or sounds, or pairs, and what its labels are.
        rows: of the batch.
        length: tokens of a text. None: `LENGTH`, or what the model takes at most. Of a wave
            samples, and None: `SAMPLES`. Spectrograms are as long as those that the model was tried with.
        image_size: rows and columns of an image, or of a picture that texts need beside them. None: what the model was
            made for, or `IMAGE_SIZE`.
        frames: of the videos that pairs are of. None: they are of images.
        picture: that stands in front of each text.

    Raises:
        ValueError: if a size does not fit the model.
    """
    for name, value in (("batch", rows), ("frames", frames)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}, but it must be at least 1")
    if isinstance(model, TwoTowers):
        return _pairs(model, rows, length, image_size, frames)
    if frames is not None:
        raise ValueError(f"frames={frames}, but {_name(model)} reads no videos: they are for a dual encoder (Retrieve)")
    if model.main_input_name == "pixel_values":
        if length is not None:
            raise ValueError(f"length={length}, but {_name(model)} reads images: give image_size")
        inputs = {"pixel_values": torch.zeros(rows, *_image_shape(model, image_size))}
    elif model.main_input_name in SOUND_INPUTS:
        if image_size is not None:
            raise ValueError(f"image_size={image_size}, but {_name(model)} reads sounds: give length")
        inputs = _sounds(model, rows, length)
    elif picture is not None:
        inputs = picture.batch(rows, _length(model, length, len(picture.tokens["input_ids"]) - picture.text))
    else:
        pictured = bool(model.facts.read)
        if image_size is not None and not pictured:
            what = "has no processor of pictures here: " if reads_mixed(model.trunk) else "reads texts: "
            raise ValueError(f"image_size={image_size}, but {_name(model)} {what}give length")
        inputs = _texts(model, rows, length)
        if pictured:
            pixels = {"pixel_values": torch.zeros(rows, *_image_shape(model, image_size))}
            inputs |= without_drawing(model, pixels)
    if model.settings.head is None and model.writes == "text2text":
        target = torch.ones(rows, TARGET, dtype=torch.long)
        return {**inputs, "decoder_input_ids": target, "labels": target.clone()}
    if model.settings.head is None and model.writes == "lm":
        return {**inputs, "labels": inputs["input_ids"].clone()}
    return {**inputs, "labels": _labels(model, rows, inputs)}


def _pairs(
    model: TwoTowers, rows: int, length: int | None, image_size: int | None, frames: int | None
) -> dict[str, Tensor]:
    """An image, or a video of so many frames, for each text."""
    axes, head = () if frames is None else (frames,), model.settings.head
    assert head is not None
    pixels, texts = torch.zeros(rows, *axes, *_image_shape(model.image, image_size)), _texts(model.text, rows, length)
    return {"pixel_values": pixels, **texts, "labels": head.blank_labels(rows, texts["input_ids"].shape[1])}


def _texts(model: SideModel, rows: int, length: int | None) -> dict[str, Tensor]:
    shape = rows, _length(model, length)
    inputs = {name: torch.ones(shape, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    # without any padding transformers would leave the mask out
    inputs["attention_mask"][-1, 1:] = 0
    return inputs


def without_drawing(model: Attached, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with a picture's patches in the place of its pixels, for models that draw the patches at random.

    How many a model draws depends on values, which a plan has none of.
    """
    found = dict(inputs)
    if not family_of(model.trunk).shuffles or "pixel_values" not in found:
        return found
    pixels, patch = found.pop("pixel_values"), model.trunk.config.patch_size
    tokens = 1 + (pixels.shape[-2] // patch) * (pixels.shape[-1] // patch)
    patches = torch.zeros(len(pixels), tokens, model.trunk.config.hidden_size, dtype=model.dtype)
    return {**found, PATCHES: patches, "pixel_mask": torch.ones(len(pixels), tokens, dtype=torch.long)}


def _length(model: SideModel, asked: int | None, beside: int = 0) -> int:
    """Tokens of a text that stands beside so many others."""
    most, _ = positions(model.backbone)
    most = None if most is None else most - beside
    length = asked if asked is not None else min(LENGTH, most or LENGTH)
    if length < 1 or (most is not None and length > most):
        raise ValueError(f"length={length}, but {_name(model)} takes 1 to {most or 'any number of'} tokens")
    return length


def _sounds(model: SideModel, rows: int, length: int | None) -> dict[str, Tensor]:
    """Silence. The last row of waves is half as long if the model takes a mask."""
    name, read = model.main_input_name, model.facts.read
    if name not in read:
        raise ValueError(f"{_name(model)} does not say which sounds it takes: it cannot be planned for")
    if len(read[name]) > 1:
        if length is not None:
            raise ValueError(f"length={length}, but {_name(model)} reads spectrograms of {read[name]}: leave it out")
        return {name: torch.zeros(rows, *read[name])}
    if length is not None and length < 1:
        raise ValueError(f"length={length}, but it must be at least 1")
    inputs = {name: torch.zeros(rows, length or SAMPLES)}
    if "attention_mask" in read:
        inputs["attention_mask"] = torch.ones(inputs[name].shape, dtype=torch.long)
        inputs["attention_mask"][-1, inputs[name].shape[1] // 2 :] = 0
    return inputs


def _image_shape(model: SideModel, asked: int | None) -> tuple[int, int, int]:
    """Channels, rows, columns."""
    own = image_shape(model.trunk)
    if own is None and (channels := getattr(getattr(model.trunk, "config", None), "num_channels", None)):
        own = (channels, IMAGE_SIZE, IMAGE_SIZE)  # any size will do: transformers' ResNets name none
    if own is None:
        raise ValueError(f"{_name(model)} does not say which images it takes: it cannot be planned for")
    if asked is not None and asked < 1:
        raise ValueError(f"image_size={asked}, but it must be at least 1")
    return own if asked is None else (own[0], asked, asked)


def _labels(model: SideModel, rows: int, inputs: dict[str, Tensor]) -> Tensor:
    head, ids = model.settings.head, inputs.get("input_ids")
    tokens = 1 if ids is None else ids.shape[1]
    if head is not None:
        return head.blank_labels(rows, tokens)
    own = type(model.backbone).__name__
    if own.endswith("ForTokenClassification"):
        return torch.zeros(rows, tokens, dtype=torch.long)
    return torch.zeros((rows, 2) if gives_spans(model.backbone) else (rows,), dtype=torch.long)


def _name(model: SideModel) -> str:
    return type(model.backbone).__name__


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
