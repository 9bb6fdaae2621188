"""Meters: what training and using a method takes, for several methods side by side on one backbone.

`measure` runs all of them. What a step keeps, fills and computes is counted. Peaks and energy are measured. Times are
taken in turns, so that a drift of the machine affects every method alike.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sidestep.backbone.quantised import stored_tensors
from sidestep.measure.energy import EnergyCounter, MeterError, Source, energy_counter, energy_per_step
from sidestep.measure.step import (
    Batch,
    StepCount,
    accepted,
    idle_optimizer,
    inference_peak,
    measure_step,
    nbytes,
    predict,
    same_random_numbers,
    seconds_of,
    settle,
    synchronize,
    train_step,
)
from sidestep.methods import ProbeConfig, UnsupportedBackbone
from sidestep.model.attach import Attached, attach, detach
from sidestep.model.saving import packed
from sidestep.model.settings import Settings

__all__ = [
    "Cost",
    "MeterError",
    "Spread",
    "Times",
    "attached",
    "file_bytes",
    "measure",
    "measure_memory",
    "time_steps",
]

#: By safetensors' names, in the order in which it writes them.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Contenders = Mapping[str, Settings]
Planned = Callable[[Attached, Batch], int | None]
#: What ends the measurement of one contender, not of the others: a refusal, a missing library, too little memory.
FAILURES = (UnsupportedBackbone, ModuleNotFoundError, torch.OutOfMemoryError, MemoryError)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Repeated measurements: median, quartiles ("low", "high") and all values in the order of the rounds."""

    median: float
    low: float
    high: float
    values: list[float]

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Of at least one value."""
        low, median, high = statistics.quantiles(values if len(values) > 1 else values * 2, method="inclusive")
        return cls(median=median, low=low, high=high, values=values)


@dataclass(frozen=True, kw_only=True)
class Cost(StepCount):
    """All that the meters say of a method on a backbone. What was not measured is None, never a guess.

    Attributes:
        parameters: values that are trained, the head's among them.
        backbone_parameters: of the backbone alone.
        task_bytes: size of the task's weight file, without metadata.
        model_bytes: of the weights in memory, backbone and task.
        peak_bytes: how far allocated memory rises in a step (forward, backward, AdamW) over weights and optimizer
            state, beginning without gradients.
        resident_bytes: how far the process's resident memory rises meanwhile (CPU only).
        inference_peak_bytes: how far allocated memory rises in an inference.
        planned_peak_bytes: what was predicted for `peak_bytes`.
        step_seconds: of forward, backward and AdamW.
        forward_seconds: of a forward pass of the bare frozen backbone and the head, in the same rounds.
        inference_seconds: of a forward pass with the task attached, in eval mode, without gradients.
        energy_joules: of a step. See `sidestep.measure.energy`.
        energy_source: what counted it.
    """

    parameters: int
    backbone_parameters: int
    task_bytes: int
    model_bytes: int
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    inference_peak_bytes: int | None = None
    planned_peak_bytes: int | None = None
    step_seconds: Spread | None = None
    forward_seconds: Spread | None = None
    inference_seconds: Spread | None = None
    energy_joules: float | None = None
    energy_source: Source | Literal["not measured"] = "not measured"

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Times:
    """The part of a `Cost` that takes repeated steps. Its fields are as there."""

    step_seconds: Spread
    forward_seconds: Spread
    inference_seconds: Spread
    energy_joules: float | None
    energy_source: Source | Literal["not measured"]


def measure(
    backbone: nn.Module,
    contenders: Contenders,
    batch: Batch,
    *,
    repeats: int = 5,
    warmup: int = 1,
    bf16: bool = False,
    energy: Source | None = None,
    planned: Planned | None = None,
) -> dict[str, Cost | Exception]:
    """What each contender costs on the same backbone and batch.

    Each is attached, measured and detached again. The backbone and the random generators are afterwards as before.

    Args:
        backbone: on the device that is to be measured, with nothing attached.
        contenders: what to attach, by label.
        batch: with labels.
        repeats: rounds that are timed.
        warmup: rounds before them that are not.
        bf16: run forward under autocast to bfloat16.
        energy: "nvml" or "rapl" asks for this counter. None: the device's, if it has one that can be read.
        planned: predicts `peak_bytes` for an attached model and the batch.

    Returns:
        By label the cost, or what prevented it: `UnsupportedBackbone`, `ModuleNotFoundError` (a library is missing),
        `torch.OutOfMemoryError` or `MemoryError`.

    Raises:
        ValueError: if there is nothing to measure or a setting is out of range.
        MeterError: if the energy counter that was asked for cannot measure here.
    """
    _check(contenders, repeats, warmup)
    energy_counter(_device(backbone), energy)  # refused before anything is measured
    found: dict[str, Cost | Exception] = {}
    for label, contender in contenders.items():
        try:
            found[label] = measure_memory(backbone, contender, batch, bf16=bf16, planned=planned)
        except FAILURES as error:
            found[label] = error.with_traceback(None)  # its frames hold the step's tensors
    costs = {label: cost for label, cost in found.items() if isinstance(cost, Cost)}
    if not costs:
        return found
    able = {label: contenders[label] for label in costs}
    times = time_steps(backbone, able, batch, repeats=repeats, warmup=warmup, bf16=bf16, energy=energy)
    return {**found, **{label: replace(cost, **vars(times[label])) for label, cost in costs.items()}}


def measure_memory(
    backbone: nn.Module,
    contender: Settings,
    batch: Batch,
    *,
    bf16: bool = False,
    planned: Planned | None = None,
) -> Cost:
    """The cost of one contender without times and energy. Arguments as for `measure`.

    If the backbone and the batch were made inside a `FakeTensorMode` that is active, there are counts and no peaks. So
    sizes can be counted that would not fit.

    Raises:
        UnsupportedBackbone: if the method does not work on the backbone.
        ModuleNotFoundError: if the method needs a library that is not installed.
    """
    backbone_parameters = sum(parameter.numel() for parameter in backbone.parameters())
    with same_random_numbers(backbone), attached(backbone, contender) as model:
        step = measure_step(model, batch, bf16=bf16)
        planned_bytes = None if planned is None else planned(model, batch)
        _place(model)
        return Cost(
            **{field.name: getattr(step, field.name) for field in fields(StepCount)},
            parameters=sum(parameter.numel() for _, parameter in model.trained_parameters()),
            backbone_parameters=backbone_parameters,
            task_bytes=file_bytes(packed(model, model.state_dict())),
            model_bytes=nbytes(stored_tensors(model)),
            peak_bytes=step.peak_bytes,
            resident_bytes=step.resident_bytes,
            inference_peak_bytes=inference_peak(model, batch, bf16=bf16),
            planned_peak_bytes=planned_bytes,
        )


def time_steps(
    backbone: nn.Module,
    contenders: Contenders,
    batch: Batch,
    *,
    repeats: int = 5,
    warmup: int = 1,
    bf16: bool = False,
    energy: Source | None = None,
) -> dict[str, Times]:
    """Times of every contender, taken in turns, and its energy. Arguments as for `measure`.

    In each round every contender is attached, one step and one inference of it are timed, and it is detached. So is the
    bare backbone with the first contender's head. Each round begins with another contender.

    Raises:
        UnsupportedBackbone: if a method does not work on the backbone.
        ValueError: if there is nothing to time or a setting is out of range.
        MeterError: if the energy counter that was asked for cannot measure here.
    """
    _check(contenders, repeats, warmup)
    counter = energy_counter(_device(backbone), energy)
    bare = Settings(ProbeConfig(), next(iter(contenders.values())).head)
    steps: dict[str, list[float]] = {label: [] for label in contenders}
    inferences: dict[str, list[float]] = {label: [] for label in contenders}
    forwards: list[float] = []
    labels: list[str | None] = [None, *contenders]
    with same_random_numbers(backbone):
        for turn in range(warmup + repeats):
            first = turn % len(labels)
            for label in [*labels[first:], *labels[:first]]:
                if label is None:
                    with attached(backbone, bare) as model:
                        forwards.append(_inference_seconds(model, batch, bf16))
                    continue
                with attached(backbone, contenders[label]) as model:
                    steps[label].append(_step_seconds(model, batch, bf16))
                    inferences[label].append(_inference_seconds(model, batch, bf16))
        joules = {label: _step_joules(backbone, one, batch, bf16, counter) for label, one in contenders.items()}
    forward = Spread.of(forwards[warmup:])
    return {
        label: Times(
            step_seconds=Spread.of(steps[label][warmup:]),
            forward_seconds=forward,
            inference_seconds=Spread.of(inferences[label][warmup:]),
            energy_joules=joules[label],
            energy_source="not measured" if counter is None else counter.source,
        )
        for label in contenders
    }


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Size of a safetensors file of these tensors, without metadata. Nothing is written or copied.

    Raises:
        ValueError: if there is a tensor of a dtype that task files do not hold.
    """
    header, end, order = {}, 0, list(DTYPES)
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(f"{name} is {tensor.dtype}, but a task file holds {known}: convert it")
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        start, end = end, end + nbytes([tensor])
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + 8 * math.ceil(len(text) / 8) + end


