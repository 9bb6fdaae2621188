"""Encode each text once. The frozen pass is the same in every epoch, so a study may keep what the side network reads.

`record` runs the library's own fold with a method that only collects. `replay` runs a method over what was collected.
`tests/measure/test_benchmark_taps.py` shows that one training step from recorded taps equals the live model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import sidestep as ss
from sidestep.backbone.families import Pool
from sidestep.fold import Reading
from sidestep.interface.sites import Site
from sidestep.methods import MethodConfig, SideNet, register


@dataclass(frozen=True, kw_only=True)
class CollectConfig(MethodConfig):
    """Collects the block outputs. Trains nothing."""


@register("collect", CollectConfig)
class Collect(SideNet):
    """Gives the head every block output: (batch, blocks, tokens, width)."""

    tokenwise = True

    def __init__(self, config: CollectConfig, sites: Sequence[Site]) -> None:
        super().__init__()

    def start(self, site: Site, carried: Tensor | None) -> tuple[Tensor, ...]:
        return ()

    def step(self, state: tuple[Tensor, ...], codes: Tensor, site: Site) -> tuple[Tensor, ...]:
        return (*state, codes) if site.kind == "block" else state

    def pooled(self, state: tuple[Tensor, ...], site: Site) -> Tensor:
        return torch.stack(state, 1)


def record(backbone: nn.Module, batches: Iterator[dict[str, Tensor]], pool: Pool = "mean") -> list[Tensor]:
    """Per example (blocks, tokens, width), unpadded. With `pool="cls"` the first token only."""
    model = ss.attach(backbone, CollectConfig(), head=ss.Classify(num_labels=2, pool=pool)).eval()
    taps: list[Tensor] = []
    with torch.no_grad():
        for batch in batches:
            reading = model.fold.run(model.trunk, **batch)[1]
            assert reading is not None
            assert reading.pooled is not None
            whole = torch.ones(reading.pooled.shape[:3:2])
            keep = (batch.get("attention_mask", whole) if pool == "mean" else whole).bool()
            taps += [row[:, mask].clone() for row, mask in zip(reading.pooled, keep, strict=True)]
    ss.detach(model)
    return taps


def pad(taps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(batch, blocks, tokens, width) and its (batch, tokens) mask."""
    longest = max(tap.shape[1] for tap in taps)
    batch = taps[0].new_zeros(len(taps), taps[0].shape[0], longest, taps[0].shape[2])
    keep = torch.zeros(len(taps), longest, dtype=torch.bool)
    for row, tap in enumerate(taps):
        batch[row, :, : tap.shape[1]] = tap
        keep[row, : tap.shape[1]] = True
    return batch, keep


def replay(model: ss.SideModel, taps: Tensor, keep: Tensor) -> Tensor:
    """The head's outputs (batch, outputs) from recorded taps, as the live model computes them."""
    side, state, hidden = model.side, None, taps[:, 0]
    for place in model.places:
        site = place.site.during(keep=keep, key_keep=keep, memory_keep=None, grid=None, past=0, cache=None)
        if site.kind == "stage":
            state = side.start(site, None)
            state = side.advance(state, hidden, site)
        elif site.kind == "block":
            hidden = taps[:, site.index]
            state, hidden = side.write(side.advance(state, hidden, site), hidden, site)
    normed = place.module.forward(hidden) if site.kind == "norm" else hidden
    finished = side.finish(state, hidden, normed, site)
    assert model.head is not None
    return model.head(Reading(finished, site, side.pooled(state, site)))
