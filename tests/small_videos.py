"""Tiny videos, as files and as folders of frames: each frame has a grey of its own, by which it is known again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
import PIL.Image

SIDE = 32
STEP = 8
"""Between the greys of two frames. A codec changes a grey by less than half of it."""


def frame(place: int) -> np.ndarray:
    return np.full((SIDE, SIDE, 3), 8 + STEP * (place % 30), dtype=np.uint8)


def place_of(image: PIL.Image.Image) -> int:
    """Which frame it is."""
    return round((float(np.asarray(image).mean()) - 8) / STEP)


def video(path: Path, frames: int = 20, *, options: Mapping[str, str] | None = None, turned: float = 0) -> Path:
    """A file of so many frames, ten a second. An mp4 says at its beginning how many there are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options={**how, **(options or {})}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.gop_size = 5
        stream.codec_context.thread_count = 2  # else sizes of files depend on how many processors there are
        if turned:
            stream.set_display_rotation(turned)
        for place in range(frames):
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame(place), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def cut(path: Path, share: float) -> Path:
    """The file without its end."""
    content = path.read_bytes()
    path.write_bytes(content[: round(len(content) * share)])
    return path


def folder_of_frames(path: Path, frames: int = 20) -> Path:
    """Frames as images, with numbers in their names that have no leading zeros."""
    path.mkdir(parents=True)
    for place in range(frames):
        PIL.Image.fromarray(frame(place)).save(path / f"frame{place}.png")
    return path
