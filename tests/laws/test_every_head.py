"""The laws of heads that read every token: padding, stored features, halves of a batch, replays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_every_feature import stored
from test_every_keep import PAIRS
from test_every_method import METHODS, REFUSED, config_of, gradients, placed
from test_every_method import ONE_VECTOR as CORRECTING
from torch import Tensor

import sidestep as ss
from sidestep.model.features import FeaturesRefused, check_storable
from sidestep.model.heads import HEADS, HeadConfig
from tiny import ALL, LABELS, randomize

HEADS_OF_TOKENS = {name: kind for name, kind in HEADS.items() if kind.default == "all"}
ONE_VECTOR = ("synqt", *CORRECTING)
"""Methods that give one vector for a row."""


def head_named(name: str) -> HeadConfig:
    fields = {"num_labels": LABELS} if "num_labels" in HEADS[name].__dataclass_fields__ else {}
    return HEADS[name](**fields)


def labels_of(head: HeadConfig, mask: Tensor) -> Tensor:
    """Random labels of tokens that are no padding."""
    rows, tokens = mask.shape
    generator = torch.Generator().manual_seed(3)
    if head.kind == "tokens":
        return torch.randint(LABELS, mask.shape, generator=generator).masked_fill(mask == 0, -100)
    return torch.randint(tokens - 2, (rows, 2), generator=generator)


def attached(method: str, family: str, head: HeadConfig, **how: Any) -> ss.SideModel:
    torch.manual_seed(3)
    model = placed(ss.attach(ALL[family].model(), config_of(method), head=head, **how))
    randomize(model)
    return model


CASES = [(m, "bert") for m in METHODS if m not in ONE_VECTOR and (m, "bert") not in REFUSED]
CASES += [
    (method, family) for method in ("read", "side_attention", "lora") for family in ("llama", "albert", "modernbert")
]


@pytest.mark.parametrize("head", HEADS_OF_TOKENS)
@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_head_of_tokens_keeps_the_laws(method: str, family: str, head: str) -> None:
    config = head_named(head)
    model, batch = attached(method, family, config), ALL[family].inputs()
    labels = labels_of(config, batch["attention_mask"])
    model.eval()
    whole = model(**batch).logits
    # padding: the last row has two tokens of it
    alone = model(**{name: value[-1:, :-2] for name, value in batch.items()}).logits
    torch.testing.assert_close(whole[-1:, :-2], alone, rtol=1e-5, atol=1e-5)
    # halves: with the number of labels of both, their losses add up
    loss = model(**batch, labels=labels).loss
    count = (labels != -100).sum()
    halves = [
        model(**{name: value[own] for name, value in batch.items()}, labels=labels[own], num_items_in_batch=count).loss
        for own in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(halves), loss, rtol=1e-5, atol=1e-6)
    # features
    try:
        check_storable(model)
    except FeaturesRefused:
        return
    wanted = gradients(model, model(**batch, labels=labels).loss)
    fed = stored(model, batch)
    found = model(**fed, labels=labels).loss
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-6)
    ours = gradients(model, found)
    assert ours.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", HEADS_OF_TOKENS)
@pytest.mark.parametrize("method", [m for m, family in PAIRS if family == "bert" and m not in ONE_VECTOR])
def test_a_replay_has_the_gradients_of_a_pass_that_keeps_all(method: str, head: str) -> None:
    config = head_named(head)
    found = {}
    for keep in ("full", "replay"):
        model, batch = attached(method, "bert", config, keep=keep), ALL["bert"].inputs()
        loss = model.train()(**batch, labels=labels_of(config, batch["attention_mask"])).loss
        found[keep] = gradients(model, loss)
        ss.detach(model)
    assert found["full"].keys() == found["replay"].keys()
    for name, gradient in found["full"].items():
        torch.testing.assert_close(found["replay"][name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ONE_VECTOR)
def test_a_method_of_one_vector_is_refused_by_name(method: str) -> None:
    with pytest.raises(ValueError, match="as configured gives one vector for a whole row"):
        attached(method, "bert", ss.Tag(num_labels=3))


def test_an_encoder_decoder_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="a Tag head does not work on T5ForConditionalGeneration"):
        attached("read", "t5", ss.Tag(num_labels=3))
