"""What the entries of a sidestep.json may hold, and the checksums that show that they were altered.

A table says of every entry what it may be, in Python's own annotations. Nothing here raises: a function returns what
is wrong in words, and `store` says it of a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from sidestep.backbone import Noise
from sidestep.backbone.recompute import Checkpoint
from sidestep.backbone.source import Library
from sidestep.interface.annotations import Rule, fits, worded
from sidestep.interface.keep import Keep
from sidestep.metrics import Kind

DEEPEST = 100
"""How many lists and dictionaries may lie within each other."""
COVERED = (
    "format",
    "method",
    "head",
    "attach",
    "backbone",
    "labels",
    "preprocessing",
    "trained",
    "sha256",
    "processor_sha256",
)
"""The entries that outputs, labels and preprocessing depend on: they stand under the checksum."""
FREE = ("sidestep", "versions", "scores", "files")
"""The entries that may change without another training: they do not."""
OF_A_TRAINER = ("model.safetensors", "training_args.bin")
"""Files that transformers' Trainer writes where it saves a model."""
MISSING = object()
SHOWN = 60  # characters of a value in a message


def instead(folder: Path) -> str:
    """What a folder without a task holds, in words."""
    if all((folder / name).is_file() for name in OF_A_TRAINER):
        return (
            "it is what a Trainer writes, the tensors alone: load them with model.load_state_dict on a model that is "
            "attached alike, then model.save_pretrained; or give the Trainer sidestep.training.callbacks.SaveTask"
        )
    return f"it holds {', '.join(sorted(item.name for item in folder.iterdir())[:6]) or 'nothing'}"


def _is_inside(name: str) -> bool:
    """Whether a file name stays in the folder that it is relative to, on every system."""
    parts = PurePosixPath(name).parts
    plain = all(part != ".." and len(part.encode()) <= 255 for part in parts)
    return bool(parts) and plain and not name.startswith("/") and not re.search(r"[\x00-\x1f\\:]", name)


AtLeast1 = Annotated[int, Rule("a whole number of at least 1", lambda value: value >= 1)]
AtLeast0 = Annotated[int, Rule("a whole number of at least 0", lambda value: value >= 0)]
Sha256 = Annotated[str, Rule("64 hexadecimal digits", lambda value: re.fullmatch("[0-9a-f]{64}", value) is not None)]
Index = Annotated[str, Rule("a text of digits", lambda value: re.fullmatch("[0-9]{1,9}", value) is not None)]
Inside = Annotated[str, Rule("the name of a file inside the task's folder", _is_inside)]

SOURCE: Mapping[str, Any] = {
    "id": str,
    "revision": str | None,
    "class_name": str,
    "library": Library,
    "dtype": str,
}
"""As `Source`."""
SOURCE_TOO: Mapping[str, Any] = {"quantization": dict[str, Any]}
"""What a `Source` has only where weights are quantised."""
DIGEST: Mapping[str, Any] = {"dtype": str, "exact": Sha256, "rounded": dict[str, Sha256]}
REQUIRED: Mapping[str, Any] = {
    "format": AtLeast1,
    "method": dict[str, Any],
    "method.name": str,
    "method.config": dict[str, Any],
    "attach": dict[str, Any],
    "backbone": dict[str, Any],
    **{f"backbone.{name}": kind for name, kind in SOURCE.items()},
    "backbone.trunk_class": str,
    "backbone.config": dict[str, Any],
    "backbone.digest": dict[str, Any],
    "backbone.head_digest": dict[str, Any] | None,
    "files": dict[str, Any],
    "files.weights": Inside,
    "sha256": Sha256,
}
OPTIONAL: Mapping[str, Any] = {
    "sidestep": str | None,
    "versions": dict[str, str | None],
    "head": dict[str, Any] | None,
    "labels": list[str] | None,
    "preprocessing": dict[str, Any] | None,
    "scores": dict[str, Any] | None,
    "trained": list[str],
    "files.processor": Inside | None,
    "processor_sha256": Sha256 | None,
    "config_sha256": Sha256,
    "backbone.towers": dict[str, dict[str, Any]],
    **{f"backbone.{name}": kind for name, kind in SOURCE_TOO.items()},
}
#: Parts that have no other entries than these.
CLOSED: Mapping[str, Mapping[str, Any]] = {
    "attach": {
        "train_head": bool | None,
        "backbone_noise": Noise | None,
        "checkpoint": Checkpoint | None,
        "keep": Keep,
        "lm_loss": Literal["own", "chunked"],
    },
    "backbone.config": {
        "problem_type": Literal["regression", "single_label_classification", "multi_label_classification"],
        "pad_token_id": int,
        "id2label": dict[Index, str],
        "label2id": dict[str, AtLeast0],
        "num_classes": AtLeast0,
    },
    "backbone.digest": DIGEST,
    "backbone.head_digest": DIGEST,
    "files": {"weights": Inside, "processor": Inside | None},
}
PREPARED: Mapping[str, Any] = {
    "fields": dict[Literal["text", "text2", "image", "audio", "video", "label"], str | None],
    "max_length": AtLeast1 | None,
    "problem": Kind,
    "labels": list[str],
}
"""Preprocessing as `sidestep train` writes it, known by these four; somebody's own may be any plain data."""
PREPARED_TOO: Mapping[str, Any] = {
    "padding": str,
    "generation": dict[Literal["max_new_tokens", "num_beams"], AtLeast1],
    "separators": dict[Literal["pair", "answer"], str],
    "boxes": Literal["xyxy", "xywh"],
    "unanswerable": bool,
}


