"""READ, the probe, BitFit and full tuning on five real text tasks with all-MiniLM-L6-v2 (22.7 M parameters).

    python benchmarks/text_table.py                # READ and the probe (about 45 minutes on 2 cores), then the table
    python benchmarks/text_table.py --controls     # BitFit and full tuning (about 40 minutes on 2 cores)
    python benchmarks/text_table.py --costs        # parameters, bytes kept and step time (a minute)
    python benchmarks/text_table.py --table        # the table alone

READ and probe: 5 epochs. The rate is the best of four on a fifth of at most 1,500 training rows (primary score). Then
they train on all training rows (SST-2: 8,000) with seeds 0 to 2, scored once on dev after the last epoch. BitFit and
full tuning: at most 2,000 training rows, 2 epochs at 2e-3 and 5e-5, one seed. All: batch 32, at most 128 tokens, AdamW,
6 % warm-up, linear decay.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import sidestep as ss
from read_defaults import holdout, run
from sidestep.methods import MethodConfig
from sidestep.metrics import scores
from study import BATCH, Examples, Results, _batches, examples, grouped, head_for, primary
from text_tasks import TASKS, Encoded, encoded, encoder

RESULTS = Results(Path(__file__).parent / "results" / "text_table.jsonl")
TRIAL_ROWS, TRAIN_ROWS, EPOCHS, SEEDS = 1500, 8000, 5, (0, 1, 2)
CONTROL_ROWS = 2000
CONFIGS: dict[str, MethodConfig] = {
    "probe": ss.ProbeConfig(),
    "read": ss.ReadConfig(),
    "bitfit": ss.BitFitConfig(),
    "full": ss.FullConfig(),
}
RATES = {"probe": (1e-4, 1e-3, 1e-2, 5e-2), "read": (1e-4, 5e-4, 1e-3, 3e-3)}
RECIPES = {"bitfit": (2e-3, 2), "full": (5e-5, 2)}


def side_networks(name: str, backbone: nn.Module, tokenizer: Any) -> None:
    """READ and the probe on one task, from recorded taps."""
    if all(chosen(name, method) and dev_lines(name, method) for method in RATES):
        return
    task = encoded(name, tokenizer, limit=TRAIN_ROWS)
    rows, dev = examples(backbone, task, "train"), examples(backbone, task, "dev")
    head, kind = head_for(task, rows.targets), task.labels.kind
    some = np.random.default_rng(1).permutation(len(rows.taps))[:TRIAL_ROWS].tolist()
    inner, outer = holdout(rows.pick(some))

    def score(train: Examples, test: Examples, part: str, method: str, rate: float, seed: int) -> None:
        key = {"task": name, "method": method, "part": part, "rate": rate, "epochs": EPOCHS, "seed": seed}
        settings = {"rate": rate, "epochs": EPOCHS, "seed": seed}
        RESULTS.once(lambda: run(backbone, kind, head, train, test, CONFIGS[method], **settings), **key)

    for method, rates in RATES.items():
        for rate in rates:
            score(inner, outer, "holdout", method, rate, 0)
        for seed in SEEDS:
            score(rows, dev, "dev", method, chosen(name, method), seed)


def chosen(task: str, method: str) -> float | None:
    """The rate with the best score on the holdout. None until all were tried."""
    lines = {rate: RESULTS.find(task=task, method=method, part="holdout", rate=rate) for rate in RATES[method]}
    return None if None in lines.values() else max(lines, key=lambda rate: lines[rate]["score"])


def dev_lines(task: str, method: str) -> list[dict[str, Any]]:
    """The lines of the table's cell: every seed at the chosen rate, or one seed of a control's recipe."""
    rate, seeds = (RECIPES[method][0], SEEDS[:1]) if method in RECIPES else (chosen(task, method), SEEDS)
    lines = [RESULTS.find(task=task, method=method, part="dev", rate=rate, seed=seed) for seed in seeds]
    return [] if None in lines else lines


def control(name: str, method: str, backbone: nn.Module, tokenizer: Any) -> None:
    """BitFit or full tuning on one task, live, with the backbone's own dropout."""
    rate, epochs = RECIPES[method]
    key = {"task": name, "method": method, "part": "dev", "rate": rate, "epochs": epochs, "seed": 0}
    RESULTS.once(
        lambda: live(CONFIGS[method], encoded(name, tokenizer, limit=CONTROL_ROWS), backbone, rate, epochs),
        **key,
    )


