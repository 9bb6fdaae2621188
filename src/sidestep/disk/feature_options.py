"""Where and how the frozen part of a model is kept. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Where = Literal["auto", "ram", "disk", "off"]
"""Where features are kept: in memory, in a folder, or not at all. auto: where it pays."""
Precision = Literal["same", "bf16"]
"""In which precision: as the blocks gave them, or rounded to bfloat16."""
LIMIT = 50 * 2**30
"""Bytes that features may take, unless it is said otherwise."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Where and how the frozen part is kept.

    Attributes:
        where: see `Where`.
        folder: of "disk". None: `default_folder()`.
        limit: bytes that may be taken: of "disk" by all features in the folder together.
        precision: see `Precision`.

    Raises:
        ValueError: if a value is unknown or out of range.
    """

    where: Where = "off"
    folder: Path | None = None
    limit: int = LIMIT
    precision: Precision = "same"

    def __post_init__(self) -> None:
        for name, value, known in (("features", self.where, Where), ("features_precision", self.precision, Precision)):
            if value not in get_args(known):
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(get_args(known))}")
        if self.limit < 1:
            raise ValueError(f"features_limit={self.limit}, but it must be at least 1 byte")

    @property
    def place(self) -> Path:
        """The folder."""
        return self.folder or default_folder()


def default_folder() -> Path:
    """Where features are stored unless it is said otherwise: `SIDESTEP_FEATURES`, or the user's folder of caches."""
    said = os.environ.get("SIDESTEP_FEATURES")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(said) if said else caches / "sidestep" / "features"
