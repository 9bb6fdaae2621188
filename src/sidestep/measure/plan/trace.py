"""A plan: one training step, traced on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge

from sidestep.backbone.fakes import unlogged
from sidestep.backbone.frames import VIDEO_AXES
from sidestep.backbone.quantised import bytes_of
from sidestep.backbone.source import Reads
from sidestep.interface.keep import Keep
from sidestep.interface.offload import offloaded_size
from sidestep.measure.memory import by_kind_of_module, saved_bytes
from sidestep.measure.plan.cuda import ALLOCATION, CudaKernels
from sidestep.measure.plan.fakes import fake_batch, fake_copy
from sidestep.measure.plan.ledger import Ledger
from sidestep.measure.plan.pictures import Prepare, is_pictured, without_pictures, without_values
from sidestep.measure.step import announced
from sidestep.model.attach import Attached
from sidestep.model.side_model import SideModel

Precision = Literal["float32", "bf16 autocast", "bfloat16"]
Device = Literal["cpu", "cuda"]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "AdamW (fused)": lambda parameters, foreach: torch.optim.AdamW(parameters, fused=True),
    "SGD": torch.optim.SGD,
    "Adafactor": torch.optim.Adafactor,
}
"""Optimizers by name; each is made from parameters and whether it handles them all at once (`foreach`)."""

ATTENTION = {
    "_scaled_dot_product_flash_attention_for_cpu": "flash (CPU)",
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "memory-efficient",
    "_safe_softmax": "plain (keeps the scores)",
    "_softmax": "plain (keeps the scores)",
}
"""Names of attention kernels by the operation that shows them."""


INSTEAD = "measure a step of random weights on this machine instead, with --measure (in Python measure=True)"


class PlanError(ValueError):
    """A model cannot be traced without memory. The message says which part."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The memory of one training step (forward, backward, optimizer), in bytes. Gradients are freed at its end.

    Attributes:
        peak_bytes: how far the step rises above model, optimizer state and batch: what `memory.peak_memory` measures.
        gradient_bytes, kept_bytes, temporary_bytes: what is alive at that moment: parameters' gradients, what the
            forward pass kept for backward, and the rest. They sum to `peak_bytes`. None in a measured plan.
        weights_bytes: parameters and buffers of the backbone, the method and the head. Of an offloaded backbone what
            stays in memory, and the largest module that is brought from disk.
        optimizer_bytes: the optimizer's state.
        batch_bytes: the inputs.
        peak_phase, peak_op: "forward", "backward" or "optimizer", and the operation at which the peak is reached.
        saved_bytes: what autograd keeps at the end of the forward pass, as `memory.saved_bytes` counts it.
        saved_by_module: the same by module, largest first. Block numbers are replaced by "*".
        attention: the attention kernels that ran.
        method, config, checkpoint, keep, head: what was attached.
        parameters: how many values are trained.
        batch, length, image_size: of the inputs. A length is of texts (tokens, a picture's among them) and waves
            (samples), a size of images.
        frames: of a video. None: a row is no video with its caption.
        reads: what a row is. A caption of an image or a video is a text.
        pictured: whether a picture stands among the tokens of each text.
        precision, optimizer, device: of the step.
        source: "traced", or "measured" by a real step with random weights.
        notes: what a reader should know besides.
    """

    peak_bytes: int
    gradient_bytes: int | None
    kept_bytes: int | None
    temporary_bytes: int | None
    weights_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    peak_phase: str | None
    peak_op: str | None
    saved_bytes: int
    saved_by_module: dict[str, int]
    attention: tuple[str, ...]
    method: str
    config: dict[str, Any]
    checkpoint: bool
    keep: Keep
    head: dict[str, Any] | None
    parameters: int
    batch: int
    length: int | None
    image_size: int | None
    frames: int | None
    reads: Reads
    pictured: bool
    precision: Precision
    optimizer: str
    device: Device
    source: Literal["traced", "measured"] = "traced"
    notes: tuple[str, ...] = ()

    @property
    def total_bytes(self) -> int:
        """What the device must hold: weights, optimizer state, the batch, and the step's peak."""
        return self.weights_bytes + self.optimizer_bytes + self.batch_bytes + self.peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """The fields and the total, as JSON-ready values."""
        return {"total_bytes": self.total_bytes, **asdict(self)}


def plan_for(
    model: Attached,
    batch: Mapping[str, Tensor],
    *,
    precision: Precision = "float32",
    optimizer: str = "AdamW",
    device: Device | None = None,
) -> Plan:
    """The memory that a training step of an attached model takes. Nothing is allocated and the model stays as it is.

    Args:
        model: attached. On any device, also on "meta" (without weights).
        batch: the inputs with labels. Only shapes and precisions are read. A mask counts as masking something.
        precision: "bf16 autocast" runs the forward pass under autocast. The weights' precision is the model's own.
        optimizer: one of `OPTIMIZERS`.
        device: whose memory is planned. None: the model's (the CPU's for "meta").

    Raises:
        PlanError: if the model cannot be traced.
        ValueError: if precision, optimizer or device is unknown.
    """
    device = device or ("cuda" if model.device.type == "cuda" else "cpu")
    check_choices(precision, optimizer, device)
    # forking leaves the caller's random numbers as they were. It stays outside, where its tensors are real
    with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True), _kernels(device):
        fake = fake_copy(model).train()
        given = fake_batch(model, batch)
        step = Step(fake, given, precision, optimizer, device, without_values(fake, given))
        with _tracing(step), step.ledger, saved_bytes(fake) as saved:
            loss = step.forward()
        with _tracing(step), step.ledger:
            step.backward(loss)
        del loss
        # its state is made beside the ledger, because a step finds it in place
        if any(parameter not in step.optimizer.state for parameter in step.parameters):
            with _at_once(step.optimizer):
                step.optimizer.step()
        with step.ledger:
            step.update()
        top = step.ledger.highest()
        known = facts(step, saved.by_module())
        known["weights_bytes"] -= offloaded_size(model) - offloaded_size(model, at_once=True)
        return Plan(
            peak_bytes=top.bytes,
            gradient_bytes=top.gradient_bytes,
            kept_bytes=top.kept_bytes,
            temporary_bytes=top.temporary_bytes,
            peak_phase=top.phase,
            peak_op=top.op,
            attention=tuple(sorted({name for op, name in ATTENTION.items() if op in step.ledger.ops})),
            notes=tuple(_notes(model, step, device)),
            **known,
        )