def live(config: MethodConfig, task: Encoded, backbone: nn.Module, rate: float, epochs: int) -> dict[str, Any]:
    """Train through the whole model and score on dev."""
    torch.manual_seed(0)
    model = ss.attach(backbone, config, head=head_for(task, torch.tensor(task.train["labels"][:], dtype=torch.float)))
    parameters = [parameter for _, parameter in model.trained_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    steps = epochs * -(-len(task.train) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (0.06 * steps), (steps - step) / (0.94 * steps), 1.0)
    )
    generator, lengths = torch.Generator().manual_seed(0), task.train["length"][:]
    for _ in range(epochs):
        for batch in grouped(lengths, generator):
            loss = model.train()(**task.collate([task.train[i] for i in batch])).loss
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    order = np.argsort(task.dev["length"][:], kind="stable")
    with torch.no_grad():
        parts = [model.eval()(**batch).logits for batch in _batches(task.dev, task.collate, order)]
    found = scores(task.labels.kind, torch.cat(parts).numpy(), np.array(task.dev["labels"][:])[order])
    ss.detach(model)
    return {"score": primary(task.labels.kind, found), "scores": found}


def costs(backbone: nn.Module, repeats: int = 7) -> None:
    """Parameters, bytes kept and step time at batch 32, 128 tokens. Methods interleaved, medians."""
    batch = {
        "input_ids": torch.randint(1000, 30000, (BATCH, 128)),
        "attention_mask": torch.ones(BATCH, 128, dtype=torch.long),
        "labels": torch.randint(0, 2, (BATCH,)),
    }
    times: dict[str, list[float]] = {method: [] for method in CONFIGS}
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(repeats):
        for method, config in CONFIGS.items():
            model = ss.attach(backbone, config, head=ss.Classify(num_labels=2, pool="mean")).train()
            parameters = [parameter for _, parameter in model.trained_parameters()]
            optimizer = torch.optim.AdamW(parameters)
            if method not in rows:
                with ss.saved_bytes(model) as kept:
                    model(**batch)
                rows[method] = {"parameters": sum(p.numel() for p in parameters), "kept": kept.total}
            start = time.perf_counter()
            model(**batch).loss.backward()
            optimizer.step()
            times[method].append(time.perf_counter() - start)
            ss.detach(model)
    for method, row in rows.items():
        seconds = statistics.median(times[method][1:])
        RESULTS.once(
            lambda row=row, s=seconds: {**row, "step": s},
            method=method,
            part="costs",
            batch=BATCH,
            tokens=128,
        )


def table() -> str:
    """The table of docs/measured.md, "READ on larger training sets"."""
    lines = [
        f"| method | {' | '.join(TASKS)} | parameters | bytes kept, MiB | step, s |",
        "|---|" + "---|" * (len(TASKS) + 3),
    ]
    for method in CONFIGS:
        cells = []
        for task in TASKS:
            values = [100 * line["score"] for line in dev_lines(task, method)]
            spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.1f}{spread}" if values else "")
        cost = RESULTS.find(method=method, part="costs")
        cells += [f"{cost['parameters']:,}", f"{cost['kept'] / 2**20:.1f}", f"{cost['step']:.2f}"] if cost else [""] * 3
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    if "--table" not in sys.argv:
        backbone, tokenizer = encoder()
        if "--costs" in sys.argv:
            costs(backbone)
        for name in () if "--costs" in sys.argv else reversed(TASKS):
            if "--controls" in sys.argv:
                for method in RECIPES:
                    control(name, method, backbone, tokenizer)
            else:
                side_networks(name, backbone, tokenizer)
    print(table())
