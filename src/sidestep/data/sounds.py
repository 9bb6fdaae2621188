"""Sounds of a column, decoded as one channel of samples, at the rate of their file or at another one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from math import gcd
from types import ModuleType
from typing import IO, Any

import numpy as np
from datasets import Audio, Dataset
from datasets.utils.file_utils import xopen
from numpy.typing import NDArray

from sidestep.data.media import Medium, name_of, undecoded
from sidestep.data.messages import DataError, listed


@dataclass(frozen=True)
class Sound:
    """A sound of one channel.

    Attributes:
        samples: (samples,) float32.
        rate: samples a second.
    """

    samples: NDArray[np.float32]
    rate: int

    def at(self, rate: int) -> NDArray[np.float32]:
        """(samples,) float32: the samples at another rate, rounded up to a whole number of them."""
        if rate == self.rate:
            return self.samples
        from scipy.signal import resample_poly  # slow to import

        shared = gcd(rate, self.rate)
        found: NDArray[np.float32] = resample_poly(self.samples, rate // shared, self.rate // shared)
        return found.astype(np.float32)


@dataclass(frozen=True)
class Header:
    """What a file says of its sound.

    Attributes:
        samples: of one channel.
        rate: samples a second.
    """

    samples: int
    rate: int

    def at(self, rate: int) -> int:
        """The samples at another rate."""
        return -(-self.samples * rate // self.rate)


def headers(rows: Dataset, column: str) -> list[Header]:
    """What the files of a column say of their sounds. No samples are read.

    Raises:
        DataError: naming the first of those that are no sounds or have no samples.
    """
    found: list[Header] = []
    bad: list[str] = []
    for place, cell in enumerate(undecoded(rows, column)[column]):
        try:
            with _content(cell) as content:
                info = import_soundfile().info(content)
            found.append(Header(info.frames, info.samplerate))
            _refuse_none(info.frames)
        except (OSError, ValueError) as error:
            bad.append(f"{name_of(cell, place)} ({error})")
    if bad:
        raise DataError(
            f"{len(bad)} of {len(rows)} sounds of column {column!r} cannot be read: {listed(bad)}. Replace or drop "
            "them, or leave out all such with --skip-bad-files"
        )
    return found


def import_soundfile() -> ModuleType:
    """The soundfile package.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    try:
        import soundfile
    except (ImportError, OSError) as error:  # the library that it wraps is another file
        raise ModuleNotFoundError(
            f"soundfile cannot be imported ({error}): install the extra with pip install 'sidestep[audio]'"
        ) from error
    return soundfile


@contextmanager
def _content(cell: dict[str, Any]) -> Iterator[IO[bytes]]:
    """A cell's file, opened. What is wrong with it is a ValueError without the name of a Python object."""
    soundfile = import_soundfile()
    try:
        if cell["bytes"] is not None:
            yield BytesIO(cell["bytes"])
            return
        with xopen(cell["path"], "rb") as file:  # a file, or what is in a store
            yield file
    except soundfile.LibsndfileError as error:
        raise ValueError(error.error_string.rstrip(".")) from error


def _mono(cell: dict[str, Any]) -> Sound:
    """The mean of the channels."""
    with _content(cell) as content:
        samples, rate = import_soundfile().read(content, dtype="float32", always_2d=True)
    _refuse_none(len(samples))
    if not np.isfinite(samples).all():
        raise ValueError("it holds samples that are not finite")
    return Sound(samples.mean(axis=1), rate)


def _refuse_none(samples: int) -> None:
    if not samples:
        raise ValueError("it holds no samples")


SOUNDS = Medium(
    name="sound",
    field="audio",
    feature=Audio(decode=False),  # `datasets` decodes with torchcodec, which is not needed here
    extensions=frozenset(
        (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64")
    ),  # of what libsndfile reads
    opened=_mono,
)
"""Decoded as a `Sound`."""
