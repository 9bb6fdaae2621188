"""READ's defaults by measurement: one factor at a time from gru / last / pre_norm.

    python benchmarks/read_defaults.py            # runs what is missing (about 40 minutes on 2 cores), then the table
    python benchmarks/read_defaults.py --table    # the table alone

Cell and aggregation are measured on RTE, MRPC and CR with all-MiniLM-L6-v2, 1,500 training rows, 5 epochs. The place of
the correction needs another backbone, as all-MiniLM is a post-norm encoder, on which both places coincide. So it is
measured on `vit-small-32` with scikit-learn's digits, MNIST and the unseen half of Caltech-101. There are 1,000
training images and 10 epochs, and the class token is read. The rate of each variant (1e-3 or 3e-3) is chosen on a fifth
of the training rows. The dev score is the mean over seeds 0 to 2.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import sidestep as ss
from image_tasks import CLASSES, IMAGE_TASKS, image_examples, vision_backbone
from sidestep.data import Kind
from sidestep.methods import MethodConfig
from study import Examples, Results, evaluate, examples, head_for, primary, train
from text_tasks import encoded, encoder

RESULTS = Results(Path(__file__).parent / "results" / "read_defaults.jsonl")
RATES, SEEDS = (1e-3, 3e-3), (0, 1, 2)
TEXT = ("rte", "mrpc", "cr")
BASE = ss.ReadConfig(rank=128, cell="gru", aggregate="last", correction="pre_norm")
TEXT_VARIANTS = {
    "gru / last": BASE,
    "rnn / last": ss.ReadConfig(rank=128, cell="rnn", aggregate="last", correction="pre_norm"),
    "gru / mean": ss.ReadConfig(rank=128, cell="gru", aggregate="mean", correction="pre_norm"),
}
IMAGE_VARIANTS = {
    "pre_norm": BASE,
    "post_norm": ss.ReadConfig(rank=128, cell="gru", aggregate="last", correction="post_norm"),
}


def holdout(rows: Examples) -> tuple[Examples, Examples]:
    """Four fifths and one fifth of the training rows, a fixed permutation."""
    order = np.random.default_rng(0).permutation(len(rows.taps)).tolist()
    cut = len(order) // 5
    return rows.pick(order[cut:]), rows.pick(order[:cut])


def run(
    backbone: nn.Module,
    kind: Kind,
    head: Any,
    rows: Examples,
    dev: Examples,
    config: MethodConfig,
    **how: Any,
) -> dict[str, Any]:
    """One training run and its score."""
    model = train(backbone, config, head, rows, **how)
    found = evaluate(model, kind, dev)
    ss.detach(model)
    return {"score": primary(kind, found), "scores": found}


def study(
    name: str,
    variants: dict[str, ss.ReadConfig],
    backbone: nn.Module,
    kind: Kind,
    head: Any,
    epochs: int,
    parts: Any,
) -> None:
    """Every variant on one task: the rate on a holdout, then three seeds. `parts` encodes, if anything is missing."""
    if all(RESULTS.find(task=name, variant=v, part="dev", seed=SEEDS[-1]) for v in variants):
        return
    rows, dev = parts()
    head = head(rows.targets) if callable(head) else head
    inner, outer = holdout(rows)
    for variant, config in variants.items():
        trials = {}
        for rate in RATES:
            key = {
                "task": name,
                "variant": variant,
                "part": "holdout",
                "rate": rate,
                "epochs": epochs,
                "seed": 0,
            }
            found = RESULTS.once(
                lambda c=config, r=rate: run(backbone, kind, head, inner, outer, c, rate=r, epochs=epochs, seed=0),
                **key,
            )
            trials[rate] = found["score"]
        best = max(trials, key=lambda rate: trials[rate])
        for seed in SEEDS:
            key = {
                "task": name,
                "variant": variant,
                "part": "dev",
                "rate": best,
                "epochs": epochs,
                "seed": seed,
            }
            RESULTS.once(
                lambda c=config, b=best, s=seed: run(backbone, kind, head, rows, dev, c, rate=b, epochs=epochs, seed=s),
                **key,
            )


def text() -> None:
    """Cell and aggregation."""
    backbone, tokenizer = encoder()
    for name in TEXT:
        task = encoded(name, tokenizer, limit=1500)
        study(
            name,
            TEXT_VARIANTS,
            backbone,
            task.labels.kind,
            lambda targets, task=task: head_for(task, targets),
            5,
            lambda task=task: (examples(backbone, task, "train"), examples(backbone, task, "dev")),
        )


def images() -> None:
    """Before or after the final norm."""
    backbone = vision_backbone()
    for name in IMAGE_TASKS:
        head = ss.Classify(num_labels=CLASSES[name], pool="cls")
        study(
            name,
            IMAGE_VARIANTS,
            backbone,
            "single",
            head,
            10,
            lambda name=name: image_examples(backbone, name),
        )


def table() -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = []
    for variants, tasks in ((TEXT_VARIANTS, TEXT), (IMAGE_VARIANTS, tuple(IMAGE_TASKS))):
        lines += [f"| variant | {' | '.join(tasks)} | mean |", "|---|" + "---|" * (len(tasks) + 1)]
        for variant in variants:
            cells, means = [], []
            for task in tasks:
                found = [RESULTS.find(task=task, variant=variant, part="dev", seed=seed) for seed in SEEDS]
                values = [line["score"] for line in found if line]
                cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
                means += values
            lines.append(f"| {variant} | {' | '.join(cells)} | {np.mean(means):.3f} |" if means else f"| {variant} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    if "--table" not in sys.argv:
        text()
        images()
    print(table())