GPU_NOTE = (
    "a GPU needs more than a plan counts: CUDA and its libraries take some hundred MiB for themselves, and PyTorch "
    "keeps memory in reserve"
)

CONVOLUTION_NOTE = (
    "convolutions take memory to work in that a plan does not see: the peak may be higher, above all with a small batch"
)

PICTURES_NOTE = "the tower that reads the pictures is not counted, because its code depends on values"

STAGE_NOTE = (
    "this is the memory of the first stage, in which all weights are trained; the second one trains a few of them and "
    "needs less"
)


def _notes(model: Attached, step: Step, device: Device) -> Iterator[str]:
    if device == "cuda":
        yield GPU_NOTE
    if step.is_first_stage:
        yield STAGE_NOTE
    if step.prepare is without_pictures:
        yield f"{PICTURES_NOTE}: {INSTEAD}"
    convolutional = any(place.site.convolutional for part in model.parts for place in part.places)
    if convolutional and "convolution_backward" in step.ledger.ops:
        yield CONVOLUTION_NOTE


class Step:
    """Training steps of a model on one batch, phase by phase.

    Attributes:
        prepare: makes what the model is given of the batch, in each pass. None: the batch itself.
        is_first_stage: whether they are those of a stage in which all weights are free, which has its own optimizer.
        ledger: told where the phases end.
    """

    def __init__(
        self,
        model: Attached,
        batch: Mapping[str, Tensor],
        precision: Precision,
        optimizer: str,
        device: Device,
        prepare: Prepare | None = None,
    ) -> None:
        self.model, self.batch, self.precision, self.device = model, batch, precision, device
        self.prepare = prepare
        for part in model.parts:
            part.fold.keeping.on_gpu = device == "cuda" and part.device.type != "cuda"
        first = model if isinstance(model, SideModel) and model.relaxes else None
        self.is_first_stage = first is not None
        if first is not None:
            self.optimizer = first.relax(rate=0.0)
            self.name = type(self.optimizer).__name__
        else:
            for part in model.parts:
                part.place_anywhere()
            parameters = [parameter for _, parameter in model.trained_parameters()]
            self.optimizer = OPTIMIZERS[optimizer](parameters, foreach=device == "cuda")
            self.name = optimizer
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self.ledger = Ledger(ALLOCATION if device == "cuda" else 1)

    def run(self) -> None:
        """One step. Afterwards gradients are freed."""
        self.backward(self.forward())
        self.update()

    def forward(self) -> Tensor:
        """The loss."""
        kind = self.batch["labels"].device.type
        bf16 = torch.autocast(kind, torch.bfloat16, enabled=self.precision == "bf16 autocast")
        with announced(self.model, self.optimizer), bf16:
            batch, _held = (self.batch, None) if self.prepare is None else self.prepare(self.batch)
            loss = self.model(**batch).loss
        self.ledger.end_forward()
        return loss

    def backward(self, loss: Tensor) -> None:
        """The gradients."""
        # given a tensor, backward would be wrapped by CudaKernels, which then sees nothing of recomputed blocks
        torch.autograd.backward(get_gradient_edge(loss))
        self.ledger.end_backward(self.parameters)

    def update(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def facts(step: Step, saved: Mapping[str, int]) -> dict[str, Any]:
    """What a plan says besides its peak, after at least one step. `saved` is by module."""
    model, batch, settings = step.model, step.batch, step.model.settings
    given, images = batch.get("input_ids", batch.get("input_values")), batch.get("pixel_values")
    state = [value for values in step.optimizer.state.values() for value in values.values()]
    return {
        "weights_bytes": bytes_of(model),
        "optimizer_bytes": sum(value.nbytes for value in state if isinstance(value, Tensor)),
        "batch_bytes": sum(tensor.nbytes for tensor in batch.values()),
        "saved_bytes": sum(saved.values()),
        "saved_by_module": by_kind_of_module(saved),
        "method": model.record.name,
        "config": settings.method.to_dict(),
        "checkpoint": settings.checkpoint is not None,
        "keep": settings.keep,
        "head": model.head_config,
        "parameters": sum(parameter.numel() for _, parameter in model.trained_parameters()),
        "batch": len(batch["labels"]),
        "length": None if given is None or given.ndim > 2 else given.shape[1],
        "image_size": None if images is None or images.ndim < 4 else images.shape[-1],
        "frames": None if images is None or images.ndim <= VIDEO_AXES else images.shape[1],
        "pictured": is_pictured(model, batch),
        "reads": "text" if "input_ids" in batch else "audio" if images is None else "image",
        "precision": step.precision,
        "optimizer": step.name,
        "device": step.device,
    }


def check_choices(precision: str, optimizer: str, device: str) -> None:
    """Raise unless a plan's settings are known."""
    for name, given, known in (
        ("precision", precision, get_args(Precision)),
        ("optimizer", optimizer, tuple(OPTIMIZERS)),
        ("device", device, get_args(Device)),
    ):
        if given not in known:
            raise ValueError(f"{name}={given!r}: choose one of {', '.join(known)}")


def _kernels(device: Device) -> AbstractContextManager[Any]:
    return CudaKernels() if device == "cuda" else nullcontext()


@contextmanager
def _at_once(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Steps on all parameters together, which on the CPU leave the same state after far fewer operations."""
    groups = [group for group in optimizer.param_groups if group.get("foreach") is False]
    for group in groups:
        group["foreach"] = True
    try:
        yield
    finally:
        for group in groups:
            group["foreach"] = False


@contextmanager
def _tracing(step: Step) -> Iterator[None]:
    """Turn whatever fails into an error that names the module and the operation."""
    running: list[str] = []
    handles = [handle for name, module in step.model.named_modules() for handle in _follow(name, module, running)]
    try:
        with unlogged():
            yield
    except Exception as error:
        where = f"in {running[-1] or type(step.model.backbone).__name__}" if running else "in backward or the optimizer"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PlanError(
            f"{type(step.model.backbone).__name__} with {step.model.record.name} cannot be traced without memory: "
            f"{where}, at the operation {step.ledger.op or 'none'} ({type(error).__name__}: {reason}): {INSTEAD}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _follow(name: str, module: nn.Module, running: list[str]) -> list[Any]:
    return [
        module.register_forward_pre_hook(lambda *_: running.append(name), prepend=True),
        module.register_forward_hook(lambda *_: running.remove(name)),
    ]
