"""The smallest inputs that a bare model takes, made from its signature and its config.

Nothing here is known of one architecture. Where several forms of input are possible, the likeliest comes first, and
whoever calls tries them in turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sidestep.backbone.calls import argument_names
from sidestep.backbone.pixels import image_shape
from sidestep.backbone.trunk import device_of, positions

Inputs = dict[str, Any]
Side = Literal["left", "right"]

ROWS = 1
"""Of a batch of images or sounds."""
SHORT, LONG = 9, 11
"""Tokens of a text, without padding and with it."""
ORDINARY = 64
"""How many different tokens dummy texts are made of, at most."""
_SPECIAL = re.compile(r".*(token|pad|bos|eos|cls|sep|mask)_(id|ids|index)")
QUESTION = "qformer_input_ids"
"""The text that some models read a picture by (InstructBLIP)."""
PATCHES = "image_embeds"
"""A picture's patches as the blocks read them, which some models take in the place of its pixels."""
_CELLS = ((3, 5), (6, 10))
"""Patches along both sides of images that are smaller than those a model was made for."""
_SIDES = (112, 128, 160, 192, 240, 256, 288, 384)
"""Of images for timm models that were made for another size than their name says, and do not tell it."""
_BINS = ("num_mel_bins", "feature_size", "input_feat_per_channel", "mel_bins")
"""What configs call the channels of a spectrogram."""


@dataclass(frozen=True)
class Texts:
    """Makes token inputs of a model of texts.

    Attributes:
        tokens: (any,) ids of ordinary tokens.
        pad: the id of padding.
        names: what the model's forward takes.
        short, long: tokens of a text, without padding and with it.
        ids: the name of the token ids.
        also: what else the model wants, by name: makes a tensor for (rows, tokens).
        device: of the model.
    """

    tokens: Tensor
    pad: int
    names: tuple[str, ...]
    short: int
    long: int
    device: torch.device
    ids: str = "input_ids"
    also: dict[str, Callable[[int, int], Tensor]] = field(default_factory=dict)

    @property
    def has_mask(self) -> bool:
        """Whether padding can be masked."""
        return "attention_mask" in self.names

    def text(self, length: int, seed: int) -> Tensor:
        """(length,) ordinary tokens."""
        drawn = torch.randint(len(self.tokens), (length,), generator=torch.Generator().manual_seed(seed))
        return self.tokens[drawn]

    def changed(self, text: Tensor, position: int) -> Tensor:
        """The text with another token at a position."""
        other = text.clone()
        here = int((self.tokens == text[position]).nonzero()[0, 0])
        other[position] = self.tokens[(here + 1) % len(self.tokens)]
        return other

    def batch(
        self, rows: list[Tensor], sides: Sequence[Side] | None = None, *, decoder: list[Tensor] | None = None
    ) -> Inputs:
        """Texts as one batch with their mask, each padded on its side (None: all on the right)."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, (text, side) in enumerate(zip(rows, sides or ["right"] * len(rows), strict=True)):
            place = slice(longest - len(text), None) if side == "left" else slice(len(text))
            ids[row, place], mask[row, place] = text, 1
        inputs = {self.ids: ids}
        if self.has_mask:
            inputs["attention_mask"] = mask
        inputs |= {name: make(len(rows), longest) for name, make in self.also.items()}
        if decoder is not None:
            inputs["decoder_input_ids"] = torch.stack(decoder)
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}


def texts(trunk: nn.Module, model: Any) -> Iterator[Texts]:
    """Ways to give a model texts, or nothing where it reads no tokens.

    Args:
        trunk: whose forward is called.
        model: the trunk with its head, if it has one.
    """
    names = tuple(argument_names(trunk))
    ids = next((name for name in ("input_ids", "inputs") if name in names), None)
    if ids is None or not isinstance(trunk, PreTrainedModel):
        return
    most = min((limit for limit in positions(model) if limit is not None), default=LONG)
    long = min(LONG, most)
    tokens, pad = ordinary_tokens(trunk)
    plain = Texts(tokens, pad, names, max(2, long - (LONG - SHORT)), long, device_of(trunk), ids)
    if main_input(model) in (ids, None):
        yield plain
    boxes = {"bbox": lambda rows, length: torch.zeros(rows, length, 4, dtype=torch.long)}
    boxed = replace(plain, also=boxes)
    further = [boxed, *with_pictures(trunk, plain), *with_pictures(trunk, boxed)]
    yield from (one for one in further if set(one.also) <= set(names))


def with_pictures(trunk: Any, texts: Texts) -> Iterator[Texts]:
    """The same texts, each with a picture."""
    if "pixel_values" not in texts.names:
        return
    for image in _images(trunk):
        picture: dict[str, Any] = {
            "pixel_values": lambda rows, length, image=image: image[:1].expand(rows, *image.shape[1:])
        }
        if QUESTION in texts.names:
            picture[QUESTION] = lambda rows, length: texts.text(length, seed=5).expand(rows, -1)
        yield replace(texts, also={**texts.also, **picture})
    if {PATCHES, "pixel_mask"} <= set(texts.names):  # where how many patches there are depends on values (ViLT)
        patches: dict[str, Any] = {
            PATCHES: lambda rows, length: torch.zeros(rows, SHORT, trunk.config.hidden_size).to(_precision(trunk)),
            "pixel_mask": lambda rows, length: torch.ones(rows, SHORT, dtype=torch.long),
        }
        yield replace(texts, also={**texts.also, **patches})


def others(trunk: nn.Module, rows: int = ROWS) -> Iterator[Inputs]:
    """Batches of images or sounds, as the model's forward may take them."""
    names = argument_names(trunk)
    decoder = {}
    if "decoder_input_ids" in names and isinstance(trunk, PreTrainedModel):
        drawn = ordinary_tokens(trunk)[0]
        decoder = {"decoder_input_ids": drawn[torch.arange(SHORT) % len(drawn)].expand(rows, -1)}
    for given in _given(trunk, names, rows):
        both = {**given, **decoder}
        yield {name: v.to(device_of(trunk)) if isinstance(v, Tensor) else v for name, v in both.items()}


