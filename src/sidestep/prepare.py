"""Rows of a user's data as a task's training and dev sets, the same way in training and afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset, LargeList, List
from transformers import PreTrainedTokenizerBase

from sidestep.data import (
    Augmentation,
    Collate,
    DataError,
    Fields,
    ImageTransform,
    Kind,
    LabelSpace,
    check_fields,
    drop_unreadable,
    encode_images,
    encode_text,
    few_shot,
    holdout,
    label_space,
)
from sidestep.data.augment import NONE

REFUSED = ("token", "tokens", "ner", "tagging", "token-classification", "token_classification")
PROBLEMS: tuple[Kind, ...] = ("single", "multi", "regress")


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What a task is trained and chosen on.

    Attributes:
        train, dev: encoded rows with "labels".
        labels: what is predicted.
        fields: the columns that were read.
        processor: tokenizer or image processor.
        max_length: tokens kept of a text; None: the tokenizer's limit.
        truncated: texts that were cut, of train and dev together.
        dev_source: in words, where the dev rows come from.
        augment: of the training images; None: they are read as those of dev.
        handling: what was asked for of the rows besides: shots, views of images, bad images left out, a transform in
            the place of the backbone's processor; with seeds and counts, as JSON-ready values.
    """

    train: Dataset
    dev: Dataset
    labels: LabelSpace
    fields: Fields
    processor: Any
    max_length: int | None
    truncated: int
    dev_source: str
    augment: Augmentation | None = None
    handling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def collate(self) -> Collate:
        """Makes batches of these rows."""
        return collator(self.fields, self.processor)

    def preprocessing(self) -> dict[str, Any]:
        """What a task stores to read other rows the same way."""
        stored: dict[str, Any] = {
            "fields": asdict(self.fields),
            "max_length": self.max_length,
            "problem": self.labels.kind,
            "labels": list(self.labels.names),
        }
        if self.fields.text is not None and self.processor.pad_token_id is None:
            stored["padding"] = "the tokenizer has no pad token: token 0, masked"
        return stored


def prepare(
    train: Dataset,
    dev: Dataset | None,
    fields: Fields,
    processor: Any,
    *,
    kind: Kind | None = None,
    max_length: int | None = None,
    dev_fraction: float = 0.1,
    seed: int = 0,
    shots: int | None = None,
    shots_seed: int | None = None,
    augment: str = NONE,
    skip_bad_images: bool = False,
) -> TaskData:
    """The rows as a task reads them.

    Args:
        train: as `data.read` gives them.
        dev: None: a share of the training rows is held out.
        fields: text (and text2) or image, and label.
        processor: tokenizer or image processor of the backbone, or an `ImageTransform`.
        kind: None: several labels a row where the column holds lists, else one; a number has to be asked for.
        max_length: tokens kept of a text.
        dev_fraction: share of the training rows that is held out where there is no dev set.
        seed: of that choice, and of the views of images.
        shots: training rows of each class, drawn from those that are not held out; None: all.
        shots_seed: of the draw; None: `seed`.
        augment: random views of the training images, see `Augmentation`; "none" for none.
        skip_bad_images: whether images that cannot be read are left out; each is decoded once to know.

    Raises:
        DataError: for unusable columns or labels, dev labels that training never had, a backbone for images
            with a column of text, or the reverse; a class with fewer rows than shots.
        ValueError: for a processor whose images cannot be augmented.

    Warns:
        DataWarning: if images were left out.
    """
    if fields.label is None:
        raise DataError("no label column: training needs one (--label)")
    check_modality(processor, fields)
    check_fields(train, fields)
    handling: dict[str, Any] = {}
    if dev is not None:
        check_fields(dev, fields)
    if skip_bad_images:
        train, dev, handling["skipped_images"] = _without_bad_images(train, dev, fields)
    views = _views(augment, processor, fields, seed)
    if views is not None:
        processor, handling["augment"], handling["augment_seed"] = views.transform, augment, seed
    if isinstance(processor, ImageTransform):
        handling["transform"] = processor.to_dict()
    labels = label_space(train, fields.label, kind or guess_kind(train, fields.label))
    source = f"{len(dev)} rows of their own" if dev is not None else ""
    if dev is None:
        total = len(train)
        train, dev = holdout(train, fields.label, dev_fraction, seed)
        source = f"{len(dev)} of the {total} training rows, held out (no dev set was given; seed {seed})"
    if shots is not None:
        handling["shots"], handling["shots_seed"] = shots, seed if shots_seed is None else shots_seed
        train = few_shot(train, fields, shots, handling["shots_seed"])
    rows, cut = encode(train, fields, processor, labels, max_length, views)
    dev_rows, dev_cut = encode(dev, fields, processor, labels, max_length)
    return TaskData(
        train=rows,
        dev=dev_rows,
        labels=labels,
        fields=fields,
        processor=processor,
        max_length=max_length,
        truncated=cut + dev_cut,
        dev_source=source,
        augment=views,
        handling=handling,
    )


