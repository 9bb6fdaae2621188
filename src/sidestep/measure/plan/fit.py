"""What fits: the largest batch for a device, and a warning before a run that will not fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from sidestep.interface.keep import Keep
from sidestep.measure.memory import format_bytes
from sidestep.measure.plan.trace import Device, Plan, Precision, plan_for
from sidestep.methods import MethodConfig, methods
from sidestep.model.attach import Attached

MOST = 2**20  # rows. A batch that still fits then is limited by something else
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class PlanWarning(UserWarning):
    """A run will take more memory than the device has."""


def memory_of(text: str) -> int:
    """Bytes of a size such as "16GB", "24 GiB" or "900M". Units are powers of 1024, as makers of cards count them.

    Raises:
        ValueError: if the text is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", text, flags=re.IGNORECASE)
    if found is None or not float(found[1]):
        raise ValueError(f"{text!r} is no size of memory: write for example 16GB")
    return int(float(found[1]) * UNITS[found[2].upper()])


def best_device() -> Device:
    """The device on which a step can be measured here: the GPU, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def largest_batch(total: Callable[[int], int], limit: int, *, start: int, fixed: int = 0) -> int:
    """The largest batch whose `total` bytes stay within `limit`. 0 if not even one row does.

    The found batch has been tried, and so has the next one. The line through two known batches says where to try.

    Args:
        total: bytes for a batch. They rise with it.
        limit: bytes.
        start: the batch to try first.
        fixed: bytes that do not depend on the batch.
    """
    (low, low_bytes), (high, high_bytes) = (0, fixed), (MOST, 0)
    guess, slope, middle = start, 1.0, True
    while high - low > 1:
        size = total(guess)
        if size > limit:
            high, high_bytes = guess, size
        else:
            slope = (size - low_bytes) / (guess - low)
            low, low_bytes = guess, size
        if high < MOST:
            slope, middle = (high_bytes - low_bytes) / (high - low), not middle
        ahead = int((limit - low_bytes) / max(1.0, slope))
        # in case the line is none: the first tries go no further than eightfold, later every other one halves the gap
        most = 7 * max(1, low) if high == MOST else high - low - 1
        guess = low + min(max(1, (high - low) // 2 if high < MOST and middle else ahead), most)
    return low


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A method that could be used instead, and its plan.

    Attributes:
        label: the method's name, with "+checkpoint" if late blocks are recomputed, "+replay" if taps read again.
        plan: None if there is no plan.
        reason: why there is no plan. None if there is one.
    """

    label: str
    plan: Plan | None
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """Label, bytes and reason, as JSON-ready values."""
        sizes = {
            name: None if self.plan is None else getattr(self.plan, name) for name in ("total_bytes", "peak_bytes")
        }
        return {"label": self.label, **sizes, "reason": self.reason}


def alternatives(make: Callable[..., Plan], asked: MethodConfig) -> list[Alternative]:
    """Every registered method, the smallest first. Where it makes a difference, also with what it can leave out.

    That is with late blocks recomputed, and with `keep="replay"`.

    Args:
        make: the plan of a method config, and of `checkpoint="late"` or `keep="replay"`.
        asked: the config to take for its own method. The other methods have their defaults.
    """
    found = []
    for name, method in methods().items():
        config = asked if type(asked) is method.config else method.config()
        try:
            plain, late = make(config), make(config, checkpoint="late")
        # a method may refuse the backbone, need a package that is not there, or not be traceable
        except (ValueError, ModuleNotFoundError) as refusal:
            found.append(Alternative(label=name, plan=None, reason=str(refusal)))
            continue
        found.append(Alternative(label=name, plan=plain, reason=None))
        if late.saved_bytes != plain.saved_bytes:
            found.append(Alternative(label=f"{name}+checkpoint", plan=late, reason=None))
        if replayed := _replayed(make, config):
            found.append(Alternative(label=f"{name}+replay", plan=replayed, reason=None))
    return sorted(found, key=lambda other: (other.plan is None, other.plan.total_bytes if other.plan else 0))


