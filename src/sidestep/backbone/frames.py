"""How videos are read: a number of frames, each of them as an image."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FRAMES = 12
"""Of a video, as CLIP4Clip takes them for clips of up to half a minute."""
VIDEO_AXES = 4
"""Frames, channels, rows, columns. An image has no frames."""
FRAMES_FILE = "frames.json"
OF_A_FRAME = "frame"
"""The folder in which the processor of one frame is stored."""


@dataclass(frozen=True)
class FrameProcessor:
    """Makes pixels of the frames of a video.

    Attributes:
        image: image processor, or an `ImageTransform`.
        frames: how many frames are taken of a video that has so many.

    Raises:
        ValueError: for less than one frame.
    """

    image: Any
    frames: int = FRAMES

    def __post_init__(self) -> None:
        if not isinstance(self.frames, int) or isinstance(self.frames, bool) or self.frames < 1:
            raise ValueError(f"frames={self.frames!r}: give a whole number of at least 1 (--frames)")

    @classmethod
    def of(cls, processor: Any, frames: int | None = None) -> FrameProcessor:
        """The processor of videos for one of images, or the same one for another number of frames."""
        own = processor if isinstance(processor, FrameProcessor) else cls(processor)
        return own if frames is None else cls(own.image, frames)

    def __call__(self, images: Sequence[Any], return_tensors: str = "pt") -> Any:
        """{"pixel_values": (frames, channels, rows, columns)} of PIL images."""
        return self.image(images=images, return_tensors=return_tensors)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the number of frames and the image processor to a folder."""
        self.image.save_pretrained(str(Path(folder) / OF_A_FRAME))
        text = json.dumps({"frames": self.frames}, indent=2) + "\n"
        (Path(folder) / FRAMES_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path, load: Callable[[Path], Any]) -> FrameProcessor:
        """What `save_pretrained` wrote, with the image processor as `load` gives it of its folder."""
        stored = json.loads((Path(folder) / FRAMES_FILE).read_text(encoding="utf-8"))
        return cls(load(Path(folder) / OF_A_FRAME), stored["frames"])
