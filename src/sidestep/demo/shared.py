"""What the demos share: contestants trained on one backbone, the table of what they cost, a saved task at work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from sidestep.backbone.families import Pool
from sidestep.console import remark, show_table
from sidestep.kinds.prepare import TaskData
from sidestep.measure.memory import format_bytes
from sidestep.measure.step import StepCost, measure_step
from sidestep.messages import counted
from sidestep.methods import FullConfig, MethodConfig, method_of
from sidestep.model.attach import attach, detach
from sidestep.tasks.predict import evaluate
from sidestep.training.results import Results
from sidestep.training.run import DataSpec, ModelSpec, RunSpec, train
from sidestep.training.settings import TrainSettings
from sidestep.training.train import head_for
from sidestep.training.trainer import largest_batch


class DemoError(ValueError):
    """A demo cannot run: its backbone is not there or not the one that it should be, or a process failed."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A method and how it is trained. The rates were chosen on a fifth of the training rows."""

    name: str
    config: MethodConfig
    rate: float
    pool: Pool | None = None

    @property
    def task(self) -> str:
        """The name of its task's folder."""
        return self.config.__class__.__name__.removesuffix("Config").lower()


def train_contestant(
    contestant: Contestant,
    name: str | Path,
    backbone: Any,
    data: TaskData,
    settings: TrainSettings,
    test: Dataset | None = None,
) -> Results:
    """Train a method from the same seed as the others, by the call that `sidestep train` makes.

    Args:
        contestant: its rate and its folder replace those of the settings.
        name: the backbone's.
        backbone: as it was loaded. It is detached again at the end.
        data: what it is trained on.
        settings: of the training. The task goes to a folder in `output`, and what lies there is replaced.
        test: rows that the returned scores are of. None: the dev rows, as in the results.json that is written.
    """
    how = f"{counted(settings.epochs, 'epoch')} at a learning rate of {contestant.rate:g}"
    if method_of(contestant.config).solved:
        how = "one pass of the frozen model, then solved"
    remark(f"\n{contestant.name}: {how}")
    settings = replace(
        settings, output=settings.output / contestant.task, learning_rate=contestant.rate, overwrite=True
    )
    spec = RunSpec(
        data=DataSpec(train=data.train),
        model=ModelSpec(backbone=name, method=contestant.config, pool=contestant.pool),
        training=settings,
    )
    model, _, results = train(spec, backbone=backbone, data=data)
    try:
        return results if test is None else replace(results, scores=evaluate(model, test))
    finally:
        detach(model)


def full_step(backbone: Any, data: TaskData, settings: TrainSettings) -> StepCost:
    """What full tuning keeps in the step that the contestants were measured in."""
    model = attach(backbone, FullConfig(), head=head_for(data))
    try:
        return measure_step(model, largest_batch(data, settings.batch_size))
    finally:
        detach(model)


def majority(classes: Sequence[str]) -> float:
    """The accuracy of always naming the most frequent class."""
    return max(classes.count(name) for name in classes) / len(classes)


def show_costs(title: str, found: Mapping[str, Results], full: StepCost, chance: float) -> None:
    """Print what each contestant reaches and costs, between the majority and full tuning."""
    lines: list[tuple[object, ...]] = [
        (
            name,
            f"{results.scores['accuracy']:.1%}",
            results.trainable_parameters,
            format_bytes(_kept(results)),
            f"{_kept(results) / full.kept_bytes:.1%}",
            format_bytes(results.task_bytes),
            f"{_seconds(results):.0f} s",
        )
        for name, results in found.items()
    ]
    lines = [
        ("majority", f"{chance:.1%}", *[None] * 5),
        *lines,
        ("full tuning (not trained)", None, None, format_bytes(full.kept_bytes), "100%", None, None),
    ]
    columns = ("", "dev accuracy", "trained", "kept for backward", "of full tuning", "task file", "training")
    print()
    show_table(title, columns, lines)


def _kept(results: Results) -> int:
    """Bytes for backward. A method that is solved takes no steps."""
    return 0 if results.step is None else results.step.kept_bytes


def _seconds(results: Results) -> float:
    """Of training, with the frozen pass that it reads, if that is stored."""
    return results.seconds + (results.features or {"spent_seconds": 0.0})["spent_seconds"]


def predict_elsewhere(task: Path, source: Path, target: Path) -> Dataset:
    """Rows labelled by a saved task, in a new process that knows nothing but its folder.

    Args:
        task: its folder.
        source: a file of rows or a folder of images.
        target: the .jsonl file that `sidestep predict` writes.

    Raises:
        DemoError: if the process fails.
    """
    command = [sys.executable, "-m", "sidestep.cli", "predict", str(task), "--data", str(source)]
    command += ["--output", str(target), "--overwrite", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DemoError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return Dataset.from_json(str(target))
