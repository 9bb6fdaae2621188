"""A task folder as an attached model, on its own backbone or on one that fits."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sidestep.backbone import Digest, joined
from sidestep.backbone.load import load_class, paired
from sidestep.backbone.placement import DeviceMap, MaxMemory, Placement
from sidestep.backbone.processors import load_processor
from sidestep.backbone.source import LoadError, OtherModel, Source, source_of
from sidestep.disk.card import backbone_text
from sidestep.disk.task_folder import CONFIG, Task, TaskError, read, read_config
from sidestep.messages import some
from sidestep.methods import UnsupportedBackbone, WeightDelta, method_of
from sidestep.model.attach import Attached, attach, detach, digests_of
from sidestep.model.build import check_attachable
from sidestep.model.heads import named
from sidestep.model.saving import diffs, portable_names, settings_of
from sidestep.model.settings import Settings
from sidestep.sparse.codec import POSITIONS, VALUES, DamagedDiff, decode
from sidestep.sparse.diff import SparseDiff

OWN_BACKBONE = "load the task's own backbone"


class OtherBackbone(TaskError):
    """A task was made on other weights. `reason` is the message without what to do."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}: {OWN_BACKBONE}, or pass allow_mismatch=True if you know that it fits")
        self.reason = reason


class BackboneMismatch(UserWarning):
    """A task was loaded onto another backbone, because `allow_mismatch=True` asked for it."""


class DtypeMismatch(UserWarning):
    """A task was loaded onto the same weights in another precision."""


def _unpacked(task: Task, model: Attached) -> dict[str, Tensor]:
    """The reverse of `packed`, with the positions in the model's tensors laid end to end.

    Raises:
        TaskError: if a diff is damaged, or of tensors that the model does not have in that shape.
    """
    tensors = dict(task.tensors)
    for prefix, diff in diffs(model).items():
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
            f"{some([f'{name} {shape}' for name, shape in unfit.items()])}. It has {some(there)}. Load the task's own "
            "backbone, with its embeddings not resized"
        )
    return {name: (part.positions, part.values) for name, part in entries.items()}


def load(
    folder: str | Path,
    backbone: nn.Module | None = None,
    *,
    allow_mismatch: bool = False,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: DeviceMap | None = None,
    offload_folder: str | Path | None = None,
    max_memory: MaxMemory | None = None,
) -> Attached:
    """The model of a task folder, in eval mode.

    Args:
        folder: what `save_pretrained` wrote.
        backbone: the model to put the task on. None: loaded by the name that is stored in the task.
        allow_mismatch: whether another backbone, or for a sparse diff another precision, is a warning rather than an
            error.
        dtype: precision in which the backbone is loaded. None: the precision that the task was saved with.
        device: where the model goes.
        device_map, offload_folder, max_memory: where the backbone's weights go, as of `load_backbone`. A task does not
            store it.

    Raises:
        TaskError: if the folder is no task, is damaged or too new, or belongs to another backbone. Also if it is a
            sparse diff of the backbone in another precision.
        LoadError: if the backbone cannot be loaded.
        UnsupportedBackbone: if the method cannot work on the backbone.

    Warns:
        DtypeMismatch: if the backbone's weights are the same in another precision.
        BackboneMismatch: if they are others, and `allow_mismatch` is set.
    """
    task = read(folder)
    settings_of(task)  # what cannot be used is refused before a backbone is loaded
    placement = Placement.of(device_map, offload_folder, max_memory)
    if placement is not None and (backbone is not None or device is not None):
        raise TaskError(
            "device_map with a backbone or a device: it is for a backbone that is loaded here. Leave it out"
        )
    if backbone is None:
        backbone = stored_backbone(folder, dtype=dtype, placement=placement)
    elif dtype is not None:
        raise TaskError(f"dtype={dtype} with a backbone: convert it first, with backbone.to(dtype)")
    if device is not None:
        backbone.to(device)
    return put(task, backbone, allow_mismatch=allow_mismatch)


def put(
    task: Task,
    backbone: nn.Module,
    *,
    digests: Sequence[Digest] = (),
    processors: MutableMapping[str, Any] | None = None,
    allow_mismatch: bool = False,
) -> Attached:
    """As `load`, of a task that was read.

    Args:
        task: as read.
        backbone: the model to put it on.
        digests: of the backbone as `digests_of` gives them, if they are known. Computing them takes a while.
        processors: those of other tasks, by the checksum of their files. One with the same files is taken from there,
            and a new one put there.
        allow_mismatch: as for `load`.
    """
    settings = settings_of(task)
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
        _restore_extras(task, model, {} if processors is None else processors)
    except BaseException:
        detach(model)
        raise
    return model.eval()


def can_rest(task: Task) -> bool:
    """Whether a task can stay in memory while it is off its backbone (`Attachment.can_rest`), by its settings alone."""
    settings = settings_of(task)
    method = method_of(settings.method).implementation
    inserts = issubclass(method, WeightDelta) and method.remove is not WeightDelta.remove
    return not inserts and "towers" not in task.config["backbone"]


