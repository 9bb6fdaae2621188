"""Small image tasks for the benchmarks: digits, MNIST and the half of Caltech-101 that the shared ViT never saw."""

from __future__ import annotations

import gzip
import zipfile
from collections.abc import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
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


def caltech() -> tuple[Tensor, Tensor]:
    """Up to 40 images of each of the 50 unseen categories (every second one in alphabetical order), 32 px."""
    with zipfile.ZipFile(SHARED / "caltech101" / "caltech101_s112.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[-2] for name in names} - {"BACKGROUND_Google"})[1::2]
        images, labels = [], []
        for label, category in enumerate(classes):
            for name in [name for name in names if name.split("/")[-2] == category][:40]:
                with archive.open(name) as file:
                    picture = ImageOps.fit(Image.open(file).convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)
                images.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255)
                labels.append(label)
    return torch.stack(images), torch.tensor(labels)


IMAGE_TASKS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits": digits, "mnist": mnist, "caltech": caltech}
CLASSES = {"digits": 10, "mnist": 10, "caltech": 50}


def image_examples(backbone: nn.Module, name: str) -> tuple[Examples, Examples]:
    """The class token's taps: 1,000 training images and the rest, by a fixed permutation."""
    images, labels = IMAGE_TASKS[name]()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    taps = record(backbone, _batches(images), pool="cls")
    rows = Examples(taps, labels)
    return rows.pick(order[:TRAIN].tolist()), rows.pick(order[TRAIN:].tolist())


def _batches(images: Tensor) -> Iterator[dict[str, Tensor]]:
    for part in images.split(64):
        images = part if part.ndim == 4 else part[:, None].expand(-1, 3, -1, -1)
        resized = F.interpolate(images, (SIDE, SIDE), mode="bilinear")
        yield {"pixel_values": (resized - 0.5) / 0.5}
