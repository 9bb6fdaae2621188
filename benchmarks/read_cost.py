"""What READ keeps for backward and how long its step takes, at the published sizes with random weights.

    python benchmarks/read_cost.py bytes     # ViT-B/16 (batch 32, 224 px) and BERT-base (batch 32, length 128), fp32
    python benchmarks/read_cost.py time      # BERT-base, batch 16, length 128: a training step over a bare forward pass
    python benchmarks/read_cost.py table     # the tables alone

Neither depends on the weights' values. Step and forward pass are interleaved in one run. The ratio is of medians.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import sidestep as ss
from sidestep.measure.memory import mib
from study import Results

RESULTS = Results(Path(__file__).parent / "results" / "read_cost.jsonl")
WIDTH, BLOCKS = 768, 12


def bert(batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """BERT-base and a batch of 128 tokens a row."""
    return BertModel(BertConfig(), add_pooling_layer=False), {"input_ids": torch.randint(0, 30000, (batch, 128))}


def vit(batch: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """ViT-B/16 and a batch of 224 px images."""
    return ViTModel(ViTConfig(), add_pooling_layer=False), {"pixel_values": torch.randn(batch, 3, 224, 224)}


BACKBONES: dict[str, Callable[[int], tuple[nn.Module, dict[str, Tensor]]]] = {
    "BERT-base": bert,
    "ViT-B/16": vit,
}
TOKENS = {"BERT-base": 128, "ViT-B/16": 197}


def bytes_kept(batch: int = 32) -> None:
    """Every variant's bytes, all tokens and one token."""
    labels = torch.randint(0, 2, (batch,))
    for name, build in BACKBONES.items():
        backbone, inputs = build(batch)
        for cell in ("gru", "rnn"):
            for rank in (32, 128):
                for pool in ("mean", "cls"):
                    key = {
                        "part": "bytes",
                        "backbone": name,
                        "cell": cell,
                        "rank": rank,
                        "pool": pool,
                        "batch": batch,
                    }
                    RESULTS.once(lambda k=key, b=backbone, i=inputs: kept(b, k, {**i, "labels": labels}), **key)


def kept(backbone: nn.Module, key: dict[str, Any], batch: dict[str, Tensor]) -> dict[str, Any]:
    """Bytes kept for backward by one training step."""
    config = ss.ReadConfig(rank=key["rank"], cell=key["cell"])
    model = ss.attach(backbone, config, head=ss.Classify(num_labels=2, pool=key["pool"])).train()
    with ss.saved_bytes(model) as found:
        model(**batch)
    ss.detach(model)
    return {"kept": found.total, "taps": BLOCKS * key["batch"] * TOKENS[key["backbone"]] * WIDTH * 4}


def step_time(batch: int = 16, repeats: int = 15) -> None:
    """A training step of READ over the backbone's bare forward pass."""
    backbone, inputs = bert(batch)
    backbone.eval()
    labels = torch.randint(0, 2, (batch,))
    for rank in (32, 128):
        key = {"part": "time", "backbone": "BERT-base", "rank": rank, "batch": batch, "repeats": repeats}
        RESULTS.once(lambda r=rank: ratio(backbone, r, inputs, labels, repeats), **key)


def ratio(backbone: nn.Module, rank: int, inputs: dict[str, Tensor], labels: Tensor, repeats: int) -> dict[str, Any]:
    """Medians of step and forward pass, interleaved, the first of each left out."""
    seconds: dict[str, list[float]] = {"forward": [], "step": []}
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with torch.no_grad():
            backbone(**inputs)
        seconds["forward"].append(time.perf_counter() - start)
        model = ss.attach(backbone, ss.ReadConfig(rank=rank), head=ss.Classify(num_labels=2, pool="mean")).train()
        optimizer = torch.optim.AdamW([parameter for _, parameter in model.trained_parameters()])
        start = time.perf_counter()
        model(**inputs, labels=labels).loss.backward()
        optimizer.step()
        seconds["step"].append(time.perf_counter() - start)
        ss.detach(model)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    spread = {f"{name}_range": [min(values[1:]), max(values[1:])] for name, values in seconds.items()}
    return {**medians, **spread, "ratio": medians["step"] / medians["forward"]}


def table() -> str:
    """Both tables as Markdown."""
    lines = [
        "| backbone | cell | rank | tokens read | bytes kept, MiB | over the taps' inputs |",
        "|---|---|---|---|---|---|",
    ]
    for line in (line for line in RESULTS.lines if line["part"] == "bytes"):
        tokens = "all" if line["pool"] == "mean" else "class token"
        share = f"{line['kept'] / line['taps']:.2f}" if line["pool"] == "mean" else ""
        lines.append(
            f"| {line['backbone']} | {line['cell']} | {line['rank']} | {tokens} | {mib(line['kept']):.1f} | {share} |"
        )
    lines += ["", "| BERT-base, batch 16 | forward, s | step, s | ratio |", "|---|---|---|---|"]
    for line in (line for line in RESULTS.lines if line["part"] == "time"):
        lines.append(
            f"| READ, rank {line['rank']} | {line['forward']:.2f} | {line['step']:.2f} | {line['ratio']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    what = sys.argv[1] if len(sys.argv) > 1 else "table"
    if what == "bytes":
        bytes_kept()
    elif what == "time":
        step_time()
    print(table())
