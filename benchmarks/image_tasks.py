"""Small image tasks for the benchmarks: scikit-learn's digits and MNIST's test set, with the shared ViT."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from study import Examples
from taps import record
from text_tasks import SHARED

SIDE, TRAIN = 32, 1000


def vision_backbone() -> nn.Module:
    """The shared ViT (32 px, patch 4, width 192, 8 layers)."""
    return AutoModel.from_pretrained(SHARED.parent / "backbones" / "vit-small-32", add_pooling_layer=False)


def digits() -> tuple[Tensor, Tensor]:
    """(1797, 8, 8) images in 0 to 1, and their classes."""
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target)


def mnist() -> tuple[Tensor, Tensor]:
    """3,000 of MNIST's test images (28 px) in 0 to 1, and their classes."""
    with gzip.open(SHARED / "mnist10k" / "t10k-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(SHARED / "mnist10k" / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.tensor(images[:3000], dtype=torch.float32) / 255, torch.tensor(labels[:3000], dtype=torch.long)


IMAGE_TASKS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits": digits, "mnist": mnist}


def image_examples(backbone: nn.Module, name: str) -> tuple[Examples, Examples]:
    """The class token's taps: 1,000 training images and the rest, by a fixed permutation."""
    images, labels = IMAGE_TASKS[name]()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    taps = record(backbone, _batches(images), pool="cls")
    rows = Examples(taps, labels)
    return rows.pick(order[:TRAIN].tolist()), rows.pick(order[TRAIN:].tolist())


def _batches(images: Tensor) -> Iterator[dict[str, Tensor]]:
    for part in images.split(64):
        resized = F.interpolate(part[:, None], (SIDE, SIDE), mode="bilinear").expand(-1, 3, -1, -1)
        yield {"pixel_values": (resized - 0.5) / 0.5}
