"""What a dual encoder says about images and captions: recalls, and what is closest to what."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

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
from sidestep.data.pairs import CollatePairs, captioned, encode_pairs, read_pairs
from sidestep.data.vocabulary import check_tokens
from sidestep.kinds.assess import Assessment
from sidestep.kinds.base import Probabilities, TaskKind, register
from sidestep.kinds.steps import views_of, without_bad_files
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
    loader = DataLoader(encoded, batch_size=batch_size, collate_fn=collate, num_workers=workers)
    parts: dict[str, list[NDArray[Any]]] = {"image_embeds": [], "text_embeds": [], "labels": []}
    model.eval()
    with torch.inference_mode():
        for batch in track(loader, "predicting", console=Console(stderr=True), disable=not progress, transient=True):
            owners = batch.pop("labels")
            out = model(**accepted(model, batch))
            for name, values in (("labels", owners), *out.items()):
                parts[name].append(values.cpu().numpy())
    images, texts, owners = (np.concatenate(values) for values in parts.values())
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
        Rows with "query" ("image" or "text"), "image", "text", "rank" (from 1) and "score" (the cosine).

    Raises:
        DataError: for rows that are no pairs.
    """
    assert fields.image is not None
    rows = captioned(rows, fields)
    length = (model.extras.get("preprocessing") or {}).get("max_length")
    by_text, _ = cosines(model, encode_pairs(rows, fields, model.extras["processor"], length)[0], **how)
    cells = undecoded(rows, fields.image)[fields.image][:]
    images = [cell["path"] or f"image {number + 1}" for number, cell in enumerate(cells)]
    texts = [text for cell in rows[fields.text][:] for text in cell]
    found: dict[str, list[Any]] = {name: [] for name in ("query", "image", "text", "rank", "score")}
    for query, table in (("image", by_text.T), ("text", by_text)):
        for number, line in enumerate(table):
            for rank, other in enumerate(np.argsort(-line, kind="stable")[:top]):
                image, text = (number, other) if query == "image" else (other, number)
                values = (query, images[image], texts[text], rank + 1, float(line[other]))
                for name, value in zip(found, values, strict=True):
                    found[name].append(value)
    return Dataset.from_dict(found)


@register
class Retrieval(TaskKind):
    """Images and captions, which are looked for by each other."""

    name = "retrieval"
    answer = "an image and its captions"
    metrics, best = METRICS["retrieval"], "rsum"
    dual = True

    def read_rows(self, source: str, fields: Fields, options: TableOptions, *, split: str) -> Dataset:
        """One row an image, with all its captions."""
        return read_pairs(source, fields, options, split=split)

    def prepare(
        self, train: Dataset, dev: Dataset | None, fields: Fields, processor: PairProcessor, asked: Asked
    ) -> TaskData:
        """The rows of images and captions. Whole images are held out."""
        separators_of(asked.separator, processor, kind=self.name, pair=False)
        if asked.shots is not None:
            raise DataError(f"shots={asked.shots}: retrieval has no classes. Leave --shots out")
        train, dev = captioned(train, fields), None if dev is None else captioned(dev, fields)
        handling: dict[str, Any] = {}
        if asked.skip_bad_files:
            train, dev, handling["skipped_files"] = without_bad_files(train, dev, fields)
        views = views_of(asked.augment, processor.image, fields, asked.seed)
        if views is not None:
            processor = replace(processor, image=views.transform)
            handling["augment"], handling["augment_seed"] = asked.augment, asked.seed
        if isinstance(processor.image, ImageTransform):
            handling["transform"] = processor.image.to_dict()
        source = "" if dev is None else f"{len(dev)} images of their own"
        if dev is None:
            total = len(train)
            train, dev = holdout(train, None, asked.dev_fraction, asked.seed)
            source = f"{len(dev)} of the {total} images, held out (no dev set was given; seed {asked.seed})"
        handling["images"] = {"train": len(train), "dev": len(dev)}
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

    def head(self, data: TaskData, pool: Any = None) -> Retrieve:
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
