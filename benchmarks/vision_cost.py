"""What DTL, DTL+ and SynQT keep for backward on ViT-B/16 at 224 px, and how long their steps take.

    python benchmarks/vision_cost.py bytes     # float32, MiB per image. Counted, the same on every machine
    python benchmarks/vision_cost.py time      # batch 8: a training step over full tuning's and over a bare forward
    python benchmarks/vision_cost.py           # the tables alone, as Markdown

Weights are random, as neither depends on their values. The official figures are those of the methods' own code with
explicit softmax attention, measured the same way. Times are medians of interleaved rounds in one run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTModel

import sidestep as ss
from sidestep.measure.memory import mib
from sidestep.measure.meters import time_steps
from sidestep.model.settings import Settings
from study import Results

RESULTS = Results(Path(__file__).parent / "results" / "vision_cost.jsonl")
ATTENTION = ("eager", "sdpa")
PUBLISHED = ss.Classify(num_labels=100, pool="mean_pre_norm")
METHODS: dict[str, tuple[ss.MethodConfig, float]] = {
    "DTL": (ss.DTLConfig(), 45.86),
    "DTL+, kernel 3": (ss.DTLConfig(kernel=3), 49.32),
    "DTL+, kernel 5": (ss.DTLConfig(kernel=5), 49.32),
    "SynQT, 1 query": (ss.SynQTConfig(queries=1), 15.28),
    "SynQT, 4 queries": (ss.SynQTConfig(queries=4), 18.08),
    "SynQT, 16 queries": (ss.SynQTConfig(queries=16), 29.32),
}
"""Each with the MiB per image that its official code keeps."""
TIMED = ("DTL", "DTL+, kernel 3", "SynQT, 4 queries")


def vit(attention: str) -> ViTModel:
    """ViT-B/16."""
    return ViTModel(ViTConfig(attn_implementation=attention), add_pooling_layer=False)


def images(rows: int) -> dict[str, Tensor]:
    """A batch with labels."""
    return {"pixel_values": torch.randn(rows, 3, 224, 224), "labels": torch.randint(0, 100, (rows,))}


def bytes_kept(rows: int = 2) -> None:
    """Every method, with both kinds of attention, and with the late blocks recomputed."""
    batch = images(rows)
    for attention in ATTENTION:
        backbone = vit(attention)
        for method, (config, _) in METHODS.items():
            for checkpoint in (None, "late"):
                key: dict[str, Any] = {"part": "bytes", "method": method, "attention": attention}
                key |= {"checkpoint": checkpoint is not None}
                RESULTS.once(lambda c=config, how=checkpoint, b=backbone: kept(b, c, how, batch), **key)


def kept(backbone: ViTModel, config: ss.MethodConfig, checkpoint: Any, batch: dict[str, Tensor]) -> dict[str, int]:
    """Bytes that one step keeps, of all its images. With recomputing also of the largest block run again."""
    model = ss.attach(backbone, config, head=PUBLISHED, checkpoint=checkpoint).train()
    with ss.saved_bytes(model) as found:
        model(**batch)
    blocks = model.late_blocks()
    largest = 0
    if checkpoint is not None and blocks:
        hidden = torch.randn(len(batch["labels"]), 197, 768, requires_grad=True)
        with ss.saved_bytes(blocks[0]) as block:
            type(blocks[0]).forward(blocks[0], hidden)
        largest = block.total
    ss.detach(model)
    return {"kept": found.total, "recomputed": largest, "rows": len(batch["labels"])}


def step_time(rows: int = 8, repeats: int = 3) -> None:
    """A training step of the methods in `TIMED` and of full tuning, and a bare forward pass, in turns."""
    contenders = {method: Settings(METHODS[method][0], PUBLISHED) for method in TIMED}
    contenders["full tuning"] = Settings(ss.FullConfig(), PUBLISHED)
    RESULTS.once(
        lambda: {
            label: {"step": times.step_seconds.values, "forward": times.forward_seconds.values}
            for label, times in time_steps(vit("sdpa"), contenders, images(rows), repeats=repeats).items()
        },
        part="time",
        batch=rows,
        repeats=repeats,
    )


def tables() -> str:
    """Both tables as Markdown."""
    found = {(x["method"], x["attention"], x["checkpoint"]): x for x in RESULTS.lines if x["part"] == "bytes"}
    lines = [
        "| MiB per image | official, explicit attention | explicit attention | SDPA | late blocks recomputed (SDPA) |",
        "|---|---|---|---|---|",
    ]
    for method, (_, official) in METHODS.items():
        plain = [mib(line["kept"]) / line["rows"] for a in ATTENTION if (line := found.get((method, a, False)))]
        again = found.get((method, "sdpa", True))
        recomputed = (
            ""
            if again is None or not again["recomputed"]
            else (f"{mib(again['kept']) / again['rows']:.1f} + {mib(again['recomputed']) / again['rows']:.1f}")
        )
        lines.append(f"| {method} | {official:.1f} | " + " | ".join(f"{x:.1f}" for x in plain) + f" | {recomputed} |")
    for line in (line for line in RESULTS.lines if line["part"] == "time"):
        lines += ["", f"| a step of {line['batch']} images | s | over full tuning | over a bare forward |"]
        lines += ["|---|---|---|---|"]
        full, forward = (torch.tensor(line["full tuning"][name]).median().item() for name in ("step", "forward"))
        for label in (*TIMED, "full tuning"):
            step = torch.tensor(line[label]["step"]).median().item()
            lines.append(f"| {label} | {step:.2f} | {step / full:.2f} | {step / forward:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    if "bytes" in sys.argv[1:]:
        bytes_kept()
    if "time" in sys.argv[1:]:
        step_time()
    print(tables())
