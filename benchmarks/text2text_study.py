"""SST-2 as text to text on a small T5 that was pretrained here: the whole path on real text.

    python benchmarks/text2text_study.py         # pretrains, then scores, then costs. Continues where it was stopped
    python benchmarks/text2text_study.py longer  # READ alone, 10 epochs in place of 3, with and without a scale
    sidestep report benchmarks/results/text2text_study.jsonl --output text2text_study.html

The backbone is that of `small_t5.py`. It reads a sentence and writes "positive" or "negative". The score is the share
of the 872 dev rows at which it wrote exactly that. Methods: SHERL, LST, READ and full tuning. Settings: 8,000 training
rows, 3 epochs, batch 16, AdamW, 6 % warm-up, linear decay. Each has one rate, which was not tuned. There are SEEDS
seeds (default 1). The probe stands in the comparison as refused. It trains nothing where the frozen language model head
answers. What can be read off the frozen model is shown by a second comparison, in which a probe classifies the same
rows. READ stands there three times: before T5's final norm, behind it, and with a scaled correction. The costs are
those of a step of 32 texts of 32 tokens with 4 tokens to write. The results are in docs/text_generation.md.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import torch
from datasets import Dataset

import sidestep as ss
from sidestep.compare.runs import run
from sidestep.compare.spec import Backbone, Comparison, Contender, Costs, Task
from sidestep.data import Fields
from small_t5 import pretrained
from text_tasks import TASKS

RESULTS = Path(__file__).parent / "results" / "text2text_study.jsonl"
WORDS = {"0": "negative", "1": "positive"}
RATES = {
    "sherl": (1e-3,),
    "lst": (1e-3,),
    "read": (4e-3,),
    "full": (3e-4,),
    "probe": (1e-2,),
}


@dataclass(frozen=True, kw_only=True)
class SST2(Task):
    """SST-2 with its labels as words."""

    def read(self) -> tuple[Dataset, Dataset]:
        train, dev = (rows.map(lambda row: {"label": WORDS[row["label"]]}) for rows in TASKS["sst-2"].rows())
        return train, dev


def study(backbone: Path, seeds: int) -> tuple[Comparison, Comparison]:
    """The methods on text to text, and the probe on the same rows as classes."""
    fields = Fields(text="sentence", label="label")
    contenders = {name: replace(Contender.named(name), rates=rates) for name, rates in RATES.items()}
    behind = Contender(name="read, post_norm", config=ss.ReadConfig(correction="post_norm"), rates=RATES["read"])
    scaled = Contender(
        name="read, post_norm, scale 30", config=ss.ReadConfig(correction="post_norm", scale=30.0), rates=(3e-4,)
    )
    written = Comparison(
        backbones=(Backbone(name="small T5, pretrained here", model=str(backbone)),),
        tasks=(SST2(name="sst-2 in words", train="", fields=fields, problem="text2text", rows=8000),),
        contenders=(*contenders.values(), behind, scaled),
        seeds=tuple(range(seeds)),
        epochs=3,
        batch_size=16,
        max_length=64,
        costs=Costs(batch=32, length=32),
    )
    classes = replace(
        written,
        tasks=(SST2(name="sst-2 as classes", train="", fields=fields, problem="single", rows=8000),),
        contenders=(contenders["probe"],),
        costs=None,
    )
    return written, classes


def longer(backbone: Path, seeds: int) -> Comparison:
    """READ with more steps: whether the scale does more than they do."""
    written, _ = study(backbone, seeds)
    *_, behind, scaled = written.contenders
    behind = replace(behind, rates=(1e-3,))  # at 4e-3 its states saturate sooner
    return replace(written, contenders=(scaled, behind), epochs=10, costs=None)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("THREADS", "1")))
    datasets.disable_progress_bars()
    asked = (pretrained(), int(os.environ.get("SEEDS", "1")))
    if sys.argv[1:] == ["longer"]:
        run(longer(*asked), RESULTS)
    else:
        written, classes = study(*asked)
        run(replace(written, costs=None), RESULTS)
        run(classes, RESULTS)
        run(written, RESULTS)
