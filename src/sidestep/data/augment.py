"""Random views of training images, from torchvision and timm.

Which view an image gets depends on the seed, the epoch and the row alone. It does not depend on the order of the rows,
the batch size or the number of processes that load data. A run is therefore reproducible, and a resumed one exact from
any step. The libraries draw from global generators, so those are seeded for each image and put back afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from sidestep.backbone.pixels import ImageTransform, import_transforms
from sidestep.backbone.timm_models import import_timm
from sidestep.data.messages import DataError, listed

Views = Literal["flip", "crop", "randaugment"]
NONE = "none"
RANDAUGMENT = "rand-m9-mstd0.5-inc1"
"""timm's name for two operations of magnitude 9, give or take 0.5, that grow stronger with their magnitude."""
MOVED = 0.45
"""Share of the shorter side by which RandAugment moves an image at most; timm's."""


class Epoch:
    """Which epoch is being trained.

    Copies are the same object: `datasets` copies a transform with the rows that it belongs to.
    """

    def __init__(self) -> None:
        self.number = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Epoch:
        return self


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random views of images, as pixel values.

    Attributes:
        views: "flip": mirrored or not. "crop": a cut of 8 to 100 % of the image with a shape from 3:4 to 4:3, resized,
            and "flip". "randaugment": "crop", and timm's RandAugment of `RANDAUGMENT`.
        transform: of images that are not augmented.
        seed: of the views.
        epoch: the one that is being trained. The trainer sets its number.

    Raises:
        DataError: for other views.
    """

    views: Views
    transform: ImageTransform
    seed: int = 0
    epoch: Epoch = field(default_factory=Epoch, compare=False)

    def __post_init__(self) -> None:
        if self.views not in get_args(Views):
            raise DataError(f"augment={self.views!r}: choose {listed((NONE, *get_args(Views)))}")

    def __call__(self, image: PIL.Image.Image, row: int | None) -> Tensor:
        """(3, rows, columns) of one RGB image.

        Without a row's number the view is drawn from the global generators.
        """
        pipeline = _pipeline(self.views, self.transform)
        if row is None:
            return pipeline(image)
        with _seeded(self.seed, self.epoch.number, row):
            return pipeline(image)


@lru_cache(maxsize=8)
def _pipeline(views: Views, transform: ImageTransform) -> Any:
    v2 = import_transforms()
    if views == "flip":
        return v2.Compose([v2.RandomHorizontalFlip(), *transform.steps()])
    interpolation = v2.InterpolationMode(transform.interpolation)
    steps = [v2.RandomResizedCrop(list(transform.shape), interpolation=interpolation), v2.RandomHorizontalFlip()]
    if views == "randaugment":
        steps.append(_randaugment(transform))
    return v2.Compose([*steps, *transform.finish()])


def _randaugment(transform: ImageTransform) -> Any:
    import_timm()
    from timm.data.auto_augment import rand_augment_transform

    grey = tuple(round(255 * value) for value in transform.mean)
    resampling = PIL.Image.Resampling[transform.interpolation.upper()]
    how = {"translate_const": int(min(transform.shape) * MOVED), "img_mean": grey, "interpolation": resampling}
    return rand_augment_transform(RANDAUGMENT, how)


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators (of the CPU) by these numbers, and put them back."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds the accelerator too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])
