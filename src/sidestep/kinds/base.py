"""What a kind of task is: what the answer of a row is, and all that follows from it.

To add a kind, write one file beside this one, or in a package of your own with an entry point in the group
"sidestep.kinds". It holds a class with the decorator `@register`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from sidestep.backbone.load import OwnHead
from sidestep.backbone.processors import PairProcessor
from sidestep.backbone.vision_language import SideBySideProcessor
from sidestep.data import (
    Augmentation,
    Collate,
    DataError,
    Fields,
    Generation,
    ImageTransform,
    LabelSpace,
    Separators,
    TableOptions,
    check_fields,
    decoding,
    encode_beside,
    encode_images,
    encode_pictured,
    encode_sounds,
    encode_text,
    few_shot,
    holdout,
    label_space,
    read,
)
from sidestep.data.joins import NOTHING, separators_of
from sidestep.interface.third_parties import import_third_parties
from sidestep.kinds.assess import Assessment
from sidestep.kinds.steps import check_asked, check_modality, views_of, without_bad_files
from sidestep.kinds.task_data import Asked, TaskData
from sidestep.metrics import GREATER_IS_BETTER, ComputeMetrics, Written, of_evaluation, scores
from sidestep.model.attach import Attached
from sidestep.model.heads import HeadConfig

PREDICTION = "prediction"
PROBABILITY = "p_"
OWN = "probability"

UNREAD = ("labels", "length", "row", "target")
"""Columns of encoded rows that no classifier's backbone reads."""

Probabilities = Literal["all", "one", "none"]
"""A column of probabilities for each class, one for that of the prediction, or none."""


