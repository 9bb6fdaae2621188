"""What changes on a backbone while a task is attached, besides hooks and weights: kept, and put back."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

OF_TRAINING = (
    "id2label",
    "label2id",
    "problem_type",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
    "output_router_logits",
    "router_aux_loss_coef",
)
"""Fields of configs that training with the backbone's own head sets: `train` does, the Trainer does, and TRL's."""


@dataclass(frozen=True)
class Before:
    """What changes on a backbone under a task besides hooks: gradient flags, modes, and fields of its configs.

    They belong to parameters and modules, not to names. A model may change its modules meanwhile (BigBird does).
    Modules that are new by then are frozen if the rest is, and get the mode of the whole.
    """

    training: bool
    requires_grad: dict[nn.Parameter, bool]
    modes: dict[nn.Module, bool]
    configs: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, model: nn.Module) -> Before:
        """The flags, modes and config fields of a model as it is now."""
        return cls(
            model.training,
            {parameter: parameter.requires_grad for parameter in model.parameters()},
            {module: module.training for module in model.modules()},
            {
                config: {name: copy.deepcopy(fields[name]) for name in OF_TRAINING if name in fields}
                for config, fields in _configs(model).items()
            },
        )

    def restore(self, model: nn.Module) -> None:
        """Put them back."""
        rest = any(self.requires_grad.values())
        for parameter in model.parameters():
            # codes cannot require one
            flag = self.requires_grad.get(parameter, rest and parameter.is_floating_point())
            # what accelerate has offloaded is new after each pass, and made under the pass's inference mode
            with torch.inference_mode(parameter.is_inference()):
                parameter.requires_grad_(flag)
        for module in model.modules():
            module.training = self.modes.get(module, self.training)
        for config, fields in _configs(model).items():
            for name in OF_TRAINING:
                fields.pop(name, None)
            fields.update(copy.deepcopy(self.configs.get(config, {})))


def _configs(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The fields, by name, of a model's config, of the configs inside of it, and of how it generates."""
    if not isinstance(model, PreTrainedModel):
        return {}
    found = {"config": model.config, "generation": vars(model).get("generation_config"), **vars(model.config)}
    return {name: vars(one) for name, one in found.items() if isinstance(one, PreTrainedConfig | GenerationConfig)}
