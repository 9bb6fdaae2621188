"""What training sets in a backbone's configs is put back, whichever of them it is in."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as t
from torch import nn

import sidestep as ss
from architectures import CAUSAL, IMAGE
from sidestep.model.before import OF_TRAINING, Before
from tiny import FAMILIES


def llava() -> nn.Module:
    """Its config holds one of texts and one of images."""
    parts = {"text_config": t.LlamaConfig(**CAUSAL), "vision_config": t.CLIPVisionConfig(**IMAGE)}
    return t.LlavaForConditionalGeneration(t.LlavaConfig(image_token_index=39, **parts))


SET: dict[str, Any] = {
    "id2label": {0: "other"},
    "label2id": {"other": 0},
    "problem_type": "regression",
    "pad_token_id": 7,
    "bos_token_id": 7,
    "eos_token_id": [7, 1],
    "use_cache": False,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
MODELS = {
    "llama": FAMILIES["llama"].model,
    "llava": llava,
    "bert": FAMILIES["bert"].model,
    "timm": FAMILIES["timm_vit"].model,
}


def configs(model: Any) -> list[Any]:
    """A model's configs, and how it generates."""
    if not isinstance(model, t.PreTrainedModel):
        return []
    inside = [getattr(model.config, name) for name in model.config.sub_configs]
    return [model.config, *inside, *([model.generation_config] if model.can_generate() else [])]


@pytest.mark.parametrize("name", MODELS)
def test_fields_that_training_sets_are_put_back(name: str) -> None:
    model = MODELS[name]()
    fields = [config.to_dict() for config in configs(model)]
    before = Before.of(model)
    assert SET.keys() == set(OF_TRAINING)
    for config in configs(model):
        for field, value in SET.items():
            setattr(config, field, value)
    assert fields == [] or [config.to_dict() for config in configs(model)] != fields
    before.restore(model)
    assert [config.to_dict() for config in configs(model)] == fields


def test_a_task_that_rests_leaves_its_fields_and_has_them_again() -> None:
    backbone: Any = FAMILIES["llama"].model()
    model = ss.attach(backbone, ss.ReadConfig(rank=4))
    assert isinstance(model, ss.SideModel)
    backbone.config.use_cache, backbone.generation_config.eos_token_id = False, [5, 1]
    rest = model.attachment.rest()
    assert (backbone.config.use_cache, backbone.generation_config.eos_token_id) == (True, 1)
    model.attachment.resume(rest)
    assert (backbone.config.use_cache, backbone.generation_config.eos_token_id) == (False, [5, 1])
