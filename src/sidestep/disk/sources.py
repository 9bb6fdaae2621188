"""Where the names of backbones and of rows point on the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidestep.backbone.gguf import gguf_parts, is_gguf
from sidestep.backbone.source import TIMM, VIT


def rows_at(*sources: str | None) -> list[Path]:
    """The files and folders of rows, where a hub id is a path that does not exist."""
    return [Path(source).expanduser() for source in sources if source]


def backbones_at(*names: str | None) -> list[Path]:
    """The folders and weight files of backbones, where a hub id is a path that does not exist."""
    found = (_weights_at(name) for name in names if name)
    return [Path(place).expanduser() for place in found if place]


def _weights_at(name: str) -> str:
    """The path in a backbone's name, or "" where the name has no path."""
    if name.startswith(TIMM):
        return name.partition("@")[2]
    return "/".join(gguf_parts(name)) if is_gguf(name) else name.removeprefix(VIT)


def stored_backbones_at(config: Mapping[str, Any]) -> list[Path]:
    """The same of the backbone that a task's config names."""
    stored = config["backbone"]
    return backbones_at(*(part["id"] for part in (stored, *stored.get("towers", {}).values())))
