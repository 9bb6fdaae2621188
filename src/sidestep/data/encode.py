"""Rows as what a backbone reads: token ids, pixel values or what is heard, and batches of them."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import PIL.Image
import torch
from datasets import Dataset, Value
from torch import Tensor
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from sidestep.backbone.processors import tokenizer_of
from sidestep.backbone.vision_language import PicturedProcessor, VisionLanguageProcessor
from sidestep.data.augment import Augmentation
from sidestep.data.images import IMAGES
from sidestep.data.labels import LabelSpace
from sidestep.data.media import TEXT_TYPES, Medium
from sidestep.data.messages import DataError, DataWarning, listed, named_rows
from sidestep.data.sounds import SOUNDS
from sidestep.data.tables import check_column
from sidestep.data.videos import VIDEOS
from sidestep.metrics import IGNORED

NO_LIMIT = 10**6
"""A tokenizer that knows no limit says 10**30; no model reads this many tokens."""


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which columns are read: `text` (with `text2` for a pair), `image` or `audio`, and `label` where there is one.

    A vision-language model reads `text` and `image`, retrieval `text` and `image` or `video`.
    """

    text: str | None = None
    text2: str | None = None
    image: str | None = None
    audio: str | None = None
    video: str | None = None
    label: str | None = None

    @property
    def files(self) -> tuple[Medium, str] | None:
        """The column of images, sounds or videos, with which of them it holds. None where texts alone are read."""
        columns = ((IMAGES, self.image), (SOUNDS, self.audio), (VIDEOS, self.video))
        return next(((medium, column) for medium, column in columns if column is not None), None)


def check_fields(rows: Dataset, fields: Fields) -> None:
    """Refuses fields that the rows do not have, or that hold something else.

    Raises:
        DataError: if none of text, image and audio is given, or audio with another. Also if a column does not exist.
            Also if a text column holds numbers (by type, or text that is a number in every row) or missing values.
    """
    named = [column for column in (fields.text, fields.image, fields.audio) if column is not None]
    if not named or (fields.audio is not None and len(named) > 1):
        raise DataError(
            f"text={fields.text!r}, image={fields.image!r}, audio={fields.audio!r}: name one column of text, of images "
            "or of sounds"
        )
    if fields.text2 is not None and fields.text is None:
        raise DataError(f"text2={fields.text2!r} without text: name the first text's column as text")
    for name in asdict(fields).values():
        if name is not None:
            check_column(rows, name)
    for name in (fields.text, fields.text2):
        if name is not None:
            _check_text(rows, name)
    if fields.files is not None:
        medium, name = fields.files
        medium.check(rows, name)


def encode_text(
    rows: Dataset,
    fields: Fields,
    tokenizer: Any,
    labels: LabelSpace | None,
    max_length: int | None,
    *,
    separator: str = "",
    end: str = "",
) -> tuple[Dataset, int]:
    """The rows as token ids, not padded.

    Args:
        rows: with the columns that `fields` names.
        fields: one text or a pair. `label` is needed with `labels`.
        tokenizer: a Hugging Face tokenizer.
        labels: None to leave the labels out.
        max_length: tokens kept of a row, special ones included. Of a pair the longer text is cut first. None: the
            tokenizer's own limit, if it has one.
        separator: put between the texts of a pair, besides what the tokenizer puts there.
        end: put behind the last text of each row.

    Returns:
        The tokenizer's columns with "length" (tokens, for length grouping) and, with `labels`, "labels".
        Second, how many rows were truncated.

    Raises:
        DataError: for unusable fields or labels, a max_length without room for text, a row without a token.

    Warns:
        DataWarning: if rows were truncated, with their count and share.
    """
    check_fields(rows, fields)
    if fields.text is None:
        raise DataError("fields names no text column: use encode_images for images")
    limit = token_limit(tokenizer, max_length, pair=fields.text2 is not None)
    targets = targets_of(rows, fields, labels)
    encoded = rows.with_format(None).map(
        Tokenize(tokenizer, fields.text, fields.text2, limit, separator, end),
        batched=True,
        remove_columns=rows.column_names,
        desc="tokenizing",
    )
    refuse_empty(encoded, fields.text)
    truncated = sum(encoded["truncated"][:])
    if truncated:
        warnings.warn(
            f"{truncated} of {len(rows)} rows ({truncated / len(rows):.1%}) have more than {limit} tokens "
            "and were truncated: give a larger max_length (--max-length) if the model can read more",
            DataWarning,
            stacklevel=2,
        )
    encoded = encoded.remove_columns("truncated")
    return encoded if targets is None else encoded.add_column("labels", targets), truncated