def guess_kind(rows: Dataset, label_column: str) -> Kind:
    """ "multi" for lists of labels, else "single".

    Raises:
        DataError: if the labels are numbers that are not all whole: they may well be a regression's targets.
    """
    if isinstance(rows.features[label_column], List | LargeList):
        return "multi"
    cells = rows.with_format(None)[label_column][:]
    numbers = [number for number in map(_number, cells) if number is not None]
    if len(numbers) == len(cells) and not all(number.is_integer() for number in numbers):
        raise DataError(
            f"column {label_column!r} holds numbers that are not all whole (such as "
            f"{_first_broken(numbers)}): say --problem regress to predict a number, or --problem single if "
            "they are names of classes"
        )
    return "single"


def check_problem(problem: str | None) -> Kind | None:
    """The problem that a user named, or None to guess.

    Raises:
        DataError: for one that is not supported (token classification by name) or unknown.
    """
    if problem is None or problem in PROBLEMS:
        return problem
    if problem in REFUSED:
        raise DataError(f"problem={problem!r}: token classification is not supported yet; choose {', '.join(PROBLEMS)}")
    raise DataError(f"problem={problem!r}: choose {', '.join(PROBLEMS)}")


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


def encode(
    rows: Dataset,
    fields: Fields,
    processor: Any,
    labels: LabelSpace | None,
    max_length: int | None,
    augment: Augmentation | None = None,
) -> tuple[Dataset, int]:
    """Rows as a backbone reads them (labels None: without labels), and how many texts were cut.

    Raises:
        DataError: as `encode_text` and `encode_images`.
    """
    if fields.image is not None:
        return encode_images(rows, fields, processor, labels, augment), 0
    return encode_text(rows, fields, processor, labels, max_length)


def collator(fields: Fields, processor: Any) -> Collate:
    """Makes batches of encoded rows."""
    return Collate(processor if fields.text is not None else None)


def stored_fields(preprocessing: Mapping[str, Any]) -> Fields:
    """The columns that a saved task was trained on.

    Raises:
        DataError: if the task does not say.
    """
    if "fields" not in preprocessing:
        raise DataError("this task does not say which columns it reads: name them (--text or --image)")
    return Fields(**preprocessing["fields"])


def stored_labels(preprocessing: Mapping[str, Any]) -> LabelSpace:
    """What a task predicts that `sidestep train` has saved."""
    return LabelSpace(preprocessing["problem"], tuple(preprocessing["labels"]))


def _without_bad_images(train: Dataset, dev: Dataset | None, fields: Fields) -> tuple[Dataset, Dataset | None, int]:
    """Both without the images that cannot be read, and how many those are."""
    if fields.image is None:
        raise DataError("skip_bad_images is for images, but a column of text is read: leave --skip-bad-images out")
    before = len(train) + (0 if dev is None else len(dev))
    train = drop_unreadable(train, fields.image, "training rows")
    if dev is not None:
        dev = drop_unreadable(dev, fields.image, "dev rows")
    return train, dev, before - len(train) - (0 if dev is None else len(dev))


def _views(augment: str, processor: Any, fields: Fields, seed: int) -> Augmentation | None:
    if augment == NONE:
        return None
    if fields.image is None:
        raise DataError(f"augment={augment!r} is for images, but a column of text is read: leave --augment out")
    return Augmentation(views=augment, transform=ImageTransform.of(processor), seed=seed)  # type: ignore[arg-type]


def _number(cell: Any) -> float | None:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _first_broken(numbers: list[float]) -> float:
    return next(number for number in numbers if not number.is_integer())
