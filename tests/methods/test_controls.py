"""The controls train exactly what they say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sidestep as ss
from tiny import FAMILIES, LABELS

HEAD = ss.Classify(num_labels=LABELS)


def trained(model: ss.SideModel) -> set[str]:
    return {name for name, _ in model.trained_parameters()}


def biases(module: nn.Module) -> set[str]:
    """Bias vectors of linear maps and norms, by module type rather than by name."""
    owners = (nn.Linear, nn.LayerNorm, nn.Conv2d)
    parts = [(path, part) for path, part in module.named_modules() if isinstance(part, owners)]
    return {f"{path}.bias" for path, part in parts if part.bias is not None}


@pytest.mark.parametrize("family", ["bert", "vit", "swin", "timm_vit"])
def test_bitfit_trains_the_bias_vectors_and_the_head(family: str) -> None:
    model = ss.attach(FAMILIES[family].model(), ss.BitFitConfig(), head=HEAD)
    side = {"head.linear.weight", "head.linear.bias"}
    unread = {n for n in biases(model.backbone) if n.startswith(("classifier", "head")) or "pooler" in n}
    assert trained(model) == side | {f"backbone.{name}" for name in biases(model.backbone) - unread}


def test_bitfit_does_not_train_matrices_that_are_called_bias() -> None:
    """Swin's relative_position_bias_table is a bias of attention, not a bias vector."""
    names = trained(ss.attach(FAMILIES["swin"].model(), ss.BitFitConfig()))
    assert not any("relative_position_bias" in name for name in names)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_bitfit_refuses_a_backbone_without_bias(family: str) -> None:
    with pytest.raises(ss.UnsupportedBackbone, match="it has no bias vectors to train"):
        ss.attach(FAMILIES[family].model(), ss.BitFitConfig())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_trains_every_weight_of_the_trunk(family: str) -> None:
    model = ss.attach(FAMILIES[family].model(), ss.FullConfig())
    trunk = {id(parameter) for parameter in model.trunk.parameters()}
    found = {id(parameter) for _, parameter in model.trained_parameters()}
    assert trunk <= found


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_probe_trains_the_head_on_the_frozen_models_output(family: str) -> None:
    kind = FAMILIES[family]
    model = ss.attach(kind.model(), ss.ProbeConfig(), head=ss.Classify(num_labels=2, pool="cls")).eval()
    assert trained(model) == {"head.linear.weight", "head.linear.bias"}
    trunk, batch = kind.model().base_model, kind.inputs()
    hidden = trunk(**batch, output_hidden_states=True)
    last = hidden.decoder_hidden_states[-1] if kind.encoder_decoder else hidden.last_hidden_state
    assert model.head is not None
    torch.testing.assert_close(model(**batch).logits, model.head.linear(last[:, 0]))
