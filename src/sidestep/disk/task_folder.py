"""The task folder: what was tuned, and everything that is needed to run it again on its backbone.

    sidestep.json       format, method, head, backbone and digest, labels, preprocessing, scores, versions, checksums
    task.safetensors    the task's tensors; format, method, digest and a checksum in their metadata
    processor/          tokenizer or image processor, where the model has one
    README.md           a model card

A folder is a task if and only if it holds a sidestep.json whose checksum is that of the weights it names. Two more
checksums in the sidestep.json are of its own values and of the processor's files. Tasks that were written before have
neither. A task changes at the moment at which its sidestep.json is replaced. Whatever else lies in the folder (a
Trainer's checkpoints, logs, results) is left alone. Nothing is pickled or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sidestep.disk import task_fields
from sidestep.disk.atomic import sync_path, whole
from sidestep.disk.card import backbone_text, write_card
from sidestep.sparse.codec import POSITIONS
from sidestep.versions import version_of

FORMAT = 1
CONFIG = "sidestep.json"
WEIGHTS = "task.safetensors"
PROCESSOR = "processor"
STAGING = ".saving-"
SEALED = ("config", "checksum")  # in the weights' metadata: their sidestep.json has a checksum of its own


class TaskError(ValueError):
    """A task cannot be written, read or put on a backbone, and the message says why and what to do."""


class DamagedTask(TaskError):
    """A task's files are incomplete or altered, and `reason` is the message without what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: copy the task again")
        self.reason = reason


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise `TaskError` if a folder is a file, or holds a task that is not to be replaced."""
    if folder.exists() and not folder.is_dir():
        raise TaskError(f"{folder} is a file: choose a folder")
    if overwrite or not (folder / CONFIG).exists():
        return
    try:
        there = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        what = f"{there['method']['name']} on {backbone_text(there['backbone'])}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        what = f"its {CONFIG} cannot be read"
    raise TaskError(
        f"{folder} holds another task ({what}): choose another folder, or replace it with overwrite=True (--overwrite)"
    )


def sealed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON gives it back, with the checksum of its values."""
    plain = json.loads(_as_json(config))
    return {**plain, "config_sha256": task_fields.config_checksum(plain)}


def weights_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """What the file of weights says of its task."""
    return {
        "format": str(config["format"]),
        "sidestep": config["sidestep"] or "",
        "method": config["method"]["name"],
        "digest": config["backbone"]["digest"]["exact"],
        "sha256": config["sha256"],
        **dict([SEALED]),
    }


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors on the CPU."""
    running = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        running.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        running.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return running.hexdigest()


def _as_json(config: Mapping[str, Any]) -> str:
    for key in ("preprocessing", "scores"):
        try:
            text = json.dumps(config[key], default=_plain, ensure_ascii=False)
            text.encode()  # half a surrogate pair is no text
        except (TypeError, ValueError, RecursionError) as error:
            raise TaskError(
                f"{key} cannot be stored ({error}): give numbers, texts, lists and dictionaries of them"
            ) from error
        if task_fields.depth(config[key]) >= task_fields.DEEPEST:
            raise TaskError(
                f"{key} cannot be stored: its lists and dictionaries lie more than {task_fields.DEEPEST - 1} deep"
            )
    return json.dumps(config, indent=2, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """Scalars of numpy and torch as Python's own."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"a {type(value).__name__} is no plain data")


def install(staging: Path, folder: Path, config: dict[str, Any]) -> None:
    """Make the finished task in `staging` the folder's."""
    if (folder / CONFIG).exists():
        # From here on the folder's task is the new one, read out of the staging folder, so that the old
        # files can be replaced under it.
        files = {key: name and f"{staging.name}/{name}" for key, name in config["files"].items()}
        _commit(folder, {**config, "files": files})
    if (folder / CONFIG).exists() or config["files"]["processor"]:
        # files of another processor would be read together with this one's
        shutil.rmtree(folder / PROCESSOR, ignore_errors=True)
    _place(staging / WEIGHTS, folder / WEIGHTS)
    if config["files"]["processor"]:
        (folder / PROCESSOR).mkdir(exist_ok=True)
        for file in sorted((staging / PROCESSOR).iterdir()):
            _place(file, folder / PROCESSOR / file.name)
    sync(folder / PROCESSOR)
    _commit(folder, config)
    shutil.rmtree(staging, ignore_errors=True)


def _place(source: Path, target: Path) -> None:
    """Put a file that exists elsewhere at a name, in one step, without taking it away from where it is."""
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
        return
    with whole(target) as beside:
        try:
            os.link(source, beside)
        except OSError:  # a file system without hard links
            shutil.copy2(source, beside)


def _commit(folder: Path, config: Mapping[str, Any]) -> None:
    """Replace sidestep.json in one step, once everything that it names is on the disk."""
    sync_path(folder)
    with whole(folder / CONFIG) as beside:
        beside.write_text(_as_json(config), encoding="utf-8")
    sync_path(folder)


