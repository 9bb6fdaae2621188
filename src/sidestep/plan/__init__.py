"""Memory of a training step before anything is allocated: `plan` needs a config only, `plan_for` an attached model."""

from __future__ import annotations

from typing import Any

import torch

from sidestep.backbone import Noise
from sidestep.heads import Classify, HeadConfig
from sidestep.memory import peak_memory, saved_bytes
from sidestep.methods import MethodConfig, UnsupportedBackbone
from sidestep.model import Checkpoint, SideModel, attach
from sidestep.plan.blank import Backbone, blank_batch, build
from sidestep.plan.fit import Alternative, PlanWarning, alternatives, check_fits, largest_batch, memory_of
from sidestep.plan.trace import (
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

__all__ = [
    "OPTIMIZERS",
    "Alternative",
    "Plan",
    "PlanError",
    "PlanWarning",
    "alternatives",
    "check_fits",
    "largest_batch",
    "measure",
    "memory_of",
    "plan",
    "plan_for",
]

TWO_CLASSES = Classify(num_labels=2)


def plan(
    backbone: Backbone,
    method: MethodConfig,
    *,
    head: HeadConfig | None = TWO_CLASSES,
    batch: int = 32,
    length: int | None = None,
    image_size: int | None = None,
    checkpoint: Checkpoint | None = None,
    backbone_noise: Noise | None = None,
    precision: Precision = "float32",
    optimizer: str = "AdamW",
    device: Device = "cpu",
    revision: str | None = None,
) -> Plan:
    """The memory that a training step will take, from the backbone's config alone.

    Args:
        backbone: a folder with a config.json, such a file, a hub id, "timm:NAME", a transformers config, or a function
            that makes the model.
        method: for example `ReadConfig(rank=128)`.
        head: as in `attach`; None: a classification head of the backbone's own.
        batch: rows.
        length: tokens of a text; None: 128, or what the model takes at most.
        image_size: rows and columns of an image; None: what the model was made for.
        checkpoint, backbone_noise: as in `attach`.
        precision: "float32", "bf16 autocast" (weights in float32), or "bfloat16" (the backbone's weights).
        optimizer: one of `OPTIMIZERS`.
        device: "cpu" or "cuda"; the latter needs no GPU.
        revision: branch, tag or commit of a hub id.

    Raises:
        LoadError: if there is no such config.
        UnsupportedBackbone: if the method cannot work on this backbone.
        PlanError: if the model cannot be traced.
        ValueError: if a setting is unknown or out of range.
    """
    check_choices(precision, optimizer, device)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = _attached(backbone, method, head, checkpoint, backbone_noise, precision, revision)
        inputs = blank_batch(model, batch, length, image_size)
    return plan_for(model, inputs, precision=precision, optimizer=optimizer, device=device)


def measure(
    backbone: Backbone,
    method: MethodConfig,
    *,
    head: HeadConfig | None = TWO_CLASSES,
    batch: int = 32,
    length: int | None = None,
    image_size: int | None = None,
    checkpoint: Checkpoint | None = None,
    backbone_noise: Noise | None = None,
    precision: Precision = "float32",
    optimizer: str = "AdamW",
    device: Device = "cpu",
    revision: str | None = None,
) -> Plan:
    """What `plan` says, measured: two real steps on this machine, with random weights and the allocator's count.

    Arguments and errors are those of `plan`; for "cuda" there has to be a GPU.
    """
    check_choices(precision, optimizer, device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' cannot be measured, because CUDA is not available: measure on 'cpu', or plan")
    with torch.random.fork_rng(), torch.device(device):
        model = _attached(backbone, method, head, checkpoint, backbone_noise, precision, revision).train()
        inputs = blank_batch(model, batch, length, image_size)
        step = Step(model, inputs, precision, optimizer, device)
        with saved_bytes(model) as saved:
            loss = step.forward()
        step.backward(loss)
        step.update()
        del loss
        peak = peak_memory(step.run, device)
    return Plan(
        peak_bytes=peak.allocated,
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
    backbone: Backbone,
    method: MethodConfig,
    head: HeadConfig | None,
    checkpoint: Checkpoint | None,
    noise: Noise | None,
    precision: Precision,
    revision: str | None,
) -> SideModel:
    """The attached model on the default device."""
    how: dict[str, Any] = {"head": head, "checkpoint": checkpoint, "backbone_noise": noise}
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    made = build(backbone, own_head=head is None, dtype=dtype, revision=revision)
    try:
        return attach(made, method, **how)
    except (UnsupportedBackbone, ModuleNotFoundError):
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise PlanError(
            f"{type(made).__name__} with {type(method).__name__} cannot be put together without weights "
            f"({str(error).splitlines()[0]}): {INSTEAD}"
        ) from error
