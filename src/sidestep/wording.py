"""How messages list names."""

from __future__ import annotations

from collections.abc import Iterable


def some(names: Iterable[str], most: int = 4) -> str:
    """The first `most` names and how many more there are; "nothing" if there is none."""
    every = list(names)
    shown = ", ".join(every[:most]) or "nothing"
    return shown if len(every) <= most else f"{shown} and {len(every) - most} more"
