"""Images or videos and their captions: a row is an image with all its captions, and a batch holds an image once.

What is said of images here is true of videos too.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, LargeList, List, Value
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sidestep.backbone.frames import VIDEO_AXES, FrameProcessor
from sidestep.data.augment import Augmentation
from sidestep.data.encode import Collate, Fields, encode_images, encode_text
from sidestep.data.media import TEXT_TYPES, Medium, is_local, undecoded
from sidestep.data.messages import DataError, listed, named_rows
from sidestep.data.tables import TableOptions, check_column, read
from sidestep.data.videos import encode_videos


def read_pairs(source: str, fields: Fields, options: TableOptions, *, split: str) -> Dataset:
    """The rows of `read`, one for each image with a list of its captions.

    A file's relative paths begin at its folder.

    Raises:
        DataError: as `read` and `captioned`.
    """
    rows = read(source, options, split=split)
    path = Path(source).expanduser()
    return captioned(rows, fields, path.parent if path.is_file() else None)


def captioned(rows: Dataset, fields: Fields, folder: Path | None = None) -> Dataset:
    """One row an image, in the order in which they come, with the list of its captions.

    A file is one image however its path is spelled, and keeps the first of its paths.

    Args:
        rows: with a column of images or of their paths, and one of captions: a text, or a list of texts.
        fields: `image` or `video`, and `text`.
        folder: that relative paths begin at. None: the one that the command is run in.

    Raises:
        DataError: if a column is missing or holds something else, an image has no caption or a caption no image, or
            images are not there.
    """
    medium, column = looked_for(fields)
    assert fields.text is not None
    for name in (column, fields.text):
        check_column(rows, name)
    captions = _captions(rows, fields.text)
    cells = _cells(rows, column, medium)
    names = [_name(cell) for cell in cells]
    if lone := [place for place, name in enumerate(names) if not name]:
        raise DataError(
            f"{len(lone)} of {len(rows)} rows have a caption and no {medium.name}, {named_rows(lone)}: drop them"
        )
    if bare := [name for name, texts in zip(names, captions, strict=True) if not texts or not all(texts)]:
        raise DataError(
            f"{len(bare)} of {len(rows)} rows have no caption for their {medium.name}: {listed(bare)}. Give them one, "
            "or drop them"
        )
    cells = [_located(cell, folder) for cell in cells]
    groups: dict[Hashable, list[str]] = {}
    first: dict[Hashable, int] = {}
    for place, (cell, texts) in enumerate(zip(cells, captions, strict=True)):
        key = _key(cell)
        groups.setdefault(key, []).extend(texts)
        first.setdefault(key, place)
    images = [cells[place] for place in first.values()]
    _refuse_missing(images, folder, medium)
    features = Features({column: Image(decode=False), fields.text: List(Value("string"))})
    found = Dataset.from_dict({column: images, fields.text: list(groups.values())}, features=features)
    return found.cast_column(column, medium.feature)


def looked_for(fields: Fields) -> tuple[Medium, str]:
    """What captions are of, images or videos, and the column of them.

    Raises:
        DataError: unless there is one such column, and one of captions.
    """
    named = [column for column in (fields.image, fields.video) if column is not None]
    if len(named) != 1 or fields.text is None or (fields.text2, fields.audio) != (None, None):
        given = {"image": fields.image, "video": fields.video, "audio": fields.audio}
        given |= {"text": fields.text, "text2": fields.text2}
        told = ", ".join(f"{name}={column!r}" for name, column in given.items() if column is not None)
        raise DataError(
            f"{told or 'no columns'}: retrieval reads pairs, so name one column of images (--image) or of videos "
            "(--video), and one of captions (--text)"
        )
    assert fields.files is not None
    return fields.files


def encode_pairs(
    rows: Dataset, fields: Fields, processor: Any, max_length: int | None, augment: Augmentation | None = None
) -> tuple[Dataset, int]:
    """A row for each caption, with its image, and how many captions were cut.

    Args:
        rows: as `captioned` gives them.
        fields: `image` or `video`, and `text`.
        processor: with `image`, an image processor (of videos a `FrameProcessor`), and `text`, a tokenizer.
        max_length: tokens kept of a caption. None: the tokenizer's limit.
        augment: of training images. A view depends on the image, not on the caption.

    Returns:
        A dataset of rows with "pixel_values", "input_ids", the tokenizer's other columns, "length", and as "labels" the
        number of the image. Images are decoded when they are read.

    Raises:
        DataError: as `encode_images`, `encode_videos` and `encode_text`.
    """
    texts, owners, cut = encode_captions(rows, fields, processor.text, max_length)
    if fields.video is not None:
        images = encode_videos(rows, fields.video, FrameProcessor.of(processor.image), augment)
    else:
        images = encode_images(rows, Fields(image=fields.image), processor.image, None, augment)
    return texts.add_column("labels", owners).with_transform(WithImages(images)), cut


def encode_captions(
    rows: Dataset, fields: Fields, tokenizer: Any, max_length: int | None
) -> tuple[Dataset, list[int], int]:
    """All captions as token ids, the number of each one's image, and how many were cut.

    Raises:
        DataError: as `encode_text`.
    """
    assert fields.text is not None
    captions = rows.with_format(None)[fields.text][:]
    owners = [number for number, texts in enumerate(captions) for _ in texts]
    flat = Dataset.from_dict({fields.text: [text for texts in captions for text in texts]})
    texts, cut = encode_text(flat, Fields(text=fields.text), tokenizer, None, max_length)
    return texts, owners, cut


@dataclass
class CollatePairs(Collate):
    """A Trainer's data collator of the rows of `encode_pairs`.

    An image with several captions stands in a batch once.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """What a `PairModel` takes: images or videos, texts, `image_index` and `labels`."""
        images = {row["labels"]: torch.as_tensor(row["pixel_values"]) for row in rows}
        places = {owner: place for place, owner in enumerate(images)}
        return {
            **stacked(list(images.values())),
            **self._pad(rows),
            "image_index": torch.tensor([places[row["labels"]] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }


def stacked(images: Sequence[Tensor]) -> dict[str, Tensor]:
    """Images, or videos padded to the same number of frames with what tells their own ones."""
    counts = torch.tensor([len(image) for image in images])
    if images[0].ndim < VIDEO_AXES or counts.min() == counts.max():
        return {"pixel_values": torch.stack(list(images))}
    frames = pad_sequence(list(images), batch_first=True)
    return {"pixel_values": frames, "frame_mask": torch.arange(frames.shape[1]) < counts[:, None]}


@dataclass(frozen=True)
class WithImages:
    """Adds to rows of captions the pixels of their images, each of which is decoded once."""

    images: Dataset

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, Any]:
        """A batch with "pixel_values", unless it lacks the columns by which images are found."""
        if "labels" not in batch or "input_ids" not in batch:
            return dict(batch)
        owners = list(dict.fromkeys(batch["labels"]))
        pixels = dict(zip(owners, self.images[owners]["pixel_values"], strict=True))
        return {**batch, "pixel_values": [pixels[owner] for owner in batch["labels"]]}


def _captions(rows: Dataset, name: str) -> list[list[str]]:
    feature = rows.features[name]
    several = isinstance(feature, List | LargeList)
    kind = feature.feature if several else feature
    if not (isinstance(kind, Value) and kind.dtype in TEXT_TYPES):
        raise DataError(f"caption column {name!r} holds {feature}, not texts or lists of texts")
    cells = rows.with_format(None)[name][:]
    texts = [cell or [] for cell in cells] if several else [[cell] if cell else [] for cell in cells]
    return [[(text or "").strip() for text in row] for row in texts]


def _cells(rows: Dataset, name: str, medium: Medium) -> list[dict[str, Any]]:
    feature = rows.features[name]
    if not medium.holds(feature) and not (isinstance(feature, Value) and feature.dtype in TEXT_TYPES):
        raise DataError(f"{medium.name} column {name!r} holds {feature}, not {medium.name}s or paths of {medium.name}s")
    if isinstance(feature, Value):
        return [{"path": path, "bytes": None} for path in rows.with_format(None)[name][:]]
    return [cell or {"path": None, "bytes": None} for cell in undecoded(rows, name)[name][:]]


def _name(cell: Mapping[str, Any]) -> str:
    """What an image is called: the digest of its bytes where they are in the rows, else its path."""
    return sha256(cell["bytes"]).hexdigest() if cell["bytes"] is not None else cell["path"] or ""


def _is_file(cell: Mapping[str, Any]) -> bool:
    """Whether an image lies on the disk: not in the rows, and not in a store."""
    return cell["bytes"] is None and is_local(cell["path"])


def _key(cell: Mapping[str, Any]) -> Hashable:
    """What tells images apart: the file, which may have many paths and links, or else what the image is called."""
    if not _is_file(cell):
        return _name(cell)
    try:
        found = os.stat(cell["path"])
        return found.st_dev, found.st_ino
    except (OSError, ValueError):  # it is not there, which is said of it later
        return cell["path"]


def _located(cell: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    return cell if folder is None or not _is_file(cell) else {**cell, "path": str(folder / cell["path"])}


def _refuse_missing(images: Sequence[Mapping[str, Any]], folder: Path | None, medium: Medium) -> None:
    files = [cell["path"] for cell in images if _is_file(cell)]
    where = (folder or Path.cwd()).resolve()
    missing = [os.path.relpath(file, where) for file in files if not medium.is_there(file)]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(images)} {medium.name}s are not there: {listed(missing)}, looked for from "
            f"{where}: paths are relative to the file's folder, or absolute"
        )
