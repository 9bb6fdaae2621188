"""What other packages add: modules under an entry point group, imported when they are first asked for."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points


@cache
def import_third_parties(group: str) -> None:
    """Import the modules under an entry point group, once in a process: to look them up takes a while."""
    for point in entry_points(group=group):
        point.load()
