"""Versions of what is installed. Imports no torch."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version

VERSION = "0.1.0"
"""Of this package, which also runs from its sources without being installed."""


@cache
def version_of(package: str) -> str | None:
    """The installed version of a package. None if it is not installed, which this one need not be."""
    try:
        return version(package)
    except PackageNotFoundError:
        return VERSION if package == "sidestep" else None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of Python and of packages, by name."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in packages}}
