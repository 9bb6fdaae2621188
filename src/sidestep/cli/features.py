"""`sidestep features`: what is stored of frozen blocks, so that they run once."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting
from sidestep.console import remark, show_table

if TYPE_CHECKING:
    from sidestep.disk.features import FeatureStore

features = typer.Typer(name="features", help="What frozen blocks computed, kept in a folder.", no_args_is_help=True)


@features.command("list")
def list_(folder: opt.FeaturesFolder = None, as_json: opt.AsJson = False, debug: opt.Debug = False) -> None:
    """List what is stored, and what it takes on the disk."""
    with reporting(debug):
        from sidestep.measure.memory import format_bytes

        store = _open(folder)
        found = sorted(store.stored(), key=lambda entry: -entry.used)
        if as_json:
            print(json.dumps([asdict(entry) for entry in found], indent=2, ensure_ascii=False))
            return
        rows = []
        for entry in found:
            key = entry.key or {}
            day = time.strftime("%Y-%m-%d", time.localtime(entry.used))
            about = (key.get("model", "cannot be read"), str(key.get("tokens", "")), str(key.get("precision", "")))
            rows.append((entry.name[:8], *about, str(entry.rows), format_bytes(entry.size), day))
        total = format_bytes(sum(entry.size for entry in found))
        show_table(
            f"{store.folder}: {total}", ("name", "backbone", "tokens", "precision", "rows", "size", "last used"), rows
        )


@features.command()
def clear(
    folder: opt.FeaturesFolder = None,
    names: opt.FeaturesNames = None,
    debug: opt.Debug = False,
) -> None:
    """Remove what is stored. A run that needs it computes it again."""
    with reporting(debug):
        from sidestep.measure.memory import format_bytes

        store = _open(folder)
        chosen = None
        if names:
            known = [entry.name for entry in store.stored()]
            chosen = [full for name in names for full in known if full.startswith(name)]
            if lacking := [name for name in names if not any(full.startswith(name) for full in known)]:
                raise ValueError(f"nothing is stored under {', '.join(lacking)}: see `sidestep features list`")
        remark(f"{format_bytes(store.clear(chosen))} removed from {store.folder}")


def _open(folder: Path | None) -> FeatureStore:
    """The store in a folder that is there.

    Raises:
        ValueError: if it is not.
    """
    from sidestep.disk.feature_options import LIMIT, default_folder
    from sidestep.disk.features import FeatureStore

    place = folder or default_folder()
    if not place.is_dir():
        raise ValueError(f"there are no features in {place}: `sidestep train --features disk` stores some")
    return FeatureStore(place, LIMIT)
