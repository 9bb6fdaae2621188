"""Rows of a user's data as a task's training and dev sets, the same way in training and afterwards."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from datasets import Dataset, LargeList, List
from transformers import PreTrainedTokenizerBase

from sidestep.backbone.processors import PairProcessor
from sidestep.data import (
    Augmentation,
    Collate,
    CollateWritten,
    DataError,
    Fields,
    Generation,
    ImageTransform,
    Kind,
    LabelSpace,
    Separators,
    TableOptions,
    check_fields,
    drop_unreadable,
    encode_images,
    encode_prompts,
    encode_targets,
    encode_text,
    few_shot,
    holdout,
    label_space,
    prompt_limit,
    read,
    with_targets,
)
from sidestep.data.augment import NONE
from sidestep.data.joins import NOTHING, separators_of, warn_of_glued
from sidestep.data.labels import KINDS
from sidestep.data.pairs import CollatePairs, captioned, encode_pairs, read_pairs
from sidestep.metrics import WRITTEN, Written

REFUSED = ("token", "tokens", "ner", "tagging", "token-classification", "token_classification")


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """What a task is trained and chosen on.

    Attributes:
        train, dev: encoded rows with "labels".
        labels: what is predicted.
        fields: the columns that were read.
        processor: tokenizer or image processor.
        max_length: tokens kept of a text (of a prompt); None: the tokenizer's limit.
        truncated: texts that were cut, of train and dev together.
        dev_source: in words, where the dev rows come from.
        augment: of the training images; None: they are read as those of dev.
        handling: what was asked for of the rows besides: shots, views of images, bad images left out, a transform in
            the place of the backbone's processor; with seeds and counts, as JSON-ready values.
        generation: how texts are written; None: the task is no such.
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
    augment: Augmentation | None = None
    handling: Mapping[str, Any] = field(default_factory=dict)
    generation: Generation | None = None
    separators: Separators = NOTHING

    @property
    def collate(self) -> Collate:
        """Makes batches of these rows."""
        return collator(self.fields, self.processor, self.labels.kind)

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
        if self.generation is not None:
            stored["generation"] = asdict(self.generation)
        if self.separators != NOTHING:
            stored["separators"] = asdict(self.separators)
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
    max_new_tokens: int | None = None,
    num_beams: int = 1,
    separator: str | None = None,
) -> TaskData:
    """The rows as a task reads them.

    Args:
        train: as `data.read` gives them.
        dev: None: a share of the training rows is held out.
        fields: text (and text2) or image, and label (of a text to write, the text).
        processor: tokenizer or image processor of the backbone, or an `ImageTransform`; a `PairProcessor` for
            retrieval, whose rows are images and captions.
        kind: None: several labels a row where the column holds lists, else one; a number or a text to write has to be
            asked for.
        max_length: tokens kept of a text; of a decoder's prompt and completion together.
        dev_fraction: share of the training rows that is held out where there is no dev set.
        seed: of that choice, and of the views of images.
        shots: training rows of each class, drawn from those that are not held out; None: all.
        shots_seed: of the draw; None: `seed`.
        augment: random views of the training images, see `Augmentation`; "none" for none.
        skip_bad_images: whether images that cannot be read are left out; each is decoded once to know.
        max_new_tokens: that are written at most; None: as many as the longest target of the training rows has.
        num_beams: of beam search, where texts are written.
        separator: put between the two texts of a pair, and between a decoder's prompt and its answer. None: between
            the texts of a pair a newline where the tokenizer puts nothing there; "": nothing anywhere.

    Raises:
        DataError: for unusable columns or labels, dev labels that training never had, a backbone for images
            with a column of text, or the reverse; a class with fewer rows than shots; completions that do not fit; a
            separator where there is nothing to separate.
        ValueError: for a processor whose images cannot be augmented.

    Warns:
        DataWarning: if images were left out, a separator is dropped by the tokenizer, or answers stand behind their
            prompts without white space.
    """
    if kind == "retrieval":
        separators_of(separator, processor, kind=kind, pair=False)
        if shots is not None:
            raise DataError(f"shots={shots}: retrieval has no classes; leave --shots out")
        return _prepare_pairs(train, dev, fields, processor, max_length, dev_fraction, seed, augment, skip_bad_images)
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
    if written_kind(kind) and fields.image is not None:
        raise DataError(f"problem={kind!r} is for texts, but {fields.image!r} is named as images: say --text")
    labels = label_space(train, fields.label, kind or guess_kind(train, fields.label))
    separators = separators_of(separator, processor, kind=labels.kind, pair=fields.text2 is not None)
    source = f"{len(dev)} rows of their own" if dev is not None else ""
    if dev is None:
        total = len(train)
        train, dev = holdout(train, strata(labels.kind, fields), dev_fraction, seed)
        source = f"{len(dev)} of the {total} training rows, held out (no dev set was given; seed {seed})"
    if shots is not None:
        handling["shots"], handling["shots_seed"] = shots, seed if shots_seed is None else shots_seed
        train = few_shot(train, fields, shots, handling["shots_seed"])
    generation = None
    if labels.kind in WRITTEN:
        if labels.kind == "lm" and separator is None:
            prompts = train.with_format(None)[fields.text2 or fields.text or ""][:]
            warn_of_glued(prompts, labels.encode(train, fields.label), processor)
        parts = [_targets(part, fields, processor, labels, separators) for part in (train, dev)]
        longest = max(map(len, parts[0])) if max_new_tokens is None else max_new_tokens
        generation = Generation(max_new_tokens=longest, num_beams=num_beams)
        if labels.kind == "lm":
            both, pair = [*parts[0], *parts[1]], fields.text2 is not None
            max_length = prompt_limit(processor, max_length, both, generation.max_new_tokens, pair=pair)
    elif max_new_tokens is not None or num_beams != 1:
        raise DataError(
            f"max_new_tokens and num_beams are for texts that a model writes, but the problem is {labels.kind!r}: "
            f"leave them out, or choose {' or '.join(WRITTEN)}"
        )
    rows, cut = encode(train, fields, processor, labels, max_length, views, separators=separators)
    dev_rows, dev_cut = encode(dev, fields, processor, labels, max_length, separators=separators)
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
        generation=generation,
        separators=separators,
    )


