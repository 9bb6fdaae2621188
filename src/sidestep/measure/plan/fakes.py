"""Stand-ins without memory: a model's tensors are replaced by fake ones, which have shapes and no values."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sidestep.backbone.fakes import fake_like, fakes_of, unhooked, without_hooks
from sidestep.measure.plan.blank import without_drawing
from sidestep.measure.plan.packed import stand_ins
from sidestep.measure.step import names_taken
from sidestep.model.attach import Attached


def fake_copy(model: Attached) -> Attached:
    """A copy of an attached model (of real weights, or on the meta device) whose tensors are fake ones on the CPU.

    Call it under a `FakeTensorMode`. Hooks, recomputed blocks and gradient flags come along. The model itself
    stays as it is.
    """
    # by its memo, deepcopy takes these for what they stand for: nothing large is copied
    memo: dict[int, Any] = {id(model.extras): {}, **{id(part.trained.originals): {} for part in model.parts}}
    fakes_of(model, unhooked(memo, model))
    stand_ins(model, memo)
    copied: Any = without_hooks(copy.deepcopy(model, memo))
    return copied


def fake_batch(model: Attached, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fake tensors in place of a batch, without the columns that the model does not take."""
    names = names_taken(model)
    given = {name: tensor for name, tensor in batch.items() if name in names}
    return {name: fake_like(tensor) for name, tensor in without_drawing(model, given).items()}
