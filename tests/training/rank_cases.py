"""What `test_ranks.py` compares between one process and two: this file is run by both.

Two then train until one of them is killed.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/training/rank_cases.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from transformers import TrainerCallback

import sidestep as ss
from dual_encoders import clip
from sidestep import ranks
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.data import Fields
from sidestep.kinds.prepare import TaskData, head_for, prepare
from sidestep.kinds.solve import solve
from sidestep.tasks import load as loading
from sidestep.tasks import predict
from sidestep.training import train as training
from sidestep.training.settings import TrainSettings
from small_tasks import reviews, text_backbone
from written_tasks import answered, llama_backbone, t5_backbone

FOUND, GO = "found.pt", "go"
STILL = 1e-9
"""A learning rate at which weights stay, so that all steps are compared at the same weights."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run.

    Attributes:
        method: its config.
        kind: of the task. None: the backbone's own head, which does not take the Trainer's number of labels.
        settings: that differ.
        how: further arguments of `attach`.
    """

    method: ss.MethodConfig
    kind: str | None = "single"
    settings: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)


READ = ss.ReadConfig(rank=4)
CASES = {
    "read": Case(method=READ),
    "read, accumulated": Case(method=READ, settings={"accumulate": 2}),
    "read, replay": Case(method=READ, how={"keep": "replay"}),
    "sherl": Case(method=ss.SherlConfig(reduction=4, dropout=0.0)),
    "dtl": Case(method=ss.DTLConfig(rank=2, late_blocks=1)),
    "lst": Case(method=ss.LSTConfig(reduction=4, dropout=0.0)),
    "side_attention": Case(method=ss.SideAttentionConfig(dropout=0.0)),
    "lora": Case(method=ss.LoraConfig(rank=2)),
    "diff_pruning": Case(method=ss.DiffPruningConfig(finetune_epochs=1)),
    "sparse": Case(method=ss.SparseConfig(density=0.05, select="random"), settings={"accumulate": 2}),
    "regression": Case(method=READ, kind="regress"),
    "several classes": Case(method=READ, kind="multi"),
    "own head": Case(method=READ, kind=None, settings={"accumulate": 2}),
    "lm": Case(method=READ, kind="lm", settings={"accumulate": 2}),
    "text2text": Case(method=ss.LoraConfig(rank=2), kind="text2text", settings={"accumulate": 2}),
}


class Seen(TrainerCallback):
    """Notes the gradients of each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the step."""
        named = kwargs["model"].named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def backbones(folder: Path) -> None:
    """Write the backbones. Dropout is off, so that one process and two compute the same."""
    for name, make in (("bert", text_backbone), ("lm", llama_backbone), ("text2text", t5_backbone)):
        make(folder / name)
        place = folder / name / "config.json"
        config = json.loads(place.read_text())
        off = {key: 0.0 for key in config if "drop" in key}
        place.write_text(json.dumps({**config, **off}))


def rows_of(kind: str | None, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows for a kind of task."""
    if kind in ("lm", "text2text"):
        return answered(count, seed)
    rows = reviews(count, seed)
    for number, row in enumerate(rows):
        row["label"] = {"regress": row["score"], "multi": ["pos"] * (number % 3 > 0) + ["neg"] * (number % 2)}.get(
            str(kind), row["label"]
        )
    return rows


def data_of(folder: Path, kind: str | None, count: int = 27) -> TaskData:
    """Training rows that make uneven shares of the last batch, and dev rows."""
    written = kind in ("lm", "text2text")
    fields = Fields(text="text", label="answer" if written else "label")
    train, dev = (Dataset.from_list(rows_of(kind, number, seed)) for number, seed in ((count, 0), (13, 1)))
    processor = load_processor(folder / (str(kind) if written else "bert"))
    return prepare(train, dev, fields, processor, kind=kind)


def attached(folder: Path, case: Case, data: TaskData) -> Any:
    """The model of a case, away from its start, at which many gradients are 0."""
    torch.manual_seed(0)
    written = case.kind in ("lm", "text2text")
    if case.kind is None:
        backbone = load_backbone(folder / "bert", head=True, num_labels=2)
        model = ss.attach(backbone, case.method, train_head=True, **case.how)
    else:
        backbone = load_backbone(folder / (case.kind if written else "bert"), writes=case.kind if written else None)
        model = ss.attach(backbone, case.method, head=None if written else head_for(data), **case.how)
    with torch.no_grad():
        for name, parameter in model.trained_parameters():
            if not name.startswith("sparse"):
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def settings_of(output: Path, **changes: Any) -> TrainSettings:
    """One epoch with a step's loss in each log entry."""
    how = {"epochs": 1, "batch_size": 8, "learning_rate": STILL, "schedule": "constant", "warmup": 0.0, "log_steps": 1}
    how |= {"progress": False, "measure": False, "max_grad_norm": 0.0, "keep": "last"}
    return TrainSettings(output=output, **{**how, **changes})


