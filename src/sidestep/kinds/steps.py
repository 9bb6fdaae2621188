"""Steps in which rows of a user's data become those of a task."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from sidestep.backbone.processors import IN_WORDS, read_by
from sidestep.backbone.source import Reads
from sidestep.data import Augmentation, DataError, Fields, ImageTransform
from sidestep.data.augment import NONE


def check_modality(processor: Any, fields: Fields) -> None:
    """Refuses a column of text, of images or of sounds for a backbone that reads another of the three.

    Raises:
        DataError: naming the processor and the column.
    """
    reads = read_by(processor)
    columns: dict[Reads, str | None] = {"text": fields.text, "image": fields.image, "audio": fields.audio}
    named = [field for field, column in columns.items() if column]
    if len(named) == 1 and named[0] != reads:
        raise DataError(
            f"the backbone reads {IN_WORDS[reads]} ({type(processor).__name__}), but {columns[named[0]]!r} is named as "
            f"{IN_WORDS[named[0]]}: say --{reads}"
        )


def without_bad_files(train: Dataset, dev: Dataset | None, fields: Fields) -> tuple[Dataset, Dataset | None, int]:
    """Both without the images or sounds that cannot be read, and how many those are.

    Raises:
        DataError: if texts alone are read.
    """
    if fields.files is None:
        raise DataError(
            "skip_bad_files is for images and sounds, but a column of text is read: leave --skip-bad-files out"
        )
    medium, column = fields.files
    before = len(train) + (0 if dev is None else len(dev))
    train = medium.drop_unreadable(train, column, "training rows")
    if dev is not None:
        dev = medium.drop_unreadable(dev, column, "dev rows")
    return train, dev, before - len(train) - (0 if dev is None else len(dev))


def views_of(augment: str, processor: Any, fields: Fields, seed: int) -> Augmentation | None:
    """The random views of training images that a user named. None for none.

    Raises:
        DataError: if no images are read.
    """
    if augment == NONE:
        return None
    if fields.image is None:
        what = "text" if fields.audio is None else "sounds"
        raise DataError(f"augment={augment!r} is for images, but a column of {what} is read: leave --augment out")
    # ignored: a text may be other views, which Augmentation refuses
    return Augmentation(views=augment, transform=ImageTransform.of(processor), seed=seed)  # type: ignore[arg-type]
