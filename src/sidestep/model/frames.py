"""Videos as embeddings: each frame is an image, and a video is the mean of its frames.

Source: Luo et al., "CLIP4Clip: An Empirical Study of CLIP for End to End Video Clip Retrieval", arXiv 2104.08860, in
its form without parameters. As in ArrowLuo/CLIP4Clip the embeddings of frames have length one, and so has their mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sidestep.interface.layers import masked_mean
from sidestep.model.heads import unit


def embed_videos(embed: Callable[[Tensor], Tensor], videos: Tensor, keep: Tensor | None) -> Tensor:
    """The embeddings of videos, of length one.

    Args:
        embed: gives the embeddings (images, dim) of images, of length one.
        videos: (videos, frames, channels, rows, columns).
        keep: (videos, frames) bool, False where a video has no more frames, or None if all have as many.

    Returns:
        (videos, dim).
    """
    # frames that pad a video are embedded too: their number is only known from values, which a plan does not have
    frames = embed(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
    with torch.autocast(frames.device.type, enabled=False):
        return unit(masked_mean(frames, keep))
