"""Steps in which rows of a user's data become those of a task."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from sidestep.data import Augmentation, DataError, Fields, ImageTransform, drop_unreadable
from sidestep.data.augment import NONE


def check_modality(processor: Any, fields: Fields) -> None:
    """Refuses a column of images for a backbone that reads text, and the reverse.

    Raises:
        DataError: naming the processor and the column.
    """
    kind, reads_text = type(processor).__name__, isinstance(processor, PreTrainedTokenizerBase)
    if fields.text and not fields.image and not reads_text:
        raise DataError(f"the backbone reads images ({kind}), but {fields.text!r} is named as text: say --image")
    if fields.image and not fields.text and reads_text:
        raise DataError(f"the backbone reads text ({kind}), but {fields.image!r} is named as images: say --text")


def without_bad_images(train: Dataset, dev: Dataset | None, fields: Fields) -> tuple[Dataset, Dataset | None, int]:
    """Both without the images that cannot be read, and how many those are.

    Raises:
        DataError: if no images are read.
    """
    if fields.image is None:
        raise DataError("skip_bad_images is for images, but a column of text is read: leave --skip-bad-images out")
    before = len(train) + (0 if dev is None else len(dev))
    train = drop_unreadable(train, fields.image, "training rows")
    if dev is not None:
        dev = drop_unreadable(dev, fields.image, "dev rows")
    return train, dev, before - len(train) - (0 if dev is None else len(dev))


def views_of(augment: str, processor: Any, fields: Fields, seed: int) -> Augmentation | None:
    """The random views of training images that a user named. None for none.

    Raises:
        DataError: if no images are read.
    """
    if augment == NONE:
        return None
    if fields.image is None:
        raise DataError(f"augment={augment!r} is for images, but a column of text is read: leave --augment out")
    # ignored: a text may be other views, which Augmentation refuses
    return Augmentation(views=augment, transform=ImageTransform.of(processor), seed=seed)  # type: ignore[arg-type]
