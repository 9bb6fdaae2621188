"""Encoded rows of a task, and how they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from datasets import Dataset

from sidestep.data import Augmentation, Collate, DataError, Fields, Generation, LabelSpace, Separators
from sidestep.data.augment import NONE
from sidestep.data.boxes import BoxForm
from sidestep.data.joins import NOTHING


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What a task is trained and chosen on.

    Attributes:
        train, dev: encoded rows with "labels".
        labels: what is predicted.
        fields: the columns that were read.
        processor: tokenizer, image processor or feature extractor.
        max_length: tokens kept of a text (of a prompt). None: the tokenizer's limit.
        truncated: texts or sounds that were cut, of train and dev together.
        dev_source: in words, where the dev rows come from.
        collator: of the kind of task. See `collate`.
        augment: of the training images. None: they are read as those of dev.
        handling: what was asked for of the rows besides: shots, views of images, bad files left out, a transform in
            the place of the backbone's processor. With seeds and counts, as JSON-ready values.
        generation: how texts are written. None: the task is no such.
        separators: what stands between texts that are put behind each other.
    """

    train: Dataset
    dev: Dataset
    labels: LabelSpace
    fields: Fields
    processor: Any
    max_length: int | None
    truncated: int
    dev_source: str
    collator: Callable[[Fields, Any], Collate]
    augment: Augmentation | None = None
    handling: Mapping[str, Any] = field(default_factory=dict)
    generation: Generation | None = None
    separators: Separators = NOTHING

    @property
    def collate(self) -> Collate:
        """Makes batches of these rows."""
        return self.collator(self.fields, self.processor)

    def preprocessing(self) -> dict[str, Any]:
        """What a task stores to read other rows the same way."""
        stored: dict[str, Any] = {
            "fields": asdict(self.fields),
            "max_length": self.max_length,
            **self.labels.stored(),
        }
        if self.labels.unanswerable:
            stored["unanswerable"] = True
        if self.fields.text is not None and self.processor.pad_token_id is None:
            stored["padding"] = "the tokenizer has no pad token: token 0, masked"
        if self.generation is not None:
            stored["generation"] = asdict(self.generation)
        if self.separators != NOTHING:
            stored["separators"] = asdict(self.separators)
        return stored


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for of rows besides their columns. The fields are arguments of `prepare.prepare`."""

    max_length: int | None = None
    dev_fraction: float = 0.1
    seed: int = 0
    shots: int | None = None
    shots_seed: int | None = None
    augment: str = NONE
    skip_bad_files: bool = False
    max_new_tokens: int | None = None
    num_beams: int = 1
    separator: str | None = None
    frames: int | None = None
    answers: int | None = None
    boxes: BoxForm = "xyxy"


def stored_fields(preprocessing: Mapping[str, Any]) -> Fields:
    """The columns that a saved task was trained on.

    Raises:
        DataError: if the task does not say.
    """
    if "fields" not in preprocessing:
        raise DataError(
            "this task does not say which columns it reads: name them (--text, --image, --audio or --video)"
        )
    return Fields(**preprocessing["fields"])


def stored_generation(preprocessing: Mapping[str, Any]) -> Generation:
    """How a saved task's texts are written. The defaults, if the task does not say."""
    return Generation(**preprocessing.get("generation", {}))


def stored_separators(preprocessing: Mapping[str, Any]) -> Separators:
    """What stands between a saved task's texts. Nothing if it does not say, as with tasks of earlier versions."""
    return Separators(**preprocessing.get("separators", {}))
