"""Embeddings: of texts, images and videos by the towers of a task of retrieval, and of texts by the bare backbone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn

from sidestep.backbone import device_of, is_encoder_decoder, trunk_of
from sidestep.backbone.frames import VIDEO_AXES, FrameProcessor
from sidestep.backbone.processors import tokenizer_of
from sidestep.data import Collate, DataError, Fields
from sidestep.data.pairs import looked_for, stacked
from sidestep.data.videos import VIDEOS, evenly, shape_of
from sidestep.kinds.base import Probabilities
from sidestep.messages import some
from sidestep.model.pair_model import PairModel
from sidestep.serve.cells import Row, cells_of
from sidestep.serve.forms import NOT_FINITE, PIXELS, Answer, Asking, Piece, Reading, pixels_of
from sidestep.serve.problems import Problem
from sidestep.tasks.bank import TaskBank

EMBEDDING = "embedding"
VIDEO_PIXELS = 10_000_000_000
"""Of all frames of a video, which are decoded. They are three minutes of 1920 x 1080 at 25 frames a second."""


@dataclass(eq=False)
class Embeddings(Reading):
    """Rows that become vectors of length one."""

    def run(
        self, bank: TaskBank, pieces: Sequence[Piece], tasks: Mapping[str, Asking], modes: Sequence[Probabilities]
    ) -> dict[str, list[Answer | Problem]]:
        """A vector for each row, task by task."""
        answers: dict[str, list[Answer | Problem]] = {}
        for name, task in tasks.items():
            with torch.inference_mode():
                found = self.embed(bank, name, [pieces[place].parts[0] for place in task.places])
            vectors = found.float().cpu().numpy()
            answers[name] = [{EMBEDDING: own.tolist()} if np.isfinite(own).all() else NOT_FINITE for own in vectors]
        return answers

    @abstractmethod
    def embed(self, bank: TaskBank, name: str, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """(rows, dim): of encoded rows."""

    def batch(self, bank: TaskBank, texts: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Texts as the model takes them, on the backbone's device."""
        batch, device = Collate(tokenizer_of(self.processor))(texts), device_of(bank.backbone)
        return {name: value.to(device) for name, value in batch.items() if name in self.takes}


@dataclass(eq=False)
class Pooled(Embeddings):
    """The mean of a text's last hidden states, over the tokens kept: what sentence encoders are trained to give."""

    def encode(self, cells: list[dict[str, Any]]) -> Sequence[Piece | Problem]:
        """Token ids."""
        return self.texts(cells)

    def embed(self, bank: TaskBank, name: str, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """(texts, width): of the bare backbone."""
        batch = self.batch(bank, rows)
        states = trunk_of(bank.deactivate())(**batch).last_hidden_state.float()
        keep = batch["attention_mask"][..., None].to(states.dtype)
        mean = (states * keep).sum(dim=1) / keep.sum(dim=1)
        return nn.functional.normalize(mean, dim=-1)


@dataclass(eq=False)
class Towers(Embeddings):
    """Texts and images, or texts and videos, by the two towers of a task of retrieval. A row is one of both.

    Attributes:
        max_images: of a pass. Each frame of a video is one.
    """

    max_images: int = 64

    def cells(self, row: Row) -> dict[str, Any]:
        """The one cell of a row."""
        medium, _ = looked_for(self.fields)
        if [*row] not in (["text"], [medium.field]):
            raise Problem(
                "bad-row",
                f"the row has {some(map(repr, row))}, and the task embeds rows of 'text' or of {medium.field!r}",
                "Give each row one of both",
            )
        return cells_of(row, Fields(**{field: field for field in row}))

    def encode(self, cells: list[dict[str, Any]]) -> Sequence[Piece | Problem]:
        """Token ids of texts, and pixels of images and of videos' frames."""
        texts = iter(self.texts([each for each in cells if "text" in each]))
        return [next(texts) if "text" in each else self._pixels(each) for each in cells]

    def _pixels(self, cells: dict[str, Any]) -> Piece:
        image = self.processor.image
        if "image" in cells:
            return Piece([{"pixel_values": pixels_of(cells["image"], image)}])
        processor = FrameProcessor.of(image)
        frames = frames_of(cells["video"], processor.frames)
        return Piece([{"pixel_values": torch.stack(list(processor(frames)["pixel_values"]))}])

    def embed(self, bank: TaskBank, name: str, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """(rows, dim): of texts together, and of images together."""
        model = bank.activate(name)
        assert isinstance(model, PairModel)
        parts: dict[bool, list[int]] = {True: [], False: []}
        for place, row in enumerate(rows):
            parts["input_ids" in row].append(place)
        embeds: list[torch.Tensor] = []
        if parts[True]:
            embeds.append(model(**self.batch(bank, [rows[place] for place in parts[True]])).text_embeds)
        for pixels in self._passes([rows[place]["pixel_values"] for place in parts[False]]):
            batch = {part: value.to(device_of(bank.backbone)) for part, value in stacked(pixels).items()}
            embeds.append(model(**batch).image_embeds)
        return torch.cat(embeds)[torch.tensor(parts[True] + parts[False]).argsort()]

    def _passes(self, pixels: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """As many images or videos as a pass has."""
        video = pixels and pixels[0].ndim == VIDEO_AXES
        step = max(1, self.max_images // max(map(len, pixels))) if video else self.max_images
        return (pixels[start : start + step] for start in range(0, len(pixels), step))


def frames_of(cell: dict[str, Any], count: int) -> list[PIL.Image.Image]:
    """Up to `count` frames of a video, if its header does not tell of too many pixels to decode.

    Raises:
        Problem: if it does.
        DataError: if it cannot be read.
    """
    try:
        frames, width, height = shape_of(cell)
    except VIDEOS.errors:
        frames = width = height = 0  # what is wrong is told by decoding
    if width * height > PIXELS or frames * width * height > VIDEO_PIXELS:
        raise Problem(
            "bad-row",
            f"the video has {frames} frames of {width} x {height} pixels",
            f"Send one of at most {VIDEO_PIXELS} pixels in all frames, and {PIXELS} in each",
        )
    found: list[PIL.Image.Image] = replace(VIDEOS, opened=partial(evenly, count=count)).decode(cell, None)
    return found


def check_pooled(backbone: nn.Module) -> None:
    """Refuse a backbone whose last hidden states are no vectors of its tokens.

    Raises:
        DataError: saying which model it is.
    """
    if getattr(trunk_of(backbone), "main_input_name", None) != "input_ids" or is_encoder_decoder(backbone):
        raise DataError(f"{type(backbone).__name__} is no encoder or decoder of texts alone")
