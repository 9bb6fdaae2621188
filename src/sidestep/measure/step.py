"""One step of a model: training and inference as everything here measures them, and the memory that they take.

Optimizer steps are taken at a learning rate of 0, so that every step computes the same and the weights stay.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from sidestep.interface.sparse_delta import SparseDelta
from sidestep.measure.memory import Peak, by_kind_of_module, peak_memory, saved_bytes
from sidestep.model.attach import Attached
from sidestep.model.side_model import SideModel
from sidestep.sparse.diff import SparseDiff

MODULES = 40  # rows of `StepCount.kept_by_module`
OTHER = "(other)"

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """What is counted in a training step, the same on every machine with the same kernels.

    Attributes:
        kept_bytes: what autograd keeps for backward.
        kept_by_module: the same by module, the blocks of a stack together ("encoder.layer.*.output"), largest first.
            At most 40 rows, the last of which is then "(other)".
        gradient_bytes: of all gradients, when backward ends.
        optimizer_bytes: of the optimizer's state.
        flops: of forward and backward, recomputation with it: matrix products, convolutions and attention, as PyTorch's
            counter has them.
    """

    kept_bytes: int
    kept_by_module: dict[str, int]
    gradient_bytes: int
    optimizer_bytes: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class StepCost(StepCount):
    """What one training step (forward, backward, AdamW) takes.

    Attributes:
        rows: of the batch.
        tokens: the batch's padded length. None for images.
        peak_bytes: how far allocated memory rises over weights and optimizer state, beginning without gradients. None
            where it cannot be measured.
        resident_bytes: how far the process's resident memory rises (CPU only).
    """

    rows: int
    tokens: int | None
    peak_bytes: int | None
    resident_bytes: int | None


def measure_step(model: Attached, batch: Batch, *, bf16: bool = False) -> StepCost:
    """Memory of a training step on a batch with labels. Mode, weights and random generators stay as they are.

    Args:
        model: real, or made inside a `FakeTensorMode` that is active. Then there are counts and no peaks.
        batch: with labels. It is real or fake, as the model is.
        bf16: run forward under autocast to bfloat16.
    """
    inputs = accepted(model, batch)
    with _undone(model), idle_optimizer(model) as optimizer:
        model.train()
        settle(model, inputs, optimizer, bf16)
        count = _count(model, inputs, bf16, optimizer)
    # Not in one pass: what the counters attach to the graph makes recomputed blocks live longer.
    peak = step_peak(model, batch, bf16=bf16)
    ids = batch.get("input_ids")
    return StepCost(
        **vars(count),
        rows=len(batch["labels"]),
        tokens=None if ids is None else ids.shape[1],
        peak_bytes=None if peak is None else peak.allocated,
        resident_bytes=None if peak is None else peak.resident,
    )


def step_peak(model: Attached, batch: Batch, *, bf16: bool = False) -> Peak | None:
    """How far memory rises in a training step over weights and optimizer state. None where it cannot be measured.

    Mode, weights and random generators stay as they are.
    """
    if not _is_real(model):
        return None
    inputs = accepted(model, batch)
    with _undone(model), idle_optimizer(model) as optimizer:
        model.train()
        settle(model, inputs, optimizer, bf16)
        return peak_memory(lambda: train_step(model, inputs, optimizer, bf16), model.device)


def inference_peak(model: Attached, batch: Batch, *, bf16: bool = False) -> int | None:
    """How far allocated memory rises in an inference, in bytes. None where it cannot be measured."""
    if not _is_real(model):
        return None
    inputs = accepted(model, batch)
    with _undone(model):
        model.eval()
        return peak_memory(lambda: predict(model, inputs, bf16), model.device).allocated


def step_seconds(model: Attached, batches: Iterable[Callable[[], Batch]], *, bf16: bool = False) -> list[float]:
    """Seconds of a training step on each of the batches, which are made within that time.

    Mode, weights and random generators stay as they are.
    """

    def step(make: Callable[[], Batch]) -> None:
        train_step(model, accepted(model, make()), optimizer, bf16)

    batches = list(batches)
    with _undone(model), idle_optimizer(model) as optimizer:
        model.train()
        if batches and first_step_compares(model):
            step(batches[0])
        return [seconds_of(partial(step, make), model.device) for make in batches]


def evaluation_seconds(model: Attached, batches: Iterable[Callable[[], Batch]], *, bf16: bool = False) -> list[float]:
    """Seconds of a forward pass with labels, without gradients, on each of the batches."""

    def evaluate(make: Callable[[], Batch]) -> None:
        _loss(model, accepted(model, make()), bf16)

    with _undone(model), torch.no_grad():
        model.eval()
        return [seconds_of(partial(evaluate, make), model.device) for make in batches]


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """How long it takes, until the device has done its work."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_step(model: Attached, batch: Batch, optimizer: torch.optim.Optimizer, bf16: bool) -> None:
    """Forward, backward and an optimizer step. No gradients are left."""
    _loss(model, batch, bf16).backward()
    optimizer.step()
    optimizer.zero_grad()


