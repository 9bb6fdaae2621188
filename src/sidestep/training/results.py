"""What a training run reports: its scores, what it cost, and what it was made with."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sidestep.disk.atomic import whole
from sidestep.kinds.assess import OfClass
from sidestep.measure.step import StepCost

FILE = "results.json"
PACKAGES = ("sidestep", "torch", "transformers", "datasets", "accelerate", "safetensors", "timm")


@dataclass(frozen=True, kw_only=True)
class Results:
    """The contents of results.json.

    Attributes:
        scores: of the kept weights on the dev rows, as `sidestep eval` computes them.
        metric: the score by which the weights were chosen. With keep="last" none were chosen.
        constant: by score, what the best single answer for all dev rows would have. See `assess.Assessment`.
        classes: by name, how many dev rows are of the class, and the share of them that was found.
        best_epoch, epochs: when they were made, and how many epochs were trained.
        planned_epochs: the epochs that were asked for. With fewer `epochs`, training stopped early.
        method, head, backbone: what was trained on what. The backbone has its digest.
        keep: how the inputs of taps were kept for backward. What "auto" has chosen, in its place.
        labels: names of the classes.
        data: rows, the source of the dev rows, texts that were truncated.
        trainable_parameters: values that were trained.
        task_bytes: size of the task's weight file.
        step: memory of the largest training step (the longest texts). None if it was not to be measured.
        seconds: of training, with its evaluations. Of a resumed run, those of the last session.
        estimated_seconds: the estimate before training, for all `planned_epochs`. None if no step was measured.
        epoch_seconds: of the optimizer steps alone, for each epoch of the last session.
        resumed_from: step of the checkpoint that the last session continued from.
        device, versions: what it ran on.
        seed, learning_rate, settings: how it was trained.
        recipe: the name of the recipe that was followed, and what was "overridden". None: no recipe.
        history: training loss and dev scores of each epoch.
        notes: what a reader should know besides.
        first_stage: the outcome of a stage before the one that the rest is about (diff pruning's relaxed weights). It
            has "seconds", "epoch_seconds" (of optimizer steps alone) and "history". "open" is the share of gates open
            at its end. "nonzeros" were kept, in so many "tensors" of "all_tensors".
        features: where the frozen part was kept and what it took. None: it ran in each epoch. Its "spent_seconds" are
            not among `seconds`.
        auto: how the method was chosen: its "trials" on held-out training rows, the "budget" and the seconds. None: it
            was named.
        processes: that trained together.
    """

    scores: dict[str, float]
    constant: dict[str, float]
    classes: dict[str, OfClass]
    metric: str
    best_epoch: float
    epochs: float
    planned_epochs: int
    method: dict[str, Any]
    head: dict[str, Any] | None
    backbone: dict[str, Any]
    keep: str
    labels: list[str]
    data: dict[str, Any]
    trainable_parameters: int
    task_bytes: int
    step: StepCost | None
    seconds: float
    estimated_seconds: float | None
    epoch_seconds: list[float]
    resumed_from: int | None
    device: str
    versions: dict[str, str | None]
    seed: int
    learning_rate: float
    settings: dict[str, Any]
    recipe: dict[str, Any] | None
    history: list[dict[str, float]]
    notes: list[str]
    first_stage: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    auto: dict[str, Any] | None = None
    processes: int = 1

    def write(self, folder: Path) -> None:
        """Write results.json to a folder, in one step."""
        write_json(folder / FILE, asdict(self))


def device_name(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file in one step. A reader sees the old file or the new one."""
    with whole(path) as beside:
        beside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