def _given(trunk: nn.Module, names: list[str], rows: int) -> Iterator[Inputs]:
    if not isinstance(trunk, PreTrainedModel):
        for image in _images(trunk, rows):
            yield {"x": image}
        return
    for image in _images(trunk, rows):
        for name in ("pixel_values", "inputs"):
            if name in names:
                # so that a few patches will do
                grows = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in names else {}
                yield {name: image, **grows}
        if "spatial_shapes" in names:
            yield _patches(image, _patch(trunk))
        if "pixel_values" in names:
            yield {"pixel_values": image[:, None].expand(-1, _field(trunk.config, "num_frames") or 2, -1, -1, -1)}
    for name, sound in _sounds(trunk, rows):
        if name in names:
            mask = {"attention_mask": torch.ones(sound.shape[:2], dtype=torch.long)} if sound.ndim < 4 else {}
            yield {name: sound, **(mask if "attention_mask" in names else {})}
            yield {name: sound}


def _patches(image: Tensor, size: int) -> Inputs:
    """The form of models that take pictures of any shape: (rows, patches, values of a patch), and how they stand."""
    rows, (high, wide) = len(image), (image.shape[-2] // size, image.shape[-1] // size)
    flat = nn.functional.unfold(image, size, stride=size).transpose(1, 2)
    mask = torch.ones(rows, high * wide, dtype=torch.long)
    return {"pixel_values": flat, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[high, wide]] * rows)}


def _images(trunk: Any, rows: int = ROWS) -> Iterator[Tensor]:
    """Images of a few patches, which not every model takes. Then images of the size that the model was made for."""
    own = _image_shape(trunk)
    channels = own[0] if own is not None else _channels(trunk)
    patch = _patch(trunk)
    rows_columns = (224, 224) if own is None else own[1:]
    small = [(high * patch, wide * patch) for high, wide in _CELLS]
    sizes = [*(size for size in small if own is None or prod(size) < prod(rows_columns)), rows_columns]
    if not isinstance(trunk, PreTrainedModel):
        sizes += [(side, side) for side in _SIDES]
    draw = torch.Generator().manual_seed(0)
    for high, wide in sizes:
        yield torch.randn(rows, channels, high, wide, generator=draw).to(_precision(trunk))