def encode_images(
    rows: Dataset, fields: Fields, processor: Any, labels: LabelSpace | None, augment: Augmentation | None = None
) -> Dataset:
    """The rows as pixel values, decoded and processed when they are read.

    Args:
        rows: with a column of images, or of paths of images.
        fields: `image`. `label` is needed with `labels`.
        processor: `processor(images=[...], return_tensors="pt")["pixel_values"]` is a tensor
            (images, channels, rows, columns), or a list of such without the first axis.
        labels: None to leave the labels out.
        augment: of training rows: makes the pixel values in the processor's place.

    Returns:
        A dataset whose rows hold "pixel_values" (channels, rows, columns) and, with `labels`, "labels".
        The undecoded image has the name "pixel_values" too, so that the Trainer's column removal keeps it.

    Raises:
        DataError: for unusable fields or labels, and files that are not there or empty. When a row is read, also for an
            image that cannot be read, with its file or row.
    """
    check_fields(rows, fields)
    if fields.image is None:
        raise DataError("fields names no image column: use encode_text for text")
    targets = targets_of(rows, fields, labels)
    return IMAGES.decoded(rows, fields.image, "pixel_values", Pixels(processor, augment), targets)


@dataclass
class Collate:
    """A Trainer's data collator: rows of one of this room's `encode_...` functions as one batch.

    Texts and sounds are padded to the longest of the batch, and the padding is masked. Labels
    become int64 (classes) or float32 (several classes, numbers). Other columns ("length") are dropped.

    A tokenizer without a pad token is copied, and the copy pads with id 0. The tokenizer that was given stays as it is.
    The attention mask is 0 on padding, so the model does not mind what it reads there. But a model that finds the last
    token by `config.pad_token_id` still needs that to be set.

    Attributes:
        tokenizer: of texts. For rows of a picture and a text a `PicturedProcessor`. None for images and sounds.
        pad_to_multiple_of: rounds the padded length up.
        padding_side: of texts. None: the tokenizer's. Beside pictures it is the right one: positions past padding on
            the left are plain numbers, and a picture's tokens may have rows and columns.
        features: gives what a store holds of the rows. None: rows hold all that a backbone reads.
        extractor: the feature extractor of sounds.
    """

    tokenizer: Any = None
    pad_to_multiple_of: int | None = None
    padding_side: Literal["left", "right"] | None = None
    features: Callable[[Sequence[Mapping[str, Any]]], Any] | None = None
    extractor: Any = None

    @classmethod
    def of(cls, fields: Fields, processor: Any) -> Self:
        """Makes batches of rows that were read by these fields and this processor."""
        if fields.audio is not None:
            return cls(extractor=processor)
        return cls(processor if fields.text is not None else None)

    def __post_init__(self) -> None:
        # not under the name `tokenizer`: the Trainer would store the copy in its checkpoints
        self._padding = tokenizer_of(self.tokenizer)
        if self._padding is not None and self._padding.pad_token_id is None:
            self._padding = copy.deepcopy(self._padding)
            self._padding.pad_token = self._padding.convert_ids_to_tokens(0)
        if isinstance(self.tokenizer, PicturedProcessor):
            self.padding_side = self.padding_side or "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tensors with the rows along their first axis. With features, also their `States` as "features".

        Raises:
            DataError: for token ids without a tokenizer, for rows with neither text nor image nor sound, and if the
                loss would leave out all rows.
        """
        batch: dict[str, Any] = {}
        if "input_ids" in rows[0]:
            batch.update(self._pad(rows))
        batch.update(self._pixels(rows))
        if self.extractor is not None and self.extractor.model_input_names[0] in rows[0]:
            batch.update(self._pad_sounds(rows))
        if not batch and self.features is None:
            raise DataError(f"rows hold {listed(rows[0])}: a batch needs input_ids, pixel_values or sounds")
        if "labels" in rows[0]:
            batch["labels"] = _stack_labels([row["labels"] for row in rows])
        if self.features is not None:
            batch["features"] = self.features(rows)
        return batch

    def _pad(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if self.tokenizer is None:
            raise DataError("rows hold input_ids: give the collator the tokenizer that made them")
        types = self._types.keys() & rows[0].keys()
        names = {"input_ids", "attention_mask", *self._padding.model_input_names} - types
        texts = [{name: row[name] for name in names & row.keys()} for row in rows]
        # padding without a mask would be read as text, whatever the tokenizer thinks that its model needs
        for text in texts:
            text.setdefault("attention_mask", [1] * len(text["input_ids"]))
        padded = pad_without_fast_tokenizer_warning(
            self._padding,
            texts,
            pad_to_multiple_of=self.pad_to_multiple_of,
            padding_side=self.padding_side,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {**padded, **{name: _beside(padded, [row[name] for row in rows]) for name in types}}

    @property
    def _types(self) -> Mapping[str, int]:
        """By name, what rows of pictures hold for each token besides its id, and the value of an answer's tokens."""
        return self.tokenizer.parts.types if isinstance(self.tokenizer, VisionLanguageProcessor) else {}

    def _pixels(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """What is read of the rows' images, if they have any."""
        if "pixel_values" not in rows[0]:
            return {}
        images = [row["pixel_values"] for row in rows]
        if isinstance(self.tokenizer, PicturedProcessor):
            return self.tokenizer.pixels(images)
        return {"pixel_values": torch.stack([torch.as_tensor(image) for image in images])}

    def _pad_sounds(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = {*self.extractor.model_input_names} & rows[0].keys()
        padded = self.extractor.pad(
            [{name: row[name] for name in names} for row in rows],
            padding=True,
            # what has no mask alone has none in a batch: such models read zeros as silence
            return_attention_mask="attention_mask" in names,
            return_tensors="pt",
        )
        return dict(padded)


def _beside(padded: Mapping[str, Tensor], rows: Sequence[Sequence[int]]) -> Tensor:
    """A number for each token of padded rows, and 0 for padding."""
    ids, kept = padded["input_ids"], padded["attention_mask"].bool()
    return torch.zeros_like(ids).masked_scatter(kept, torch.tensor([number for row in rows for number in row]))


@dataclass(frozen=True)
class Tokenize:
    """Makes token ids of columns of texts, with the "length" of each row and whether it was "truncated".

    Attributes:
        tokenizer: a Hugging Face tokenizer.
        text: the column.
        text2: that of the second text of a pair.
        limit: tokens kept of a row.
        separator: put between the texts of a pair.
        end: put behind the last text of a row.
    """

    tokenizer: Any
    text: str
    text2: str | None
    limit: int | None
    separator: str
    end: str

    def __call__(self, batch: Mapping[str, list[str]]) -> dict[str, list[Any]]:
        """The tokenizer's columns and those two, of columns of texts."""
        columns = [batch[self.text]] if self.text2 is None else self._pair(batch[self.text], batch[self.text2])
        columns[-1] = [text + self.end for text in columns[-1]]
        encoded = dict(self.tokenizer(*columns, padding=False, truncation=False, verbose=False))
        limit = NO_LIMIT if self.limit is None else self.limit
        truncated = [len(ids) > limit for ids in encoded["input_ids"]]
        long = [place for place, cut in enumerate(truncated) if cut]
        # in two passes, because not every tokenizer reports what it cut from a pair
        if long:
            texts = [[column[place] for place in long] for column in columns]
            for name, values in self.tokenizer(*texts, padding=False, truncation=True, max_length=limit).items():
                for place, value in zip(long, values, strict=True):
                    encoded[name][place] = value
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]], "truncated": truncated}

    def _pair(self, first: list[str], second: list[str]) -> list[list[str]]:
        """Both columns, with the separator at that end of a text which is not cut."""
        if self.tokenizer.truncation_side == "left":
            return [[text + self.separator for text in first], second]
        return [first, [self.separator + text for text in second]]


