"""Whether a model reads the texts of one row as if each were alone, where positions start again with each text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sidestep.backbone import dummies
from sidestep.backbone.dummies import Texts
from sidestep.backbone.texts import PADDING_MOVES, WIDE, apart
from sidestep.backbone.trunk import trunk_of
from sidestep.backbone.watch import attempt, output_of

SEEDS = (5, 6)
"""Of two texts that stand in front of the same text."""


def packs(model: nn.Module) -> bool:
    """Whether a text stays as it is when another one in front of it in its row is replaced.

    The model is given positions alone: with a mask or a cache, transformers takes a row for one text.
    """
    trunk = trunk_of(model)
    for texts in dummies.texts(trunk, model):
        states = [attempt(trunk, _behind, trunk, texts, seed) for seed in SEEDS if "position_ids" in texts.names]
        first, second = states or (None, None)
        if first is not None and second is not None:
            return apart(first, second) <= PADDING_MOVES[first.dtype in WIDE]
    return False


def _behind(trunk: nn.Module, texts: Texts, seed: int) -> Tensor:
    """What a trunk makes of one text, (1, tokens, any), behind another one in its row."""
    text = texts.text(texts.short, seed=1)
    inputs = texts.batch([torch.cat([texts.text(len(text), seed), text])])
    inputs["position_ids"] = torch.arange(len(text), device=texts.device).repeat(1, 2)
    inputs.pop("attention_mask", None)
    states: Tensor = output_of(trunk, inputs)[0]
    return states[:, -len(text) :]