class TaskKind(ABC):
    """A kind of task.

    Class attributes:
        name: in options, files and stored tasks.
        answer: what is learned of a row, in words. It may hold "{names}" of the classes.
        metrics: the names of its scores.
        best: which of them chooses the best epoch.
        writes: what of a language model head it needs, where its answers are texts.
        dual: whether it needs a dual encoder of images and texts.
        pictured: whether its rows have a picture and a text. Then it may be on a dual encoder.
        asks: fields of `Asked` that are of this kind alone.
        beside: names of columns of encoded rows, besides `UNREAD`, which no backbone reads: scores and predictions do.
        of_tokens: whether its head reads every token.
        own_head: which head of the backbone's own is trained, where that is asked for.
        smooths: whether the Trainer's label smoothing works with it.
        problem_type: of the config of a backbone whose own head is trained. None: transformers decides.
    """

    name: ClassVar[str]
    answer: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]
    best: ClassVar[str]
    writes: ClassVar[Written | None] = None
    dual: ClassVar[bool] = False
    pictured: ClassVar[bool] = False
    asks: ClassVar[tuple[str, ...]] = ()
    beside: ClassVar[tuple[str, ...]] = ()
    of_tokens: ClassVar[bool] = False
    own_head: ClassVar[OwnHead] = "rows"
    smooths: ClassVar[bool] = False
    problem_type: ClassVar[str | None] = None

    # --- rows --------------------------------------------------------------------------------------------------------

    def read_rows(self, source: str, fields: Fields, options: TableOptions, *, split: str) -> Dataset:
        """The rows of a file, folder or hub id.

        Raises:
            DataError: as `data.read`.
        """
        return read(source, options, split=split)

    def check_columns(self, rows: Dataset, fields: Fields) -> None:
        """Refuse columns that are not there, or that hold something else.

        Raises:
            DataError: as `data.check_fields`.
        """
        check_fields(rows, fields)

    def labels(self, rows: Dataset, fields: Fields) -> LabelSpace:
        """What is to be predicted, by the training rows.

        Raises:
            DataError: as `data.label_space`.
        """
        return label_space(rows, fields.label or "", self.name)

    def labels_asked(self, rows: Dataset, fields: Fields, asked: Asked) -> LabelSpace:
        """As `labels`, where what is predicted also depends on what was asked for."""
        return self.labels(rows, fields)

    def check_asked(self, asked: Asked) -> None:
        """Refuse what was asked for and is of other kinds.

        Raises:
            DataError: saying of which.
        """
        for name in ("answers", "boxes"):
            given = getattr(asked, name)
            if given != getattr(Asked, name) and name not in self.asks:
                takes = " or ".join(kind.name for kind in kinds().values() if name in kind.asks)
                raise DataError(f"{name}={given!r} with kind={self.name!r}: it is for {takes}. Leave it out")

    def stored_labels(self, names: Sequence[str]) -> LabelSpace:
        """What `labels` gave, by the names of classes that a task stores."""
        return LabelSpace(self.name, tuple(names))

    def labels_of(self, preprocessing: Mapping[str, Any]) -> LabelSpace:
        """What `labels_asked` gave, by all that a task stores of how it reads rows."""
        return self.stored_labels(preprocessing["labels"])

    def strata(self, fields: Fields) -> str | None:
        """The column by whose classes held-out rows are drawn. None for a random draw."""
        return fields.label

    def hold_out(self, rows: Dataset, fields: Fields, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """A training and a dev part of the rows.

        Raises:
            DataError: as `data.holdout`.
        """
        return holdout(rows, self.strata(fields), fraction, seed)

    def generation(
        self,
        train: Dataset,
        dev: Dataset,
        fields: Fields,
        processor: Any,
        labels: LabelSpace,
        separators: Separators,
        asked: Asked,
    ) -> tuple[Generation | None, int | None]:
        """How texts are written, where they are, and how many tokens are kept of what is read.

        Raises:
            DataError: if the answers are no texts and it was asked how they are written.
        """
        if asked.max_new_tokens is not None or asked.num_beams != 1:
            writing = " or ".join(name for name, kind in kinds().items() if kind.writes)
            raise DataError(
                f"max_new_tokens and num_beams are for texts that a model writes, but the problem is {self.name!r}: "
                f"leave them out, or choose {writing}"
            )
        return None, asked.max_length

    def encode(
        self,
        rows: Dataset,
        fields: Fields,
        processor: Any,
        labels: LabelSpace | None,
        max_length: int | None,
        augment: Augmentation | None = None,
        *,
        separators: Separators = NOTHING,
    ) -> tuple[Dataset, int]:
        """Rows as a backbone reads them (labels None: without labels), and how many texts or sounds were cut.

        Raises:
            DataError: for unusable columns, cells or labels.
        """
        check_modality(processor, fields)
        if fields.audio is not None:
            return encode_sounds(rows, fields, processor, labels)
        if fields.text is None:
            return encode_images(rows, fields, processor, labels, augment), 0
        if fields.image is not None and isinstance(processor, SideBySideProcessor | PairProcessor):
            found, cut = encode_beside(rows, fields, processor, labels, max_length)
            return decoding(found, processor), cut
        if fields.image is not None:
            return decoding(encode_pictured(rows, fields, processor, labels, max_length)), 0
        return encode_text(rows, fields, processor, labels, max_length, separator=separators.pair)

    def collate(self, fields: Fields, processor: Any) -> Collate:
        """Makes batches of encoded rows with labels."""
        return Collate.of(fields, processor)

    def by_size(self, rows: Dataset) -> NDArray[np.int64]:
        """The places of encoded rows, the longest first: the first of them make the largest batch."""
        if "length" not in rows.column_names:
            return np.arange(len(rows))
        return np.argsort(rows["length"][:])[::-1]

    def prepare(self, train: Dataset, dev: Dataset | None, fields: Fields, processor: Any, asked: Asked) -> TaskData:
        """The rows as a task of this kind reads them. Arguments and errors as of `prepare.prepare`."""
        if fields.label is None:
            raise DataError("no label column: training needs one (--label)")
        check_modality(processor, fields)
        check_asked(processor, asked)
        handling: dict[str, Any] = {}
        for part in (train, dev):
            if part is not None:
                self.check_columns(part, fields)
        if asked.skip_bad_files:
            train, dev, handling["skipped_files"] = without_bad_files(train, dev, fields)
        views = views_of(asked.augment, processor, fields, asked.seed)
        if views is not None:
            processor, handling["augment"], handling["augment_seed"] = views.transform, asked.augment, asked.seed
        if isinstance(processor, ImageTransform):
            handling["transform"] = processor.to_dict()
        if self.writes and fields.files is not None and not (self.writes == "lm" and fields.text and fields.image):
            medium, column = fields.files
            raise DataError(f"kind={self.name!r} is for texts, but {column!r} is named as {medium.name}s: say --text")
        labels = self.labels_asked(train, fields, asked)
        separators = separators_of(asked.separator, processor, kind=self.name, pair=fields.text2 is not None)
        source = f"{len(dev)} rows of their own" if dev is not None else ""
        if dev is None:
            total = len(train)
            train, dev = self.hold_out(train, fields, asked.dev_fraction, asked.seed)
            source = f"{len(dev)} of the {total} training rows, held out (no dev set was given; seed {asked.seed})"
        if asked.shots is not None:
            seed = asked.seed if asked.shots_seed is None else asked.shots_seed
            handling["shots"], handling["shots_seed"] = asked.shots, seed
            train = few_shot(train, fields, asked.shots, seed)
        generation, length = self.generation(train, dev, fields, processor, labels, separators, asked)
        rows, cut = self.encode(train, fields, processor, labels, length, views, separators=separators)
        dev_rows, dev_cut = self.encode(dev, fields, processor, labels, length, separators=separators)
        return TaskData(
            train=rows,
            dev=dev_rows,
            labels=labels,
            fields=fields,
            processor=processor,
            max_length=length,
            truncated=cut + dev_cut,
            dev_source=source,
            collator=self.collate,
            augment=views,
            handling=handling,
            generation=generation,
            separators=separators,
        )

    # --- model -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def head(self, data: TaskData, pool: Any = None) -> HeadConfig | None:
        """The Sidestep head for the data. None: the backbone's own head writes.

        Raises:
            ValueError: for a pool where there is nothing to choose.
        """

    def blank_head(self, outputs: int, pool: Any = None) -> HeadConfig | None:
        """The same without data, for a plan. `outputs` are classes, where there are any.

        Raises:
            ValueError: for a pool where there is nothing to choose.
        """
        raise ValueError(f"kind={self.name!r} has no head that could be planned without data")

    def check(self, model: Attached, batch_size: int) -> None:  # noqa: B027 - most kinds have nothing to refuse
        """Raise `ValueError` if a model or the rows of a batch do not fit."""

    # --- answers and scores ------------------------------------------------------------------------------------------

    def best_by(self, asked: str | None, classes: int) -> str:
        """The score that chooses the best epoch: the one that is asked for, or `best`.

        Raises:
            ValueError: if there is no such score.
        """
        known = self.scored(classes)
        if asked is not None and asked not in known:
            of = f"{'two-class ' if classes == 2 else ''}{self.name}"
            raise ValueError(f"metric={asked!r}: {of} problems have {', '.join(known)}")
        return asked or self.best

    def scored(self, classes: int) -> Sequence[str]:
        """The names of the scores of a task with so many classes."""
        return self.metrics

    def greater_is_better(self, metric: str) -> bool:
        """Whether a larger score is the better one."""
        return GREATER_IS_BETTER.get(metric, True)

    def compute_metrics(self, data: TaskData) -> Callable[[Any], dict[str, float]] | None:
        """What a Trainer scores its evaluation of the dev rows with. None where texts have to be written."""
        return None if self.writes else ComputeMetrics(self.name, data.labels.names or None)

    def assess(
        self, predictions: NDArray[Any], targets: NDArray[Any], names: Sequence[str] | None = None
    ) -> Assessment:
        """The scores of logits, numbers or similarities, and what they are to be compared with."""
        return Assessment(scores=scores(self.name, predictions, targets, names))

    def assess_evaluation(self, evaluation: Any, data: TaskData) -> Assessment:
        """The assessment of what a Trainer's evaluation of the dev rows gave."""
        return self.assess(*of_evaluation(self.name, evaluation), data.labels.names or None)

    @abstractmethod
    def judge(
        self,
        model: Attached,
        encoded: Dataset,
        fields: Fields,
        labels: LabelSpace,
        generation: Generation,
        **how: Any,
    ) -> Assessment:
        """The assessment of a model on encoded rows with labels.

        Args:
            model: with its processor in `extras`.
            encoded: as `encode` gives them.
            fields: the columns that they were made of.
            labels: what the task predicts.
            generation: how texts are written, where they are.
            how: `batch_size`, `workers` and `progress`.
        """

    @abstractmethod
    def predict(
        self,
        model: Attached,
        rows: Dataset,
        fields: Fields,
        labels: LabelSpace,
        probabilities: Probabilities,
        **how: Any,
    ) -> Dataset | dict[str, list[Any]]:
        """Columns for the rows. If answers are no cells of a row, a table of its own."""


Kind = TypeVar("Kind", bound=type[TaskKind])
_REGISTRY: dict[str, TaskKind] = {}


def register(kind: Kind) -> Kind:
    """Class decorator: make a kind of task known under its name.

    Raises:
        ValueError: if the name is taken.
    """
    taken = _REGISTRY.get(kind.name)
    if taken is not None and type(taken).__qualname__ != kind.__qualname__:
        raise ValueError(f"a kind of task named {kind.name!r} is registered already: choose another name")
    _REGISTRY[kind.name] = kind()
    return kind


def kinds() -> Mapping[str, TaskKind]:
    """Every registered kind by name. Modules under the entry point group "sidestep.kinds" are imported first."""
    import_third_parties("sidestep.kinds")
    return dict(_REGISTRY)


OTHER_NAMES = {
    **dict.fromkeys(("token", "ner", "pos", "tagging", "token-classification", "token_classification"), "tokens"),
    **dict.fromkeys(("span", "squad", "qa", "question-answering", "question_answering"), "spans"),
}
"""What others call kinds."""


def kind_named(name: str) -> TaskKind:
    """The kind of this name.

    Raises:
        DataError: for an unknown one.
    """
    known = kinds()
    if name in known:
        return known[name]
    meant = f"{OTHER_NAMES[name]!r} is what you mean. It is one of " if name in OTHER_NAMES else "choose "
    raise DataError(f"kind={name!r}: {meant}{', '.join(known)}")


def targets_of(encoded: Dataset) -> NDArray[Any]:
    """The labels of encoded rows."""
    return np.array(encoded.with_format(None)["labels"][:])
