"""What DTL trains on backbones of the published size; nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn
from transformers import SwinConfig, SwinModel, ViTConfig, ViTModel

import sidestep as ss


def swin_base() -> nn.Module:
    return SwinModel(SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]))


VITS: dict[str, Callable[[], nn.Module]] = {
    "transformers": lambda: ViTModel(ViTConfig(), add_pooling_layer=False),
    "timm": lambda: timm.create_model("vit_base_patch16_224"),
}
SWINS: dict[str, Callable[[], nn.Module]] = {
    "transformers": swin_base,
    "timm": lambda: timm.create_model("swin_base_patch4_window7_224"),
}


def trained(build: Callable[[], nn.Module], config: ss.DTLConfig) -> int:
    """Parameters of the method, without the head."""
    with torch.device("meta"):
        model = ss.attach(build(), config, head=ss.Classify(num_labels=100))
    return sum(parameter.numel() for parameter in model.side.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("library", VITS)
@pytest.mark.parametrize(("kernel", "parameters"), [(0, 36_864), (3, 43_776), (4, 49_152), (5, 56_064)])
def test_parameters_on_vit_base(library: str, kernel: int, parameters: int) -> None:
    assert trained(VITS[library], ss.DTLConfig(kernel=kernel)) == parameters


@pytest.mark.parametrize("library", SWINS)
@pytest.mark.parametrize(("kernel", "parameters"), [(0, 90_112), (5, 128_512)])
def test_parameters_on_swin_base(library: str, kernel: int, parameters: int) -> None:
    config = ss.DTLConfig(rank=4, first_read=4, late_blocks=10, kernel=kernel)
    assert trained(SWINS[library], config) == parameters


def test_reads_that_nothing_is_written_from_are_not_created() -> None:
    all_reads = ss.DTLConfig(rank=4, late_blocks=10)
    assert trained(SWINS["transformers"], all_reads) == 90_112  # the release creates 96,256