def _image_shape(trunk: Any) -> tuple[int, int, int] | None:
    """Channels, rows and columns of a model's images, also where a part of it or of its config says so."""
    with suppress(AttributeError, KeyError, TypeError):
        if (said := image_shape(trunk)) is not None:
            return said
    config = getattr(trunk, "config", None)
    own = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    side = _field(config, "image_size") or _field(config, "input_size") or own
    if side is None:
        return None
    rows, columns = (side, side) if isinstance(side, int) else side[-2:]
    return _channels(trunk), rows, columns


def _channels(trunk: nn.Module) -> int:
    """Of images: what the first convolution takes."""
    first = next((module for module in trunk.modules() if isinstance(module, nn.Conv2d)), None)
    return _field(getattr(trunk, "config", None), "num_channels") or (3 if first is None else first.in_channels)


def _patch(trunk: Any) -> int:
    size = _field(getattr(trunk, "config", None), "patch_size")
    if size is None:
        size = getattr(getattr(trunk, "patch_embed", None), "patch_size", None)
    size = max(size) if isinstance(size, list | tuple) and size and all(isinstance(n, int) for n in size) else size
    # a stem that says nothing halves the sides five times at most
    return size if isinstance(size, int) and size > 0 else 32


def _sounds(trunk: Any, rows: int) -> Iterator[tuple[str, Tensor]]:
    """Waves, and spectrograms with the channels last or in front."""
    config = trunk.config
    bins = next((n for name in _BINS if (n := _field(config, name))), 80)
    frames = 2 * (_field(config, "max_source_positions") or 64)
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(rows, *shape, generator=draw).to(_precision(trunk))

    for samples in (4000, 16000):
        yield "input_values", noise(samples)
    yield "input_values", noise(_field(config, "max_length") or 64, bins)
    yield "input_values", noise(1, 16000)
    yield "input_features", noise(64, bins)
    yield "input_features", noise(bins, frames)
    yield "input_features", noise(160, 2 * bins)


def ordinary_tokens(trunk: Any) -> tuple[Tensor, int]:
    """Ids of tokens that stand for words, and the id of padding."""
    config = trunk.config.get_text_config()
    special = {*_ids(trunk.config), *_ids(config)}
    words = [number for number in range(_vocabulary(trunk, config)) if number not in special] or [0]
    # from the middle: rare ids at both ends may have a meaning that no config tells
    first = max(0, (len(words) - ORDINARY) // 2)
    pad = getattr(config, "pad_token_id", None)
    return torch.tensor(words[first : first + ORDINARY]), pad if isinstance(pad, int) and pad >= 0 else 0


def _vocabulary(trunk: Any, config: Any) -> int:
    try:
        table = trunk.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # so transformers says that a model has no table of tokens
        table = None
    rows = table.num_embeddings if isinstance(table, nn.Embedding) else None
    return min(filter(None, (rows, getattr(config, "vocab_size", None))), default=32)


def _ids(config: PreTrainedConfig) -> Iterator[int]:
    """Every id of a special token that a config names."""
    for name, value in vars(config).items():
        if _SPECIAL.fullmatch(name):
            yield from (n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, int))


def _field(config: Any, name: str) -> Any:
    """A field of a config or of a part of it, that for images first, or None where none has it."""
    others = [part for part in vars(config).values() if isinstance(part, PreTrainedConfig)] if config else []
    for part in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None), *others):
        if (value := getattr(part, name, None)) is not None:
            return value
    return None


def main_input(model: Any) -> str | None:
    """The name of a Hugging Face model's first input."""
    return getattr(model, "main_input_name", None)


def _precision(module: nn.Module) -> torch.dtype:
    """Of the first floating-point weights."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point() and p.itemsize > 1), torch.float32)
