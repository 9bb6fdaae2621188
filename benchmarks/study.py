"""Train a side network and its head from recorded taps: what every text study shares."""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sidestep as ss
from sidestep.data import Kind
from sidestep.kinds import kind_named
from sidestep.methods import MethodConfig, read
from sidestep.metrics import scores
from taps import pad, record, replay
from text_tasks import Encoded

BATCH = 32


@dataclass(frozen=True)
class Examples:
    """Recorded taps and targets of a set of rows."""

    taps: list[Tensor]
    targets: Tensor

    def pick(self, index: Sequence[int]) -> Examples:
        return Examples([self.taps[i] for i in index], self.targets[list(index)])


def examples(backbone: nn.Module, encoded: Encoded, part: str) -> Examples:
    """The taps of "train" or "dev" rows, in order. Encoded sorted by length, so that little is padding."""
    rows = getattr(encoded, part)
    order = np.argsort(rows["length"][:], kind="stable")
    taps: list[Tensor | None] = [None] * len(rows)
    found = record(backbone, _batches(rows.remove_columns("labels"), encoded.collate, order))
    for place, tap in zip(order, found, strict=True):
        taps[place] = tap
    kind = torch.float32 if encoded.labels.kind == "regress" else torch.long
    return Examples([tap for tap in taps if tap is not None], torch.tensor(rows["labels"][:], dtype=kind))


def _batches(rows: Any, collate: Callable[[Any], dict[str, Tensor]], order: Sequence[int]) -> Iterator[Any]:
    for start in range(0, len(order), BATCH):
        yield collate([rows[int(i)] for i in order[start : start + BATCH]])


def grouped(lengths: Sequence[int], generator: torch.Generator) -> Iterator[list[int]]:
    """Shuffled batches of rows of like length (sorted within groups of 50 batches, as the Trainer's sampler does)."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    groups = [order[i : i + 50 * BATCH] for i in range(0, len(order), 50 * BATCH)]
    order = [i for group in groups for i in sorted(group, key=lambda i: lengths[i])]
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    for batch in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[batch]


def head_for(encoded: Encoded, targets: Tensor) -> ss.Classify | ss.Regress:
    """The head of a task, on the mean of the tokens (what this encoder was trained for)."""
    if encoded.labels.kind == "regress":
        return ss.Regress(pool="mean", center=float(targets.mean()))
    return ss.Classify(num_labels=len(encoded.labels.names), pool="mean")


@contextmanager
def gates_kept() -> Iterator[None]:
    """Let autograd keep READ's gates: recorded taps lie in memory anyway, so recomputing would only cost time here."""
    recompute = read.recompute
    read.recompute = lambda function, *args: function(*args)
    try:
        yield
    finally:
        read.recompute = recompute


def train(
    backbone: nn.Module,
    config: MethodConfig,
    head: ss.Classify | ss.Regress,
    rows: Examples,
    *,
    rate: float,
    epochs: int,
    seed: int,
) -> ss.SideModel:
    """Train from taps: AdamW, no weight decay, 6 % warm-up, linear decay, batch 32, gradient norm at most 1."""
    torch.manual_seed(seed)
    model = ss.attach(backbone, config, head=head).train()
    parameters = [parameter for _, parameter in model.trained_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = epochs * -(-len(rows.taps) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.06 * steps), (steps - step) / (0.94 * steps), 1.0)
    )
    generator = torch.Generator().manual_seed(seed)
    lengths = [tap.shape[1] for tap in rows.taps]
    for _ in range(epochs):
        for batch in grouped(lengths, generator):
            chosen = rows.pick(batch)
            with gates_kept():
                loss = model.head.loss(replay(model, *pad(chosen.taps)), chosen.targets)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


def evaluate(model: ss.SideModel, kind: Kind, rows: Examples) -> dict[str, float]:
    """The scores on recorded rows."""
    order = sorted(range(len(rows.taps)), key=lambda i: rows.taps[i].shape[1])
    with torch.no_grad():
        parts = [replay(model, *pad([rows.taps[i] for i in order[s : s + BATCH]])) for s in range(0, len(order), BATCH)]
    return scores(kind, torch.cat(parts).numpy(), rows.targets[order].numpy())


def primary(kind: Kind, found: dict[str, float]) -> float:
    """The score by which a task is judged: accuracy, or Pearson's correlation."""
    return found[kind_named(kind).best]


class Results:
    """A resumable study: one JSON line a run. A run whose key is there is not repeated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The line of these settings, if it was run."""
        return next((line for line in self.lines if all(line.get(k) == v for k, v in key.items())), None)

    def once(self, run: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """The result of a run: read if it is there, else run and written."""
        if (line := self.find(**key)) is not None:
            return line
        start = time.perf_counter()
        line = {**key, **run(), "seconds": round(time.perf_counter() - start, 1), **machine()}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line


def quiet(**given: Any) -> ss.TrainSettings:
    """Settings of a run that leaves nothing but its results: a folder of its own, the last epoch, no checkpoints."""
    usual: dict[str, Any] = {
        "output": Path(tempfile.mkdtemp()),
        "batch_size": BATCH,
        "keep": "last",
        "checkpoints": False,
        "measure": False,
        "overwrite": True,
        "progress": False,
    }
    return ss.TrainSettings(**usual | given)


def machine() -> dict[str, Any]:
    """What a number depends on besides its settings."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "sidestep": ss.__version__,
    }
