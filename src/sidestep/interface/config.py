"""What a method is configured by, and what it says where it cannot work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar

from sidestep.interface.annotations import check_fields, from_fields


class UnsupportedBackbone(ValueError):
    """A method cannot work on this backbone, and the message names both and says why."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Base of every method's config: plain data, checked in `__post_init__`.

    Fields have to be what their annotations say (see `annotations.check_fields`). A subclass checks the ranges.

    Class attributes:
        rates: three learning rates worth trying with AdamW, from low to high.
        rate: the middle one, with which training starts if nobody says.
    """

    rates: ClassVar[tuple[float, float, float]] = (3e-4, 1e-3, 3e-3)
    rate: ClassVar[float] = rates[1]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.rate = cls.rates[1]

    def __post_init__(self) -> None:
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MethodConfig:
        """The config with these fields.

        Raises:
            ValueError: if a field is unknown or out of range.
        """
        return from_fields(cls, values)

    def require(self, name: str, allowed: bool, what: str) -> None:
        """Raise unless `allowed`, saying what the field was given and what it may be."""
        if not allowed:
            raise ValueError(f"{type(self).__name__}: {name}={getattr(self, name)!r}, but it must be {what}")


def spread(depth: int, count: int) -> tuple[int, ...]:
    """So many of `depth` block numbers (at most all), spread evenly, the last one among them."""
    count = min(depth, count)
    return tuple(depth - 1 - (depth * number) // count for number in reversed(range(count)))


def is_ascending(blocks: Sequence[int]) -> bool:
    """Whether there are block numbers, from 0 in order and each once."""
    return bool(blocks) and blocks[0] >= 0 and all(a < b for a, b in pairwise(blocks))
