"""Versions of what is installed. Imports no torch."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def version_of(package: str) -> str | None:
    """The installed version of a package. None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Versions of Python and of packages, by name."""
    return {"python": platform.python_version(), **{name: version_of(name) for name in packages}}
