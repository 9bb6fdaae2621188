"""Steps that several processes share: their gradients beside those of one, and rows a second.

    torchrun --standalone --nproc-per-node 2 benchmarks/rank_steps.py steps.json           # a card each
    torchrun --standalone --nproc-per-node 2 benchmarks/rank_steps.py steps.json --small   # tiny sizes

Each contender's batch is run by the first process alone, and shared by all. Gradients are compared by the norm of their
difference. Rows a second are the median of some steps of forward and backward. Weights are random.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from gpu_cases import CONTENDERS, SCALES
from sidestep import ranks
from sidestep.measure.meters import attached
from sidestep.measure.step import accepted, synchronize
from sidestep.training import shares

TRIED = {"bert-base": ("read-128", "read-128 replay", "lora", "sherl"), "vit-b": ("read-128", "dtl+", "lora")}
STEPS = 10


def gradients(model: Any) -> dict[str, Tensor]:
    """Those of what is trained, which are cleared."""
    found = {name: parameter.grad.clone() for name, parameter in model.trained_parameters()}
    model.zero_grad()
    return found


def rows_per_second(step: Callable[[], object], rows: int, device: torch.device) -> float:
    """The median of some steps, after one that is not counted."""
    taken = []
    for _ in range(STEPS + 1):
        synchronize(device)
        began = time.perf_counter()
        step()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return rows / statistics.median(taken[1:])


def row(scale: str, label: str, device: torch.device, *, small: bool) -> dict[str, Any]:
    """What one contender shows."""
    torch.manual_seed(0)
    kind, one = SCALES[scale], CONTENDERS[label]
    with device:
        backbone, batch = kind.backbone(small=small), kind.batch(small=small)
    with attached(backbone, kind.settings(one)) as model:
        model.train()
        batch = accepted(model, batch)
        rows = len(batch["labels"])
        own = {name: value[ranks.rank() :: ranks.count()] for name, value in batch.items()}

        def alone() -> None:
            model(**batch).loss.backward()

        model.zero_grad()
        alone()
        whole = gradients(model)
        speed = ranks.first(lambda: rows_per_second(alone, rows, device))
        model.zero_grad()
        shares.keep_apart(model)
        wrapped = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)

        def together() -> None:
            wrapped(**own).loss.backward()

        together()
        shared = gradients(model)
        difference = sum(float((shared[name] - value).square().sum()) for name, value in whole.items()) ** 0.5
        norm = sum(float(value.square().sum()) for value in whole.values()) ** 0.5
        of_all = rows_per_second(together, rows, device)
    told = {"backbone": scale, "contender": label, "processes": ranks.count(), "apart": difference / norm}
    return {**told, "alone_rows_per_second": speed, "together_rows_per_second": of_all}


def main() -> None:
    """All contenders, into a file."""
    small = "--small" in sys.argv
    ranks.begin()
    index = torch.cuda.current_device() if torch.cuda.is_available() else None
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    found = [row(scale, label, device, small=small) for scale, labels in TRIED.items() for label in labels]
    ranks.first(lambda: Path(sys.argv[1]).write_text(json.dumps(found, indent=1), encoding="utf-8"))
    ranks.end()


if __name__ == "__main__":
    main()
