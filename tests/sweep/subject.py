"""One tiny model, the batches that it takes, and what it does without a method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sidestep.backbone import trunk_of
from sweep.behaviour import LAWS, laws_for, written_name
from sweep.build import LABELS, build
from sweep.catalogue import ModelType
from sweep.inputs import ROWS, Batch, call, pad_id, runnable, tensors

EXACT = 1e-5
"""Up to which share of its largest output the bare model counts as one that keeps a law: some rounding of float32."""


@dataclass(frozen=True)
class Use:
    """One way of using a model: with a Sidestep head, or with its own head that writes text.

    Attributes:
        own: whether it is its own head.
        batch: what the model takes.
        labels: for training.
        laws: those that the bare model keeps.
    """

    own: bool
    batch: Batch
    labels: Tensor
    laws: tuple[str, ...]


class Subject:
    """A bare model that is tried with one method after the other.

    Attributes:
        kind: its type.
        model: the bare model.
        uses: with a Sidestep head, and where it writes text with its own head too.
        pad: the id of padding.

    Raises:
        NoBatch: if the model takes none of the batches that were tried.
        Exception: whatever the model's own code raises.
    """

    def __init__(self, kind: ModelType) -> None:
        self.kind = kind
        self.model: Any = build(kind)
        config = getattr(self.model, "config", None) if isinstance(self.model, PreTrainedModel) else None
        self.pad = 0 if config is None else pad_id(config.get_text_config())
        batch = runnable(self.model, kind.group)
        inner = runnable(trunk_of(self.model), kind.group, batch)
        self.uses = [Use(False, inner, torch.arange(ROWS) % LABELS, self._kept(trunk_of(self.model), inner, own=False))]
        if kind.writes and _learns(self.model, batch):
            kept = self._kept(self.model, batch, own=True)
            self.uses.append(Use(True, batch, _next_tokens(batch), kept))
        self._batch, self._before, self._weights = batch, tensors(call(self.model, batch)), _copies(self.model)
        if not self.is_as_before():
            raise RuntimeError("the bare model gives other outputs each time")

    def _kept(self, model: Any, batch: Batch, *, own: bool) -> tuple[str, ...]:
        """The laws that the bare model keeps."""

        def keeps(law: str) -> bool:
            try:
                return LAWS[law](model, batch, self.pad) <= EXACT
            except Exception:  # a model that does not take such a batch, or cannot write
                return False

        return tuple(law for law in laws_for(batch, tokens=own) if keeps(law))

    def is_as_before(self) -> bool:
        """Whether the model's outputs and weights are what they were, bit for bit."""
        return _same(tensors(call(self.model, self._batch)), self._before) and _same(_copies(self.model), self._weights)


@torch.no_grad()
def _learns(model: Any, batch: Batch) -> bool:
    """Whether the bare model takes labels and gives a loss."""
    try:
        return bool(model(**batch, labels=_next_tokens(batch)).loss.isfinite())
    except Exception:  # some write, but their classes have no loss, or one that does not run
        return False


def _next_tokens(batch: Batch) -> Tensor:
    """Labels of a head that writes: the tokens themselves, without padding."""
    labels = batch[written_name(batch)].clone()
    if written_name(batch) == "input_ids" and "attention_mask" in batch:
        labels[batch["attention_mask"] == 0] = -100
    return labels


def _copies(model: Any) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in (*model.parameters(), *model.buffers())]


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether tensors are equal bit for bit, where no number is equal to no number."""
    return len(some) == len(others) and all(
        a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in zip(some, others, strict=True)
    )