# --- what is wrong -----------------------------------------------------------------------------------------


def missing(config: Mapping[str, Any]) -> list[str]:
    """Names of the entries that a config has to have and does not."""
    absent = [name for name in REQUIRED if _at(config, name) is MISSING]
    for name in ("backbone.digest", "backbone.head_digest"):
        part = _at(config, name)
        absent += [f"{name}.{key}" for key in ("dtype", "exact") if isinstance(part, dict) and key not in part]
    return absent


def wrong(config: Mapping[str, Any]) -> list[str]:
    """What a config with all its entries holds that it may not, each in words."""
    found = [
        *_misfits((name, _at(config, name), kind) for name, kind in {**REQUIRED, **OPTIONAL}.items()),
        *(text for name, kinds in CLOSED.items() for text in _of_closed(name, _at(config, name), kinds)),
    ]
    if found:
        return found
    return [*_of_towers(config), *_of_preprocessing(config), *_of_head(config), *_of_processor(config)]


def depth(value: Any, most: int = DEEPEST) -> int:
    """How many lists and dictionaries lie within each other, counted up to one more than `most`."""
    level, deep = [value], 0
    while level and deep <= most:
        level = [inner for outer in level if isinstance(outer, dict | list | tuple) for inner in _inner(outer)]
        deep += 1
    return deep


def _inner(value: dict[Any, Any] | Sequence[Any]) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _at(config: Mapping[str, Any], name: str) -> Any:
    """The entry of a dotted name, or `MISSING` where there is no such entry."""
    value: Any = config
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            return MISSING
        value = value[part]
    return value


def _misfits(entries: Iterator[tuple[str, Any, Any]]) -> Iterator[str]:
    for name, value, kind in entries:
        if value is not MISSING and not fits(value, kind):
            yield f"{name} is {shown(value)}, but it must be {worded(kind)}"


def _of_closed(name: str, part: Any, kinds: Mapping[str, Any]) -> Iterator[str]:
    if not isinstance(part, dict):
        return  # said of the part itself
    for key in part.keys() - kinds.keys():
        yield f"{name} has no entry {shown(key)}: it has {', '.join(kinds)}"
    yield from _misfits((f"{name}.{key}", part[key], kind) for key, kind in kinds.items() if key in part)


def _of_towers(config: Mapping[str, Any]) -> Iterator[str]:
    kinds = {**SOURCE, "digest": dict[str, Any]}
    for tower, about in config["backbone"].get("towers", {}).items():
        name = f"backbone.towers.{tower}"
        for key in kinds.keys() - about.keys():
            yield f"{name} lacks {key}"
        yield from _of_closed(name, about, {**kinds, **SOURCE_TOO})
        yield from _of_closed(f"{name}.digest", about.get("digest"), DIGEST)


def _of_preprocessing(config: Mapping[str, Any]) -> Iterator[str]:
    given = config.get("preprocessing") or {}
    if given.keys() >= PREPARED.keys():
        kinds = {**PREPARED, **PREPARED_TOO}
        yield from _misfits((f"preprocessing.{key}", given[key], kinds[key]) for key in kinds if key in given)


def _of_head(config: Mapping[str, Any]) -> Iterator[str]:
    """A head has a name, and its labels are written twice."""
    head = config.get("head")
    if head is None:
        return
    if not isinstance(head.get("head"), str):
        yield f"head.head is {shown(head.get('head'))}, but it must be the name of a head"
    elif "labels" in head and head["labels"] != config.get("labels"):
        yield f"labels are {shown(config.get('labels'))}, but head.labels are {shown(head['labels'])}"


def _of_processor(config: Mapping[str, Any]) -> Iterator[str]:
    named, checksum = config["files"].get("processor"), config.get("processor_sha256", MISSING)
    if checksum is not MISSING and (named is None) != (checksum is None):
        yield f"files.processor is {shown(named)}, but processor_sha256 is {shown(checksum)}: both or neither"


def shown(value: Any) -> str:
    """The beginning of a value as JSON writes it."""
    if value is MISSING:
        return "not there"
    text = json.dumps(value, ensure_ascii=False).encode(errors="replace").decode()
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


# --- checksums ---------------------------------------------------------------------------------------------


def config_checksum(config: Mapping[str, Any]) -> str:
    """SHA-256 over the values of the covered entries, however they are laid out, of a config as JSON gives it back."""
    covered = {name: config[name] for name in COVERED if name in config}
    return hashlib.sha256(json.dumps(covered, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def folder_checksum(folder: Path) -> str:
    """SHA-256 over names and bytes of all files of a folder but hidden ones, which systems leave there."""
    running = hashlib.sha256()
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(names):
        if not any(part.startswith(".") for part in name.split("/")):
            content = names[name].read_bytes()
            running.update(f"{name} {len(content)} ".encode() + content)
    return running.hexdigest()
