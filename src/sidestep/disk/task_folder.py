"""The task folder: what was tuned, and everything that is needed to run it again on its backbone.

    sidestep.json       format, method, head, backbone and digest, labels, preprocessing, scores, versions, checksums
    task.safetensors    the task's tensors; format, method, digest and a checksum in their metadata
    processor/          tokenizer or image processor, where the model has one
    README.md           a model card

A folder is a task if and only if it holds a sidestep.json whose checksum is that of the weights it names. Two more
checksums in it are of its own values and of the processor's files; tasks that were written before have neither.
Replacing that one file is therefore the moment at which a task changes; whatever else lies in the folder (a
Trainer's checkpoints, logs, results) is left alone. Nothing is pickled or unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from sidestep.backbone import Digest, joined, token_rows
from sidestep.backbone.load import (
    LoadError,
    OtherModel,
    Source,
    load_class,
    load_processor,
    paired,
    source_of,
    stored_vocabulary,
)
from sidestep.disk import task_fields
from sidestep.disk.atomic import sync_path, whole
from sidestep.disk.card import backbone_text, write_card
from sidestep.messages import some
from sidestep.methods import MethodConfig, UnsupportedBackbone, method_named
from sidestep.model.heads import HeadConfig, head_from_dict, named
from sidestep.model.pair_model import Attached, PairModel, attach, detach, digests_of
from sidestep.model.side_model import Settings, SideModel, check_attachable
from sidestep.sparse.codec import POSITIONS, VALUES, DamagedDiff, SparseTensor, decode, encode
from sidestep.sparse.diff import SparseDiff
from sidestep.versions import version_of, versions

FORMAT = 1
PACKAGES = ("torch", "transformers", "timm", "safetensors")
CONFIG = "sidestep.json"
WEIGHTS = "task.safetensors"
PROCESSOR = "processor"
STAGING = ".saving-"
SEALED = ("config", "checksum")  # in the weights' metadata: their sidestep.json has a checksum of its own
OWN_CONFIG = ("problem_type", "pad_token_id")
OWN_BACKBONE = "load the task's own backbone"


class TaskError(ValueError):
    """A task cannot be written, read or put on a backbone; the message says why and what to do."""


class DamagedTask(TaskError):
    """A task's files are incomplete or altered; `reason` is the message without what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: copy the task again")
        self.reason = reason


