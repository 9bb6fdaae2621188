"""Batches that a bare model takes: texts, images, sounds and texts about them, in the forms that models ask for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

import sidestep as ss
from sidestep.backbone import trunk_of
from sweep.build import SMALL_IMAGE
from sweep.catalogue import Group
from sweep.configs import ORDINARY

Batch = dict[str, Tensor]
ROWS, TOKENS, TARGETS, PADDING = 3, 10, 5, 2
"""Rows, tokens of a text, tokens that a decoder reads, and how many tokens of the last text are padding."""
CELLS = 4
"""Patches along each side of an image that is given in patches."""
IMAGE_COUNTS = (4, 16, 17, 1)
"""How many tokens may stand for an image, where the model does not say."""
IMAGE_IDS = ("image_token_id", "image_token_index", "media_placeholder_token_id")
PARTS = ("vision_config", "backbone_config", "audio_config", "encoder", "encoder_config")
"""Where a config has its parts for images and sounds."""


class NoBatch(Exception):
    """A model took none of the batches that were tried. The message says what it raised."""


def runnable(model: nn.Module, group: Group, first: Batch | None = None) -> Batch:
    """A batch that the bare model takes and gives finite numbers for.

    Args:
        model: with its head, or the trunk alone.
        group: of its type.
        first: a batch that is tried before the others.

    Raises:
        NoBatch: if the model takes none.
    """
    errors: dict[str, None] = {}
    for given in [*([] if first is None else [first]), *_candidates(model, group)]:
        batch = {name: tensor for name, tensor in given.items() if _takes(model, name)}
        try:
            out = tensors(call(model, batch))
        except Exception as error:  # models have many ways to say that an input is not theirs
            errors[f"{type(error).__name__}: {re.sub(r'[0-9]+', 'n', ' '.join(str(error).split())[:120])}"] = None
            continue
        if out and (not out[0].is_floating_point() or out[0].isfinite().all()):
            return batch
        errors["outputs are not finite"] = None
    raise NoBatch(" | ".join(list(errors)[:7]))


@torch.no_grad()
def call(model: Any, batch: Batch) -> Any:
    """What a model, bare or attached, gives for a batch, without a cache."""
    backbone = model.backbone if isinstance(model, ss.SideModel) else model
    if not isinstance(backbone, PreTrainedModel):
        return model(*batch.values())
    bare = not (isinstance(model, ss.SideModel) and model.head is not None)
    return model(**batch, **({"use_cache": False} if bare and "use_cache" in _arguments(backbone) else {}))


def tensors(output: Any) -> list[Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def _arguments(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(model).forward).parameters)


def _takes(model: nn.Module, name: str) -> bool:
    return not isinstance(model, PreTrainedModel) or name in _arguments(model)


# --- what is tried ----------------------------------------------------------------------------------------------------


def _candidates(model: Any, group: Group) -> Iterator[Batch]:
    """Batches without labels, the likeliest first."""
    if group == "timm":
        for side in (SMALL_IMAGE, model.default_cfg["input_size"][-1]):
            yield {"pixel_values": _noise(ROWS, 3, side, side)}
        return
    config, arguments = model.config, _arguments(model)
    words = text(config.get_text_config())
    target = {"decoder_input_ids": words["input_ids"][:, :TARGETS].clone()} if "decoder_input_ids" in arguments else {}
    if group in ("causal", "encoder", "seq2seq"):
        yield from ({**batch, **target} for batch in _texts(words, config))
    if group == "vision":
        yield from _images(config)
        yield {"inputs": next(_images(config))["pixel_values"]}
        yield {"input_ids": torch.randint(0, max(ORDINARY), (ROWS, 16), generator=_random())}
        yield from ({**words, **image} for image in _images(config))
    if group == "audio" or hasattr(config, "audio_config"):
        for sound in _sounds(config):
            yield {**sound, **target}
            if "input_ids" in arguments:
                yield {**sound, **words}
    if group == "vlm":
        yield from ({**batch, **target} for batch in _texts_about_images(model, words))


def text(config: PreTrainedConfig, placeholders: int = 0, placeholder: int = 0) -> Batch:
    """Token ids and a mask. The last row is padded on the right.

    Args:
        config: of the part that reads the text.
        placeholders: how many tokens behind the first one stand for an image.
        placeholder: their id.
    """
    ids = torch.randint(ORDINARY.start, ORDINARY.stop, (ROWS, TOKENS + placeholders), generator=_random())
    ids[:, 1 : 1 + placeholders] = placeholder
    mask = torch.ones_like(ids)
    mask[-1, -PADDING:], ids[-1, -PADDING:] = 0, pad_id(config)
    return {"input_ids": ids, "attention_mask": mask}


def pad_id(config: PreTrainedConfig) -> int:
    """The id of padding, or 0 where a config names none."""
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) and pad >= 0 else 0


def _texts(words: Batch, config: PreTrainedConfig) -> Iterator[Batch]:
    """Texts, also with a place on a page for each word, and with a picture of that page."""
    yield words
    placed = {**words, "bbox": torch.zeros(*words["input_ids"].shape, 4, dtype=torch.long)}
    yield placed
    yield from ({**placed, **image} for image in _images(config))
    yield {"inputs": words["input_ids"], "attention_mask": words["attention_mask"]}


def _texts_about_images(model: Any, words: Batch) -> Iterator[Batch]:
    config = model.config
    named = (getattr(config, name, None) for name in IMAGE_IDS)
    image_id: Any = next((found for found in named if isinstance(found, int)), None)
    for image in _images(config) if image_id is not None else ():
        for count in _image_counts(model, image):
            joined = text(config.get_text_config(), count, image_id)
            types = joined["input_ids"].eq(image_id).long()
            yield {
                **joined,
                **image,
                "mm_token_type_ids": types,
                "token_type_ids": types,
                "image_embeds_position_mask": types,
                "qformer_input_ids": words["input_ids"],
            }
    yield from ({**words, **image} for image in _images(config))
    yield from _texts(words, config)


def _image_counts(model: Any, image: Batch) -> tuple[int, ...]:
    """How many tokens an image makes, as the model itself has it, or guesses where it has no such method."""
    for owner in (model, trunk_of(model)):
        if (take := getattr(owner, "get_image_features", None)) is None:
            continue
        given = {n: tensor for n, tensor in image.items() if n in inspect.signature(take).parameters}
        try:
            with torch.no_grad():
                found = take(**given)
        except Exception:  # an image of another form
            continue
        features = found.pooler_output if isinstance(found, ModelOutput) else found
        return (sum(part.flatten(0, -2).shape[0] for part in tensors(features)) // ROWS,)
    return IMAGE_COUNTS


def _images(config: PreTrainedConfig) -> Iterator[Batch]:
    """Images as they are, in patches, as tiles, with masks and as videos."""
    size = _field(config, "image_size", "img_size") or 64
    high, wide = size if isinstance(size, list | tuple) else (size, size)
    channels = _field(config, "num_channels", "in_channels", "in_chans") or 3
    patch = _field(config, "patch_size", "spatial_patch_size") or 8
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    frames = _field(config, "temporal_patch_size") or 1
    image, sizes = _noise(ROWS, channels, high, wide), torch.tensor([[high, wide]] * ROWS)
    grid = torch.tensor([[CELLS, CELLS]] * ROWS)
    patches = _noise(ROWS, CELLS * CELLS, channels * patch * patch)
    several = _noise(ROWS * CELLS * CELLS, channels * frames * patch * patch)
    yield {"pixel_values": image}
    yield {"pixel_values": several, "image_grid_thw": nn.functional.pad(grid, (1, 0), value=1)}
    yield {"pixel_values": image[:, None], "image_sizes": sizes}
    yield {"pixel_values": image, "image_sizes": sizes}
    yield {"pixel_values": image[:, None], "pixel_attention_mask": torch.ones(ROWS, 1, high, wide, dtype=torch.long)}
    yield {"pixel_values": image[:, None]}
    yield {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(patches.shape[:2], dtype=torch.long),
        "spatial_shapes": grid,
    }
    yield {"pixel_values": image, "pixel_mask": torch.ones(ROWS, high, wide, dtype=torch.long)}
    video = _noise(ROWS, _field(config, "num_frames") or 2, channels, high, wide)
    yield {"pixel_values": video}
    yield {"pixel_values_videos": video}


def _sounds(config: PreTrainedConfig) -> Iterator[Batch]:
    """Waves, and spectrograms with the channels last or in front."""
    bins = _field(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "mel_bins") or 80
    frames = _field(config, "max_source_positions")
    yield {"input_values": _noise(ROWS, 6000), "attention_mask": torch.ones(ROWS, 6000, dtype=torch.long)}
    yield {"input_features": _noise(ROWS, bins, 2 * (frames or 64))}
    for length in (64, 2 * (frames or 64)):
        mask = torch.ones(ROWS, length, dtype=torch.long)
        yield {"input_features": _noise(ROWS, length, bins), "attention_mask": mask}
    yield {"input_values": _noise(ROWS, _field(config, "max_length") or 64, bins)}
    yield {"input_values": _noise(ROWS, 1, 6000)}
    yield {"input_features": _noise(ROWS, 160, 2 * bins)}


def _field(config: PreTrainedConfig, *names: str) -> Any:
    """The first of these fields that a config, or one of its parts for images and sounds, has."""
    parts = [config, *(part for name in PARTS if (part := getattr(config, name, None)) is not None)]
    found = (getattr(part, name, None) for name in names for part in parts)
    return next((value for value in found if value is not None), None)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_random())


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(1)
