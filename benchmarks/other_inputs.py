"""What READ, plain and replayed, costs on a vision-language model and on a speech encoder, beside LoRA + checkpointing.

    python benchmarks/other_inputs.py         # measures what is missing (about 10 minutes on 2 cores), then the table
    python benchmarks/other_inputs.py --table # the table alone

Weights are random with seed 0, as no cost depends on them. The shapes are those of SmolVLM-256M (pictures of 512 px,
each of which is 64 of 128 tokens) and of wav2vec2-base (sounds of 5 s, no layer drop). Float32, a head of two classes
on the last token or on the mean of the tokens. Bytes are counted in a step of the batch. Steps are timed in turns in
one run, as ratios to a bare pass. THREADS sets the number of threads (2).
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SmolVLMConfig, SmolVLMModel, Wav2Vec2Config, Wav2Vec2Model

import sidestep as ss
from keep_cost import bare_seconds, step
from sidestep.measure.memory import mib
from sidestep.measure.meters import measure_memory
from sidestep.model.settings import Settings
from study import Results

RESULTS = Results(Path(__file__).parent / "results" / "other_inputs.jsonl")
ROUNDS = 3
PICTURE, TOKENS, SECONDS, RATE = 49190, 128, 5, 16000


def smolvlm() -> nn.Module:
    """The shape of SmolVLM-256M."""
    text = {
        "model_type": "llama", "vocab_size": 49280, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "pad_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 512, "patch_size": 16,
    }  # fmt: skip
    return SmolVLMModel(
        SmolVLMConfig(text_config=text, vision_config=vision, image_token_id=PICTURE, scale_factor=4, pad_token_id=2)
    )


def pictures(rows: int) -> dict[str, Tensor]:
    """A picture among the tokens of each row."""
    ids = torch.randint(3, PICTURE, (rows, TOKENS))
    ids[:, 8 : 8 + (512 // 16 // 4) ** 2] = PICTURE
    pixels = torch.randn(rows, 1, 3, 512, 512)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def sounds(rows: int) -> dict[str, Tensor]:
    """Noise."""
    return {"input_values": torch.randn(rows, SECONDS * RATE)}


@dataclass(frozen=True)
class Case:
    """A backbone at its real shape, a batch of so many rows, and what the head reads."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Tensor]]
    rows: int
    pool: Any


CASES = {
    "smolvlm-256m": Case(smolvlm, pictures, 4, "last"),
    "wav2vec2-base": Case(lambda: Wav2Vec2Model(Wav2Vec2Config(mask_time_prob=0.0, layerdrop=0.0)), sounds, 4, "mean"),
}


def contenders(pool: Any) -> dict[str, Settings]:
    """By label."""
    head = ss.Classify(num_labels=2, pool=pool)
    lora = Settings(ss.LoraConfig(rank=8), head)
    return {
        "READ, rank 128": Settings(ss.ReadConfig(), head),
        "READ, rank 128, replay": Settings(ss.ReadConfig(), head, keep="replay"),
        "READ, rank 32, replay": Settings(ss.ReadConfig(rank=32), head, keep="replay"),
        "LoRA": lora,
        "LoRA + checkpointing": replace(lora, checkpoint="late"),
    }


def measured(case: Case) -> dict[str, Any]:
    """Bytes kept of each contender, and the seconds of its steps and of bare passes, in turns."""
    torch.manual_seed(0)
    backbone, inputs = case.build().eval(), case.inputs(case.rows)
    batch = {**inputs, "labels": torch.arange(case.rows) % 2}
    kept = {label: measure_memory(backbone, one, batch).kept_bytes for label, one in contenders(case.pool).items()}
    seconds: dict[str, list[float]] = {label: [] for label in ("bare pass", *kept)}
    for turn in range(ROUNDS + 1):
        labels = list(seconds)
        for label in labels[turn % len(labels) :] + labels[: turn % len(labels)]:
            one = contenders(case.pool).get(label)
            seconds[label].append(bare_seconds(backbone, inputs) if one is None else step(backbone, one, batch))
    rounds = {label: [round(value, 3) for value in values[1:]] for label, values in seconds.items()}
    return {"rows": case.rows, "kept": kept, "rounds_of": rounds}


def table() -> None:
    for line in RESULTS.lines:
        bare_pass = statistics.median(line["rounds_of"]["bare pass"])
        rival = line["kept"]["LoRA + checkpointing"]
        print(f"| {line['case']}, {line['rows']} rows | kept, MiB | over LoRA + checkpointing | step, bare passes |")
        print("|---|---:|---:|---:|")
        for label, kept in line["kept"].items():
            took = statistics.median(line["rounds_of"][label]) / bare_pass
            print(f"| {label} | {mib(kept):.1f} | {kept / rival:.2f} | {took:.2f} |")
        print()


def main() -> None:
    torch.set_num_threads(int(os.environ.get("THREADS", "2")))
    for name, case in CASES.items() if "--table" not in sys.argv else ():
        RESULTS.once(lambda c=case: measured(c), case=name)
    table()


if __name__ == "__main__":
    main()