def _replayed(make: Callable[..., Plan], config: MethodConfig) -> Plan | None:
    """The plan of a method that reads again, or None if it does not go with that."""
    try:
        return make(config, keep="replay")
    except ValueError:
        return None


def ways_of_keeping(device: Device) -> tuple[Keep, ...]:
    """The ways in which taps' inputs are kept with the same gradients, the fastest first."""
    return ("full", "offload", "replay") if device == "cuda" else ("full", "replay")


def fastest(sizes: Mapping[Keep, int], limit: int) -> tuple[Keep, str]:
    """The first way of keeping taps' inputs that fits, and the reason in words. If none fits, the smallest.

    Args:
        sizes: bytes that a step needs, by way, the fastest first.
        limit: bytes that there are.
    """
    said: list[str] = []
    for way, size in sizes.items():
        if size <= limit:
            return way, ", ".join([*said, f"{way} fits with {format_bytes(size)} of {format_bytes(limit)}"])
        said.append(f"{way} needs {format_bytes(size)}")
    smallest = min(sizes, key=lambda way: sizes[way])
    return smallest, f"none fits in {format_bytes(limit)}: {', '.join(said)}. Take a smaller batch"


def settle_keep(
    model: Attached, batch: Mapping[str, Tensor], *, precision: Precision = "float32", optimizer: str = "AdamW"
) -> str | None:
    """Choose for `keep="auto"` by plans on this batch. Where there is no plan, the first step will choose.

    Returns:
        what was chosen and why, in words. None if there was nothing to choose, or there is no plan.
    """
    undecided = [part.fold.keeping for part in model.parts if part.fold.keeping.way == "auto"]
    if not undecided:
        return None
    device: Device = "cuda" if model.device.type == "cuda" else "cpu"
    plans: dict[Keep, Plan] = {}
    try:
        for way in ways_of_keeping(device):
            for keeping in undecided:
                keeping.way = way
            with warnings.catch_warnings(action="ignore"):
                plans[way] = plan_for(model, batch, precision=precision, optimizer=optimizer)
            if _needs(plans[way]) <= _memory(model):
                break
    except Exception:  # whatever goes wrong here is no reason to keep anyone from training
        for keeping in undecided:
            keeping.way = "auto"
        return None
    best, why = fastest({way: _needs(plan) for way, plan in plans.items()}, _memory(model))
    for keeping in undecided:
        keeping.way = best
    return f"keep: {best}, because {why}"


def _needs(plan: Plan) -> int:
    """Bytes that have to be there for a model that is loaded: on a GPU all of its memory is compared."""
    return plan.total_bytes if plan.device == "cuda" else plan.peak_bytes + plan.optimizer_bytes


def _memory(model: Attached) -> int:
    """The memory of the GPU that a model is on, or what the machine has free."""
    if model.device.type == "cuda":
        return torch.cuda.get_device_properties(model.device).total_memory
    return psutil.virtual_memory().available


def check_fits(
    model: Attached,
    batch: Mapping[str, Tensor],
    *,
    precision: Precision = "float32",
    optimizer: str = "AdamW",
) -> None:
    """Warn if a training step on this batch will take more than the device has. Says nothing if it cannot tell.

    On a GPU everything is compared with its memory. On the CPU, what comes on top of the loaded model is compared with
    the memory that is free now.

    Warns:
        PlanWarning: if it does not fit.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            plan = plan_for(model, batch, precision=precision, optimizer=optimizer)
        needed, has = _needs(plan), _memory(model)
    # whatever goes wrong here is no reason to keep anyone from training
    except Exception:
        return
    if needed > has:
        there = "the GPU has" if plan.device == "cuda" else "the machine has free"
        warnings.warn(
            f"a training step with batches of {plan.batch} will need about {format_bytes(needed)}, but {there} "
            f"{format_bytes(has)}: `sidestep plan` finds the batch size or the method that fits",
            PlanWarning,
            stacklevel=2,
        )
