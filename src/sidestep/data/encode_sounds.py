"""Sounds as what a feature extractor makes of them, resampled to its rate.

What an extractor does with long and short sounds is found by giving it noise, as extractors do not say it in one way.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from sidestep.data.encode import Fields, check_fields, targets_of
from sidestep.data.labels import LabelSpace
from sidestep.data.messages import DataError, DataWarning, named_rows
from sidestep.data.sounds import SOUNDS, Header, Sound, headers

MISFITS = (ValueError, TypeError, RuntimeError, AssertionError, IndexError, ZeroDivisionError)
"""What extractors and models raise for sounds that do not fit them."""
LONGEST = 60
"""Seconds of noise that an extractor is given at most, to see where it cuts."""
FINEST = 0.05
"""Seconds at the end of a sound that no extractor has to read: less than a frame."""


def encode_sounds(rows: Dataset, fields: Fields, extractor: Any, labels: LabelSpace | None) -> tuple[Dataset, int]:
    """The rows as what a feature extractor makes of their sounds, decoded and resampled when they are read.

    Args:
        rows: with a column of sounds, or of paths of sounds.
        fields: `audio`. `label` is needed with `labels`.
        extractor: a feature extractor of transformers.
        labels: None to leave the labels out.

    Returns:
        A dataset whose rows hold "input_values" (samples,) or "input_features" (frames, channels), as the extractor
        calls them, with "attention_mask" if it gives one and, with `labels`, "labels". Also "length" in samples at the
        extractor's rate, unless it brings all sounds to one length.
        Second, how many sounds are longer than what the extractor reads.

    Raises:
        DataError: for unusable fields or labels, and files that are not there, no sounds, or too short for the
            extractor. When a row is read, also for a sound that cannot be read, with its file or row.

    Warns:
        DataWarning: if sounds are resampled or cut, with their count.
    """
    check_fields(rows, fields)
    if fields.audio is None:
        raise DataError("fields names no audio column: use encode_text for text and encode_images for images")
    targets, rate = targets_of(rows, fields, labels), extractor.sampling_rate
    encoded = SOUNDS.decoded(rows, fields.audio, extractor.model_input_names[0], _Extract(extractor), targets)
    found = headers(rows, fields.audio)
    _warn_of_rates(found, rate)
    lengths = [one.at(rate) for one in found]
    _refuse_short(lengths, extractor)
    if not has_one_length(extractor):
        return encoded.add_column("length", lengths), 0
    return encoded, _warn_of_cut(lengths, extractor)


def inputs_of(extractor: Any, samples: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """What an extractor makes of one sound at its rate, by name, without the axis of rows."""
    made = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
    return {name: np.asarray(made[name])[0] for name in extractor.model_input_names if name in made}


def noise(samples: int, seed: int = 0) -> NDArray[np.float32]:
    """(samples,): always the same for a seed."""
    return 0.1 * np.random.default_rng(seed).standard_normal(samples, dtype=np.float32)


def least(works: Callable[[int], bool], most: int) -> int:
    """The smallest number from 1 to `most` that works, where all larger ones do too, and `most` is known to."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def refuse_shorter(lengths: Sequence[int], samples: int, rate: int, reader: str, where: str = "") -> None:
    """Refuses sounds with fewer samples, naming their rows."""
    short = [row for row, length in enumerate(lengths) if length < samples]
    if short:
        raise DataError(
            f"{len(short)} of {len(lengths)} sounds are shorter than the {samples} samples ({samples / rate:.3g} "
            f"seconds) that {reader} needs at least, {named_rows(short)}{where}: drop or lengthen them"
        )


@dataclass(frozen=True)
class _Extract:
    extractor: Any

    def __call__(self, sounds: Iterable[Sound], rows: list[int | None]) -> dict[str, list[NDArray[Any]]]:
        made = [inputs_of(self.extractor, sound.at(self.extractor.sampling_rate)) for sound in sounds]
        return {name: [one[name] for one in made] for name in made[0]}


def has_one_length(extractor: Any) -> bool:
    """Whether an extractor brings all sounds to one length."""
    second, name = extractor.sampling_rate, extractor.model_input_names[0]
    half, whole = (inputs_of(extractor, noise(samples))[name].shape for samples in (second // 2, second))
    return half == whole


def _warn_of_rates(found: Sequence[Header], rate: int) -> None:
    others = Counter(one.rate for one in found if one.rate != rate)
    if others:
        told = ", ".join(f"{count} from {given} Hz" for given, count in sorted(others.items()))
        warnings.warn(
            f"{others.total()} of {len(found)} sounds are resampled to the {rate} Hz that the backbone reads: {told}",
            DataWarning,
            stacklevel=3,
        )


def _refuse_short(lengths: Sequence[int], extractor: Any) -> None:
    """Refuses sounds of which an extractor makes nothing: an error, or the same whatever the sound is."""

    def works(samples: int) -> bool:
        try:
            one, other = (inputs_of(extractor, noise(samples, seed)) for seed in (0, 1))
        except MISFITS:
            return False
        name = extractor.model_input_names[0]
        return not np.array_equal(one[name], other[name])

    rate = extractor.sampling_rate
    if lengths and not works(min(lengths)):
        refuse_shorter(lengths, least(works, rate), rate, type(extractor).__name__)


def _warn_of_cut(lengths: Sequence[int], extractor: Any) -> int:
    """How many sounds are longer than what an extractor reads."""
    rate = extractor.sampling_rate
    longest = min(max(lengths, default=0), LONGEST * rate)
    name, fine = extractor.model_input_names[0], round(FINEST * rate)
    whole = inputs_of(extractor, noise(max(longest, rate)))[name]

    def silent_from(samples: int) -> bool:
        """Whether silence from there on changes nothing."""
        silent = noise(max(longest, rate))
        silent[samples:] = 0
        return np.array_equal(inputs_of(extractor, silent)[name], whole)

    if longest <= fine or not silent_from(longest - fine):
        return 0
    limit = least(silent_from, longest - fine)
    cut = sum(length > limit + fine for length in lengths)
    warnings.warn(
        f"{cut} of {len(lengths)} sounds are longer than the {limit / rate:.3g} seconds that "
        f"{type(extractor).__name__} reads, and their ends are left out",
        DataWarning,
        stacklevel=3,
    )
    return cut
