"""What a traced pass, an attach that fails and a detach leave of a backbone: all of it."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import transformers as t
from torch import nn

import sidestep as ss
from architectures import ARCHITECTURES, TEXT
from odd_models import MODELS, made, texts
from sidestep.backbone import facts_of
from sidestep.backbone.trace import KEPT_ON
from sidestep.backbone.trunk import IS_TRUNK
from sidestep.backbone.untouched import untouched
from tiny import FAMILIES

EVERY = {
    **{name: kind.model for name, kind in ARCHITECTURES.items()},
    **{name: lambda n=name: made(n) for name in MODELS},
}


def state(model: nn.Module) -> dict[str, Any]:
    """All that a model is made of: objects by identity, tensors by value."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in (KEPT_ON, IS_TRUNK):
                continue
            inside = [*value.items()] if isinstance(value, dict) else value
            found[f"{path}|{name}"] = inside if not isinstance(value, dict) else [(key, id(one)) for key, one in inside]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return found | {f"value|{name}": (tensor.detach().clone(), tensor.requires_grad) for name, tensor in tensors}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, tuple) and a and isinstance(a[0], torch.Tensor):
            return torch.equal(a[0], b[0]) and a[1] == b[1]
        return a is b or bool(a == b)

    return one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", EVERY)
def test_a_traced_pass_changes_nothing(name: str, training: bool) -> None:
    model = EVERY[name]().train(training)
    before, config = state(model), getattr(model, "config", None) and model.config.to_dict()
    numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    assert facts_of(model).source == "traced"
    assert same(state(model), before)
    assert config == (getattr(model, "config", None) and model.config.to_dict())
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]
    assert np.array_equal(np.random.get_state()[1], numbers[2])


def test_modules_that_a_model_changes_while_it_runs_are_put_back() -> None:
    """BigBird takes full attention on short texts, and keeps it."""
    model = made("big bird")
    attention = model.encoder.layer[0].attention.self
    assert model.attention_type == "block_sparse"
    facts_of(model)
    assert model.attention_type == model.encoder.attention_type == "block_sparse"
    assert model.encoder.layer[0].attention.self is attention
    with torch.no_grad():
        model(texts())
    assert model.attention_type == "original_full"


@pytest.mark.parametrize("config", [ss.ReadConfig(rank=2), ss.LoraConfig(rank=2), ss.BitFitConfig()])
def test_a_model_whose_modules_change_after_attach_is_given_back(config: Any) -> None:
    model = made("big bird")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    attached = ss.attach(model, config, head=ss.Classify(num_labels=2)).train()
    attached(input_ids=texts(), labels=torch.tensor([0, 1])).loss.backward()
    assert model.attention_type == "original_full"
    assert ss.detach(attached) is model
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not any(module.training or module._forward_hooks for module in model.modules())


# --- an attach that fails half-way ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        "side_model.Fold",
        "side_model.backbones.device_of",
        "side_model.family_of",
        "side_model.backbones.freeze",
        "side_model.Attachment",
        "trained.new_parameters",
        "trained.Widened",
    ],
)
@pytest.mark.parametrize(
    "config",
    [ss.ReadConfig(rank=2), ss.LoraConfig(rank=2), ss.FullConfig(), ss.SparseConfig(density=0.1, select="random")],
    ids=["read", "lora", "full", "sparse"],
)
def test_an_attach_that_fails_leaves_nothing_behind_and_tells_why(config: Any, where: str) -> None:
    model = FAMILIES["bert"].model().train()
    facts_of(model)
    before = state(model)
    with (
        mock.patch(f"sidestep.model.{where}", side_effect=MemoryError("no memory left")),
        pytest.raises(MemoryError, match="no memory left"),
    ):
        ss.attach(model, config, head=ss.Classify(num_labels=2), checkpoint="late")
    assert same(state(model), before)
    assert not any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    ss.attach(model, config, head=ss.Classify(num_labels=2))


def test_an_attach_to_two_towers_that_fails_at_the_second_leaves_nothing_behind() -> None:
    towers = {"text_config": TEXT, "vision_config": {**ARCHITECTURES["clip vision"].model().config.to_dict()}}
    model = t.CLIPModel(t.CLIPConfig(**towers, projection_dim=16))
    for tower in (model.vision_model, model.text_model):
        facts_of(tower)
    before = state(model)
    build, calls = ss.SideModel.__init__, []

    def fail(self: Any, *given: Any) -> None:
        calls.append(self)
        if len(calls) == 2:
            raise MemoryError("no memory left")
        build(self, *given)

    with mock.patch.object(ss.SideModel, "__init__", fail), pytest.raises(MemoryError):
        ss.attach(model, ss.LoraConfig(rank=2), head=ss.Retrieve())
    assert same(state(model), before)


# --- the context itself -----------------------------------------------------------------------------------------------


def test_handles_of_hooks_work_afterwards() -> None:
    model, ran = nn.Sequential(nn.Linear(2, 2)), []
    handle = model[0].register_forward_hook(lambda *_: ran.append(1))
    with untouched(model):
        model[0].register_forward_hook(lambda *_: ran.append(2))
        model.extra = nn.Linear(2, 2)
        model[0].weight.requires_grad_(True)
    assert [name for name, _ in model.named_children()] == ["0"]
    model(torch.zeros(1, 2))
    handle.remove()
    model(torch.zeros(1, 2))
    assert ran == [1]


def test_nothing_inside_has_a_gradient_and_the_callers_contexts_are_left_out() -> None:
    model = nn.Linear(2, 2)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"), untouched(model):
        made = torch.zeros(1, 2)
        out = model(made)
    assert not made.is_meta
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert not made.is_inference()
