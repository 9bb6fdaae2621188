"""How messages list names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any


def about(seconds: float) -> str:
    """A time as a person says it: "less than 10 s", "about 40 s", "about 4 min", "about 2.5 h"."""
    if seconds < 10:
        return "less than 10 s"
    if seconds < 90:
        return f"about {10 * round(seconds / 10)} s"
    return f"about {round(seconds / 60)} min" if seconds < 90 * 60 else f"about {seconds / 3600:.1f} h"


def counted(number: float, what: str) -> str:
    """A number of things: "1 epoch", "3 epochs"."""
    return f"{number:g} {what}" if number == 1 else f"{number:g} {what}s"


def some(names: Iterable[str], most: int = 4) -> str:
    """The first `most` names and how many more there are. "nothing" if there are no names."""
    every = list(names)
    shown = ", ".join(every[:most]) or "nothing"
    return shown if len(every) <= most else f"{shown} and {len(every) - most} more"


UNITS = {"s": 1, "m": 60, "h": 3600}


def duration_of(text: str) -> float:
    """Seconds of a time such as "90s", "10m" or "1.5h".

    Raises:
        ValueError: if the text is no time.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if found is None or not float(found[1]):
        raise ValueError(f"budget={text!r} is no time: write for example 90s, 10m or 1.5h")
    return float(found[1]) * UNITS[found[2]]


def flat(values: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """Values of nested mappings by names with dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{within}{name}.") if isinstance(value, Mapping) else {f"{within}{name}": value}
    return found