def _prepare_pairs(
    train: Dataset,
    dev: Dataset | None,
    fields: Fields,
    processor: PairProcessor,
    max_length: int | None,
    dev_fraction: float,
    seed: int,
    augment: str,
    skip_bad_images: bool,
) -> TaskData:
    """The rows of images and captions; what is held out is whole images."""
    train, dev = captioned(train, fields), None if dev is None else captioned(dev, fields)
    handling: dict[str, Any] = {}
    if skip_bad_images:
        train, dev, handling["skipped_images"] = _without_bad_images(train, dev, fields)
    views = _views(augment, processor.image, fields, seed)
    if views is not None:
        processor = replace(processor, image=views.transform)
        handling["augment"], handling["augment_seed"] = augment, seed
    if isinstance(processor.image, ImageTransform):
        handling["transform"] = processor.image.to_dict()
    source = "" if dev is None else f"{len(dev)} images of their own"
    if dev is None:
        total = len(train)
        train, dev = holdout(train, None, dev_fraction, seed)
        source = f"{len(dev)} of the {total} images, held out (no dev set was given; seed {seed})"
    handling["images"] = {"train": len(train), "dev": len(dev)}
    rows, cut = encode_pairs(train, fields, processor, max_length, views)
    dev_rows, dev_cut = encode_pairs(dev, fields, processor, max_length)
    return TaskData(
        train=rows,
        dev=dev_rows,
        labels=LabelSpace("retrieval", ()),
        fields=replace(fields, label=None),
        processor=processor,
        max_length=max_length,
        truncated=cut + dev_cut,
        dev_source=source,
        augment=views,
        handling=handling,
    )


def read_rows(source: str, fields: Fields, options: TableOptions, kind: Kind | None, *, split: str) -> Dataset:
    """The rows of a file, folder or hub id; of retrieval one row an image, with all its captions.

    Raises:
        DataError: as `data.read` and `data.pairs.captioned`.
    """
    if kind == "retrieval":
        return read_pairs(source, fields, options, split=split)
    return read(source, options, split=split)


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
    if problem is None or problem in KINDS:
        return problem
    if problem in REFUSED:
        raise DataError(f"problem={problem!r}: token classification is not supported yet; choose {', '.join(KINDS)}")
    raise DataError(f"problem={problem!r}: choose {', '.join(KINDS)}")


