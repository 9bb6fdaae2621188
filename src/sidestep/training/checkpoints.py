"""The Trainer's checkpoints of a run: which are complete, which is last, and whether a folder is free.

A checkpoint is written in place, file by file, and trainer_state.json comes last. So a checkpoint that a killed process
left half-written lacks a file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sidestep.disk.atomic import OutputError, check_folder
from sidestep.disk.card import CARD
from sidestep.disk.task_folder import CONFIG, PROCESSOR
from sidestep.disk.task_folder import WEIGHTS as TASK
from sidestep.messages import flat
from sidestep.training.results import FILE, write_json
from sidestep.training.settings import TrainSettings

FOLDER = "checkpoints"
LOGS = "logs"
RUN = "run.json"
STATE = "trainer_state.json"
WEIGHTS = "model.safetensors"
FILES = (STATE, WEIGHTS, "optimizer.pt", "scheduler.pt")
RANDOM = "rng_state*.pth"
"""The states of random generators, a file for each process."""


def check_output(settings: TrainSettings) -> None:
    """Refuses an output folder that holds another task or run, before anything is computed.

    Raises:
        OutputError: if the folder is taken or cannot be written, or there is nothing in it to resume.
    """
    output, folder = settings.output, settings.output / FOLDER
    check_folder(output)
    if settings.resume and not (folder / RUN).is_file():
        raise OutputError(f"{output} holds no run to resume: check the path, or start without --resume")
    if settings.resume or settings.overwrite:
        return
    if (output / CONFIG).exists():
        raise OutputError(f"{output} holds another task: choose another folder, or replace it with --overwrite")
    if (folder / RUN).exists():
        raise OutputError(
            f"{output} holds a run that did not end: continue it with --resume, or start anew with --overwrite"
        )


def parts_of(task: Path) -> list[Path]:
    """The files and folders of a task and of its training, each of which a run may replace or delete."""
    return [task / name for name in (CONFIG, TASK, PROCESSOR, CARD, FILE, FOLDER, LOGS)]


def begin(settings: TrainSettings, run: Mapping[str, Any]) -> Path | None:
    """Makes the checkpoint folder ready for a run.

    Args:
        settings: with `output`, `resume` and `overwrite`.
        run: what identifies the run. A resumed run must have the same.

    Returns:
        The checkpoint to continue from, if there is one.

    Raises:
        OutputError: as `check_output`, and if the run to resume was another one.
    """
    check_output(settings)
    folder = settings.output / FOLDER
    if settings.resume:
        _check_same(folder / RUN, run)
        _sweep(folder)
        return last_complete(folder)
    for old in (folder, settings.output / LOGS):
        shutil.rmtree(old, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / RUN, run)
    return None


def as_begun(settings: TrainSettings) -> TrainSettings:
    """The settings. A resumed run that is not told when to stop early gets the patience that it began with."""
    if not settings.resume or settings.patience is not None or settings.keep == "last":
        return settings
    try:
        began = json.loads((settings.output / FOLDER / RUN).read_text(encoding="utf-8"))
        return replace(settings, patience=began["patience"] or 0)
    except (OSError, ValueError, KeyError, TypeError):
        return settings  # `begin` says what is wrong with the run


def epochs_left(epochs: int, start: Path | None) -> float:
    """How many of so many epochs are left to train from a checkpoint. 0 if training had ended."""
    if start is None:
        return epochs
    return 0 if is_finished(start) else epochs - read_state(start)["epoch"]


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end, or None."""
    return max((path for path in _all(folder) if is_complete(path)), key=step_of, default=None)


def is_complete(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there and can be read."""
    try:
        # one look at each file: the Trainer may be removing an old checkpoint meanwhile
        states = list(checkpoint.glob(RANDOM))
        if not states or not all(path.stat().st_size for path in (*states, *(checkpoint / name for name in FILES))):
            return False
        read_state(checkpoint)
        # for PyTorch a file is opened a second time, and its absence then is a RuntimeError
        with safe_open(checkpoint / WEIGHTS, framework="np"):
            return True
    except (ValueError, OSError, SafetensorError):
        return False


def is_finished(checkpoint: Path) -> bool:
    """Whether training had ended (by its epochs or by early stopping) when the checkpoint was written."""
    control = read_state(checkpoint)["stateful_callbacks"]["TrainerControl"]
    return bool(control["args"]["should_training_stop"])


def best_of(checkpoint: Path) -> Path:
    """The checkpoint with the best dev score at the time of this one. This one itself if no score was known yet."""
    step = read_state(checkpoint).get("best_global_step")
    best = checkpoint.with_name(f"checkpoint-{step}")
    return best if step and best.is_dir() else checkpoint


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state of a checkpoint."""
    return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))


def step_of(checkpoint: Path) -> int:
    """After how many optimizer steps a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def relocate(checkpoint: Path) -> None:
    """Make a checkpoint point at the best one beside it, wherever the folder has been moved.

    The Trainer stores that path as it was. If nothing is there, the Trainer drops the best model without an error.
    """
    state, best = read_state(checkpoint), best_of(checkpoint)
    if state.get("best_model_checkpoint") not in (None, str(best)):
        state["best_model_checkpoint"] = str(best)
        write_json(checkpoint / STATE, state)


def _all(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]


def _sweep(folder: Path) -> None:
    """Remove half-written checkpoints. The Trainer's rotation would keep them in the place of good ones."""
    for path in _all(folder):
        if not is_complete(path):
            shutil.rmtree(path)


def _check_same(path: Path, run: Mapping[str, Any]) -> None:
    try:
        before = flat(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}): start the run anew with --overwrite") from error
    now = flat(json.loads(json.dumps(run)))
    changed = [
        f"{name} is {_short(now.get(name))} and was {_short(before.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise OutputError(
            f"{path.parent.parent} holds another run ({'; '.join(changed)}): resume with the same settings "
            "and data, or start anew with --overwrite"
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
