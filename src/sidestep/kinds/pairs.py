"""What a dual encoder says about images or videos and captions: recalls, and what is closest to what.

What is said of images here is true of videos too.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Subset

from sidestep import ranks
from sidestep.backbone.frames import FrameProcessor
from sidestep.backbone.processors import PairProcessor
from sidestep.data import (
    Augmentation,
    DataError,
    Fields,
    Generation,
    ImageTransform,
    LabelSpace,
    Separators,
    TableOptions,
    holdout,
)
from sidestep.data.joins import NOTHING, separators_of
from sidestep.data.media import undecoded
from sidestep.data.pairs import CollatePairs, captioned, encode_pairs, looked_for, read_pairs
from sidestep.data.vocabulary import check_tokens
from sidestep.kinds.assess import Assessment
from sidestep.kinds.base import Probabilities, TaskKind, register, targets_of
from sidestep.kinds.steps import refuse_frames, views_of, without_bad_files
from sidestep.kinds.task_data import Asked, TaskData
from sidestep.measure.step import accepted
from sidestep.metrics import METRICS, scores, similarities
from sidestep.model.attach import Attached
from sidestep.model.heads import Retrieve
from sidestep.model.pair_model import PairModel

TOP = 5
"""How many neighbours a table of predictions names."""


def cosines(
    model: Attached, encoded: Dataset, *, batch_size: int = 64, workers: int = 0, progress: bool = False
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Similarities (captions, images) and the number of each caption's image (captions,).

    Args:
        model: with a `PairProcessor` as `extras["processor"]`.
        encoded: as `encode_pairs` gives them.
        batch_size: pairs of one pass. An image stands in it once.
        workers: processes that load data.
        progress: whether a bar is shown.

    Raises:
        DataError: if the model is no dual encoder, or has no embeddings for tokens of the captions.
    """
    if not isinstance(model, PairModel):
        raise DataError(f"retrieval needs a dual encoder, but the task is on {type(model.backbone).__name__}")
    check_tokens(model.text.backbone, encoded, model.extras["processor"].text)
    collate = CollatePairs(model.extras["processor"].text)
    if len(encoded) < ranks.count():
        raise DataError(f"{len(encoded)} captions for {ranks.count()} processes: start at most {len(encoded)}")
    # in one piece, so that an image stands in a batch with all its captions
    low, high = (len(encoded) * (ranks.rank() + end) // ranks.count() for end in (0, 1))
    rows, size = Subset(encoded, range(low, high)), ranks.share(batch_size)
    loader = DataLoader(rows, batch_size=size, collate_fn=collate, num_workers=workers)
    parts: dict[str, list[NDArray[Any]]] = {"image_embeds": [], "text_embeds": [], "labels": []}
    model.eval()
    with torch.inference_mode():
        hidden = not progress or not ranks.is_first()
        for batch in track(loader, "predicting", console=Console(stderr=True), disable=hidden, transient=True):
            owners = batch.pop("labels")
            out = model(**accepted(model, batch))
            for name, values in (("labels", owners), *out.items()):
                parts[name].append(values.cpu().numpy())
    images, texts, owners = (np.concatenate(ranks.each(partial(np.concatenate, values))) for values in parts.values())
    return similarities(images, texts, owners)


def recalls(model: Attached, encoded: Dataset, **how: Any) -> dict[str, float]:
    """Recalls in both directions, and their sum (see `metrics.scores`). Arguments as of `cosines`."""
    return scores("retrieval", *cosines(model, encoded, **how))


def neighbours(model: Attached, rows: Dataset, fields: Fields, *, top: int = TOP, **how: Any) -> Dataset:
    """The captions closest to each image, then the images closest to each caption, best first.

    Args:
        model: as of `cosines`, as are further arguments.
        rows: images and captions.
        fields: their columns.
        top: how many are named for each.

    Returns:
        Rows with "query" ("image" or "text"), "image", "text", "rank" (from 1) and "score" (the cosine). Of videos
        "video" stands in the place of "image".

    Raises:
        DataError: for rows that are no pairs.
    """
    medium, column = looked_for(fields)
    rows, kind = captioned(rows, fields), medium.field
    length = (model.extras.get("preprocessing") or {}).get("max_length")
    by_text, _ = cosines(model, encode_pairs(rows, fields, model.extras["processor"], length)[0], **how)
    cells = undecoded(rows, column)[column][:]
    images = [cell["path"] or f"{medium.name} {number + 1}" for number, cell in enumerate(cells)]
    texts = [text for cell in rows.with_format(None)[fields.text][:] for text in cell]
    found: dict[str, list[Any]] = {name: [] for name in ("query", kind, "text", "rank", "score")}
    for query, table in ((kind, by_text.T), ("text", by_text)):
        for number, line in enumerate(table):
            for rank, other in enumerate(np.argsort(-line, kind="stable")[:top]):
                image, text = (other, number) if query == "text" else (number, other)
                values = (query, images[image], texts[text], rank + 1, float(line[other]))
                for name, value in zip(found, values, strict=True):
                    found[name].append(value)
    return Dataset.from_dict(found)


@register
class Retrieval(TaskKind):
    """Images (or videos) and captions, which are looked for by each other."""

    name = "retrieval"
    answer = "an image or a video and its captions"
    metrics, best = METRICS["retrieval"], "rsum"
    dual = True

    def read_rows(self, source: str, fields: Fields, options: TableOptions, *, split: str) -> Dataset:
        """One row an image, with all its captions."""
        return read_pairs(source, fields, options, split=split)

    def prepare(
        self, train: Dataset, dev: Dataset | None, fields: Fields, processor: PairProcessor, asked: Asked
    ) -> TaskData:
        """The rows of images and captions. Whole images are held out."""
        medium, _ = looked_for(fields)
        separators_of(asked.separator, processor, kind=self.name, pair=False)
        if asked.shots is not None:
            raise DataError(f"shots={asked.shots}: retrieval has no classes. Leave --shots out")
        if fields.video is None:
            refuse_frames(asked)
        train, dev = captioned(train, fields), None if dev is None else captioned(dev, fields)
        handling: dict[str, Any] = {}
        frames = FrameProcessor.of(processor.image, asked.frames)
        processor = replace(processor, image=frames.image)
        if asked.skip_bad_files:
            train, dev, handling["skipped_files"] = without_bad_files(train, dev, fields)
        views = views_of(asked.augment, processor.image, fields, asked.seed)
        if views is not None:
            processor = replace(processor, image=views.transform)
            handling["augment"], handling["augment_seed"] = asked.augment, asked.seed
        if isinstance(processor.image, ImageTransform):
            handling["transform"] = processor.image.to_dict()
        if fields.video is not None:
            processor = replace(processor, image=replace(frames, image=processor.image))
            handling["frames"] = frames.frames
        many = f"{medium.name}s"
        source = "" if dev is None else f"{len(dev)} {many} of their own"
        if dev is None:
            total = len(train)
            train, dev = holdout(train, None, asked.dev_fraction, asked.seed)
            source = f"{len(dev)} of the {total} {many}, held out (no dev set was given; seed {asked.seed})"
        handling[many] = {"train": len(train), "dev": len(dev)}
        rows, cut = encode_pairs(train, fields, processor, asked.max_length, views)
        dev_rows, dev_cut = encode_pairs(dev, fields, processor, asked.max_length)
        return TaskData(
            train=rows,
            dev=dev_rows,
            labels=LabelSpace(self.name, ()),
            fields=replace(fields, label=None),
            processor=processor,
            max_length=asked.max_length,
            truncated=cut + dev_cut,
            dev_source=source,
            collator=self.collate,
            augment=views,
            handling=handling,
        )

    def encode(
        self,
        rows: Dataset,
        fields: Fields,
        processor: PairProcessor,
        labels: LabelSpace | None,
        max_length: int | None,
        augment: Augmentation | None = None,
        *,
        separators: Separators = NOTHING,
    ) -> tuple[Dataset, int]:
        """A row for each caption, with its image."""
        return encode_pairs(captioned(rows, fields), fields, processor, max_length, augment)

    def collate(self, fields: Fields, processor: PairProcessor) -> CollatePairs:
        """An image stands in a batch once."""
        return CollatePairs(processor.text)

    def by_size(self, rows: Dataset) -> NDArray[np.int64]:
        """The longest captions first, one of each image before a second of any."""
        order = super().by_size(rows)
        _, first = np.unique(targets_of(rows)[order], return_index=True)
        later = np.ones(len(order), dtype=bool)
        later[first] = False
        return order[np.argsort(later, kind="stable")]

    def head(self, data: TaskData, pool: Any = None) -> Retrieve:
        """An embedding for each tower."""
        return Retrieve(pool=pool)

    def blank_head(self, outputs: int, pool: Any = None) -> Retrieve:
        """An embedding for each tower."""
        return Retrieve(pool=pool)

    def check(self, model: Attached, batch_size: int) -> None:
        """Refuse batches without negatives."""
        if batch_size < 2:
            raise ValueError(
                f"batch_size={batch_size} for retrieval: the other pairs of a batch are the negatives, so there "
                "have to be at least 2"
            )

    def judge(
        self, model: Attached, encoded: Dataset, fields: Fields, labels: LabelSpace, generation: Generation, **how: Any
    ) -> Assessment:
        """Recalls in both directions."""
        return Assessment(scores=recalls(model, encoded, **how))

    def predict(
        self,
        model: Attached,
        rows: Dataset,
        fields: Fields,
        labels: LabelSpace,
        probabilities: Probabilities,
        **how: Any,
    ) -> Dataset:
        """What is closest to each image and each caption."""
        return neighbours(model, rows, fields, **how)
