"""The laws of several cards: a step on a backbone that is spread over two is that of one card, to the bit.

Blocks take turns on the cards, so that each hidden state crosses, and the final norm is on another card than the last
block. No real card has run this: `cards.py` stands in for two.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from test_every_method import DELTA, METHODS, OWN_READ_OUT, SIDE, attach, costly_pairs, gradients
from torch import Tensor, nn

import sidestep as ss
from cards import FIRST, SECOND, Cards, cards, values
from sidestep.backbone import find_places
from sidestep.backbone.trunk import trunk_of
from sidestep.interface.offload import devices_of
from sidestep.methods import SideNet
from tiny import ALL, TinyFamily, randomize

SPREAD = [name for name in SIDE if not getattr(METHODS[name].implementation, "replays", False)]


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cards]:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with cards(monkeypatch) as mode:
        yield mode


def spread(model: Any) -> nn.Module:
    """A backbone over two cards, block by block. What comes behind its blocks is on the second."""
    own = next(name for name, module in model.named_modules() if module is trunk_of(model))
    blocks = [f"{own}.{place.name}".lstrip(".") for place in find_places(model) if place.site.kind == "block"]
    where: dict[str, torch.device] = {}
    tied: dict[Tensor, torch.device] = {}
    for name, module in model.named_modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if name in blocks:
            where[name] = (FIRST, SECOND)[blocks.index(name) % 2]
        elif tensors and not any(name.startswith(f"{block}.") for block in blocks):
            behind = SECOND if any(block in where for block in blocks) else FIRST
            where[name] = next((tied[one] for one in tensors if one in tied), behind)
        tied |= dict.fromkeys(module.parameters(recurse=False), where.get(name, FIRST))
    return dispatch_model(model, where, main_device=FIRST)


def whole(model: Any) -> nn.Module:
    """A backbone on one card."""
    return dispatch_model(model, {"": FIRST}, main_device=FIRST, force_hooks=True)


def stepped(method: str, family: TinyFamily, backbone: nn.Module, **how: Any) -> tuple[Any, ...]:
    """Logits of a pass, loss and gradients of a step, as plain tensors."""
    model = attach(method, family, backbone, **how)
    randomize(model)
    batch = {name: one.to(FIRST) for name, one in family.inputs().items()}
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    torch.manual_seed(5)
    loss = model.train()(**batch, labels=labels_for(model, family, batch)).loss
    assert loss.device == logits.device == FIRST
    return values((logits, loss, gradients(model, loss)))


def labels_for(model: Any, family: TinyFamily, batch: dict[str, Tensor]) -> Tensor:
    own_text = model.head is None and (family.causal or family.encoder_decoder)
    return batch["decoder_input_ids" if family.encoder_decoder else "input_ids"] if own_text else family.labels().to(FIRST)


@costly_pairs(SPREAD, ("bert", "llama", "t5", "vit","swin","timm_vit","resnet","timm_resnet"))
def test_a_step_on_two_cards_is_that_of_one(method: str, family: str, mode: Cards) -> None:
    kind = ALL[family]
    logits, loss, gradient = stepped(method, kind, whole(kind.model()), head=True)
    there = spread(kind.model())
    assert devices_of(there) == {FIRST, SECOND}
    own_logits, own_loss, own_gradient = stepped(method, kind, there, head=True)
    assert torch.equal(own_logits, logits)
    assert torch.equal(own_loss, loss)
    assert own_gradient.keys() == gradient.keys()
    for name, one in gradient.items():
        assert torch.equal(own_gradient[name], one), name