def sweep(folder: Path) -> None:
    """Remove what an interrupted save left, unless the present task lies in it."""
    try:
        used = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["files"]["weights"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        used = ""
    for left in folder.glob(f"{STAGING}*"):
        if not str(used).startswith(f"{left.name}/"):
            shutil.rmtree(left, ignore_errors=True)


def sync(folder: Path) -> None:
    """Bring a folder and the files below it to the disk."""
    if folder.is_dir():
        for path in (*folder.rglob("*"), folder):
            sync_path(path)


@dataclass(frozen=True)
class Task:
    """A task folder as read: its config and, by portable names, its tensors."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def copy(folder: str | Path, target: Path) -> None:
    """Copy a task to a new folder, and bring it to the disk.

    What else lies in the task's folder stays there.
    """
    folder = Path(folder)
    config = read_config(folder)
    weights, processor = _weights_path(folder, config), config["files"].get("processor")
    target.mkdir()
    shutil.copy2(weights, target / WEIGHTS)
    if processor:
        shutil.copytree(folder / processor, target / PROCESSOR)
    sync(target)
    config = {**config, "files": {"weights": WEIGHTS, "processor": PROCESSOR if processor else None}}
    _commit(target, config)
    write_card(target, config)


def read(folder: str | Path) -> Task:
    """The config and tensors of a task folder, checked against each other.

    Raises:
        TaskError: if the folder is no task, is damaged, or was written in a newer format.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = _weights_path(folder, config)
    with _as_damage(path), safe_open(path, framework="pt") as reader:
        metadata = reader.metadata() or {}
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - no mapping
        found = checksum(tensors)
    _check_metadata(path, folder, metadata, config)
    if found != config["sha256"]:
        raise DamagedTask(f"{path} is damaged (its checksum differs)")
    _check_processor(folder, config)
    return Task(folder, config, tensors)


@contextmanager
def _as_damage(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read is a `DamagedTask` of it: other libraries raise all kinds of errors."""
    try:
        yield
    except Exception as error:
        raise DamagedTask(f"{path} is damaged ({error})") from error


def _check_metadata(path: Path, folder: Path, metadata: Mapping[str, str], config: Mapping[str, Any]) -> None:
    if metadata.get("sha256") != config["sha256"]:
        raise DamagedTask(f"{path} belongs to another task than {folder / CONFIG}")
    if SEALED in metadata.items() and not config.keys() >= {"config_sha256", "processor_sha256"}:
        raise DamagedTask(f"{folder / CONFIG} lacks a checksum that it was written with")


def _check_processor(folder: Path, config: Mapping[str, Any]) -> None:
    wanted = config.get("processor_sha256")
    if wanted is None:
        return
    path = folder / config["files"]["processor"]
    if not path.is_dir():
        raise DamagedTask(f"{folder} is no complete task: the folder {path.name} is missing")
    with _as_damage(path):
        found = task_fields.folder_checksum(path)
    if found != wanted:
        raise DamagedTask(f"{path} is damaged (the checksum of its files differs, or there are others)")


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a task folder, each entry of a type and in a range that can be used.

    Raises:
        TaskError: if there is no config, it is unreadable or altered, or its format is newer.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise TaskError(f"{folder} is no task folder: there is no such folder")
    if not path.is_file():
        kind = DamagedTask if (folder / WEIGHTS).is_file() else TaskError
        raise kind(f"{folder} is no task folder: {CONFIG} is missing ({task_fields.instead(folder)})")
    config = _parsed(path)
    form = config.get("format") if isinstance(config, dict) else None
    if not isinstance(form, int):
        raise TaskError(f"{path} was not written by sidestep: it states no format")
    if form > FORMAT:
        raise TaskError(
            f"{folder} was written by sidestep {config.get('sidestep')} in format {form}, and this version "
            f"({version_of('sidestep')}) reads up to {FORMAT}: upgrade with pip install -U sidestep"
        )
    _check_config(path, config)
    return config


def _parsed(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DamagedTask: if it cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair could be neither shown nor written
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedTask(f"{path} cannot be read ({error})") from error
    if task_fields.depth(value) > task_fields.DEEPEST:
        raise DamagedTask(f"{path} cannot be read (its values lie more than {task_fields.DEEPEST} deep)")
    return value


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    if missing := task_fields.missing(config):
        raise DamagedTask(f"{path} lacks {', '.join(missing)}")
    if wrong := task_fields.wrong(config):
        raise DamagedTask(f"{path}: {'; '.join(wrong)}")
    if "config_sha256" in config and task_fields.config_checksum(config) != config["config_sha256"]:
        raise DamagedTask(
            f"{path} was altered: the checksum of its values differs, and only {', '.join(task_fields.FREE)} may change"
        )


def inspect_task(folder: str | Path) -> dict[str, Any]:
    """What a task folder says of itself, read from its config and the header of its weights alone.

    Returns:
        The config's entries, and "folder", "digest" (the exact one), "tensors" (name -> shape, dtype and
        whether it is trained), "parameters" (their number, without a diff's positions), "bytes" (of the weight file)
        and "files" (bytes by name).

    Raises:
        TaskError: as `read`, but for the checksums of tensors and processor.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = _weights_path(folder, config)
    trained = set(config.get("trained", ()))
    with _as_damage(path), safe_open(path, framework="pt") as reader:
        metadata = reader.metadata() or {}
        slices = {name: reader.get_slice(name) for name in reader.keys()}  # noqa: SIM118 - no mapping
        tensors = {
            name: {"shape": list(part.get_shape()), "dtype": part.get_dtype(), "trained": name in trained}
            for name, part in slices.items()
        }
    _check_metadata(path, folder, metadata, config)
    processor = config["files"].get("processor")
    files = [folder / CONFIG, path, *((folder / processor).rglob("*") if processor else ())]
    return {
        **config,
        "folder": str(folder),
        "digest": config["backbone"]["digest"]["exact"],
        "tensors": tensors,
        "parameters": sum(_count(about["shape"]) for name, about in tensors.items() if not name.endswith(POSITIONS)),
        "bytes": path.stat().st_size,
        "files": {str(file.relative_to(folder)): file.stat().st_size for file in files if file.is_file()},
    }


def _weights_path(folder: Path, config: Mapping[str, Any]) -> Path:
    path = folder / config["files"]["weights"]
    if not path.is_file():
        raise DamagedTask(f"{folder} is no complete task: {config['files']['weights']} is missing")
    return path


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