def written_kind(kind: Kind | None) -> Written | None:
    """The kind if its answers are texts that the model writes, else None."""
    return next((written for written in WRITTEN if written == kind), None)


def strata(kind: Kind | None, fields: Fields) -> str | None:
    """The column by whose classes held-out rows are drawn; None for a random draw, as texts are no classes."""
    return None if written_kind(kind) else fields.label


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
    *,
    separators: Separators = NOTHING,
) -> tuple[Dataset, int]:
    """Rows as a backbone reads them (labels None: without labels), and how many texts were cut.

    Raises:
        DataError: as `encode_text`, `encode_images`, `encode_prompts` and `encode_targets`.
    """
    if fields.image is not None:
        return encode_images(rows, fields, processor, labels, augment), 0
    if labels is None or (kind := written_kind(labels.kind)) is None:
        return encode_text(rows, fields, processor, labels, max_length, separator=separators.pair)
    prompts, cut = encode_prompts(rows, fields, processor, kind, max_length, separators)
    texts = labels.encode(rows, fields.label or "")
    return with_targets(prompts, texts, _targets(rows, fields, processor, labels, separators), processor), cut


def collator(fields: Fields, processor: Any, kind: Kind) -> Collate:
    """Makes batches of encoded rows with labels."""
    if kind == "retrieval":
        return CollatePairs(processor.text)
    if (written := written_kind(kind)) is not None:
        return CollateWritten(processor, padding_side="right" if written == "lm" else None, kind=written)
    return Collate(processor if fields.text is not None else None)


def prompt_collator(processor: Any, kind: Written) -> Collate:
    """Makes batches of encoded prompts to write after: a decoder's end where the written text begins."""
    return Collate(processor, padding_side="left" if kind == "lm" else None)


def stored_fields(preprocessing: Mapping[str, Any]) -> Fields:
    """The columns that a saved task was trained on.

    Raises:
        DataError: if the task does not say.
    """
    if "fields" not in preprocessing:
        raise DataError("this task does not say which columns it reads: name them (--text or --image)")
    return Fields(**preprocessing["fields"])


def chosen_fields(preprocessing: Mapping[str, Any], given: Fields) -> Fields:
    """The columns that a saved task was trained on, with those that a user names in their place.

    Raises:
        DataError: if the task does not say, and neither a text nor an image is named.
    """
    named = {name: column for name, column in asdict(given).items() if column is not None}
    known = "fields" in preprocessing or (given.text is None and given.image is None)
    return replace(stored_fields(preprocessing) if known else Fields(), **named)


def stored_generation(preprocessing: Mapping[str, Any]) -> Generation:
    """How a saved task's texts are written; the defaults where the task does not say."""
    return Generation(**preprocessing.get("generation", {}))


def stored_separators(preprocessing: Mapping[str, Any]) -> Separators:
    """What stands between a saved task's texts; nothing where it does not say, as tasks of earlier versions do not."""
    return Separators(**preprocessing.get("separators", {}))


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


def _targets(
    rows: Dataset, fields: Fields, tokenizer: Any, labels: LabelSpace, separators: Separators
) -> list[list[int]]:
    column, kind = fields.label or "", written_kind(labels.kind)
    assert kind is not None
    return encode_targets(labels.encode(rows, column), tokenizer, kind, column, start=separators.answer_start)


def _views(augment: str, processor: Any, fields: Fields, seed: int) -> Augmentation | None:
    if augment == NONE:
        return None
    if fields.image is None:
        raise DataError(f"augment={augment!r} is for images, but a column of text is read: leave --augment out")
    # ignored: a text may be other views, which Augmentation refuses
    return Augmentation(views=augment, transform=ImageTransform.of(processor), seed=seed)  # type: ignore[arg-type]


def _number(cell: Any) -> float | None:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _first_broken(numbers: list[float]) -> float:
    return next(number for number in numbers if not number.is_integer())
