"""The laws of stored features: a pass that reads what frozen blocks gave before is the live pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_every_method import DELTA, METHODS, SIDE, attach, gradients, logits, pairs
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import sidestep as ss
from sidestep.fold import States
from sidestep.kinds.features import stand_ins
from sidestep.model.features import VECTOR, FeaturesRefused, find_route, record
from tiny import ALL, randomize

LATE = [name for name in DELTA if METHODS[name].implementation.late]


def stored(model: ss.SideModel, batch: dict[str, Tensor]) -> dict[str, Any]:
    """The batch as it is fed: the states of its rows as they are stored, padded again. Images are left out."""
    route = find_route(model, batch)
    recorded = record(model, route, batch)
    absent = stand_ins(model, route, batch)
    if route.places == (VECTOR,):
        rows = recorded.rows(VECTOR)
        if route.single:
            return {"features": States(route, vector=torch.stack(rows)[:, 0])}
        keep = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        return {"features": States(route, vector=pad_sequence(rows, batch_first=True), keep=keep)}
    hidden = {name: pad_sequence(recorded.rows(name), batch_first=True) for name in route.places}
    return {**({} if absent else batch), "features": States(route, hidden, absent=absent)}


def inputs_of(family: str) -> dict[str, Tensor]:
    """A batch. Where a picture stands behind the texts none is padded: what has padding in its middle is not stored."""
    batch = ALL[family].inputs()
    return {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} if ALL[family].beside else batch


def kept_loss(model: ss.SideModel, batch: dict[str, Any]) -> Tensor:
    """Random weights on the logits, without those of padding."""
    out, mask = logits(model(**batch)), batch.get("attention_mask")
    if out.ndim == 3 and mask is not None and out.shape[:2] == mask.shape:
        out = out[mask.bool()]
    return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(4))).sum()


@pytest.mark.parametrize("head", [False, True], ids=["own", "sidestep"])
@pairs([*SIDE, *LATE])
def test_a_pass_from_features_has_the_outputs_and_gradients_of_a_live_one(method: str, family: str, head: bool) -> None:
    model = attach(method, ALL[family], head=head)
    randomize(model)
    if family == "albert" and model.late_blocks():
        with pytest.raises(FeaturesRefused, match="its blocks share their weights"):
            stored(model, inputs_of(family))
        return
    fed = stored(model, inputs_of(family))
    torch.manual_seed(5)
    live = kept_loss(model.train(), inputs_of(family))
    if not live.requires_grad:
        pytest.skip("nothing is trained")
    wanted = gradients(model, live)
    torch.manual_seed(5)
    found = kept_loss(model, fed)
    torch.testing.assert_close(found, live, rtol=1e-6, atol=1e-6)
    grads = gradients(model, found)
    assert grads.keys() == wanted.keys()
    ours, theirs = (torch.cat([each[name].flatten() for name in wanted]) for each in (grads, wanted))
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()
