"""Videos of a column, files or folders of frames, of which evenly spread frames are decoded as RGB images.

Source: the frames are those of CLIP4Clip's uniform sampling (Luo et al., arXiv 2104.08860; ArrowLuo/CLIP4Clip).
Differs: they are taken of all frames of a video. The release first keeps one or more frames a second.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset, Video
from datasets.utils.file_utils import xopen

from sidestep.backbone.frames import FRAMES, FrameProcessor
from sidestep.data.augment import Augmentation
from sidestep.data.images import IMAGES
from sidestep.data.media import Medium, is_local, name_of, undecoded
from sidestep.data.messages import DataError, DataWarning, listed

NUMBER = re.compile(r"(\d+)")
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,asf,flv,ogg"
"""Of files that come as bytes. Some of FFmpeg's other formats name further files, which it would open."""
FRAME_PIXELS = 50_000_000
"""Of a frame of such a file. A small file can say that it has very many."""
ROUNDED = 0.1
"""Share of a duration by which a header may be wrong. The last frame may have none."""


def spread(frames: int, count: int) -> list[int]:
    """The places of `count` of so many frames, evenly from the first to the last. All, if there are no more."""
    if frames <= count:
        return list(range(frames))
    places: list[int] = np.linspace(0, frames - 1, num=count, dtype=int).tolist()
    return places


def frames_in(folder: str | Path) -> list[Path]:
    """The images in a folder by name, with numbers in names by their value ("9.png" before "10.png")."""
    files = [file for file in Path(folder).iterdir() if IMAGES.names(file) and not file.name.startswith(".")]
    return sorted(files, key=lambda file: _in_order(file.name))