@dataclass(frozen=True)
class Pixels:
    """Makes the "pixel_values" of images: by an image processor, or of random views of them.

    Attributes:
        processor: of images.
        augment: of training images. None: there are no views.
    """

    processor: Any
    augment: Augmentation | None

    def __call__(self, images: Iterable[PIL.Image.Image], rows: list[int | None]) -> dict[str, Any]:
        """The pixels of images of rows with these numbers."""
        if self.augment is None:
            return {"pixel_values": self.processor(images=list(images), return_tensors="pt")["pixel_values"]}
        views = [self.augment(image, row) for image, row in zip(images, rows, strict=True)]
        return {"pixel_values": torch.stack(views)}


def _check_text(rows: Dataset, name: str) -> None:
    feature = rows.features[name]
    if not (isinstance(feature, Value) and feature.dtype in TEXT_TYPES):
        kind = feature.dtype if isinstance(feature, Value) else type(feature).__name__
        raise DataError(f"column {name!r} holds {kind}, not text: choose a text column of {listed(rows.column_names)}")
    cells = rows.with_format(None)[name][:]
    missing = [index for index, cell in enumerate(cells) if cell is None]
    if missing:
        raise DataError(
            f"text column {name!r} has no value in {len(missing)} of {len(cells)} rows, "
            f"{named_rows(missing)}: fill them (an empty text is allowed) or drop these rows"
        )
    # one row says too little of its column
    if len(cells) > 1 and any(cells) and all(_is_number(cell) for cell in cells if cell):
        raise DataError(
            f"text column {name!r} holds only numbers ({listed(cells, limit=3)}): "
            f"choose a text column of {listed(rows.column_names)}"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    # "nan" and "infinity" parse too, but they are words of a text as well
    return any(character.isdigit() for character in text)


def token_limit(tokenizer: Any, max_length: int | None, *, pair: bool) -> int | None:
    """Tokens kept of a text (or a pair): as asked, or the tokenizer's own limit, or None for all.

    Raises:
        DataError: if there is no room for text beside the special tokens.
    """
    if max_length is None:
        return tokenizer.model_max_length if tokenizer.model_max_length < NO_LIMIT else None
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    least = special + (2 if pair else 1)
    if max_length < least:
        raise DataError(f"max_length={max_length}, but {special} tokens are special: choose at least {least}")
    return max_length


def targets_of(rows: Dataset, fields: Fields, labels: LabelSpace | None) -> list[Any] | None:
    """The labels of rows, as `LabelSpace.encode` gives them. None where there is no label space.

    Raises:
        DataError: for unusable labels.
    """
    if labels is None:
        return None
    if fields.label is None:
        raise DataError("labels are asked for, but fields names no label column: name it as label")
    return labels.encode(rows, fields.label)


def refuse_empty(encoded: Dataset, column: str) -> None:
    """Refuses rows without a token, by their "length".

    Raises:
        DataError: naming the rows.
    """
    empty = [row for row, length in enumerate(encoded["length"][:]) if length == 0]
    if empty:
        raise DataError(
            f"text column {column!r} gives no token in {len(empty)} of {len(encoded)} rows, "
            f"{named_rows(empty)}: drop these rows (this tokenizer adds no special tokens to an empty text)"
        )


def refuse_ignored(labels: Sequence[Any]) -> None:
    """Refuses a batch of classes or tokens that the loss would leave out altogether, because their mean is no number.

    Raises:
        DataError: if all are -100.
    """
    if len(labels) and all(isinstance(label, int) and label == IGNORED for label in labels):
        raise DataError(
            f"all {len(labels)} labels of a batch are {IGNORED}, which the loss leaves out, so that there is nothing "
            "to learn from. Drop the rows without a label, or make the batches larger"
        )


def _stack_labels(labels: Sequence[Any]) -> Tensor:
    stacked = torch.stack([torch.as_tensor(label) for label in labels])
    if stacked.is_floating_point():
        return stacked.float()
    refuse_ignored(stacked.flatten().tolist())
    return stacked.long()
