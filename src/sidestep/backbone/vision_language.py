"""A picture and a text as the row of tokens and pixels that a model of both reads.

transformers' own processor makes both. Nothing here is known of one architecture: which tensors belong to the picture
is found by looking. They are the same beside any text. A picture stands among the tokens of its text (LLaVA), or beside
them (ViLT).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor
from transformers import ProcessorMixin

from sidestep.backbone.source import LoadError

PROBES = ("a", "a a a a")
"""Two texts that are read beside the same picture, to see what depends on the text."""
PROBED = 64
"""Rows and columns of that picture."""
EDGED, EDGE = (640, 400), 8
"""Columns and rows of a picture whose edges are looked for, and the width of an edge: 2 % of the shorter side."""
LABELS = "labels"
"""What a processor gives that tells prompts from answers by the types of tokens (PaliGemma's)."""


class Parts(NamedTuple):
    """What a processor gives for a row.

    Attributes:
        types: by name, what it gives for each token besides ids and mask: the value that an answer's tokens have.
        picture: the names of the tensors that are the picture's.
        closes: whether something stands behind the text of a row, such as the end of a chat's turn.
    """

    types: Mapping[str, int]
    picture: tuple[str, ...]
    closes: bool


@dataclass(frozen=True)
class PicturedProcessor(ABC):
    """What pictures and texts are read with, one of both a row.

    Attributes:
        whole: transformers' processor, with a tokenizer and an image processor.
    """

    whole: Any

    @property
    def name(self) -> str:
        """The class of transformers' processor."""
        return type(self.whole).__name__

    @property
    def text(self) -> Any:
        """The tokenizer."""
        return self.whole.tokenizer

    @property
    def pad_token_id(self) -> int | None:
        """The tokenizer's."""
        return self.text.pad_token_id

    @abstractmethod
    def pixels(self, pictures: Sequence[PIL.Image.Image]) -> dict[str, Tensor]:
        """What a model reads of the pictures of a batch, such as their pixels and the shapes of their grids."""

    def __call__(self, images: Sequence[PIL.Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        """The same under the interface of an image processor."""
        return self.pixels(images)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write transformers' processor to a folder."""
        self.whole.save_pretrained(str(folder))


@dataclass(frozen=True)
class VisionLanguageProcessor(PicturedProcessor):
    """Reads one picture in front of each text, among whose tokens it stands.

    A chat template is used where the processor has one, with picture and text as one turn of the user.

    Attributes:
        parts: what it gives for a row.
    """

    parts: Parts

    @classmethod
    def of(cls, whole: Any) -> VisionLanguageProcessor:
        """The processor, if it reads pictures among texts.

        Raises:
            LoadError: if it does not, or its chat template does not place one picture. Also if it gives something that
                is neither the picture's nor one number for each token.
        """
        if not isinstance(whole, ProcessorMixin) or not isinstance(getattr(whole, "image_token", None), str):
            raise LoadError(_reads_none(whole))
        return cls(whole, _parts(whole))

    @property
    def placeholders(self) -> tuple[str, ...]:
        """The texts that stand for a picture or a part of it, first the one that is put into a text."""
        parts = self.text.convert_ids_to_tokens([each for each in self.whole.image_token_ids if each is not None])
        return tuple(dict.fromkeys((self.whole.image_token, *parts)))

    def tokens(self, text: str, picture: PIL.Image.Image) -> dict[str, list[int]]:
        """The ids of a row's tokens, the picture's among them, as "input_ids", with their types.

        Raises:
            ValueError: what transformers raises for a picture that cannot be read beside the text.
        """
        row = _read(self.whole, text, picture)
        return {name: row[name][0].tolist() for name in ("input_ids", *self.parts.types)}

    def pixels(self, pictures: Sequence[PIL.Image.Image]) -> dict[str, Tensor]:
        """What a model reads of the pictures of a batch, such as their pixels and the shapes of their grids."""
        bare = [self.whole.image_token] * len(pictures)
        found = self.whole(text=bare, images=[[one] for one in pictures], padding=True, return_tensors="pt")
        return {name: found[name] for name in self.parts.picture}


@dataclass(frozen=True)
class SideBySideProcessor(PicturedProcessor):
    """Reads a picture beside each text: the tokens are the tokenizer's, as without a picture.

    Attributes:
        picture: the names of the tensors that are the picture's.
    """

    picture: tuple[str, ...]

    @classmethod
    def of(cls, whole: Any) -> SideBySideProcessor:
        """The processor, if it gives the tokens of a text and the pixels of a picture each for itself.

        Raises:
            LoadError: if it does not.
        """
        texts, picture = PROBES, PIL.Image.new("RGB", (PROBED, PROBED))
        try:
            short, long = (dict(whole(text=[text], images=[picture], return_tensors="pt")) for text in texts)
            own = [whole.tokenizer(text)["input_ids"] for text in texts]
            apart = [found["input_ids"][0].tolist() for found in (short, long)] == own
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise LoadError(_reads_none(whole)) from error
        pictures = tuple(name for name in long if torch.equal(short[name], long[name]))
        if not apart or "pixel_values" not in pictures:
            raise LoadError(_reads_none(whole))
        return cls(whole, pictures)

    def pixels(self, pictures: Sequence[PIL.Image.Image]) -> dict[str, Tensor]:
        """What a model reads of the pictures of a batch, with a mask where they are padded to one shape."""
        found = self.whole(text=[PROBES[0]] * len(pictures), images=list(pictures), return_tensors="pt")
        return {name: found[name] for name in self.picture}


def pictured_processor(whole: Any) -> PicturedProcessor:
    """The processor of pictures and texts, by what transformers' processor gives.

    Raises:
        LoadError: if it reads no picture with a text.
    """
    among = isinstance(getattr(whole, "image_token", None), str)
    return VisionLanguageProcessor.of(whole) if among else SideBySideProcessor.of(whole)


def crops(images: Any) -> bool:
    """Whether an image processor, or one of pictures and texts, cuts edges off a picture. This is seen on one picture.

    Args:
        images: gives tensors of a sequence of pictures.
    """
    plain = PIL.Image.new("RGB", EDGED)
    columns, rows = EDGED
    edges = (
        (0, 0, columns, EDGE),
        (0, rows - EDGE, columns, rows),
        (0, 0, EDGE, rows),
        (columns - EDGE, 0, columns, rows),
    )
    seen = _flat(images, plain)
    for edge in edges:
        other = plain.copy()
        other.paste((255, 255, 255), edge)
        if all(torch.equal(a, b) for a, b in zip(seen, _flat(images, other), strict=True)):
            return True
    return False


def _flat(images: Any, picture: PIL.Image.Image) -> list[Tensor]:
    found = images(images=[picture], return_tensors="pt")
    return [torch.as_tensor(value) for value in found.values()]


def _reads_none(whole: Any) -> str:
    return (
        f"{type(whole).__name__} has no text that stands for a picture, and does not read one beside a text: choose a "
        "backbone that reads a picture with a text"
    )


def _parts(whole: Any) -> Parts:
    """What is the picture's of what a processor gives, and what the tokens'."""
    name, picture = type(whole).__name__, PIL.Image.new("RGB", (PROBED, PROBED))
    try:
        short, long = (_read(whole, text, picture) for text in PROBES)
    except ValueError as error:
        raise LoadError(
            f"{name} cannot read one picture with one text. It says: {error}. Save it with a chat template that puts "
            f"{whole.image_token!r} in the place of a picture, or with none"
        ) from error
    ids = long["input_ids"]
    changing = [each for each in long if short[each].shape != long[each].shape]
    if odd := [each for each in changing if long[each].shape != ids.shape]:
        raise LoadError(
            f"{name} gives {', '.join(odd)}, which is neither the picture's nor one number for each token. Choose a "
            "backbone whose picture stands among the tokens of its text"
        )
    types = [each for each in changing if each not in ("input_ids", "attention_mask", LABELS)]
    alone = whole.tokenizer(whole.image_token + PROBES[1], add_special_tokens=False)["input_ids"]
    return Parts(
        types=dict.fromkeys(types, int(LABELS in long)),
        picture=tuple(each for each in long if each not in changing),
        closes=ids[0, -1].item() != alone[-1],
    )


def _read(whole: Any, text: str, picture: PIL.Image.Image) -> Mapping[str, Tensor]:
    """A row as transformers' processor makes it, as tensors with one row."""
    if not whole.chat_template:
        return whole(text=[whole.image_token + text], images=[[picture]], return_tensors="pt")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
    return whole.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
