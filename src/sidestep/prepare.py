"""Rows of a user's data as a task's training and dev sets, the same way in training and afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset, LargeList, List
from transformers import PreTrainedTokenizerBase

from sidestep.data import (
    Collate,
    DataError,
    Fields,
    Kind,
    LabelSpace,
    check_fields,
    encode_images,
    encode_text,
    holdout,
    label_space,
)

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
    """

    train: Dataset
    dev: Dataset
    labels: LabelSpace
    fields: Fields
    processor: Any
    max_length: int | None
    truncated: int
    dev_source: str

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
) -> TaskData:
    """The rows as a task reads them.

    Args:
        train: as `data.read` gives them.
        dev: None: a share of the training rows is held out.
        fields: text (and text2) or image, and label.
        processor: tokenizer or image processor of the backbone.
        kind: None: several labels a row where the column holds lists, else one; a number has to be asked for.
        max_length: tokens kept of a text.
        dev_fraction: share of the training rows that is held out where there is no dev set.
        seed: of that choice.

    Raises:
        DataError: for unusable columns or labels, dev labels that training never had, a backbone for images
            with a column of text, or the reverse.
    """
    if fields.label is None:
        raise DataError("no label column: training needs one (--label)")
    check_modality(processor, fields)
    check_fields(train, fields)
    labels = label_space(train, fields.label, kind or guess_kind(train, fields.label))
    source = f"{len(dev)} rows of their own" if dev is not None else ""
    if dev is None:
        total = len(train)
        train, dev = holdout(train, fields.label, dev_fraction, seed)
        source = f"{len(dev)} of the {total} training rows, held out (no dev set was given; seed {seed})"
    else:
        check_fields(dev, fields)
    rows, cut = encode(train, fields, processor, labels, max_length)
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
    rows: Dataset, fields: Fields, processor: Any, labels: LabelSpace | None, max_length: int | None
) -> tuple[Dataset, int]:
    """Rows as a backbone reads them (labels None: without labels), and how many texts were cut.

    Raises:
        DataError: as `encode_text` and `encode_images`.
    """
    if fields.image is not None:
        return encode_images(rows, fields, processor, labels), 0
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


def _number(cell: Any) -> float | None:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _first_broken(numbers: list[float]) -> float:
    return next(number for number in numbers if not number.is_integer())
