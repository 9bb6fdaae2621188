"""An attached model as a task folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from sidestep.backbone import embedding_shapes, token_rows
from sidestep.backbone.load import stored_vocabulary
from sidestep.backbone.source import source_of
from sidestep.disk import task_fields
from sidestep.disk.card import write_card
from sidestep.disk.task_folder import (
    CONFIG,
    FORMAT,
    PROCESSOR,
    STAGING,
    WEIGHTS,
    Task,
    TaskError,
    check_free,
    checksum,
    install,
    sealed,
    sweep,
    sync,
    weights_metadata,
)
from sidestep.messages import some
from sidestep.methods import MethodConfig, method_named
from sidestep.model.attached import AttachedModel
from sidestep.model.heads import HeadConfig, head_from_dict
from sidestep.model.settings import Settings
from sidestep.sparse.codec import SparseTensor, encode
from sidestep.sparse.diff import SparseDiff
from sidestep.versions import version_of, versions

PACKAGES = ("torch", "transformers", "timm", "safetensors")
OWN_CONFIG = ("problem_type", "pad_token_id")


def save(
    model: AttachedModel,
    folder: str | Path,
    *,
    overwrite: bool = False,
    scores: Mapping[str, Any] | None = None,
) -> None:
    """Write the task of a model to a folder, which at every moment holds the old task or the new one.

    Besides the weights, `model.extras["processor"]` (by its `save_pretrained`), `model.extras["preprocessing"]` and
    `model.extras["scores"]` are stored.

    Args:
        model: an attached model.
        folder: new, empty, or with other things in it.
        overwrite: whether a task that is there already is replaced.
        scores: stored and shown on the model card. None: `model.extras["scores"]`.

    Raises:
        TaskError: if the folder holds a task already, is a file, or something in `extras` is no plain data. Also if the
            backbone's embeddings were resized, so that no backbone would fit the task.
    """
    folder = Path(folder)
    check_free(folder, overwrite)
    check_sizes(model)
    names = portable_names(model)
    tensors = packed(model, _unshared({names[name]: value for name, value in model.state_dict().items()}))
    config = _config(model, tensors, model.extras.get("scores") if scores is None else scores)
    _check_storable(folder, config)
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    new = [folder / name for name in (WEIGHTS, PROCESSOR) if not (folder / name).exists()]
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
    try:
        save_file(tensors, staging / WEIGHTS, metadata=weights_metadata(config))
        if model.extras.get("processor") is not None:
            model.extras["processor"].save_pretrained(str(staging / PROCESSOR))
            config["processor_sha256"] = task_fields.folder_checksum(staging / PROCESSOR)
        config = sealed(config)
        sync(staging)
        install(staging, folder, config)
    except BaseException:
        sweep(folder)
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


def portable_names(model: AttachedModel) -> dict[str, str]:
    """Names in the file by names in the model. They are the same for every class of one backbone.

    "side.", "head." and "sparse." stay. A backbone's tensor is named relative to its trunk ("trunk."), or by its full
    name where it lies outside ("own.").
    """
    if "" not in model.towers:
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


def diffs(model: AttachedModel) -> dict[str, SparseDiff]:
    """The sparse diffs of a model by what the names of their tensors begin with."""
    parts = {f"{name}." if name else "": part for name, part in model.towers.items()}
    return {prefix: part.sparse for prefix, part in parts.items() if part.sparse is not None}


def packed(model: AttachedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as they are written: sparse diffs through the codec.

    Raises:
        TaskError: if a diff has no positions yet, or its values do not fit their precision.
    """
    packed = dict(tensors)
    for prefix, diff in diffs(model).items():
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


def check_sizes(model: AttachedModel) -> None:
    """Refuse a model whose backbone has other sizes than what its name loads. `load` would refuse the task.

    Raises:
        TaskError: saying which, and how to come to a backbone that has a name.
    """
    for part in model.towers.values():
        _check_sizes(part)


def _check_sizes(model: AttachedModel) -> None:
    kind, now = type(model.backbone).__name__, embedding_shapes(model.backbone)
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


def _config(model: AttachedModel, tensors: Mapping[str, Tensor], scores: Mapping[str, Any] | None) -> dict[str, Any]:
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
            "keep": settings.keep,
            "lm_loss": settings.lm_loss,
        },
        "backbone": {
            **source_of(model.backbone).to_dict(),
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


def _towers(model: AttachedModel) -> dict[str, Any]:
    """Where the towers of a dual encoder came from, and their digests."""
    if "" in model.towers:
        return {}
    about = {
        name: {**source_of(tower.backbone).to_dict(), "dtype": tower.precisions, "digest": asdict(tower.digest)}
        for name, tower in model.towers.items()
    }
    return {"towers": about}


def _backbone_config(model: AttachedModel) -> dict[str, Any]:
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


def _labels(model: AttachedModel) -> list[str] | None:
    """Label names: of the head, or those that the user gave the backbone's own."""
    given = getattr(model.settings.head, "labels", None)
    if given is not None:
        return list(given)
    own = _backbone_config(model).get("id2label")
    if own is None or all(value == f"LABEL_{key}" for key, value in own.items()):
        return None
    return [own[str(index)] for index in range(len(own))]


def settings_of(task: Task) -> Settings:
    """What a stored task was attached with. Raises `TaskError` if this version cannot use it."""
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
            f"{folder}: {error}. A method of another package has to be installed with it (entry point "
            'group "sidestep.methods"), and one of a file named (--plugin FILE)'
        ) from error
    with _as_unusable(folder):
        return kind.from_dict(values)


def head_of(folder: Path, config: Mapping[str, Any]) -> HeadConfig | None:
    """The head of a task's config. None: the backbone's own.

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
    """Turn whatever a config class raises into a `TaskError`. A method of another package may raise anything."""
    try:
        yield
    except Exception as error:
        raise TaskError(f"the settings in {folder / CONFIG} cannot be used: {error}") from error
