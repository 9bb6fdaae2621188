"""The family table: what it says of an architecture is what its model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from architectures import DEBERTA, IMAGE, TEXT, timm_vit
from sidestep.backbone import find_places
from sidestep.backbone.families import DEFAULT, FAMILIES, Family, family_of, patch_grid, prefix_tokens

FIRST_TOKEN_HEADS = sorted({name for family in FAMILIES.values() for name in family.first_token_heads})


def is_vision(name: str) -> bool:
    return name.endswith(("ImageClassification", "VisionModel"))


def build(name: str) -> nn.Module:
    """A tiny model of a class that has a head, or of a tower."""
    kind: Any = getattr(transformers, name)
    sizes = IMAGE if is_vision(name) else DEBERTA if "Deberta" in name else TEXT
    if "Distil" in name:
        sizes = {"vocab_size": 40, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32}
    torch.manual_seed(0)
    return kind(kind.config_class(num_labels=3, **sizes)).eval()


@pytest.mark.parametrize("name", FIRST_TOKEN_HEADS)
def test_a_head_in_the_table_reads_the_first_token_only(name: str) -> None:
    model = build(name)
    assert name in family_of(model).first_token_heads
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        leaves.append(hidden.detach().requires_grad_())
        return (leaves[-1], *output[1:]) if isinstance(output, tuple) else leaves[-1]

    last = [place.module for place in find_places(model) if place.site.last]
    last[0].register_forward_hook(cut)
    output = model(torch.randn(2, 3, 16, 16) if is_vision(name) else torch.randint(3, 40, (2, 7)))
    read = output.pooler_output if name.endswith("VisionModel") else output.logits
    (read * torch.randn_like(read)).sum().backward()
    gradient = leaves[0].grad
    assert gradient is not None
    assert gradient[:, 0].abs().max() > 0
    assert gradient[:, 1:].abs().max() == 0


def test_a_model_that_is_not_listed_gets_the_default() -> None:
    assert family_of(nn.Linear(2, 2)) is DEFAULT
    assert Family() == DEFAULT
    assert family_of(build("BertForSequenceClassification")) is FAMILIES["bert"]
    assert family_of(timm_vit()) is FAMILIES["VisionTransformer"]


def test_prefix_tokens_are_a_number_or_the_models_own() -> None:
    for registers in (0, 3):
        model = timm_vit(reg_tokens=registers)
        assert prefix_tokens(model, family_of(model)) == 1 + registers
    assert prefix_tokens(nn.Linear(2, 2), Family(prefix=2)) == 2


@pytest.mark.parametrize("name", ["pixel_values", "x"])
def test_a_patch_grid_is_the_images_rows_and_columns_over_the_patchs(name: str) -> None:
    image = torch.randn(2, 3, 24, 40)
    vit = build("ViTForImageClassification").base_model
    assert patch_grid(vit, {name: image}, {}, image) == (6, 10)
    assert patch_grid(timm_vit(patch_size=8), {name: image}, {}, image) == (3, 5)
