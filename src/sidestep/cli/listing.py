"""`sidestep inspect`, `sidestep methods` and `sidestep recipes`."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from sidestep.cli import options as opt
from sidestep.cli.errors import reporting
from sidestep.console import remark, show_facts, show_table

if TYPE_CHECKING:
    from sidestep.training.recipes import Group

SHOWN = 30


def inspect(task: opt.Task, as_json: opt.AsJson = False, debug: opt.Debug = False) -> None:
    """Show what a task folder holds."""
    with reporting(debug):
        from sidestep.disk.task_folder import inspect_task
        from sidestep.training.notes import NO_NORM

        about = inspect_task(task)
        if as_json:
            print(json.dumps(about, indent=2, ensure_ascii=False))
            return
        show_facts(f"Task {task}", _facts(about))
        rows = [(name, list(part["shape"]), part["dtype"], part["trained"]) for name, part in about["tensors"].items()]
        show_table("Tensors", ("name", "shape", "dtype", "trained"), rows[:SHOWN])
        if len(rows) > SHOWN:
            remark(f"and {len(rows) - SHOWN} more: see --json")
        if "correction" in about["method"]["config"] and _final_norm(about["backbone"]) is False:
            remark(f"note: {about['backbone']['class_name']} {NO_NORM}")


def methods(debug: opt.Debug = False) -> None:
    """List the methods and their settings."""
    with reporting(debug):
        from sidestep.methods import methods as registered

        rows = [
            (name, method.summary, [_setting(field) for field in fields(method.config)])
            for name, method in registered().items()
        ]
        show_table("Methods", ("name", "what it does", "settings (--set)"), rows)


def recipes(prefix: opt.RecipePrefix = "", debug: opt.Debug = False) -> None:
    """List the published recipes, or those below PREFIX with their settings."""
    with reporting(debug):
        from sidestep.training.recipes import groups, load, names

        if not prefix:
            rows: list[Any] = [(group.name, group.title, len(group.recipes)) for group in groups()]
            show_table("Recipes", ("name", "what it is", "recipes"), rows)
            remark("sidestep recipes NAME shows them; sidestep train --recipe NAME/TASK follows one")
            return
        found = [load(name) for name in names(prefix) or (prefix,)]
        columns = ("name", "method", "settings (--set)", "learning rate", "epochs", "weight decay", "drop path")
        rows = []
        for each in found:
            own = (f"{each.training['learning_rate']:g}", each.training["epochs"], each.training["weight_decay"])
            rows.append((each.name, each.method, each.method_settings, *own, each.drop_path))
        show_table("Recipes", columns, rows)
        for group in groups():
            if any(each.name in group.recipes for each in found):
                _show_shared(group)


def _show_shared(group: Group) -> None:
    """What all recipes of a group have in common."""
    first = next(iter(group.recipes.values()))
    shown = ("learning_rate", "epochs", "weight_decay")
    training = {name: value for name, value in first.training.items() if name not in shown}
    facts = {
        "source": first.source,
        "backbone": first.backbone,
        "problem": first.problem or "by the labels",
        "pool": first.pool or ("the method's own" if first.images else "the backbone's own head"),
        "head": first.head,
        "noise of the backbone": first.noise,
        "training": training,
        "images": first.images or "the backbone's own processor",
        "augment": first.augment,
        "max length": first.max_length,
        "frames": first.frames,
    }
    show_facts(f"All of {group.name}", facts)


def _facts(about: dict[str, Any]) -> dict[str, object]:
    from sidestep.measure.memory import format_bytes

    backbone, preprocessing = about["backbone"], about["preprocessing"]
    columns = {name: value for name, value in (preprocessing.get("fields") or {}).items() if value}
    return {
        "method": about["method"]["name"],
        "settings": about["method"]["config"],
        "head": about["head"] or "the backbone's own",
        "attached with": {name: value for name, value in about["attach"].items() if value is not None},
        "backbone": f"{backbone['class_name']} {backbone['id']}".strip(),
        "revision": backbone["revision"],
        "digest": about["digest"],
        "dtype": backbone["dtype"],
        "labels": about["labels"],
        "columns": columns,
        "max length": preprocessing.get("max_length"),
        "padding": preprocessing.get("padding"),
        "problem": preprocessing.get("problem"),
        "writes": preprocessing.get("generation"),
        "separators": {name: repr(text) for name, text in (preprocessing.get("separators") or {}).items() if text},
        "scores": about["scores"],
        "stored values": about["parameters"],
        "weight file": format_bytes(about["bytes"]),
        "all files": format_bytes(sum(about["files"].values())),
        "made with": f"sidestep {about['sidestep']}, format {about['format']}",
    }


def _setting(field: Any) -> str:
    return field.name if field.default is MISSING else f"{field.name}={field.default}"


def _final_norm(backbone: dict[str, Any]) -> bool | None:
    """Whether the backbone's last stack ends in a norm. None if its config cannot be had here."""
    import torch
    from transformers import AutoConfig, AutoModel

    from sidestep.backbone import find_stacks

    try:
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(backbone["id"], revision=backbone["revision"] or "main")
            return find_stacks(AutoModel.from_config(config))[-1].norm is not None
    # a remark is no reason to fail: the backbone may be timm's, elsewhere, or of a later transformers
    except Exception:
        return None
