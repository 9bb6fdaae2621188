"""Rows of a picture and a text: token ids with the picture's among them, and the picture until a batch is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets

from sidestep.backbone.vision_language import VisionLanguageProcessor
from sidestep.data.encode import Fields, check_fields, targets_of, token_limit
from sidestep.data.images import IMAGES
from sidestep.data.labels import LabelSpace
from sidestep.data.media import Decode, numbered, undecoded
from sidestep.data.messages import DataError, listed, named_rows

PIXELS = "pixel_values"
"""The name of a row's picture."""


def encode_pictured(
    rows: Dataset,
    fields: Fields,
    processor: VisionLanguageProcessor,
    labels: LabelSpace | None,
    max_length: int | None,
    *,
    end: str = "",
) -> Dataset:
    """The rows as token ids, with their undecoded pictures.

    Each picture is decoded once here, because the number of its tokens may depend on its shape.

    Args:
        rows: with the columns that `fields` names.
        fields: `text` and `image`. `label` is needed with `labels`.
        processor: of the model.
        labels: None to leave the labels out.
        max_length: tokens that a row may have, those of the picture included. None: the tokenizer's limit.
        end: put behind each text.

    Returns:
        A dataset whose rows hold "input_ids", the types of the tokens, "length", "row", with `labels` "labels", and the
        picture. It has the name "pixel_values", so that column removal keeps it.

    Raises:
        DataError: for unusable fields, pictures that cannot be read, texts that hold a picture's placeholder, and rows
            with too many tokens. It names the rows.
    """
    check_fields(rows, fields)
    assert fields.text is not None
    assert fields.image is not None
    IMAGES.refuse_absent(rows, fields.image)
    limit = token_limit(processor.text, max_length, pair=False)
    _refuse_placeholders(rows.with_format(None)[fields.text][:], fields.text, processor)
    targets = targets_of(rows, fields, labels)
    both = undecoded(rows, fields.image, fields.text)
    tokens = both.map(
        _Read(processor, fields.text, fields.image, end),
        with_indices=True,
        batched=True,
        remove_columns=both.column_names,
        desc="reading pictures and texts",
    )
    _refuse_long(tokens["length"][:], limit)
    if targets is not None:
        tokens = tokens.add_column("labels", targets)
    return concatenate_datasets([numbered(rows, fields.image, PIXELS), tokens], axis=1)


def decoding(rows: Dataset) -> Dataset:
    """The rows of `encode_pictured`, whose pictures are decoded when they are read."""
    return rows.with_transform(Decode(IMAGES, PIXELS, _as_they_are))


def _as_they_are(pictures: Iterable[Any], rows: list[int | None]) -> dict[str, Any]:
    return {PIXELS: list(pictures)}


@dataclass(frozen=True)
class _Read:
    processor: VisionLanguageProcessor
    text: str
    image: str
    end: str

    def __call__(self, batch: Mapping[str, list[Any]], places: Sequence[int]) -> dict[str, list[Any]]:
        found = [self._row(*row) for row in zip(batch[self.text], batch[self.image], places, strict=True)]
        return {name: [row[name] for row in found] for name in found[0]}

    def _row(self, text: str, cell: dict[str, Any], place: int) -> dict[str, Any]:
        picture = IMAGES.decode(cell, place + 1)
        try:
            row = self.processor.tokens(text + self.end, picture)
        except (ValueError, TypeError, IndexError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{self.processor.name} cannot read picture and text of {named_rows([place])}. It says: {reason}. "
                "Change or drop this row"
            ) from error
        return {**row, "length": len(row["input_ids"])}


def _refuse_placeholders(texts: Sequence[str], column: str, processor: VisionLanguageProcessor) -> None:
    """Refuse texts that place a picture themselves: each has one already."""
    marks = processor.placeholders
    if wrong := [place for place, text in enumerate(texts) if any(mark in text for mark in marks)]:
        raise DataError(
            f"text column {column!r} holds {listed(marks)}, which stands for a picture, in {named_rows(wrong)}: "
            f"take it out. {processor.name} puts the one picture of a row in front of its text"
        )


def _refuse_long(lengths: Sequence[int], limit: int | None) -> None:
    """Refuse rows with too many tokens. A cut might take tokens of the picture, or the end of a chat's turn."""
    if limit is not None and (long := [place for place, length in enumerate(lengths) if length > limit]):
        raise DataError(
            f"picture and text have more than {limit} tokens, up to {max(lengths)}, in {named_rows(long)}: they are "
            "never cut. Shorten or drop these rows, or give a larger max_length (--max-length) if the model can read "
            "more"
        )