def _check(contenders: Contenders, repeats: int, warmup: int) -> None:
    if not contenders:
        raise ValueError("no contenders: name at least one")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats={repeats}, warmup={warmup}: at least one round is timed, after none or more others")


def _place(model: Attached) -> None:
    """Give sparse diffs that have no positions yet some."""
    for part in model.parts:
        part.place_anywhere()


def _step_seconds(model: Attached, batch: Batch, bf16: bool) -> float:
    model.train()
    inputs = accepted(model, batch)
    with idle_optimizer(model) as optimizer:
        settle(model, inputs, optimizer, bf16)
        return seconds_of(lambda: train_step(model, inputs, optimizer, bf16), model.device)


def _inference_seconds(model: Attached, batch: Batch, bf16: bool) -> float:
    model.eval()
    inputs = accepted(model, batch)
    return seconds_of(lambda: predict(model, inputs, bf16), model.device)


def _step_joules(
    backbone: nn.Module, contender: Settings, batch: Batch, bf16: bool, counter: EnergyCounter | None
) -> float | None:
    if counter is None:
        return None
    with attached(backbone, contender) as model:
        model.train()
        inputs = accepted(model, batch)
        with idle_optimizer(model) as optimizer:
            return energy_per_step(
                lambda: train_step(model, inputs, optimizer, bf16), counter, lambda: synchronize(model.device)
            )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def attached(backbone: nn.Module, contender: Settings) -> Iterator[Attached]:
    """The contender on the backbone, which is as before afterwards."""
    model = attach(backbone, **{field.name: getattr(contender, field.name) for field in fields(Settings)})
    try:
        if not any(part.relaxes for part in model.parts):
            _place(model)
        yield model
    finally:
        detach(model)