class OtherBackbone(TaskError):
    """A task was made on other weights; `reason` is the message without what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: {OWN_BACKBONE}, or pass allow_mismatch=True if you know that it fits")
        self.reason = reason


class BackboneMismatch(UserWarning):
    """A task was loaded onto another backbone, because `allow_mismatch=True` asked for it."""


class DtypeMismatch(UserWarning):
    """A task was loaded onto the same weights in another precision."""


# --- writing -----------------------------------------------------------------------------------------------


def save(
    model: Attached,
    folder: str | Path,
    *,
    overwrite: bool = False,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Write the task of a model to a folder, which at every moment holds the old task or the new one.

    Stored besides the weights are `model.extras["processor"]` (by its `save_pretrained`),
    `model.extras["preprocessing"]` and `model.extras["scores"]`.

    Args:
        model: an attached model.
        folder: new, empty, or with other things in it.
        overwrite: whether a task that is there already is replaced.
        scores: stored and shown on the model card; None: `model.extras["scores"]`.

    Raises:
        TaskError: if the folder holds a task already, is a file, or something in `extras` is no plain data; or if the
            backbone's embeddings were resized, so that no backbone would fit the task.
    """
    folder = Path(folder)
    _check_free(folder, overwrite)
    check_sizes(model)
    names = portable_names(model)
    tensors = packed(model, _unshared({names[name]: value for name, value in model.state_dict().items()}))
    config = _config(model, tensors, model.extras.get("scores") if scores is None else scores)
    _check_storable(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    new = [folder / name for name in (WEIGHTS, PROCESSOR) if not (folder / name).exists()]
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
    try:
        save_file(tensors, staging / WEIGHTS, metadata=_metadata(config))
        if model.extras.get("processor") is not None:
            model.extras["processor"].save_pretrained(str(staging / PROCESSOR))
            config["processor_sha256"] = task_fields.folder_checksum(staging / PROCESSOR)
        config = sealed(config)
        _sync(staging)
        _install(staging, folder, config)
    except BaseException:
        _sweep(folder)
        for left in new if not (folder / CONFIG).exists() else ():
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
        raise
    write_card(folder, config)


def _check_storable(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse, before anything is written, what could not be stored or not be read again.

    Raises:
        TaskError: with the field, what it was given and what it may be.
    """
    plain = sealed(config)
    if wrong := task_fields.wrong({**plain, "processor_sha256": None, "files": {"weights": WEIGHTS}}):
        raise TaskError(f"the task cannot be saved: {'; '.join(wrong)}")
    _check_settings(folder, plain)


def portable_names(model: Attached) -> dict[str, str]:
    """Names in the file by names in the model: the same for every class of one backbone.

    "side.", "head." and "sparse." stay; a backbone's tensor is named relative to its trunk ("trunk."), or by its full
    name where it lies outside ("own.").
    """
    if isinstance(model, PairModel):
        towers = {
            f"{tower}.{name}": f"{tower}.{portable}"
            for tower, part in model.towers.items()
            for name, portable in portable_names(part).items()
        }
        return towers | {name: name for name in model.state_dict() if name not in towers}
    inside_trunk = (*model.trunk.named_parameters(), *model.trunk.named_buffers())
    trunk = {id(tensor): name for name, tensor in inside_trunk}
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        inside = trunk.get(id(tensor))
        if not name.startswith("backbone."):
            names[name] = name
        else:
            names[name] = f"trunk.{inside}" if inside else f"own.{name.removeprefix('backbone.')}"
    return names


def _diffs(model: Attached) -> dict[str, SparseDiff]:
    """The sparse diffs of a model by what the names of their tensors begin with."""
    parts = {f"{name}.": part for name, part in model.towers.items()} if isinstance(model, PairModel) else {"": model}
    return {prefix: part.sparse for prefix, part in parts.items() if part.sparse is not None}


def packed(model: Attached, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are written: sparse diffs through the codec.

    Raises:
        TaskError: if a diff has no positions yet, or its values do not fit their precision.
    """
    packed = dict(tensors)
    for prefix, diff in _diffs(model).items():
        if not diff.is_placed:
            raise TaskError(
                f"{model.record.name} has not chosen its support yet, so there is nothing to save: train first"
            )
        shapes = diff.shapes
        entries = {
            name: SparseTensor(shape=shapes[name], positions=positions, values=values)
            for name, (positions, values) in diff.entries(rounded=False).items()
        }
        try:
            packed |= {prefix + name: value for name, value in encode(entries, diff.value_dtype).items()}
        except ValueError as error:
            raise TaskError(f"the diff cannot be saved: {error}") from error
    return packed


def _unpacked(task: Task, model: Attached) -> dict[str, Tensor]:
    """The reverse of `packed`, with the positions in the model's tensors laid end to end.

    Raises:
        TaskError: if a diff is damaged, or of tensors that the model does not have in that shape.
    """
    tensors = dict(task.tensors)
    for prefix, diff in _diffs(model).items():
        names = [prefix + name for name in (POSITIONS, VALUES)]
        if not tensors.keys() >= set(names):
            continue  # what is missing is told of all tensors together
        found = diff.flat(diff_of(task, diff, prefix))
        tensors |= dict(zip(names, found, strict=True))
    return tensors


def diff_of(task: Task, diff: SparseDiff, prefix: str = "") -> dict[str, tuple[Tensor, Tensor]]:
    """A task's sparse diff as `SparseDiff.place` takes it: positions and values by the names of tensors.

    Args:
        task: as read.
        diff: of the model that it is for.
        prefix: what the names of its tensors in the file begin with.

    Raises:
        TaskError: if the diff is damaged, or of tensors that the model does not have in that shape.
    """
    try:
        entries = decode({name: task.tensors[prefix + name] for name in (POSITIONS, VALUES)})
    except DamagedDiff as error:
        raise TaskError(f"{task.folder}: {error}") from error
    shapes = diff.shapes
    unfit = {name: part.shape for name, part in entries.items() if shapes.get(name) != part.shape}
    if unfit:
        there = [f"{name} {shapes[name]}" for name in unfit if name in shapes]
        raise TaskError(
            f"{task.folder} changes tensors that the backbone does not have in that shape: "
            f"{some([f'{name} {shape}' for name, shape in unfit.items()])}; it has {some(there)}. Load the task's own "
            "backbone, with its embeddings not resized"
        )
    return {name: (part.positions, part.values) for name, part in entries.items()}


def check_sizes(model: Attached) -> None:
    """Refuse a model whose backbone has other sizes than what its name loads: `load` would refuse the task.

    Raises:
        TaskError: saying which, and how to come to a backbone that has a name.
    """
    for part in model.parts:
        _check_sizes(part)


def _check_sizes(model: SideModel) -> None:
    kind, now = type(model.backbone).__name__, model.shapes()
    what_to_do = (
        "resize before attach, save that backbone (backbone.save_pretrained(FOLDER)), load it from there, and attach "
        "and train again"
    )
    before = {name: shape for name, shape in model.attached_shapes.items() if name in now}
    changed = {name: (shape, now[name]) for name, shape in before.items() if now[name] != shape}
    if changed:
        told = some(f"{name} from {old} to {new}" for name, (old, new) in changed.items())
        raise TaskError(f"{kind} was resized while the task was attached ({told}): {what_to_do}")
    if token_rows(model.backbone)[0] is None:
        return
    source, rows = source_of(model.backbone), getattr(model.backbone.config.get_text_config(), "vocab_size", None)
    named = stored_vocabulary(source)
    if named is not None and rows != named:
        raise TaskError(
            f"{kind} has embeddings for {rows} tokens, but what {source.id} loads has {named}, so the task would not "
            f"fit the backbone of that name: {what_to_do}"
        )


def _check_free(folder: Path, overwrite: bool) -> None:
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


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each with its own storage, as safetensors wants them."""
    seen: set[int] = set()
    out = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        out[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return out


def _config(model: Attached, tensors: Mapping[str, Tensor], scores: Mapping[str, Any] | None) -> dict[str, Any]:
    settings, extras = model.settings, model.extras
    names = portable_names(model)
    return {
        "format": FORMAT,
        "sidestep": version_of("sidestep"),
        "versions": versions(PACKAGES),
        "method": {"name": model.record.name, "config": settings.method.to_dict()},
        # the pool is stored as it was resolved: a later version may choose another for the family
        "head": model.head_config,
        "attach": {
            "train_head": settings.train_head,
            "backbone_noise": settings.backbone_noise,
            "checkpoint": settings.checkpoint,
        },
        "backbone": {
            **asdict(source_of(model.backbone)),
            "dtype": model.precisions,
            "trunk_class": type(model.trunk).__name__,
            "config": _backbone_config(model),
            "digest": asdict(model.digest),
            "head_digest": None if model.head_digest is None else asdict(model.head_digest),
            **_towers(model),
        },
        "labels": _labels(model),
        "preprocessing": extras.get("preprocessing") or {},
        "scores": None if scores is None else dict(scores),
        "trained": [names[name] for name, _ in model.trained_parameters() if name in names],
        "files": {
            "weights": WEIGHTS,
            "processor": None if extras.get("processor") is None else PROCESSOR,
        },
        "sha256": checksum(tensors),
        "processor_sha256": None,
    }


def sealed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config as JSON gives it back, with the checksum of its values."""
    plain = json.loads(_as_json(config))
    return {**plain, "config_sha256": task_fields.config_checksum(plain)}


def _towers(model: Attached) -> dict[str, Any]:
    """Where the towers of a dual encoder came from, and their digests."""
    if not isinstance(model, PairModel):
        return {}
    about = {
        name: {**asdict(source_of(tower.backbone)), "dtype": tower.precisions, "digest": asdict(tower.digest)}
        for name, tower in model.towers.items()
    }
    return {"towers": about}


def _backbone_config(model: Attached) -> dict[str, Any]:
    """The fields of a backbone's config that the task depends on and a checkpoint may lack."""
    backbone = model.backbone
    if not isinstance(backbone, PreTrainedModel):
        return {"num_classes": getattr(backbone, "num_classes", 0)}
    config = backbone.config
    fields = {name: getattr(config, name, None) for name in OWN_CONFIG}
    if model.settings.head is None and "Classification" in type(backbone).__name__:
        fields["id2label"] = {str(key): value for key, value in config.id2label.items()}
        fields["label2id"] = dict(config.label2id)
    return {name: value for name, value in fields.items() if value is not None}


def _labels(model: Attached) -> list[str] | None:
    """Label names: of the head, or those that the user gave the backbone's own."""
    given = getattr(model.settings.head, "labels", None)
    if given is not None:
        return list(given)
    own = _backbone_config(model).get("id2label")
    if own is None or all(value == f"LABEL_{key}" for key, value in own.items()):
        return None
    return [own[str(index)] for index in range(len(own))]


def _metadata(config: Mapping[str, Any]) -> dict[str, str]:
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


def _install(staging: Path, folder: Path, config: dict[str, Any]) -> None:
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
    _sync(folder / PROCESSOR)
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


def _sweep(folder: Path) -> None:
    """Remove what an interrupted save left, unless the present task lies in it."""
    try:
        used = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["files"]["weights"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        used = ""
    for left in folder.glob(f"{STAGING}*"):
        if not str(used).startswith(f"{left.name}/"):
            shutil.rmtree(left, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Bring a folder and the files below it to the disk."""
    if folder.is_dir():
        for path in (*folder.rglob("*"), folder):
            sync_path(path)


# --- reading -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A task folder as read: its config and, by portable names, its tensors."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]


def load(
    folder: str | Path,
    backbone: nn.Module | None = None,
    *,
    allow_mismatch: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> Attached:
    """The model of a task folder, in eval mode.

    Args:
        folder: what `save_pretrained` wrote.
        backbone: the model to put the task on; None: loaded by the name that is stored in the task.
        allow_mismatch: whether another backbone, or for a sparse diff another precision, is a warning rather than an
            error.
        dtype: precision in which the backbone is loaded; None: the precision that the task was saved with.
        device: where the model goes.

    Raises:
        TaskError: if the folder is no task, is damaged or too new, or belongs to another backbone; or if it is a sparse
            diff of the backbone in another precision.
        LoadError: if the backbone cannot be loaded.
        UnsupportedBackbone: if the method cannot work on the backbone.

    Warns:
        DtypeMismatch: if the backbone's weights are the same in another precision.
        BackboneMismatch: if they are others, and `allow_mismatch` is set.
    """
    task = read(folder)
    _settings(task)  # what cannot be used is refused before a backbone is loaded
    if backbone is None:
        backbone = stored_backbone(folder, dtype=dtype)
    elif dtype is not None:
        raise TaskError(f"dtype={dtype} with a backbone: convert it first, with backbone.to(dtype)")
    if device is not None:
        backbone.to(device)
    return put(task, backbone, allow_mismatch=allow_mismatch)


def put(task: Task, backbone: nn.Module, *, digests: Sequence[Digest] = (), allow_mismatch: bool = False) -> Attached:
    """As `load`, of a task that was read.

    Args:
        task: as read.
        backbone: the model to put it on.
        digests: of the backbone as `digests_of` gives them, where they are known; they take a while.
        allow_mismatch: as for `load`.
    """
    settings = _settings(task)
    check_attachable(backbone)
    digests = digests or digests_of(backbone)
    if not allow_mismatch:
        _check_weights(task, backbone, digests)  # before what may fail on another backbone with a less clear message
    model = _attach(task, backbone, settings)
    for part, digest in zip(model.parts, digests, strict=False):
        part.digest = digest
    try:
        _check_digest(task, model, allow_mismatch)
        model.load_state_dict(_fitted(task, model))
        _restore_extras(task, model)
    except BaseException:
        detach(model)
        raise
    return model.eval()


def check_fit(task: Task, blank: nn.Module) -> None:
    """Raise what `load` would raise, but for digests, on a backbone `without_values`.

    Raises:
        TaskError: if the task's tensors or settings do not fit, or its diff is damaged.
        UnsupportedBackbone: if the method cannot work on the backbone.
    """
    model = _attach(task, blank, _settings(task))
    try:
        _fitted(task, model)
    finally:
        detach(model)


def copy(folder: str | Path, target: Path) -> None:
    """Copy a task to a new folder, and bring it to the disk; what else lies in its folder stays there."""
    folder = Path(folder)
    config = read_config(folder)
    weights, processor = _weights_path(folder, config), config["files"].get("processor")
    target.mkdir()
    shutil.copy2(weights, target / WEIGHTS)
    if processor:
        shutil.copytree(folder / processor, target / PROCESSOR)
    _sync(target)
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
        TaskError: if there is none, it is unreadable or altered, or its format is newer.
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
            f"{path} was altered (the checksum of its values differs; only {', '.join(task_fields.FREE)} may change)"
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


def _settings(task: Task) -> Settings:
    return _check_settings(task.folder, task.config)


def _check_settings(folder: Path, config: Mapping[str, Any]) -> Settings:
    """What a config says that was attached.

    Raises:
        TaskError: if this version cannot use it, with the field, what it was given and what it may be.
    """
    method = _method(folder, config)
    head = head_of(folder, config)
    with _as_unusable(folder):
        return Settings(method, head, **config["attach"])


def _method(folder: Path, config: Mapping[str, Any]) -> MethodConfig:
    name, values = config["method"]["name"], config["method"]["config"]
    try:
        kind = method_named(name).config
    except ValueError as error:
        raise TaskError(
            f"{folder}: {error}; a method of another package has to be installed with it (entry point "
            'group "sidestep.methods")'
        ) from error
    with _as_unusable(folder):
        return kind.from_dict(values)


def head_of(folder: Path, config: Mapping[str, Any]) -> HeadConfig | None:
    """The head of a task's config; None: the backbone's own.

    Raises:
        TaskError: if this version does not know it, or cannot use its fields.
    """
    values = config.get("head")
    if values is None:
        return None
    with _as_unusable(folder):
        return head_from_dict(values)


@contextmanager
def _as_unusable(folder: Path) -> Iterator[None]:
    """Whatever a config class raises, as a `TaskError`: a method of another package may raise anything."""
    try:
        yield
    except Exception as error:
        raise TaskError(f"the settings in {folder / CONFIG} cannot be used: {error}") from error


def stored_backbone(
    folder: str | Path, *, moved_to: str | None = None, dtype: torch.dtype | str | None = None
) -> nn.Module:
    """The backbone that a task was made on, with its own head if the task uses that.

    Args:
        folder: of the task.
        moved_to: hub id, folder or "timm:NAME" in the place of the stored one.
        dtype: None: the precision that the task was saved with.

    Raises:
        TaskError: if the folder is no task, or does not say where its backbone is to be had.
        LoadError: if the backbone cannot be loaded.
    """
    config = read_config(Path(folder))
    stored = config["backbone"]
    source = _source(stored)
    towers = [_source(tower) for tower in stored.get("towers", {}).values()]
    if moved_to is not None:
        source = replace(source, id=moved_to, revision=None)
    elif not source.id and towers and all(tower.id for tower in towers):
        return paired(*(load_class(tower, class_name=tower.class_name, dtype=dtype, config={}) for tower in towers))
    elif not source.id:
        raise TaskError(
            f"{folder} does not say where its backbone is to be had (a {source.class_name} that was not "
            "loaded by name): load it yourself and pass backbone="
        )
    # mixed precision has no one name: the checkpoint's own
    wanted = dtype or (None if "+" in source.dtype else source.dtype)
    kind = source.class_name if config.get("head") is None else stored["trunk_class"]
    try:
        return load_class(source, class_name=kind, dtype=wanted, config=_own_fields(stored))
    except OtherModel as error:
        raise TaskError(
            f"{folder} was made on {backbone_text(stored)}, but {error}: {OWN_BACKBONE} (--backbone)"
        ) from error
    except LoadError as error:
        if moved_to is not None or Path(source.id).exists():
            raise
        raise LoadError(f"{error}; if the backbone has moved, say where it is now (--backbone)") from error


def _source(stored: Mapping[str, Any]) -> Source:
    return Source(**{key: stored[key] for key in Source.__dataclass_fields__})


def _attach(task: Task, backbone: nn.Module, settings: Settings) -> Attached:
    try:
        return attach(
            backbone,
            settings.method,
            head=settings.head,
            train_head=settings.train_head,
            backbone_noise=settings.backbone_noise,
            checkpoint=settings.checkpoint,
        )
    except UnsupportedBackbone as error:
        raise UnsupportedBackbone(
            f"{task.folder} was made on {backbone_text(task.config['backbone'])}: {error}"
        ) from error
    except TypeError as error:  # a whole float in the place of an int
        raise TaskError(f"the settings in {task.folder / CONFIG} cannot be used: {error}") from error


def dtype_mismatch(folder: Path, wanted: Digest, own: Digest, *, is_diff: bool, allow_mismatch: bool) -> DtypeMismatch:
    """The warning that a task was made on these weights in another precision; a diff has to be allowed to be.

    A side network only reads other states then. A diff is written into the weights and rounded with them, and in a
    narrower precision much of it can vanish.

    Raises:
        TaskError: if it is a diff, and `allow_mismatch` is not set.
    """
    text = f"{folder} was made on these weights in {wanted.dtype}, and the backbone is in {own.dtype}"
    if is_diff and not allow_mismatch:
        raise TaskError(
            f"{text}, where a diff is rounded together with the weights: load the backbone in {wanted.dtype}, or pass "
            "allow_mismatch=True and look at the scores"
        )
    return DtypeMismatch(f"{text}: outputs differ by rounding")


def _check_weights(task: Task, backbone: nn.Module, digests: Sequence[Digest]) -> None:
    """Refuse a backbone whose trunk is another than the task's."""
    own, wanted = digests[0] if len(digests) == 1 else joined(digests), Digest(**task.config["backbone"]["digest"])
    if own.matches(wanted) == "different":
        raise _other_backbone(task, backbone, wanted, own)


def _check_digest(task: Task, model: Attached, allow_mismatch: bool) -> None:
    stored = task.config["backbone"]
    own, wanted = model.digest, Digest(**stored["digest"])
    if own.matches(wanted) != "different" and stored["head_digest"] is not None and model.head_digest is not None:
        own, wanted = model.head_digest, Digest(**stored["head_digest"])
    match = own.matches(wanted)
    if match == "same":
        return
    if match == "dtype":
        found = dtype_mismatch(task.folder, wanted, own, is_diff=bool(_diffs(model)), allow_mismatch=allow_mismatch)
        warnings.warn(found, stacklevel=4)
        return
    other = _other_backbone(task, model.backbone, wanted, own)
    if not allow_mismatch:
        raise other
    warnings.warn(f"{other.reason}: outputs are not those of the task", BackboneMismatch, stacklevel=4)


def _other_backbone(task: Task, backbone: nn.Module, wanted: Digest, own: Digest) -> OtherBackbone:
    made, here = (backbone_text(about) for about in (task.config["backbone"], asdict(source_of(backbone))))
    return OtherBackbone(
        f"{task.folder} was made on {made} with digest {wanted.exact[:16]} ({wanted.dtype}), but this backbone is "
        f"{here} with digest {own.exact[:16]} ({own.dtype})"
    )


def _fitted(task: Task, model: Attached) -> dict[str, Tensor]:
    """The task's tensors by the model's names.

    Raises:
        TaskError: if they do not fit.
    """
    names = portable_names(model)
    own = {names[name]: tensor for name, tensor in model.state_dict().items()}
    tensors = _unpacked(task, model)
    missing, surplus = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = [
        f"{name} {tuple(value.shape)} for {tuple(own[name].shape)}"
        for name, value in tensors.items()
        # a diff may have any number of nonzeros
        if name in own and value.shape != own[name].shape and not name.endswith((POSITIONS, VALUES))
    ]
    if missing or surplus or shapes:
        kind = task.config["backbone"]["class_name"]
        raise TaskError(
            f"the tensors of {task.folder} do not fit {type(model.backbone).__name__} (the task was made on "
            f"{kind}): missing {some(missing)}; without a place {some(surplus)}; "
            f"other shapes {some(shapes)}"
        )
    return {name: tensors[portable] for name, portable in names.items()}


def _restore_extras(task: Task, model: Attached) -> None:
    config = task.config
    model.extras["preprocessing"] = config.get("preprocessing") or {}
    if config.get("head") is not None and hasattr(model, "config"):  # a copy, where the head is Sidestep's
        for name, value in named(model.extras["preprocessing"].get("labels") or ()).items():
            setattr(model.config, name, value)
    if config.get("scores") is not None:
        model.extras["scores"] = config["scores"]
    if processor := config["files"].get("processor"):
        model.extras["processor"] = _processor(task, processor)
    if config.get("head") is None and isinstance(model.backbone, PreTrainedModel):
        for name, value in _own_fields(config["backbone"]).items():
            setattr(model.config, name, value)  # until detach


def _own_fields(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a backbone's config that a task stores; JSON has text keys only."""
    fields = dict(backbone["config"])
    if "id2label" in fields:
        fields["id2label"] = {int(index): label for index, label in fields["id2label"].items()}
    return fields


def _processor(task: Task, name: str) -> Any:
    """A task's processor; where its bytes have no checksum, damage is the likeliest reason for any error.

    Raises:
        LoadError: if it is as it was written, and cannot be loaded here.
        TaskError: if that is not known.
    """
    if task.config.get("processor_sha256") is not None:
        return load_processor(task.folder / name)
    try:
        return load_processor(task.folder / name)
    except Exception as error:
        raise TaskError(
            f"the processor in {task.folder / name} cannot be loaded ({error}): copy the task again, or install what "
            "it needs"
        ) from error


# --- small parts -------------------------------------------------------------------------------------------


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