def trained(name: str, folder: Path, place: Path) -> dict[str, Any]:
    """The losses and gradients of a case's steps, and the bytes of its checkpoint."""
    case, seen = CASES[name], Seen()
    data = data_of(folder, case.kind)
    model, make = attached(folder, case, data), training.make_trainer

    def watched(*args: Any, **kwargs: Any) -> Any:
        trainer = make(*args, **kwargs)
        trainer.add_callback(seen)
        made.append(trainer)
        return trainer

    made: list[Any] = []
    training.make_trainer = watched
    try:
        results = training.train(model, data, settings_of(place / "run", **case.settings))
    finally:
        training.make_trainer = make
    ranks.agree({key: value.double().sum().item() for key, value in model.state_dict().items()})
    losses = [entry["loss"] for trainer in made for entry in trainer.state.log_history if "loss" in entry]
    last = max((place / "run" / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return {
        "losses": losses,
        "gradients": seen.steps,
        "bytes": (last / "model.safetensors").stat().st_size,
        "scores": results.scores,
        "wrapped": type(made[-1].model_wrapped).__name__,
    }


def retrieved(folder: Path, place: Path) -> dict[str, Any]:
    """Gradients of a dual encoder's loss over all pairs, of shares that differ by one row."""
    torch.manual_seed(0)
    model = ss.attach(clip(), READ, head=ss.Retrieve(dim=6)).train()
    pixels, ids = torch.randn(7, *model_pixels(model)), torch.randint(3, 30, (7, 5))
    labels = torch.tensor([0, 1, 1, 2, 3, 4, 5])
    own = torch.arange(7)[ranks.rank() :: ranks.count()]
    model.gathers = ranks.count() > 1
    loss = model(pixel_values=pixels[own], input_ids=ids[own], labels=labels[own]).loss
    loss.backward()
    gradients = {name: ranks.total(p.grad) / ranks.count() for name, p in model.trained_parameters()}
    return {"losses": [loss.item()], "gradients": [gradients]}


def model_pixels(model: Any) -> tuple[int, int, int]:
    """The shape of a picture."""
    config = model.backbone.config.vision_config
    return config.num_channels, config.image_size, config.image_size


def solved(folder: Path, place: Path) -> dict[str, Any]:
    """Readouts from shares of the rows, and one as a run that keeps its vectors in memory or in a folder."""
    torch.manual_seed(0)
    vectors = torch.randn(101, 12)
    classes = (vectors[:, :3] + torch.randn(101, 3)).argmax(1)
    found: dict[str, Any] = {}
    for problem, targets in (("single", classes), ("regress", vectors @ torch.randn(12, 2) + torch.randn(101, 2))):
        one = solve(lambda start, end: vectors[start:end], targets, problem, outputs=3 if problem == "single" else 2)
        found[problem] = one.weight
    data = data_of(folder, "single")
    for where in ("ram", "disk"):
        model = ss.attach(load_backbone(folder / "bert"), ss.ReadoutConfig(), head=head_for(data))
        own = {"features": where, "features_folder": place / "store" if where == "disk" else None}
        results = training.train(model, data, settings_of(place / where, **own))
        found[where] = {**model.state_dict()}["head.linear.weight"]
        found[f"{where}, rows"] = results.features["computed"]
    shards = list((place / "store").glob("*/*.safetensors"))
    found["stored"] = sorted(row for shard in shards for row in stored_rows(shard))
    return found


def stored_rows(shard: Path) -> list[str]:
    """The rows of a shard."""
    from safetensors.torch import load_file

    return [bytes(row).hex() for row in load_file(shard)["rows"].numpy()]


def kept(folder: Path, place: Path) -> dict[str, Any]:
    """A run from stored features."""
    data = data_of(folder, "single")
    model = attached(folder, CASES["read"], data)
    how = {"features": "ram", "learning_rate": 1e-3}
    training.train(model, data, settings_of(place / "run", **how))
    return {name: value.clone() for name, value in model.state_dict().items()}


def resumed(folder: Path, place: Path) -> dict[str, Any]:
    """A run with noise, whole, and broken off within its second epoch and resumed."""
    data = data_of(folder, "single")
    case = Case(method=ss.LSTConfig(reduction=4, dropout=0.3))
    how = {"learning_rate": 1e-3, "save_steps": 1, "epochs": 2, "log_steps": 3}
    whole = attached(folder, case, data)
    training.train(whole, data, settings_of(place / "whole", **how))
    stop_after(6, lambda: training.train(attached(folder, case, data), data, settings_of(place / "broken", **how)))
    again = attached(folder, case, data)
    training.train(again, data, settings_of(place / "broken", resume=True, **how))
    same = all(torch.equal(value, whole.state_dict()[name]) for name, value in again.state_dict().items())
    quiet = replace(case, method=ss.LSTConfig(reduction=4, dropout=0.0))
    model = attached(folder, quiet, data)
    stop_after(6, lambda: training.train(model, data, settings_of(place / "handed on", **how)))
    return {"same": same}


class Stopped(Exception):
    """A run was broken off."""


def stop_after(step: int, run: Callable[[], object]) -> None:
    """Break a run off after a step's checkpoint."""

    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise Stopped

    make = training.make_trainer

    def stopping(*args: Any, **kwargs: Any) -> Any:
        trainer = make(*args, **kwargs)
        trainer.add_callback(Stop())
        return trainer

    training.make_trainer = stopping
    try:
        run()
    except Stopped:
        pass
    finally:
        training.make_trainer = make


def go_on(folder: Path, run: Path) -> dict[str, torch.Tensor]:
    """Resume a run that `resumed` has handed on, with however many processes."""
    data = data_of(folder, "single")
    model = attached(folder, Case(method=ss.LSTConfig(reduction=4, dropout=0.0)), data)
    how = {"learning_rate": 1e-3, "save_steps": 1, "epochs": 2, "log_steps": 3}
    results = training.train(model, data, settings_of(run, resume=True, **how))
    assert results.resumed_from == 6
    return {name: value.clone() for name, value in model.state_dict().items()}


def taken_over(folder: Path, place: Path) -> dict[str, torch.Tensor]:
    """What two processes make of the run that one has handed on, once that one is through."""
    of_one = folder / "of 1"
    while not (of_one / FOUND).exists():
        time.sleep(0.1)
    ranks.first(lambda: shutil.copytree(of_one / "resumed" / "handed on", place))
    return go_on(folder, place)


def answers(folder: Path, place: Path) -> dict[str, Any]:
    """Predictions and scores of tasks that were trained here, on rows that do not share out evenly."""
    found: dict[str, Any] = {}
    for name, kind in (("read", "single"), ("lm", "lm")):
        model = loading.load(place.parent / name / "run")
        rows = Dataset.from_list(rows_of(kind, 11, 2))
        found[name] = predict.predict(model, rows, batch_size=4).to_dict()
        found[f"{name}, scores"] = predict.evaluate(model, rows, batch_size=4)
    return found


def refused(folder: Path, place: Path) -> dict[str, str]:
    """What is said where processes differ, or cannot share."""
    said = {}
    case, number = CASES["read"], ranks.rank()
    own = {"data": 27 - number, "settings": 27, "shares": 27, "rows": 27}
    changes = {"settings": {"learning_rate": 1e-3 * (1 + number)}, "shares": {"batch_size": 13}}
    changes["rows"] = {"batch_size": 1}
    for name, rows in own.items():
        data = data_of(folder, "single", rows)
        try:
            training.train(attached(folder, case, data), data, settings_of(place / name, **changes.get(name, {})))
        except ValueError as error:
            said[name] = f"{type(error).__name__}: {error}"
        assert not (place / name / "checkpoints").exists()
    try:
        ranks.check_seen(place / f"seen by {number}")
    except ValueError as error:
        said["folder"] = f"{type(error).__name__}: {error}"
    try:
        ranks.each(lambda: 1 // (1 - number))
    except ZeroDivisionError as error:
        said["each"] = str(error)
    return said


def run_all(folder: Path, only: Sequence[str] = ()) -> None:
    """All of it. What was found is written to a file of the first process."""
    place = folder / f"of {ranks.count()}"
    ranks.first(lambda: place.mkdir())
    checks: dict[str, Callable[[Path, Path], Any]] = {name: partial(trained, name) for name in CASES}
    checks |= {"retrieval": retrieved, "solved": solved, "kept": kept, "resumed": resumed, "answers": answers}
    if ranks.count() > 1:
        checks |= {"refused": refused, "taken over": taken_over}
    found = {name: check(folder, place / name) for name, check in checks.items() if not only or name in only}
    if ranks.is_first():
        torch.save(found, place / "new.pt")
        (place / "new.pt").rename(place / FOUND)


def go_on_for_ever(folder: Path) -> None:
    """Train, once `GO` is there, until somebody ends it."""
    while not (folder / GO).exists():
        time.sleep(0.1)
    data = data_of(folder, "single")
    training.train(attached(folder, CASES["read"], data), data, settings_of(folder / GO / "run", epochs=10**6))


if __name__ == "__main__":
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    ranks.begin()
    run_all(Path(sys.argv[1]), sys.argv[2:])
    go_on_for_ever(Path(sys.argv[1]))
