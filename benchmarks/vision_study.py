"""DTL, DTL+, SynQT and others on three real image tasks with vit-small-32, with equal tuning effort.

    python benchmarks/vision_study.py           # scores, then costs. Continues where it was stopped
    sidestep report benchmarks/results/vision_study.jsonl --output vision_study.html

Tasks: the half of Caltech-101 that the backbone never saw, MNIST, and scikit-learn's digits. Caltech-101 has 50
categories, 10 training and up to 8 other images of each. MNIST has 1,000 training and 400 other images, the digits 400
and 400. Settings: 4 epochs, batch 8, no augmentation, AdamW, 6 % warm-up, linear decay. For every method two rates are
tried on a stratified fifth of the training images. Then it trains on all of these with the better rate and seeds 0 to
2, and is scored after the last epoch. DTL reads the mean before the final norm, as published. DTL+ reads a second time
the class token, which this backbone was trained to be read by. SynQT has a read-out of its own. All others read the
class token.
THREADS sets the number of threads (1).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from torch import Tensor

import sidestep as ss
from image_tasks import IMAGE_TASKS
from sidestep.compare.runs import run
from sidestep.compare.spec import Backbone, Comparison, Contender, Costs, Task
from sidestep.data import Fields
from text_tasks import SHARED

RESULTS = Path(__file__).parent / "results" / "vision_study.jsonl"
SPLITS = {"digits": (40, 40), "mnist": (100, 40), "caltech": (10, 8)}
"""Training and dev images of each class, at most."""


@dataclass(frozen=True, kw_only=True)
class SharedImages(Task):
    """A task of `image_tasks`, its classes in equal parts as far as they reach."""

    def read(self) -> tuple[Dataset, Dataset]:
        """Training and dev images."""
        images, labels = IMAGE_TASKS[self.name]()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        shots, others = SPLITS[self.name]
        rows = [order[labels[order] == label] for label in labels.unique()]
        train, dev = (torch.cat([part[piece] for part in rows]).tolist() for piece in (_to(shots), _to(others, shots)))
        return _rows(images, labels, train), _rows(images, labels, dev)


def _to(count: int, start: int = 0) -> slice:
    return slice(start, start + count)


def _rows(images: Tensor, labels: Tensor, index: Sequence[int]) -> Dataset:
    columns = {"image": [_picture(images[i]) for i in index], "label": [f"class {labels[i]:02d}" for i in index]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": Value("string")}))


def _picture(image: Tensor) -> Pillow.Image:
    """A picture of values in 0 to 1, grey (rows, columns) or (channels, rows, columns)."""
    values = (image if image.ndim == 2 else image.permute(1, 2, 0)).mul(255).round().byte()
    return Pillow.fromarray(np.asarray(values)).convert("RGB")


def contenders() -> tuple[Contender, ...]:
    """The methods that read images, with two rates each."""
    pool = "mean_pre_norm"
    return (
        Contender(name="dtl", config=ss.DTLConfig(), rates=(4e-3, 1.2e-2), pool=pool),
        Contender(name="dtl+", config=ss.DTLConfig(kernel=3), rates=(4e-3, 1.2e-2), pool=pool),
        Contender(name="dtl+, class token", config=ss.DTLConfig(kernel=3), rates=(4e-3, 1.2e-2), pool="cls"),
        Contender(name="synqt", config=ss.SynQTConfig(), rates=(2e-3, 6e-3)),
        Contender(name="read", config=ss.ReadConfig(), rates=(2e-3, 6e-3)),
        Contender(name="probe", config=ss.ProbeConfig(), rates=(1e-2, 3e-2)),
        Contender(name="lora", config=ss.LoraConfig(), rates=(1e-3, 3e-3)),
        Contender(name="bitfit", config=ss.BitFitConfig(), rates=(2e-3, 6e-3)),
        Contender(name="full", config=ss.FullConfig(), rates=(5e-5, 2e-4)),
    )


def study() -> Comparison:
    """What is compared."""
    fields = Fields(image="image", label="label")
    return Comparison(
        backbones=(Backbone(name="vit-small-32", model=str(SHARED.parent / "backbones" / "vit-small-32")),),
        tasks=tuple(SharedImages(name=name, train="", fields=fields, problem="single") for name in SPLITS),
        contenders=contenders(),
        epochs=4,
        batch_size=8,
        costs=Costs(batch=32),
    )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    datasets.disable_progress_bars()
    run(replace(study(), costs=None), RESULTS)
    run(study(), RESULTS)