def settle(model: Attached, batch: Batch, optimizer: torch.optim.Optimizer, bf16: bool) -> None:
    """A step that is not measured, where a model's first step does more than others."""
    if first_step_compares(model) and _is_real(model):
        train_step(model, batch, optimizer, bf16)


def first_step_compares(model: Attached) -> bool:
    """Whether the next step also compares: a second pass with the first, or a loss with the model's own."""
    return any(
        not part.fold.keeping.is_proved or (part.token_loss is not None and part.token_loss.proved is None)
        for part in model.parts
    )


def predict(model: Attached, batch: Batch, bf16: bool) -> None:
    """A forward pass without labels and gradients."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        model(**inputs)


@contextmanager
def idle_optimizer(model: Attached) -> Iterator[torch.optim.Optimizer]:
    """The optimizer of a training step with its state in place, at a learning rate of 0.

    It is the Trainer's AdamW, or that of a first stage in which all weights are free. That one takes more memory.
    """
    first = model if isinstance(model, SideModel) and model.relaxes else None
    optimizer: Any
    if first is not None:
        optimizer = first.relax(rate=0.0)
    else:
        parameters = [parameter for _, parameter in model.trained_parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    try:
        fill_state(optimizer)
        with announced(model, optimizer):
            yield optimizer
    finally:
        if first is not None:
            first.unrelax(optimizer)


def sparse_deltas(models: Iterable[SideModel]) -> Iterator[tuple[SparseDelta, SparseDiff]]:
    """The methods that are told of the steps of training, with their diffs."""
    for model in models:
        if isinstance(model.delta, SparseDelta) and model.sparse is not None:
            yield model.delta, model.sparse


@contextmanager
def announced(model: Attached, optimizer: Any) -> Iterator[None]:
    """For methods that are told of steps, the step run inside is the last one of training. Nothing moves after it."""
    told = list(sparse_deltas(model.parts))
    for delta, diff in told:
        delta.before_step(diff, 1, 1)
    yield
    for delta, diff in told:
        delta.after_step(diff, optimizer)


def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Take a step without gradients, if the optimizer makes its state in the first step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p not in optimizer.state]
    if parameters:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()


def names_taken(model: Attached) -> set[str]:
    """What the model's forward takes. Labels are among it, also where the backbone's own head names them otherwise."""
    return {*inspect.signature(model.forward).parameters, "labels"}


def accepted(model: Attached, batch: Batch) -> dict[str, Tensor]:
    """The part of a batch that the model's forward takes, on the model's device."""
    names = names_taken(model)
    return {name: value.to(model.device) for name, value in batch.items() if name in names}


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Afterwards the random generators of the CPU and of the model's device are as before."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _loss(model: Attached, batch: Batch, bf16: bool) -> Tensor:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        return model(**batch).loss


def _count(model: Attached, batch: Batch, bf16: bool, optimizer: torch.optim.Optimizer) -> StepCount:
    with FlopCounterMode(display=False) as flops:
        with saved_bytes(model) as kept:
            loss = _loss(model, batch, bf16)
        loss.backward()
    gradients = nbytes(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.zero_grad()
    return StepCount(
        kept_bytes=kept.total,
        kept_by_module=_grouped(kept.by_module()),
        gradient_bytes=gradients,
        optimizer_bytes=nbytes(value for state in optimizer.state.values() for value in state.values()),
        flops=flops.get_total_flops(),
    )


def _grouped(kept: Mapping[str, int]) -> dict[str, int]:
    """Bytes by kind of module, at most `MODULES` of them, the smallest together."""
    ordered = list(by_kind_of_module(kept).items())
    if len(ordered) <= MODULES:
        return dict(ordered)
    return {**dict(ordered[: MODULES - 1]), OTHER: sum(size for _, size in ordered[MODULES - 1 :])}


def _is_real(model: Attached) -> bool:
    """Whether peaks can be measured."""
    return model.device.type in ("cpu", "cuda") and not isinstance(next(model.parameters()), FakeTensor)


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Afterwards there are no gradients, and buffers, mode and random generators are as before."""
    mode, buffers = model.training, [(buffer, buffer.clone()) for buffer in model.buffers()]
    with same_random_numbers(model):
        try:
            yield
        finally:
            model.zero_grad(set_to_none=True)
            model.train(mode)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
