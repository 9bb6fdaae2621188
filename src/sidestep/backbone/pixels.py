"""Images as the pixel values that a backbone reads: resizing and normalisation as plain data, stored with a task."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Resize = Literal["squash", "crop"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
Channels = tuple[float, float, float]

IMAGE_TRANSFORM = "image_transform.json"
NORMALIZATIONS: Mapping[str, tuple[Channels, Channels]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Mean and standard deviation of the channels, by name."""
SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose grey values Pillow scales to 16 bits where it gives them as numbers of 32 (mode "I")."""
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0
"""Tags of a TIFF file, and what the second may say."""
SAME = 0.002
"""Mean difference of smooth images, in steps of their range, below which two ways to resize are the same way."""


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Resize, cut out the centre, normalise: under the interface of an image processor.

    Attributes:
        size: (rows, columns) of what the backbone reads, or one number for both.
        resize: "squash" brings both sides to `resize_to`, whatever the image's shape. "crop" brings the shorter side to
            it and keeps the shape. Then the centre of `size` is cut out, if that is less.
        resize_to: at least `size`, in one number or (rows, columns), with "crop" one number. None: `size` itself.
        interpolation: as Pillow names it.
        mean, std: of the three channels, whose values lie between 0 and 1 before.

    Raises:
        ValueError: if a value is out of range.
    """

    size: int | tuple[int, int]
    resize: Resize = "squash"
    resize_to: int | tuple[int, int] | None = None
    interpolation: Interpolation = "bicubic"
    mean: Channels = NORMALIZATIONS["imagenet"][0]
    std: Channels = NORMALIZATIONS["imagenet"][1]

    def __post_init__(self) -> None:
        self._require("size", _is_size(self.size), "a whole number above 0, or two of them (rows, columns)")
        self._require("resize", self.resize in get_args(Resize), "squash or crop")
        given = self.resize_to
        if given is not None:
            allowed = _is_size(given) and not (self.resize == "crop" and isinstance(given, tuple))
            enough = allowed and all(map(int.__ge__, _pair(given), self._needed()))
            self._require("resize_to", enough, f"at least the size {self.size}; with resize='crop' one number")
        self._require("interpolation", self.interpolation in get_args(Interpolation), _or(get_args(Interpolation)))
        self._require("mean", _are_channels(self.mean), "three numbers")
        self._require("std", _are_channels(self.std) and min(self.std) > 0, "three numbers above 0")

    def _require(self, name: str, allowed: bool, what: str) -> None:
        if not allowed:
            raise ValueError(f"{name}={getattr(self, name)!r} of an image transform, but it must be {what}")

    def _needed(self) -> tuple[int, int]:
        """The least sides before the cut: a shorter side has to hold the longer one of the cut."""
        rows, columns = self.shape
        return (max(rows, columns),) * 2 if self.resize == "crop" else (rows, columns)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of what the backbone reads."""
        return _pair(self.size)

    @property
    def resized(self) -> tuple[int, int]:
        """What "squash" resizes to (rows, columns), or with "crop" twice the shorter side."""
        return self._needed() if self.resize_to is None else _pair(self.resize_to)

    def with_size(self, size: int | tuple[int, int]) -> ImageTransform:
        """The same for another size, with margins cut off in proportion."""
        if self.resize_to is None:
            return replace(self, size=size)
        at_size = replace(self, size=size, resize_to=None)
        shares = zip(self.resized, self._needed(), at_size._needed(), strict=True)
        rows, columns = (round(new * before / old) for before, old, new in shares)
        return replace(at_size, resize_to=rows if rows == columns else (rows, columns))

    @classmethod
    def of(cls, processor: Any) -> ImageTransform:
        """What a Hugging Face or timm image processor does.

        Raises:
            ValueError: for a tokenizer, and for a processor that does not just resize, crop and normalise. This is
                found by comparing both on two images.
        """
        if isinstance(processor, cls):
            return processor
        name = type(processor).__name__
        if isinstance(processor, PreTrainedTokenizerBase):
            raise ValueError(f"the backbone reads text ({name}): size and normalisation are for backbones of images")
        try:
            values = processor.to_dict()
            found = cls(**(_of_timm(values) if "input_size" in values else _of_transformers(values)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(_cannot_change(name)) from error
        if not found._does_what(processor):
            raise ValueError(_cannot_change(name))
        return found

    def _does_what(self, processor: Any) -> bool:
        """Whether a processor gives the same on images that are too smooth for rounding and filters to matter."""
        rows, columns = self.resized
        for shape in ((rows, 2 * columns), (3 * rows, columns)):
            image = _smooth(*shape)
            found, given = (read(images=[image], return_tensors="pt")["pixel_values"][0] for read in (self, processor))
            if found.shape != given.shape or (found - given).abs().mean() * min(self.std) > SAME:
                return False
        return True

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ImageTransform:
        """The transform with these fields, lists in the place of tuples allowed.

        Raises:
            ValueError: if a field is missing, unknown or out of range.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(values.keys() - set(known)):
            raise ValueError(f"an image transform has no field {', '.join(unknown)}: it has {', '.join(known)}")
        if "size" not in values:
            raise ValueError("an image transform needs a size")
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**plain)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageTransform:
        """The transform that `save_pretrained` wrote.

        Raises:
            ValueError, OSError: if the file cannot be read.
        """
        return cls.from_dict(json.loads((Path(folder) / IMAGE_TRANSFORM).read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the fields to a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(folder) / IMAGE_TRANSFORM).write_text(text, encoding="utf-8")

    def __call__(self, images: Any, return_tensors: str = "pt") -> dict[str, Tensor]:
        """{"pixel_values": (images, 3, rows, columns)} of one PIL image or a sequence of them."""
        several = images if isinstance(images, Sequence) else [images]
        prepare = _pipeline(self)
        return {"pixel_values": torch.stack([prepare(to_rgb(image)) for image in several])}

    def steps(self) -> list[Any]:
        """The steps from an RGB image to normalised channels."""
        v2 = import_transforms()
        sides = [self.resized[0]] if self.resize == "crop" else list(self.resized)
        resize = v2.Resize(sides, interpolation=v2.InterpolationMode(self.interpolation))
        return [resize, v2.CenterCrop(list(self.shape)), *self.finish()]

    def finish(self) -> list[Any]:
        """The steps from an RGB image of the right size to normalised channels."""
        v2 = import_transforms()
        to_shares = v2.ToDtype(torch.float32, scale=True)
        return [v2.PILToTensor(), to_shares, v2.Normalize(mean=list(self.mean), std=list(self.std))]


def adjusted(processor: Any, *, size: int | None = None, normalize: str | None = None) -> Any:
    """The processor, or what it does with another size or normalisation.

    Args:
        processor: of the backbone.
        size: rows and columns of the images. None: the processor's.
        normalize: a name of `NORMALIZATIONS`. None: the processor's.

    Raises:
        ValueError: if the processor cannot be changed so, or there is no such normalisation.
    """
    if size is None and normalize is None:
        return processor
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize={normalize!r}: choose {_or(tuple(NORMALIZATIONS))}")
    found = ImageTransform.of(processor)
    if size is not None:
        found = found.with_size(size)
    if normalize is not None:
        mean, std = NORMALIZATIONS[normalize]
        found = replace(found, mean=mean, std=std)
    return found


def image_shape(trunk: Any) -> tuple[int, int, int] | None:
    """Channels, rows and columns of the images that a model was made for, or None if it does not say."""
    config = getattr(trunk, "config", None)
    if config is None:
        channels, *own = trunk.pretrained_cfg["input_size"]
        with suppress(AttributeError):
            own = trunk.patch_embed.img_size
    else:
        channels, own = getattr(config, "num_channels", 3), getattr(config, "image_size", None)
    if own is None:
        return None
    rows, columns = (own, own) if isinstance(own, int) else own
    return channels, rows, columns


def to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """The image in RGB, 8 bits a channel.

    Grey values of 16 bits (of 12 in a TIFF file) are scaled to 8. What is transparent has the colour that is stored.

    Raises:
        ValueError: for grey values of 32 bits, whole or decimal: the file does not say which of them is white.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS):
        return _scaled(image)
    if image.mode in ("I", "F"):
        kind = "whole" if image.mode == "I" else "decimal"
        raise ValueError(
            f"its mode {image.mode!r} holds {kind} numbers of 32 bits, and the file does not say which of them is "
            "white. Save it with 8 or 16 bits"
        )
    if image.mode == "La":
        image = image.convert("LA")
    # by way of RGBA, as Pillow warns of colours with several degrees of transparency
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _scaled(image: PIL.Image.Image) -> PIL.Image.Image:
    """Grey values of 16 or fewer bits as RGB.

    Pillow would clip the values at 255 and leave a white image.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    values = np.asarray(image)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = 2**bits - 1 - values
    found = PIL.Image.fromarray((values >> (bits - 8)).astype(np.uint8)).convert("RGB")
    found.info = dict(image.info)  # how the camera was held, for one
    return found


def check_image_size(backbone: nn.Module, trunk: nn.Module, pixels: Tensor) -> None:
    """Refuses images of a size that a backbone cannot take: one is tried, unless it was made for that size.

    Args:
        backbone: as it is called, on its device.
        trunk: of the backbone. It says what size it was made for.
        pixels: (channels, rows, columns).

    Raises:
        ValueError: with the size and the backbone's own.
    """
    shape = image_shape(trunk)
    if pixels.shape == shape:
        return
    parameter = next(backbone.parameters())
    batch = pixels[None].to(parameter.device, parameter.dtype)
    try:
        with torch.inference_mode():
            backbone(pixel_values=batch) if isinstance(backbone, PreTrainedModel) else backbone(batch)
    except torch.OutOfMemoryError:
        raise
    # timm asserts, transformers raises, and torch says which shapes do not fit
    except (ValueError, AssertionError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        own = "" if shape is None else f"; it was made for {_times(shape)} (--image-size {shape[1]})"
        raise ValueError(
            f"{type(trunk).__name__} cannot take images of {_times(pixels.shape)} (channels x rows x columns){own}. "
            f"It says: {reason}. Give images of its size, or choose a backbone for yours"
        ) from error


def import_transforms() -> ModuleType:
    """torchvision's transforms.

    Raises:
        ModuleNotFoundError: if torchvision is not installed, or not built for the installed torch.
    """
    try:
        from torchvision.transforms import v2
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ModuleNotFoundError(
            f"torchvision cannot be imported ({reason}): install the extra with pip install 'sidestep[vision]'. It has "
            f"to be built for torch {torch.__version__}"
        ) from error
    return v2


@lru_cache(maxsize=8)
def _pipeline(transform: ImageTransform) -> Any:
    return import_transforms().Compose(transform.steps())


def _of_transformers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Hugging Face image processor, from its own, with a KeyError where it lacks one."""
    mean, std = values["image_mean"], values["image_std"]
    size, cut = dict(values["size"]), dict(values.get("crop_size") or {})
    squash = "height" in size
    resized = (size["height"], size["width"]) if squash else (size["shortest_edge"],) * 2
    final = (cut["height"], cut["width"]) if values.get("do_center_crop") else resized
    return {
        "size": _single(final),
        "resize": "squash" if squash else "crop",
        "resize_to": None if resized == final else _single(resized),
        "interpolation": PIL.Image.Resampling(values["resample"]).name.lower(),
        "mean": tuple(mean),
        "std": tuple(std),
    }


def _of_timm(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `TimmProcessor`."""
    final = tuple(values["input_size"][1:])
    resized = tuple(math.floor(side / values["crop_pct"]) for side in final)
    squash = values["crop_mode"] == "squash"
    return {
        "size": _single(final),
        "resize": "squash" if squash else "crop",
        "resize_to": None if resized == final else _single(resized),
        "interpolation": values["interpolation"],
        "mean": values["mean"],
        "std": values["std"],
    }


def _cannot_change(name: str) -> str:
    return (
        f"{name} does not just resize, crop and normalise, so its size and normalisation cannot be changed and its "
        "images not be augmented: leave these options out, or give a sidestep.data.ImageTransform as the processor"
    )


def _smooth(rows: int, columns: int) -> PIL.Image.Image:
    """A ramp of grey from one corner to the other."""
    down, across = torch.linspace(0, 1, rows)[:, None], torch.linspace(0, 1, columns)
    grey = ((down + across) * 127.5).round().to(torch.uint8)
    return PIL.Image.fromarray(grey.numpy()).convert("RGB")


def _is_size(size: Any) -> bool:
    sides = size if isinstance(size, tuple) and len(size) == 2 else (size,)
    return all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _single(sides: tuple[int, ...]) -> int | tuple[int, ...]:
    return sides[0] if len(set(sides)) == 1 else sides


def _are_channels(values: Any) -> bool:
    return isinstance(values, tuple) and len(values) == 3 and all(math.isfinite(value) for value in values)


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
