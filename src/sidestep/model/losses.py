"""Losses of pairs of images and texts."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_SCALE = math.log(100)
"""At which CLIP stops the logarithm of its temperature's inverse."""


def contrastive_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Symmetric cross-entropy of each pair against the batch's others. 0 if there are no others.

    Args:
        logits: (pairs, pairs), of image i and text j.
        same: (pairs, pairs) bool: texts j of the image i, which are no negatives of it.
    """
    negatives = logits.masked_fill(same, torch.finfo(logits.dtype).min)
    right = logits.diagonal()
    texts, images = (F.softplus(negatives.logsumexp(axis) - right).mean() for axis in (1, 0))
    return (texts + images) / 2


def triplet_loss(cosines: Tensor, same: Tensor, margin: float, *, hardest: bool) -> Tensor:
    """How far negatives come within the margin of their pair, image to text plus text to image.

    Args:
        cosines: (pairs, pairs), of image i and text j.
        same: (pairs, pairs) bool: texts j of the image i, which are no negatives of it.
        margin: by which a pair should be ahead.
        hardest: take the mean over pairs of their hardest negative. Else the mean over the negatives that violate it.
    """
    right = cosines.diagonal()
    texts = (margin + cosines - right[:, None]).relu().masked_fill(same, 0)
    images = (margin + cosines - right).relu().masked_fill(same, 0)
    if hardest:
        return texts.amax(1).mean() + images.amax(0).mean()
    of_texts, of_images = (costs.sum() / (costs > 0).sum().clamp(min=1) for costs in (texts, images))
    return of_texts + of_images