def check_fit(task: Task, blank: nn.Module) -> None:
    """Raise on a backbone `without_values` what `load` would raise, but for digests.

    Raises:
        TaskError: if the task's tensors or settings do not fit, or its diff is damaged.
        UnsupportedBackbone: if the method cannot work on the backbone.
    """
    model = _attach(task, blank, settings_of(task))
    try:
        _fitted(task, model)
    finally:
        detach(model)


def stored_backbone(
    folder: str | Path,
    *,
    moved_to: str | None = None,
    dtype: torch.dtype | str | None = None,
    placement: Placement | None = None,
) -> nn.Module:
    """The backbone that a task was made on, with its own head if the task uses that.

    Args:
        folder: of the task.
        moved_to: hub id, folder or "timm:NAME" in the place of the stored one.
        dtype: None: the precision that the task was saved with.
        placement: where its weights go. None: memory.

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
    elif not source.id and towers and placement is None and all(tower.id for tower in towers):
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
        return load_class(source, class_name=kind, dtype=wanted, config=_own_fields(stored), placement=placement)
    except OtherModel as error:
        raise TaskError(
            f"{folder} was made on {backbone_text(stored)}, but {error}: {OWN_BACKBONE} (--backbone)"
        ) from error
    except LoadError as error:
        if moved_to is not None or Path(source.id).exists():
            raise
        raise LoadError(f"{error}. If the backbone has moved, say where it is now (--backbone)") from error


def _source(stored: Mapping[str, Any]) -> Source:
    return Source(**{key: stored[key] for key in Source.__dataclass_fields__ if key in stored})


def _attach(task: Task, backbone: nn.Module, settings: Settings) -> Attached:
    try:
        return attach(
            backbone,
            settings.method,
            head=settings.head,
            train_head=settings.train_head,
            backbone_noise=settings.backbone_noise,
            checkpoint=settings.checkpoint,
            keep=settings.keep,
            lm_loss=settings.lm_loss,
        )
    except UnsupportedBackbone as error:
        raise UnsupportedBackbone(
            f"{task.folder} was made on {backbone_text(task.config['backbone'])}: {error}"
        ) from error
    except TypeError as error:  # a whole float in the place of an int
        raise TaskError(f"the settings in {task.folder / CONFIG} cannot be used: {error}") from error


def dtype_mismatch(folder: Path, wanted: Digest, own: Digest, *, is_diff: bool, allow_mismatch: bool) -> DtypeMismatch:
    """The warning that a task was made on these weights in another precision. For a diff this has to be allowed.

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
    """Refuse a backbone whose trunk is not the task's."""
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
        found = dtype_mismatch(task.folder, wanted, own, is_diff=bool(diffs(model)), allow_mismatch=allow_mismatch)
        warnings.warn(found, stacklevel=4)
        return
    other = _other_backbone(task, model.backbone, wanted, own)
    if not allow_mismatch:
        raise other
    warnings.warn(f"{other.reason}: outputs are not those of the task", BackboneMismatch, stacklevel=4)


def _other_backbone(task: Task, backbone: nn.Module, wanted: Digest, own: Digest) -> OtherBackbone:
    made, here = (backbone_text(about) for about in (task.config["backbone"], source_of(backbone).to_dict()))
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


def _restore_extras(task: Task, model: Attached, processors: MutableMapping[str, Any]) -> None:
    config = task.config
    model.extras["preprocessing"] = config.get("preprocessing") or {}
    if config.get("head") is not None and hasattr(model, "config"):  # a copy, where the head is Sidestep's
        for name, value in named(model.extras["preprocessing"].get("labels") or ()).items():
            setattr(model.config, name, value)
    if config.get("scores") is not None:
        model.extras["scores"] = config["scores"]
    if processor := config["files"].get("processor"):
        model.extras["processor"] = _processor(task, processor, processors)
    if config.get("head") is None and isinstance(model.backbone, PreTrainedModel):
        for name, value in _own_fields(config["backbone"]).items():
            setattr(model.config, name, value)  # until detach


def _own_fields(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a backbone's config that a task stores. JSON has text keys only."""
    fields = dict(backbone["config"])
    if "id2label" in fields:
        fields["id2label"] = {int(index): label for index, label in fields["id2label"].items()}
    return fields


def _processor(task: Task, name: str, known: MutableMapping[str, Any]) -> Any:
    """A task's processor. Where its bytes have no checksum, damage is the likeliest reason for any error.

    Raises:
        LoadError: if it is as it was written, and cannot be loaded here.
        TaskError: if that is not known.
    """
    if (checksum := task.config.get("processor_sha256")) is not None:
        processor = known.get(checksum)
        if processor is None:
            processor = known[checksum] = load_processor(task.folder / name)
        return processor
    try:
        return load_processor(task.folder / name)
    except Exception as error:
        raise TaskError(
            f"the processor in {task.folder / name} cannot be loaded ({error}): copy the task again, or install what "
            "it needs"
        ) from error
