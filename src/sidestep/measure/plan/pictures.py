"""A picture beside each text of a plan: the row that its processor makes, and a pass that looks at no values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor
from transformers.utils import ModelOutput

from sidestep.backbone.fakes import unlogged
from sidestep.backbone.processors import load_processor
from sidestep.backbone.source import LoadError
from sidestep.backbone.trunk import reads_mixed
from sidestep.backbone.vision_language import VisionLanguageProcessor
from sidestep.model.attach import Attached

Batch = Mapping[str, Tensor]
Prepare = Callable[[Batch], tuple[Batch, Any]]
"""Makes of a batch what a model is given, and what it holds besides until its pass is over."""

TEXT = "a"
"""The text beside the picture of a row, which is then as long as it is wanted."""


@dataclass(frozen=True)
class Picture:
    """A row of a blank picture and a text.

    Attributes:
        tokens: by name, one number for each token of the row: ids, and types.
        text: how many of them are of the text alone.
        pixels: what the model reads of the picture, for one row.
    """

    tokens: Mapping[str, list[int]]
    text: int
    pixels: Mapping[str, Tensor]

    def batch(self, rows: int, length: int) -> dict[str, Tensor]:
        """So many rows on the default device, with texts of so many tokens. The last one ends in padding."""
        longer = {name: [*values, *values[-1:] * (length - self.text)] for name, values in self.tokens.items()}
        inputs = {name: torch.tensor([values]).repeat(rows, 1) for name, values in longer.items()}
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][-1, -1] = 0
        place = torch.get_default_device()
        pixels = {name: one.to(place).repeat(rows, *[1] * (one.ndim - 1)) for name, one in self.pixels.items()}
        return {**inputs, **pixels}


def picture_of(name: Any, revision: str | None, side: int) -> Picture | None:
    """The row of a vision-language backbone of this name, with a picture of so many rows and columns.

    None if there is no processor of its pictures.
    """
    if not isinstance(name, str | Path):
        return None
    with torch.device("cpu"):  # what a processor makes has values, also where the model has none
        try:
            processor = load_processor(name, revision=revision, pictures=True)
        except LoadError:
            return None
        if not isinstance(processor, VisionLanguageProcessor):
            return None
        blank = PIL.Image.new("RGB", (side, side))
        text = len(processor.text(TEXT, add_special_tokens=False)["input_ids"])
        return Picture(processor.tokens(TEXT, blank), text, processor.pixels([blank]))


def is_pictured(model: Attached, batch: Batch) -> bool:
    """Whether a batch has pictures among the tokens of its texts."""
    return reads_mixed(model.parts[0].trunk) and "input_ids" in batch and bool(_pixels(batch))


def without_values(model: Attached, batch: Batch) -> Prepare | None:
    """What makes of a batch of fake tensors one in which nothing depends on values. None: nothing has to be done."""
    if not is_pictured(model, batch):
        return None
    try:
        with torch.no_grad(), unlogged():
            embedded(model, batch)
    except Exception:  # whatever a tower raises that looks at values
        return without_pictures
    return partial(embedded, model)


def embedded(model: Attached, batch: Batch) -> tuple[Batch, Any]:
    """A batch with the pictures' tokens among the embeddings of its texts, and the pictures alone.

    A vision-language model puts them there itself, but looks at values first.

    Raises:
        Exception: whatever the tower of the pictures raises, for example if it looks at values too.
    """
    trunk: Any = model.parts[0].trunk
    taken = inspect.signature(trunk.get_image_features).parameters
    found = trunk.get_image_features(**{name: tensor for name, tensor in batch.items() if name in taken})
    pictures = found.pooler_output if isinstance(found, ModelOutput) else found
    parts = [pictures] if isinstance(pictures, Tensor) else list(pictures)
    texts = trunk.get_input_embeddings()(batch["input_ids"])
    places = batch["input_ids"].bool()[..., None].expand_as(texts)
    made = texts.masked_scatter(places, torch.cat([part.flatten(0, -2) for part in parts]).to(texts.dtype))
    others = {name: batch[name] for name in ("attention_mask", "labels") if name in batch}
    return {"inputs_embeds": made, **others}, pictures


def without_pictures(batch: Batch) -> tuple[Batch, None]:
    """A batch with the pictures' tokens as if they were words."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "labels") if name in batch}, None


def _pixels(batch: Batch) -> list[Tensor]:
    return [tensor for name, tensor in batch.items() if name != "labels" and tensor.is_floating_point()]
