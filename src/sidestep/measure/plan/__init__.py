"""Memory of a training step before anything is allocated: `plan` needs a config only, `plan_for` an attached model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sidestep.backbone import Noise
from sidestep.backbone.formats import Format
from sidestep.backbone.load import OwnHead
from sidestep.backbone.placement import Placement, away_bytes
from sidestep.backbone.recompute import Checkpoint
from sidestep.backbone.trunk import reads_mixed
from sidestep.interface.keep import Keep
from sidestep.measure.memory import peak_memory, saved_bytes
from sidestep.measure.plan.blank import IMAGE_SIZE, Backbone, blank_batch, build, build_pair
from sidestep.measure.plan.fit import (
    Alternative,
    PlanWarning,
    alternatives,
    best_device,
    check_fits,
    fastest,
    largest_batch,
    memory_of,
    settle_keep,
    ways_of_keeping,
)
from sidestep.measure.plan.pictures import picture_of
from sidestep.measure.plan.trace import (
    INSTEAD,
    OPTIMIZERS,
    Device,
    Plan,
    PlanError,
    Precision,
    Step,
    check_choices,
    facts,
    plan_for,
)
from sidestep.methods import MethodConfig, UnsupportedBackbone
from sidestep.metrics import Written
from sidestep.model.attach import Attached, attach
from sidestep.model.heads import Classify, HeadConfig, Retrieve
from sidestep.model.side_model import SideModel
from sidestep.model.token_loss import LmLoss

__all__ = [
    "OPTIMIZERS",
    "Alternative",
    "Plan",
    "PlanError",
    "PlanWarning",
    "alternatives",
    "best_device",
    "check_fits",
    "fastest",
    "largest_batch",
    "memory_of",
    "plan",
    "plan_for",
    "settle_keep",
    "ways_of_keeping",
]

OFFLOAD_NOTE = (
    "weights on disk are counted one module at a time. Where a gradient flows through late blocks, backward needs "
    "theirs too, and pages of mapped files are counted by nobody"
)
TWO_CLASSES = Classify(num_labels=2)


def plan(
    backbone: Backbone,
    method: MethodConfig,
    *,
    head: HeadConfig | None = TWO_CLASSES,
    batch: int = 32,
    length: int | None = None,
    image_size: int | None = None,
    frames: int | None = None,
    text_backbone: Backbone | None = None,
    checkpoint: Checkpoint | None = None,
    backbone_noise: Noise | None = None,
    keep: Keep = "full",
    writes: Written | None = None,
    own_head: OwnHead = "rows",
    lm_loss: LmLoss = "own",
    precision: Precision = "float32",
    optimizer: str = "AdamW",
    device: Device = "cpu",
    revision: str | None = None,
    quantize: Format | None = None,
    measure: bool = False,
    placement: Placement | None = None,
) -> Plan:
    """The memory that a training step will take, from the backbone's config alone.

    Args:
        backbone: a folder with a config.json, such a file, a hub id, "timm:NAME", a transformers config, or a function
            that makes the model.
        method: for example `ReadConfig(rank=128)`.
        head: as in `attach`. None: a classification head of the backbone's own. With `Retrieve` a row is a pair.
        batch: rows.
        length: tokens of a text. None: 128, or what the model takes at most. Of a sound samples. None: 160,000.
        image_size: rows and columns of an image. None: what the model was made for. A vision-language model whose
            processor is there is given a picture with each text, of 224 if None. The picture's tokens come on top.
        frames: of a video, with `Retrieve`. None: pairs are of images.
        text_backbone: the encoder of texts, with `Retrieve`, where the two encoders are no pair yet.
        checkpoint, backbone_noise, keep, lm_loss: as in `attach`.
        writes: with head=None, "lm" or "text2text" for the backbone's own head that writes text. It is frozen, and all
            tokens of a decoder's texts have a label.
        own_head: with head=None and without `writes`, what the backbone's own head gives answers for.
        precision: "float32", "bf16 autocast" (weights in float32), or "bfloat16" (the backbone's weights).
        optimizer: one of `OPTIMIZERS`.
        device: "cpu" or "cuda". The latter needs no GPU.
        revision: branch, tag or commit of a hub id.
        quantize: the format of the backbone's weights, as of `load_backbone`. None: as its config says.
        measure: run two real steps on this machine instead, with random weights, and take the allocator's count. With
            "cuda" there has to be a GPU then.
        placement: where the backbone's weights go. Those on disk are counted as they are brought: one module at a time.

    Raises:
        LoadError: if there is no such config, or weights cannot be placed as asked.
        UnsupportedBackbone: if the method cannot work on this backbone.
        PlanError: if the model cannot be traced.
        ValueError: if a setting is unknown or out of range.
    """
    check_choices(precision, optimizer, device)
    if measure and device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' cannot be measured, because CUDA is not available: measure on 'cpu', or plan")
    if measure and placement is not None:
        raise ValueError("--measure runs with random weights, of which none are on disk: leave --device-map out")
    if measure and quantize is not None:
        raise ValueError(
            f"quantize={quantize!r} cannot be measured with random weights: plan without measuring, or load the "
            "backbone, attach the method, and use peak_memory"
        )
    place = device if measure else "meta"
    with torch.random.fork_rng(None if place == "cuda" else []), torch.device(place):
        how = {"checkpoint": checkpoint, "backbone_noise": backbone_noise, "keep": keep, "lm_loss": lm_loss}
        made = (backbone, text_backbone)
        model = _attached(made, method, None if writes else head, writes, own_head, how, precision, revision, quantize)
        mixed = isinstance(model, SideModel) and reads_mixed(model.trunk)
        picture = picture_of(backbone, revision, image_size or IMAGE_SIZE) if mixed else None
        inputs = blank_batch(model, batch, length, image_size, frames, picture)
        if measure:
            return _measured(model, inputs, precision, optimizer, device)
    found = plan_for(model, inputs, precision=precision, optimizer=optimizer, device=device)
    if placement is None:
        return found
    away = away_bytes(model.backbone, placement.map_of(model.backbone))
    if away and any(part.delta is not None for part in model.parts):
        raise UnsupportedBackbone(f"{model.record.name} changes weights, and some of them are on disk")
    return replace(found, weights_bytes=found.weights_bytes - away, notes=(*found.notes, OFFLOAD_NOTE))


def _measured(
    model: Attached, inputs: Mapping[str, Tensor], precision: Precision, optimizer: str, device: Device
) -> Plan:
    """A plan of two real steps."""
    step = Step(model.train(), inputs, precision, optimizer, device)
    with saved_bytes(model) as saved:
        loss = step.forward()
    step.backward(loss)
    step.update()
    del loss
    return Plan(
        peak_bytes=peak_memory(step.run, device).allocated,
        gradient_bytes=None,
        kept_bytes=None,
        temporary_bytes=None,
        peak_phase=None,
        peak_op=None,
        attention=(),
        source="measured",
        **facts(step, saved.by_module()),
    )


def _attached(
    backbone: tuple[Backbone, Backbone | None],
    method: MethodConfig,
    head: HeadConfig | None,
    writes: Written | None,
    own_head: OwnHead,
    how: dict[str, Any],
    precision: Precision,
    revision: str | None,
    quantize: Format | None,
) -> Attached:
    """The attached model on the default device. The second backbone is of texts, beside one of images."""
    one, text = backbone
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    own = own_head if head is None and writes is None else None
    if isinstance(head, Retrieve):
        made = build_pair(one, text, dtype=dtype, revision=revision, quantize=quantize)
    else:
        made = build(one, own_head=own, writes=writes, dtype=dtype, revision=revision, quantize=quantize)
    try:
        return attach(made, method, head=head, **how)
    except RuntimeError as error:  # what torch raises for an operation that needs values
        raise PlanError(
            f"{type(made).__name__} with {type(method).__name__} cannot be put together without weights "
            f"({str(error).splitlines()[0]}): {INSTEAD}"
        ) from error
