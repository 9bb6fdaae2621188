"""Grounding: the box of what a phrase names in a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from sidestep.backbone.processors import PairProcessor, read_by
from sidestep.backbone.vision_language import crops
from sidestep.data import Augmentation, DataError, Fields, Generation, LabelSpace, Separators, decoding
from sidestep.data.boxes import Boxes, shares_as_corners, sizes_of
from sidestep.data.joins import NOTHING
from sidestep.data.pictured import PIXELS
from sidestep.kinds.assess import Assessment
from sidestep.kinds.base import PREDICTION, Probabilities, register, targets_of
from sidestep.kinds.pictured import Pictured
from sidestep.kinds.running import logits
from sidestep.kinds.task_data import Asked, TaskData
from sidestep.metrics import METRICS, of_evaluation
from sidestep.model.attach import Attached
from sidestep.model.heads import Box
from sidestep.model.side_model import SideModel

ENOUGH = 0.5
"""Intersection over union from which a box counts as found."""


@register
class Grounding(Pictured):
    """A box in pixels of the picture."""

    name = "grounding"
    answer = "the box of what a phrase names in a picture"
    metrics, best = METRICS["grounding"], "accuracy_iou50"
    asks = ("boxes",)

    def labels_asked(self, rows: Dataset, fields: Fields, asked: Asked) -> LabelSpace:
        """A box in the form of the labels."""
        return Boxes(self.name, (), form=asked.boxes)

    def stored_labels(self, names: Sequence[str]) -> LabelSpace:
        """A box by its corners."""
        return Boxes(self.name, tuple(names))

    def labels_of(self, preprocessing: Mapping[str, Any]) -> LabelSpace:
        """A box in the form that the task was trained with."""
        return Boxes(self.name, (), form=preprocessing.get("boxes", "xyxy"))

    def prepare(self, train: Dataset, dev: Dataset | None, fields: Fields, processor: Any, asked: Asked) -> TaskData:
        """As of every kind, for pictures that are read whole.

        Raises:
            DataError: for an image processor that cuts edges off, and for a dual encoder.
        """
        if isinstance(processor, PairProcessor):
            raise DataError(
                "a dual encoder makes one vector of a whole picture before it knows the phrase, and the phrase's "
                "box cannot be read from it. Choose an encoder that reads both together, as ViLT does"
            )
        if read_by(processor) == "both" and crops(processor):
            raise DataError(
                f"{getattr(processor, 'name', type(processor).__name__)} cuts edges off pictures, so boxes "
                "would not be where they are labelled. Turn that off in the backbone's preprocessor_config.json "
                '("do_center_crop": false, with a height and a width as "size")'
            )
        return super().prepare(train, dev, fields, processor, asked)

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
        """Pictures and phrases, with boxes as shares of the pictures' sides."""
        found, cut = super().encode(rows, fields, processor, None, max_length, augment, separators=separators)
        if labels is None:
            return found, cut
        assert isinstance(labels, Boxes)
        shares = labels.shares(rows, fields.label or "", fields.image or "")
        return decoding(found.with_format(None).add_column("labels", shares)), cut

    def head(self, data: TaskData, pool: Any = None) -> Box:
        """Four numbers."""
        return Box(pool=pool)

    def blank_head(self, outputs: int, pool: Any = None) -> Box:
        """Four numbers, however many classes are named."""
        return Box(pool=pool)

    def compute_metrics(self, data: TaskData) -> Callable[[Any], dict[str, float]]:
        """What is made of the intersections over unions."""
        return lambda evaluation: self.assess(*of_evaluation(self.name, evaluation)).scores

    def assess(
        self, predictions: NDArray[Any], targets: NDArray[Any], names: Sequence[str] | None = None
    ) -> Assessment:
        """The share of boxes that are found, and the mean intersection over union, beside those of the mean box.

        Args:
            predictions, targets: (rows, 4) by centre, width and height, as shares of the pictures.
            names: not used.
        """
        targets = np.asarray(targets, dtype=np.float64)
        usual = np.tile(targets.mean(axis=0), (len(targets), 1))
        return Assessment(scores=_scores(np.asarray(predictions), targets), constant=_scores(usual, targets))

    def judge(
        self, model: Attached, encoded: Dataset, fields: Fields, labels: LabelSpace, generation: Generation, **how: Any
    ) -> Assessment:
        """Scores of the boxes."""
        assert isinstance(model, SideModel)
        return self.assess(logits(model, encoded, fields, **how), targets_of(encoded))

    def predict(
        self,
        model: Attached,
        rows: Dataset,
        fields: Fields,
        labels: LabelSpace,
        probabilities: Probabilities,
        **how: Any,
    ) -> dict[str, list[Any]]:
        """Each row's box in pixels of its picture, in the form of the labels."""
        assert isinstance(model, SideModel)
        assert isinstance(labels, Boxes)
        sizes = sizes_of(rows.with_format(None), PIXELS)
        return {PREDICTION: labels.pixels(logits(model, rows, fields, **how), sizes)}


def _scores(boxes: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
    """Accuracy and mean of the intersection over union of boxes (rows, 4) by centre, width and height."""
    from torchvision.ops import box_iou

    # a share of the sides is the same share of pixels, so both have the same intersection over union
    pairs = [torch.from_numpy(shares_as_corners(part.astype(np.float64)))[:, None] for part in (boxes, targets)]
    overlap = box_iou(*pairs)
    return {"accuracy_iou50": float((overlap >= ENOUGH).double().mean()), "mean_iou": float(overlap.mean())}