def import_av() -> ModuleType:
    """The av package (PyAV).

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ModuleNotFoundError(
            f"av (PyAV) cannot be imported ({error}): install the extra with pip install 'sidestep[video]'"
        ) from error
    module: ModuleType = av
    return module


@dataclass(frozen=True)
class Decoded:
    """What was decoded of a video file.

    Attributes:
        frames: PIL images by their place.
        total: how many frames there are, up to the one that cannot be decoded.
        broken: why the next frame cannot be decoded. Empty if the file was read to its end.
    """

    frames: Mapping[int, PIL.Image.Image]
    total: int
    broken: str = ""


def evenly(cell: dict[str, Any], count: int = FRAMES) -> list[PIL.Image.Image]:
    """Up to `count` frames of a video, evenly spread, in RGB. Of a broken file they are of what can be decoded.

    Raises:
        ValueError: if it has no frame.

    Warns:
        DataWarning: if the file is broken, with how many frames were decoded.
    """
    if _is_folder(cell):
        files = frames_in(cell["path"])
        _refuse_none(len(files), "it is a folder without images")
        return [IMAGES.decode({"bytes": None, "path": str(files[place])}, None) for place in spread(len(files), count)]
    with _container(cell) as container:
        likely, _ = _packets(container)
    found = _decoded(cell, spread(likely, count))
    _refuse_none(found.total, found.broken or "it holds no frames")
    places = spread(found.total, count)
    if not found.frames.keys() >= set(places):  # more or fewer frames than packets
        found = _decoded(cell, places)
    if found.broken:
        warnings.warn(
            f"video {cell['path'] or '(no path)'} is broken behind frame {found.total} ({found.broken}): its frames "
            "are taken from what comes before",
            DataWarning,
            stacklevel=2,
        )
    return [found.frames[place] for place in places]


def shape_of(cell: dict[str, Any]) -> tuple[int, int, int]:
    """How many frames a file has, and their width and height, as its header and packets say. Nothing is decoded.

    Raises:
        ValueError: if it cannot be read.
    """
    with _container(cell) as container:
        picture = container.streams.video[0].codec_context
        return _packets(container)[0], picture.width, picture.height


def check_videos(rows: Dataset, column: str) -> None:
    """Refuses videos without a frame. Files are read whole for this, but hardly anything is decoded.

    Args:
        rows: with a column of videos, or of their paths.
        column: its name.

    Raises:
        DataError: naming the first videos that cannot be opened or hold no frames.

    Warns:
        DataWarning: of files that end before their headers say, with their count and their numbers of frames.
    """
    bad, short = [], []
    for place, cell in enumerate(undecoded(rows, column)[column]):
        try:
            if said := _ends_early(cell):
                short.append(f"{name_of(cell, place)} ({said})")
        except VIDEOS.errors as error:
            bad.append(f"{name_of(cell, place)} ({error})")
    if bad:
        raise DataError(
            f"{len(bad)} of {len(rows)} videos of column {column!r} cannot be read: {listed(bad)}. Replace or drop "
            "them, or leave out all such with --skip-bad-files"
        )
    if short:
        warnings.warn(
            f"{len(short)} of {len(rows)} videos of column {column!r} end too early, so their frames are taken from "
            f"what can be decoded: {listed(short)}",
            DataWarning,
            stacklevel=2,
        )


def encode_videos(
    rows: Dataset, column: str, processor: FrameProcessor, augment: Augmentation | None = None
) -> Dataset:
    """The rows as pixel values of frames, decoded and processed when they are read.

    Args:
        rows: with a column of videos, or of their paths.
        column: its name.
        processor: of the frames, and how many there are.
        augment: of training rows: makes the pixel values in the processor's place. All frames of a video get one view.

    Returns:
        A dataset whose rows hold "pixel_values" (frames, channels, rows, columns).

    Raises:
        DataError: as `check_videos`. When a row is read, also for a video that cannot be decoded.

    Warns:
        DataWarning: as `check_videos`.
    """
    VIDEOS.check(rows, column)
    VIDEOS.refuse_absent(rows, column)
    check_videos(rows, column)
    medium = replace(VIDEOS, opened=partial(evenly, count=processor.frames))
    return medium.decoded(rows, column, "pixel_values", _Pixels(processor, augment), None)


@dataclass(frozen=True)
class _Pixels:
    processor: FrameProcessor
    augment: Augmentation | None

    def __call__(self, videos: Iterable[Sequence[PIL.Image.Image]], rows: list[int | None]) -> dict[str, Any]:
        return {"pixel_values": [self._video(frames, row) for frames, row in zip(videos, rows, strict=True)]}

    def _video(self, frames: Sequence[PIL.Image.Image], row: int | None) -> Any:
        if self.augment is None:
            return torch.stack(list(self.processor(frames, return_tensors="pt")["pixel_values"]))
        return torch.stack([self.augment(frame, row) for frame in frames])


def _in_order(name: str) -> list[str | int]:
    """What a name is sorted by: texts and numbers in turns."""
    return [int(part) if place % 2 else part for place, part in enumerate(NUMBER.split(name))]


def _is_folder(cell: Mapping[str, Any]) -> bool:
    return cell["bytes"] is None and os.path.isdir(cell["path"])


def _refuse_none(frames: int, why: str) -> None:
    if not frames:
        raise ValueError(why)


@contextmanager
def _container(cell: Mapping[str, Any]) -> Iterator[Any]:
    """A file, opened. What is wrong with it is a ValueError in the words of FFmpeg."""
    av = import_av()
    with ExitStack() as closed:
        content, given = cell["path"], cell["bytes"] is not None
        if given:
            content = BytesIO(cell["bytes"])
        elif not is_local(content):
            content = closed.enter_context(xopen(content, "rb"))
        only = {"format_whitelist": FORMATS} if given else {}
        try:
            container = closed.enter_context(av.open(content, container_options=only))
            if not container.streams.video:
                raise ValueError("it has no pictures")
            if given:
                container.streams.video[0].codec_context.options = {"max_pixels": str(FRAME_PIXELS)}
            yield container
        except av.FFmpegError as error:
            raise ValueError(error.strerror) from error


def _packets(container: Any) -> tuple[int, float]:
    """How many packets of pictures there are, each of which is a frame as a rule, and the second at which all end."""
    av, count, end, pictures = import_av(), 0, 0.0, container.streams.video[0].index
    with suppress(av.FFmpegError):  # what can be decoded is found by decoding
        for packet in container.demux():
            if packet.size and packet.pts is not None:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            count += packet.size > 0 and packet.stream_index == pictures
    return count, end


def _decoded(cell: Mapping[str, Any], places: Collection[int]) -> Decoded:
    """The frames at these places, and how many there are."""
    av, wanted = import_av(), set(places)
    found: dict[int, PIL.Image.Image] = {}
    total = 0
    with _container(cell) as container:
        try:
            for frame in container.decode(video=0):
                if total in wanted:
                    found[total] = _upright(frame)
                total += 1
        except av.FFmpegError as error:
            return Decoded(found, total, error.strerror)
    return Decoded(found, total)


def _upright(frame: Any) -> PIL.Image.Image:
    """A frame in RGB, turned as its file says."""
    image: PIL.Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _ends_early(cell: Mapping[str, Any]) -> str:
    """How many frames a broken file has, of how many its header names. Empty if it is whole.

    Raises:
        ValueError: if there are no frames.
    """
    if _is_folder(cell):
        _refuse_none(len(frames_in(cell["path"])), "it is a folder without images")
        return ""
    with _container(cell) as container:
        said, seconds = container.streams.video[0].frames, (container.duration or 0) / import_av().time_base
        there, end = _packets(container)
    # some forms name a duration only, which is that of the longest of pictures, sounds and subtitles
    if there and (there >= said if said else end >= seconds * (1 - ROUNDED)):
        return ""
    found = _decoded(cell, ())
    _refuse_none(found.total, found.broken or "it holds no frames")
    return f"{found.total} of {said} frames" if said else f"{found.total} frames in {end:.1f} of {seconds:.1f} seconds"


def _is_there(path: str) -> bool:
    return os.path.isfile(path) or os.path.isdir(path)


VIDEOS = Medium(
    name="video",
    field="video",
    feature=Video(decode=False),  # `datasets` decodes with torchcodec, which is not needed here
    extensions=frozenset(
        (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".ogv", ".3gp")
    ),
    opened=evenly,
    is_there=_is_there,
)
"""Decoded as evenly spread frames, PIL images in RGB."""
