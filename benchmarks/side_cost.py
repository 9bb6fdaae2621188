"""What SHERL and LST keep for backward on T5-base, UniPT on BERT-base, and how long their steps take.

    python benchmarks/side_cost.py bytes     # float32, 128 tokens (T5: 4 target tokens), batch 4, no dropout. Counted
    python benchmarks/side_cost.py time      # the same, batch 8: a training step over full tuning's and a bare forward
    python benchmarks/side_cost.py           # the tables alone, as Markdown

Weights are random, as neither depends on their values. The official figures are those of the methods' own code,
measured the same way with dropout on. Times are medians of interleaved rounds in one run. THREADS sets how many threads
(1).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import sidestep as ss
from sidestep.measure.memory import mib
from sidestep.measure.meters import time_steps
from sidestep.model.settings import Settings
from study import Results

RESULTS = Results(Path(__file__).parent / "results" / "side_cost.jsonl")
TOKENS, TARGETS, CLASSES = 128, 4, 2


def t5(dropout: float) -> nn.Module:
    """T5-base."""
    sizes = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=dropout))


def bert(dropout: float) -> nn.Module:
    """BERT-base."""
    config = BertConfig(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return BertModel(config, add_pooling_layer=False)


def text(rows: int) -> dict[str, Tensor]:
    """A batch of texts with class labels."""
    ids = torch.randint(3, 30_000, (rows, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, CLASSES, (rows,))}


def answered(rows: int) -> dict[str, Tensor]:
    """A batch of texts with texts to write."""
    targets = torch.randint(3, 30_000, (rows, TARGETS))
    return {**text(rows), "decoder_input_ids": targets.roll(1, 1), "labels": targets}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A backbone with what is put on it: configs with dropout and without, and the official MiB for each example."""

    backbone: Callable[[float], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    head: Any
    methods: dict[str, tuple[Callable[[float], ss.MethodConfig], float | None]]


CASES = {
    "T5-base": Case(
        backbone=t5,
        batch=answered,
        head=None,
        methods={
            "SHERL, reduction 8": (lambda rate: ss.SherlConfig(reduction=8, dropout=rate), 9.46),
            "SHERL, reduction 4": (lambda rate: ss.SherlConfig(reduction=4, dropout=rate), 12.31),
            "LST, reduction 8": (lambda rate: ss.LSTConfig(reduction=8, dropout=rate), 37.73),
            "full tuning": (lambda rate: ss.FullConfig(), 151.56),
        },
    ),
    "BERT-base": Case(
        backbone=bert,
        batch=text,
        head=ss.Classify(num_labels=CLASSES),
        methods={
            "UniPT, reduction 2": (lambda rate: ss.UniPTConfig(reduction=2), None),
            "full tuning": (lambda rate: ss.FullConfig(), None),
        },
    ),
}
UNTIMED = "SHERL, reduction 4"


def bytes_kept(rows: int = 4) -> None:
    """Every method on its backbone, without dropout on either side."""
    for name, case in CASES.items():
        backbone, batch = case.backbone(0.0), case.batch(rows)
        for method, (config, _) in case.methods.items():
            RESULTS.once(
                lambda c=config, b=backbone, x=batch, h=case.head: kept(b, c(0.0), h, x),
                part="bytes",
                backbone=name,
                method=method,
            )


def kept(backbone: nn.Module, config: ss.MethodConfig, head: Any, batch: dict[str, Tensor]) -> dict[str, int]:
    """Bytes that one step keeps, of all its rows."""
    model = ss.attach(backbone, config, head=head).train()
    with ss.saved_bytes(model) as found:
        model(**batch)
    ss.detach(model)
    return {"kept": found.total, "rows": len(batch["input_ids"])}


def step_time(rows: int = 8, repeats: int = 3) -> None:
    """A training step of each method and of full tuning, and a bare forward pass, in turns. With dropout."""
    for name, case in CASES.items():
        contenders = {
            method: Settings(config(0.1), case.head)
            for method, (config, _) in case.methods.items()
            if method != UNTIMED
        }
        RESULTS.once(
            lambda c=contenders, one=case: {
                label: {"step": times.step_seconds.values, "forward": times.forward_seconds.values}
                for label, times in time_steps(one.backbone(0.1), c, one.batch(rows), repeats=repeats).items()
            },
            part="time",
            backbone=name,
            batch=rows,
            repeats=repeats,
        )


def tables() -> str:
    """Both tables as Markdown."""
    lines = ["| MiB an example | | official | here |", "|---|---|---|---|"]
    for name, case in CASES.items():
        for method, (_, official) in case.methods.items():
            if line := RESULTS.find(part="bytes", backbone=name, method=method):
                told = "" if official is None else f"{official:.1f}"
                lines.append(f"| {name} | {method} | {told} | {mib(line['kept']) / line['rows']:.1f} |")
    for line in (line for line in RESULTS.lines if line["part"] == "time"):
        name, timed = line["backbone"], [label for label in CASES[line["backbone"]].methods if label in line]
        lines += ["", f"| {name}, {line['batch']} texts | s | over full tuning | over a bare forward |"]
        lines += ["|---|---|---|---|"]
        full, forward = (torch.tensor(line["full tuning"][part]).median().item() for part in ("step", "forward"))
        for label in timed:
            step = torch.tensor(line[label]["step"]).median().item()
            lines.append(f"| {label} | {step:.2f} | {step / full:.2f} | {step / forward:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    if "bytes" in sys.argv[1:]:
        bytes_kept()
    if "time" in sys.argv[1:]:
        step_time()
    print(tables())
