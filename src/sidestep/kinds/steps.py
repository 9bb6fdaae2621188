"""Steps in which rows of a user's data become those of a task."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from sidestep.backbone.processors import IN_WORDS, read_by
from sidestep.backbone.source import Reads
from sidestep.backbone.vision_language import VisionLanguageProcessor
from sidestep.data import Augmentation, DataError, Fields, ImageTransform
from sidestep.data.augment import NONE
from sidestep.kinds.task_data import Asked


def check_modality(processor: Any, fields: Fields) -> None:
    """Refuses columns of text, of images or of sounds for a backbone that reads others.

    Raises:
        DataError: naming the processor and the column.
    """
    if fields.video is not None:
        raise DataError(
            f"{fields.video!r} is named as videos, which are read with their captions on a dual encoder: say --kind "
            "retrieval, or leave --video out"
        )
    if isinstance(processor, VisionLanguageProcessor):
        _check_both(processor.name, fields)
        return
    kind, reads = type(processor).__name__, read_by(processor)
    columns: dict[Reads, str | None] = {"text": fields.text, "image": fields.image, "audio": fields.audio}
    named = [field for field, column in columns.items() if column]
    if len(named) > 1:
        others = " and ".join(f"--{field}" for field in named if field != reads)
        raise DataError(
            f"the backbone reads {IN_WORDS[reads]} ({kind}), but {fields.text!r} is named as text and {fields.image!r} "
            f"as images: leave {others} out, or choose a vision-language model"
        )
    if named and named[0] != reads:
        raise DataError(
            f"the backbone reads {IN_WORDS[reads]} ({kind}), but {columns[named[0]]!r} is named as "
            f"{IN_WORDS[named[0]]}: say --{reads}"
        )


def _check_both(kind: str, fields: Fields) -> None:
    """Refuses columns that are not one picture and one text a row."""
    if fields.text is None or fields.image is None:
        named, option = (fields.image, "--text") if fields.text is None else (fields.text, "--image")
        raise DataError(
            f"the backbone reads a picture with a text ({kind}), but {named!r} alone is named: name the other column "
            f"too ({option})"
        )
    if fields.text2 is not None:
        raise DataError(
            f"text2={fields.text2!r} with image={fields.image!r}: beside a picture one text is read. Put both texts "
            "into one column"
        )


def check_text_alone(rows: Dataset, fields: Fields, kind: str) -> None:
    """Refuses anything but one column of texts beside the labels.

    Raises:
        DataError: naming the column.
    """
    if fields.text is None:
        raise DataError(f"kind={kind!r} reads texts: name their column (--text)")
    for name in ("text2", "image", "audio"):
        if (column := getattr(fields, name)) is not None:
            raise DataError(f"{name}={column!r} with kind={kind!r}: one column of texts is read. Leave it out")


def check_asked(processor: Any, asked: Asked) -> None:
    """Refuses frames without videos, and what does not go with rows of a picture and a text.

    Raises:
        DataError: for frames, views of pictures beside texts, and a separator where the processor itself ends prompts.
    """
    refuse_frames(asked)
    if not isinstance(processor, VisionLanguageProcessor):
        return
    if asked.augment != NONE:
        raise DataError(
            f"augment={asked.augment!r} with pictures and texts: {processor.name} makes their pixels, and a text may "
            "be about what a view cuts away. Leave --augment out"
        )
    if asked.separator is not None and processor.parts.closes:
        raise DataError(
            f"separator={asked.separator!r}, but {processor.name} itself puts something between prompt and answer, "
            "such as the end of a chat's turn. Leave --separator out"
        )


def refuse_frames(asked: Asked) -> None:
    """Refuses a number of frames where no videos are read.

    Raises:
        DataError: if one is given.
    """
    if asked.frames is not None:
        raise DataError(f"frames={asked.frames} is for a column of videos (--video): leave --frames out")


def without_bad_files(train: Dataset, dev: Dataset | None, fields: Fields) -> tuple[Dataset, Dataset | None, int]:
    """Both without the images, sounds or videos that cannot be read, and how many those are.

    Raises:
        DataError: if texts alone are read.
    """
    if fields.files is None:
        raise DataError(
            "skip_bad_files is for images, sounds and videos, but a column of text is read: leave --skip-bad-files out"
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
        DataError: if no images and no videos are read.
    """
    if augment == NONE:
        return None
    if fields.image is None and fields.video is None:
        what = "text" if fields.audio is None else "sounds"
        raise DataError(f"augment={augment!r} is for images, but a column of {what} is read: leave --augment out")
    # ignored: a text may be other views, which Augmentation refuses
    return Augmentation(views=augment, transform=ImageTransform.of(processor), seed=seed)  # type: ignore[arg-type]
