"""The README.md of a task folder: what the task is, its scores, and how to predict with it from Python."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidestep.backbone.pixels import IMAGE_TRANSFORM
from sidestep.backbone.quantised import format_text
from sidestep.backbone.source import PROCESSOR_FILES, TOKENIZER_FILES, Reads, read_by_files
from sidestep.disk.atomic import whole

CARD = "README.md"
OURS = "library_name: sidestep"
EXAMPLES = {
    "text": "a text",
    "text2": "a second text",
    "image": "photo.jpg",
    "audio": "speech.wav",
    "video": "clip.mp4",
}
"""What stands in the card's row for each field that a task reads."""

NUMBER = re.compile(r"(LABEL_)?[0-9]+")
"""A class without a name: as a column of numbers has it, or as transformers calls it."""


def write_card(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the card of a task with this config, unless the folder has a README.md of somebody else's."""
    path = folder / CARD
    if path.exists() and OURS not in path.read_text(encoding="utf-8", errors="replace"):
        return
    with whole(path) as beside:
        beside.write_text(model_card(config, folder.name, _reads(folder, config)), encoding="utf-8")


def model_card(config: Mapping[str, Any], name: str, reads: Reads | None = None) -> str:
    """The README.md of a task with this config, where `reads` is what its processor is for."""
    backbone, method, scores = config["backbone"], config["method"], config["scores"] or {}
    values = ", ".join(f"{key}={value}" for key, value in method["config"].items()) or "no settings"
    hub = backbone["id"] if _is_hub_id(backbone) else ""
    lines = [
        "---",
        OURS,
        *([f"base_model: {hub}"] if hub else []),
        "tags:",
        "- sidestep",
        f"- {method['name']}",
        "---",
        "",
        f"# {name}",
        "",
        f"A task tuned with Sidestep {config['sidestep']}: `{method['name']}` ({values}) on {backbone_text(backbone)}.",
        "",
        "The folder holds what was tuned, not the backbone, which is loaded by its name and recognised by "
        f"its digest `{backbone['digest']['exact'][:16]}`.",
        "",
        *(["Labels: " + ", ".join(config["labels"]), ""] if config["labels"] else []),
        *_score_table(scores),
        "```python",
        *_use(config, name, reads),
        "```",
    ]
    return "\n".join(lines) + "\n"


def backbone_text(backbone: Mapping[str, Any]) -> str:
    """A backbone in words: its class, where it came from, and how its weights are quantised."""
    found = backbone.get("quantization")
    how = "" if found is None else f" in {format_text(found)}"
    towers = " and ".join(tower["id"] for tower in backbone.get("towers", {}).values() if tower["id"])
    return f"{backbone['class_name']} {backbone['id'] or (towers and f'of {towers}') or '(not loaded by name)'}{how}"


def unnamed_classes(config: Mapping[str, Any]) -> list[str]:
    """The classes of a task if they are numbers and no names.

    Empty if the classes have names, or the task has no classes.
    """
    head, own, known = config["head"] or {}, config["backbone"]["config"], config["preprocessing"] or {}
    if known.get("problem") == "regress" or own.get("problem_type") == "regression":
        return []
    names = known.get("labels") or config["labels"] or list(own.get("id2label", {}).values())
    if not names and head.get("head") == "Classify":
        names = [str(index) for index in range(head["num_labels"])]
    return names if all(NUMBER.fullmatch(name) for name in names) else []


def _use(config: Mapping[str, Any], name: str, reads: Reads | None) -> list[str]:
    """The lines of Python that predict a row."""
    kind, load = config["backbone"]["class_name"], f"model = ss.load({_quoted(name)})"
    if not _is_loaded_by_name(config["backbone"]):
        load = f"model = ss.load({_quoted(name)}, backbone)  # the {kind} that the task was made on"
    known = (config["preprocessing"] or {}).get("fields")
    columns = _columns(known or {}) or {field: field for field in (reads,) if field}
    if not columns or not config["files"]["processor"]:
        return ["import sidestep as ss", "", load, f"# then model(**inputs), with what a {kind} takes"]
    row = ", ".join(f"{_quoted(column)}: {_quoted(EXAMPLES[field])}" for field, column in columns.items())
    fields = ", ".join(f"{field}={_quoted(column)}" for field, column in columns.items())
    return [
        "import sidestep as ss",
        *([] if known else ["from sidestep.data import Fields"]),
        "from sidestep.tasks.predict import predict",
        "",
        load,
        f"found = predict(model, [{{{row}}}]" + (")" if known else f", fields=Fields({fields}))"),
        "print(found[0])",
    ]


def _columns(fields: Mapping[str, str | None]) -> dict[str, str]:
    """The columns that a task reads, without the label's."""
    return {field: column for field, column in fields.items() if field in EXAMPLES and column is not None}


def _quoted(text: str) -> str:
    """A text as Python's source."""
    return json.dumps(text, ensure_ascii=False)


def _reads(folder: Path, config: Mapping[str, Any]) -> Reads | None:
    """What the processor of a task folder is for, by its files.

    None if the folder has no processor, or one for both.
    """
    processor = folder / (config["files"].get("processor") or "processor")
    if (processor / IMAGE_TRANSFORM).is_file():
        return "image"
    both = all(any((processor / file).is_file() for file in files) for files in (TOKENIZER_FILES, PROCESSOR_FILES))
    return None if both else read_by_files(processor)


def _score_table(scores: Mapping[str, Any]) -> list[str]:
    if not scores:
        return []
    rows = [
        f"| {key} | {value:.4g} |" if isinstance(value, float) else f"| {key} | {value} |"
        for key, value in scores.items()
    ]
    return ["| score | value |", "|---|---|", *rows, ""]


def _is_hub_id(backbone: Mapping[str, Any]) -> bool:
    """Whether a backbone's id is one of the hub's rather than a folder of this machine."""
    parts = str(backbone["id"]).split("/")
    plain = len(parts) <= 2 and all(part and not part.startswith((".", "~")) for part in parts)
    return backbone["library"] == "transformers" and plain and backbone["revision"] is not None


def _is_loaded_by_name(backbone: Mapping[str, Any]) -> bool:
    """Whether a backbone, or each tower of it, says where it is to be had."""
    towers = backbone.get("towers", {}).values()
    return bool(backbone["id"] or (towers and all(tower["id"] for tower in towers)))
