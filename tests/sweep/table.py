"""The section of docs/backbones.md that says what the sweep found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sweep.records import OWN, Record

ORDER = ("wrong", "fails", "refused", "works")


def verdicts(record: Record) -> dict[str, str]:
    """Of each method on a type, the worse of the verdicts with a Sidestep head and with the model's own."""
    found: dict[str, str] = {}
    for name, result in record["methods"].items():
        method = name.removesuffix(OWN)
        found[method] = min(found.get(method, "works"), result["verdict"], key=ORDER.index)
    return found


def write_section(records: Mapping[str, Record]) -> None:
    pass
