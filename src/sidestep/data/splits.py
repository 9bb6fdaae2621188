"""Which part of a data set is read: the split of a name, or the one whose name means the same."""

import warnings
from collections.abc import Iterable
from pathlib import Path

from sidestep.data.messages import DataError, DataWarning, listed

SYNONYMS = (("train", "training"), ("validation", "valid", "val", "dev"), ("test", "testing"))
"""Names of splits; those of one row mean the same."""


def chosen_split(there: Iterable[str], wanted: str, source: str | Path) -> str:
    """The split of that name, or the only one whose name means the same.

    Args:
        there: the splits that the source has.
        wanted: the name that was asked for.
        source: of the splits, as a message names it.

    Raises:
        DataError: if no split, or more than one, is meant. It names those that are there.

    Warns:
        DataWarning: if a split of another name is read.
    """
    names = list(there)
    if wanted in names:
        return wanted
    meant = [name for name in names if _meaning(name) == _meaning(wanted)]
    if len(meant) != 1:
        said = f", and {listed(meant)} may all be meant" if meant else ""
        raise DataError(
            f"{source} has no split {wanted!r}: its splits are {listed(names, limit=20)}{said}: name one of them "
            "(--split, --train-split or --dev-split)"
        )
    warnings.warn(
        f"{source} has no split {wanted!r}, so its split {meant[0]!r} is read (splits: {listed(names, limit=20)})",
        DataWarning,
        stacklevel=2,
    )
    return meant[0]


def is_split_name(name: str) -> bool:
    """Whether a folder of that name is a split, as far as a name can tell."""
    return any(_meaning(name) == row[0] for row in SYNONYMS)


def _meaning(name: str) -> str:
    """The first of the names that mean the same, where upper and lower case do not differ."""
    plain = name.casefold()
    return next((row[0] for row in SYNONYMS if plain in row), plain)
