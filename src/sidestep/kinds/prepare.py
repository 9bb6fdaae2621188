"""Rows of a user's data as a task's training and dev sets, the same way in training and afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from datasets import Dataset, LargeList, List

from sidestep.data import (
    Collate,
    DataError,
    Fields,
    LabelSpace,
    TableOptions,
    check_fields,
    holdout,
    read,
)
from sidestep.data.augment import NONE
from sidestep.data.boxes import BoxForm
from sidestep.kinds.base import kind_named
from sidestep.kinds.steps import check_modality
from sidestep.kinds.task_data import Asked, TaskData, stored_fields
from sidestep.model.heads import HeadConfig


def prepare(
    train: Dataset,
    dev: Dataset | None,
    fields: Fields,
    processor: Any,
    *,
    kind: str | None = None,
    max_length: int | None = None,
    dev_fraction: float = 0.1,
    seed: int = 0,
    shots: int | None = None,
    shots_seed: int | None = None,
    augment: str = NONE,
    skip_bad_files: bool = False,
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    separator: str | None = None,
    frames: int | None = None,
    answers: int | None = None,
    boxes: BoxForm = "xyxy",
) -> TaskData:
    """The rows as a task reads them.

    Args:
        train: as `data.read` gives them.
        dev: None: a share of the training rows is held out.
        fields: text (and text2), image or audio, and label (of a text to write, the text). For retrieval text, and
            image or video.
        processor: tokenizer, image processor or feature extractor of the backbone, or an `ImageTransform`. A
            `PairProcessor` for retrieval, whose rows are images or videos and captions.
        kind: None: several labels a row if the column holds lists, else one. A number or a text to write has to be
            asked for.
        max_length: tokens kept of a text. For a decoder it counts prompt and completion together.
        dev_fraction: share of the training rows that is held out where there is no dev set.
        seed: of that choice, and of the views of images.
        shots: training rows of each class, drawn from those that are not held out. None: all.
        shots_seed: of that draw. None: `seed`.
        augment: random views of the training images, see `Augmentation`. With "none" there are no such views.
        skip_bad_files: whether images, sounds or videos that cannot be read are left out. Each is decoded once to know.
        max_new_tokens: tokens that are written at most. None: as many as the longest target of the training rows has.
        num_beams: of beam search, where texts are written.
        separator: put between the two texts of a pair, and between a decoder's prompt and its answer. None: a newline
            between the texts of a pair, if the tokenizer puts nothing there. "": nothing anywhere.
        frames: taken of a video, evenly spread. None: `backbone.frames.FRAMES`.
        answers: of VQA: how many of the most frequent answers are learned. None: those that are not rare.
        boxes: of grounding: the form of the labels, and of predictions.

    Raises:
        DataError: for unusable columns or labels, or dev labels that training never had. For a backbone for images with
            a column of text or of sounds, and the like. For a class with fewer rows than shots, or completions that do
            not fit. For a separator where there is nothing to separate.
        ValueError: for a processor whose images cannot be augmented.

    Warns:
        DataWarning: if files were left out, or sounds are resampled or cut. Also if the tokenizer drops a separator, or
            answers stand behind their prompts without white space.
    """
    asked = Asked(
        max_length=max_length,
        dev_fraction=dev_fraction,
        seed=seed,
        shots=shots,
        shots_seed=shots_seed,
        augment=augment,
        skip_bad_files=skip_bad_files,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        separator=separator,
        frames=frames,
        answers=answers,
        boxes=boxes,
    )
    if kind is None:
        if fields.label is None:
            raise DataError("no label column: training needs one (--label)")
        check_modality(processor, fields)
        check_fields(train, fields)
        kind = guess_kind(train, fields.label)
    found = kind_named(kind)
    found.check_asked(asked)
    return found.prepare(train, dev, fields, processor, asked)


def guess_kind(rows: Dataset, label_column: str) -> str:
    """ "multi" for lists of labels, else "single".

    Raises:
        DataError: if the labels are numbers that are not all whole. They may well be a regression's targets.
    """
    if isinstance(rows.features[label_column], List | LargeList):
        return "multi"
    cells = rows.with_format(None)[label_column][:]
    numbers = [number for number in map(_number, cells) if number is not None]
    if len(numbers) == len(cells) and not all(number.is_integer() for number in numbers):
        raise DataError(
            f"column {label_column!r} holds numbers that are not all whole (such as "
            f"{_first_broken(numbers)}). Say --kind regress to predict a number, or --kind single if "
            "they are names of classes"
        )
    return "single"


def read_rows(source: str, fields: Fields, options: TableOptions, kind: str | None, *, split: str) -> Dataset:
    """The rows of a file, folder or hub id. For retrieval a row is an image, with all its captions.

    Raises:
        DataError: as `data.read` and `data.pairs.captioned`.
    """
    if kind is None:
        return read(source, options, split=split)
    return kind_named(kind).read_rows(source, fields, options, split=split)


def check_kind(kind: str | None) -> str | None:
    """The kind of task that a user named, or None to guess.

    Raises:
        DataError: for one that is not supported (token classification by name) or unknown.
    """
    return None if kind is None else kind_named(kind).name


def hold_out(rows: Dataset, kind: str | None, fields: Fields, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """A training and a dev part of the rows, as their kind divides them. None: by the classes of the label.

    Raises:
        DataError: as `data.holdout`.
    """
    if kind is None:
        return holdout(rows, fields.label, fraction, seed)
    return kind_named(kind).hold_out(rows, fields, fraction, seed)


def collator(fields: Fields, processor: Any, kind: str) -> Collate:
    """Makes batches of encoded rows with labels."""
    return kind_named(kind).collate(fields, processor)


def head_for(data: TaskData, pool: Any = None) -> HeadConfig | None:
    """The Sidestep head for what the data's labels are. A regression starts at the mean of its targets.

    None if texts are written. The backbone's own language model head writes them.

    Raises:
        ValueError: for a pool where texts are written.
    """
    return kind_named(data.labels.kind).head(data, pool)


def chosen_fields(preprocessing: Mapping[str, Any], given: Fields) -> Fields:
    """The columns that a saved task was trained on, with those that a user names in their place.

    Raises:
        DataError: if the task does not say, and no column of text, images or sounds is named.
    """
    named = {name: column for name, column in asdict(given).items() if column is not None}
    known = "fields" in preprocessing or (given.text is None and given.files is None)
    return replace(stored_fields(preprocessing) if known else Fields(), **named)


def stored_labels(preprocessing: Mapping[str, Any]) -> LabelSpace:
    """What a task predicts that `sidestep train` has saved."""
    labels = kind_named(preprocessing["problem"]).labels_of(preprocessing)
    return replace(labels, unanswerable=preprocessing.get("unanswerable", False))


def _number(cell: Any) -> float | None:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _first_broken(numbers: list[float]) -> float:
    return next(number for number in numbers if not number.is_integer())
