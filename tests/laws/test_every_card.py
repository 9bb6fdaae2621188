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
from test_every_method import DELTA, METHODS, REFUSED, SIDE, attach, gradients
from torch import Tensor, nn

import sidestep as ss
from cards import FIRST, SECOND, Cards, cards, values
from sidestep.backbone import find_places
from sidestep.backbone.trunk import trunk_of
from sidestep.fold.shared import SharedFold
from sidestep.interface.offload import devices_of
from tiny import ALL, FAMILIES, randomize

#: Methods that need no block of the backbone itself.
SPREAD = [name for name, method in METHODS.items() if name in SIDE and not method.implementation.replays]
#: timm's models are loaded whole.
FAMILIES_SPREAD = [name for name in FAMILIES if not name.startswith("timm")]
PAIRS = [(method, family) for method in SPREAD for family in FAMILIES_SPREAD if (method, family) not in REFUSED]
#: What `make test` runs: two stacks, and of the methods that take one stack another family.
QUICK = [*((method, "t5") for method in SPREAD), ("unipt", "bert"), ("sherl-vector", "llama"), ("dtl+", "vit")]


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cards]:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    with cards(monkeypatch) as mode:
        yield mode


def spread(model: Any, *, halves: bool = False) -> nn.Module:
    """A backbone over two cards, block by block in turns, or in halves. Its final norm is on the second.

    Its own head is on the first, where labels come in: many of transformers' classes do not move them. Tied weights are
    together, as accelerate's own maps have them.
    """
    own = next(name for name, module in model.named_modules() if module is trunk_of(model))
    blocks = [f"{own}.{place.name}".lstrip(".") for place in find_places(model) if place.site.kind == "block"]
    where: dict[str, torch.device] = {}
    tied: dict[Tensor, torch.device] = {}
    for name, module in model.named_modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if name in blocks:
            order = blocks.index(name)
            where[name] = (FIRST, SECOND)[order >= len(blocks) // 2 if halves else order % 2]
        elif tensors and not any(name.startswith(f"{block}.") for block in blocks):
            behind = SECOND if name.startswith(own) and any(block in where for block in blocks) else FIRST
            where[name] = next((tied[one] for one in tensors if one in tied), behind)
        tied |= dict.fromkeys(module.parameters(recurse=False), where.get(name, FIRST))
    return dispatch_model(model, where, main_device=FIRST)


def whole(model: Any) -> nn.Module:
    """A backbone on one card."""
    return dispatch_model(model, {"": FIRST}, main_device=FIRST, force_hooks=True)


def on_card(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: one.to(FIRST) for name, one in batch.items()}


def stepped(method: str, family: str, backbone: nn.Module, **how: Any) -> tuple[Any, ...]:
    """Logits of a pass, loss and gradients of a step, as plain tensors."""
    kind = ALL[family]
    model = attach(method, kind, backbone, **how)
    randomize(model)
    batch = on_card(kind.inputs())
    labels = batch["input_ids"] if model.writes == "lm" else kind.labels().to(FIRST)
    with torch.no_grad():
        logits = model.eval()(**batch, use_cache=False).logits if model.writes else model.eval()(**batch).logits
    torch.manual_seed(5)
    loss = model.train()(**batch, labels=labels).loss
    assert loss.device == logits.device == FIRST
    return values((logits, loss, gradients(model, loss)))


def same(method: str, family: str, **how: Any) -> None:
    """Raise unless a step on two cards is that of one."""
    there = spread(ALL[family].model())
    assert devices_of(there) == {FIRST, SECOND}
    logits, loss, gradient = stepped(method, family, whole(ALL[family].model()), **how)
    own_logits, own_loss, own_gradient = stepped(method, family, there, **how)
    assert torch.equal(own_logits, logits)
    assert torch.equal(own_loss, loss)
    assert own_gradient.keys() == gradient.keys()
    assert any(one.any() for one in gradient.values())
    for name, one in gradient.items():
        assert torch.equal(own_gradient[name], one), name


@pytest.mark.parametrize(
    ("method", "family"),
    [pytest.param(*pair, id="-".join(pair), marks=() if pair in QUICK else pytest.mark.all_laws) for pair in PAIRS],
)
def test_a_step_on_two_cards_is_that_of_one(method: str, family: str, mode: Cards) -> None:
    same(method, family, head=True)


@pytest.mark.parametrize("keep", ["replay", "bf16"])
def test_a_step_that_keeps_less_on_two_cards_is_that_of_one(keep: str, mode: Cards) -> None:
    same("dtl", "llama", head=True, keep=keep)


def test_late_blocks_are_recomputed_where_they_are(mode: Cards) -> None:
    same("dtl", "llama", head=True, checkpoint="late")


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_backbones_own_head_is_where_accelerate_has_put_it(family: str, mode: Cards) -> None:
    same("read", family)


@pytest.mark.parametrize("method", SPREAD)
def test_only_codes_cross(method: str, mode: Cards) -> None:
    """The bare backbone sends one hidden state over. Of a method with narrow codes no further one goes."""
    kind = ALL["vit"]
    model = attach(method, kind, spread(kind.model(), halves=True), head=True)
    batch, counts = on_card(kind.inputs()), []
    for run in (model.trunk, model.eval()):
        mode.moved.clear()
        with torch.no_grad():
            run(**batch)
        counts.append(sum(len(shape) == 3 and shape[-1] == model.places[0].site.width for shape in mode.moved))
    assert (counts[1] == counts[0]) == model.side.splits


def test_tasks_share_a_pass_on_two_cards(mode: Cards) -> None:
    kind = ALL["bert"]
    backbone, batch = spread(kind.model()), on_card(kind.inputs())
    models, alone = [], []
    with torch.no_grad():
        for seed, method in enumerate(("read", "read", "lst")):
            models.append(attach(method, kind, backbone, head=True).eval())
            randomize(models[-1], seed)
            alone.append(values(models[-1](**batch).logits))
            models[-1].attachment.leave()
        one, two, other = models
        shared = SharedFold(one.trunk, one.places, one.facts)
        output, readings = shared.run([[one.fold, two.fold], [other.fold]], lambda: one.bare(batch))
        for model, reading, wanted in zip(models, [*readings[0], *readings[1]], alone, strict=True):
            torch.testing.assert_close(values(model.answer(reading, output, batch).logits), wanted)


def test_a_task_is_taken_off_two_cards(mode: Cards) -> None:
    kind = ALL["bert"]
    bare, batch = spread(kind.model()), on_card(kind.inputs())
    with torch.no_grad():
        before = values(bare(**batch).logits)
        model = attach("dtl", kind, bare, head=True)
        randomize(model)
        model(**batch)
        assert torch.equal(values(ss.detach(model)(**batch).logits), before)


@pytest.mark.parametrize("method", [*DELTA, *(name for name in SIDE if name not in SPREAD)])
def test_what_needs_the_blocks_on_one_device_is_refused(method: str, mode: Cards) -> None:
    with pytest.raises(ss.UnsupportedBackbone, match=rf"lazy:0, lazy:1, and {METHODS[method].name}.*show one card"):
        attach(method, ALL["bert"], spread(ALL["bert"].model()), head=True)


def test_a_loss_in_chunks_is_refused(mode: Cards) -> None:
    with pytest.raises(ss.UnsupportedBackbone, match="lm_loss='chunked'"):
        attach("read", ALL["llama"], spread(ALL["llama"].model()), lm_loss="chunked")
