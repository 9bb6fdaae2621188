"""A training step from recorded taps is the live model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sidestep as ss
import taps as recorded
from sidestep.backbone.families import Pool
from tiny import FAMILIES, LABELS, randomize


def trained(model: ss.SideModel, logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and the gradients of one training step."""
    assert model.head is not None
    loss = model.head.loss(logits, labels)
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.trained_parameters() if p.grad is not None}


@pytest.mark.parametrize("correction", ["pre_norm", "post_norm"])
@pytest.mark.parametrize(("family", "pool"), [("bert", "mean"), ("vit", "cls"), ("vit", "mean")])
def test_a_step_from_recorded_taps_equals_the_live_models(family: str, pool: Pool, correction: Any) -> None:
    kind = FAMILIES[family]
    batch, labels = kind.inputs(), kind.labels()
    collected = recorded.record(kind.model(), iter([batch]), pool)
    assert len(collected) == len(labels)
    config = ss.ReadConfig(rank=4, correction=correction)
    model = ss.attach(kind.model(), config, head=ss.Classify(num_labels=LABELS, pool=pool)).train()
    randomize(model, scale=0.5)
    live, expected = trained(model, model(**batch).logits, labels)
    loss, gradients = trained(model, recorded.replay(model, *recorded.pad(collected)), labels)
    # Rounding: the recorded pass computes the taps under no_grad and pads again.
    torch.testing.assert_close(loss, live, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected.keys() == {name for name, _ in model.trained_parameters()}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        assert gradient.abs().max() > 0


def test_records_are_unpadded_and_leave_the_backbone_bare() -> None:
    kind = FAMILIES["bert"]
    backbone, batch = kind.model(), kind.inputs()
    collected = recorded.record(backbone, iter([batch, batch]))
    assert [tap.shape[1] for tap in collected] == [7, 7, 7, 5] * 2
    assert not any(module._forward_hooks for module in backbone.modules())
    padded, keep = recorded.pad(collected[2:4])
    assert torch.equal(keep, batch["attention_mask"][2:].bool())
    assert torch.equal(padded[1, :, :5], collected[3])


def test_a_head_on_one_token_records_one_token() -> None:
    kind = FAMILIES["vit"]
    collected = recorded.record(kind.model(), iter([kind.inputs()]), "cls")
    assert {tuple(tap.shape) for tap in collected} == {(3, 1, 16)}
