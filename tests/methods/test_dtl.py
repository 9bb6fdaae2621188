"""DTL and DTL+ against their definition: a plain autograd reference, stages, read-outs, bytes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

import sidestep as ss
from sidestep.methods import MethodConfig, UnsupportedBackbone
from tiny import FAMILIES, randomize


def vit(depth: int = 4, size: int = 16, **config: Any) -> ViTModel:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "image_size": size, "patch_size": 4}
    torch.manual_seed(0)
    return ViTModel(ViTConfig(num_hidden_layers=depth, **{**sizes, **config}), add_pooling_layer=False).eval()


def attached(backbone: nn.Module, config: MethodConfig, **kwargs: Any) -> ss.SideModel:
    model = ss.attach(backbone, config, head=ss.Classify(num_labels=3, **kwargs))
    randomize(model, scale=0.3)
    return model


# --- the definition, unrolled by hand -----------------------------------------------------------------------


def reference(model: ss.SideModel, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Logits by the formulas of the method's page, block by block, in plain autograd."""
    config, side, trunk = model.settings.method, model.side, model.trunk
    hidden, state = trunk.embeddings(images, interpolate_pos_encoding=True), torch.zeros(())
    first_late = config.first_late(len(trunk.layers))
    for index, block in enumerate(trunk.layers):
        if index >= config.first_read:
            state = state + hidden @ side.reads[str(index)].weight.T @ side.writes[str(index)].weight.T
        hidden = block(hidden)
        if index >= first_late:
            gated = state * torch.sigmoid(config.beta * state)
            if config.kernel:
                gated = torch.cat([gated[:, :1], convolved(side.mixes["0"].weight, gated[:, 1:], grid)], dim=1)
            hidden = hidden + gated
    pooled = trunk.layernorm(hidden[:, 1:].mean(1))
    return F.linear(pooled, model.head.linear.weight, model.head.linear.bias)


def convolved(weight: Tensor, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """A depthwise convolution by its sum, zero outside of the grid; an even kernel reaches further on."""
    size, (rows, columns) = weight.shape[-1], grid
    start = -((size - 1) // 2)
    field = tokens.reshape(len(tokens), rows, columns, -1)
    out = torch.zeros_like(field)
    for down in range(size):
        for right in range(size):
            for row in range(rows):
                for column in range(columns):
                    y, x = row + start + down, column + start + right
                    if 0 <= y < rows and 0 <= x < columns:
                        out[:, row, column] = out[:, row, column] + weight[:, 0, down, right] * field[:, y, x]
    return out.flatten(1, 2)


@pytest.mark.parametrize(
    "config",
    [
        ss.DTLConfig(beta=3.0),
        ss.DTLConfig(rank=3, late_blocks=3, first_read=1, beta=1.0),
        ss.DTLConfig(kernel=3, beta=3.0),
        ss.DTLConfig(kernel=2, late_blocks=1, beta=100.0),
        ss.DTLConfig(kernel=4, first_read=2, beta=3.0),
    ],
    ids=["dtl", "dtl late read", "dtl+ 3", "dtl+ 2", "dtl+ 4"],
)
def test_outputs_and_gradients_equal_a_plain_reference(config: ss.DTLConfig) -> None:
    images = torch.randn(2, 3, 16, 24).double()
    model = attached(vit().double(), config, pool="mean_pre_norm").double()
    names = [name for name, _ in model.trained_parameters()]
    parameters = [parameter for _, parameter in model.trained_parameters()]
    out = model(pixel_values=images, interpolate_pos_encoding=True).logits
    found = torch.autograd.grad(out.square().sum(), parameters)

    expected = reference(model, images, grid=(4, 6))
    torch.testing.assert_close(out, expected)
    for name, mine, theirs in zip(names, found, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
        assert mine.abs().max() > 0, name


# --- what is created ----------------------------------------------------------------------------------------


def test_the_release_settings_are_the_defaults_on_vit() -> None:
    with torch.device("meta"):
        side = ss.attach(ViTModel(ViTConfig()), ss.DTLConfig()).side
    assert list(side.reads) == [str(block) for block in range(12)]
    assert side.first_late == 6


@pytest.mark.parametrize("family", ["swin", "timm_vit", "bert", "llama", "t5"])
def test_half_of_the_blocks_are_late_by_default(family: str) -> None:
    model = ss.attach(FAMILIES[family].model(), ss.DTLConfig())
    depth = 4 if family == "swin" else 3
    assert model.side.first_late == depth - depth // 2


def test_a_stage_without_a_write_is_not_read_and_has_no_convolution() -> None:
    swin = FAMILIES["swin"].model()
    model = ss.attach(swin, ss.DTLConfig(late_blocks=2, kernel=3))
    assert (list(model.side.reads), list(model.side.mixes)) == (["2", "3"], ["1"])
    ss.detach(model)
    model = ss.attach(swin, ss.DTLConfig(late_blocks=3, kernel=3))
    assert (list(model.side.reads), list(model.side.mixes)) == (["0", "1", "2", "3"], ["0", "1"])


def test_an_encoder_decoder_is_read_and_written_in_its_decoder() -> None:
    family = FAMILIES["t5"]
    model = ss.attach(family.model(), ss.DTLConfig(late_blocks=2, beta=1.0))
    randomize(model)
    with ss.saved_bytes(model) as kept:
        model(**family.inputs())
    assert not [row for row in kept.rows if ".encoder." in row.module]
    assert [row for row in kept.rows if ".decoder.block.2." in row.module]


# --- the read-out before the norm ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", [ss.DTLConfig(), ss.ReadConfig(rank=4), ss.ProbeConfig(), ss.FullConfig()])
def test_the_mean_before_the_norm_is_normed_afterwards(method: MethodConfig) -> None:
    backbone, images = vit(), torch.randn(2, 3, 16, 16)
    raw: list[Tensor] = []
    backbone.layers[-1].register_forward_hook(lambda module, args, output: raw.append(output))
    model = attached(backbone, method, pool="mean_pre_norm").eval()
    features: list[Tensor] = []
    model.head.linear.register_forward_hook(lambda module, args, output: features.append(args[0]))
    with torch.no_grad():
        model(pixel_values=images)
        if isinstance(method, ss.ProbeConfig | ss.FullConfig):
            torch.testing.assert_close(features[0], backbone.layernorm(raw[-1][:, 1:].mean(1)))
    loss = model(pixel_values=images, labels=torch.tensor([0, 1])).loss
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.trained_parameters() if "head" in name)


def test_a_norm_behind_the_read_out_keeps_one_row() -> None:
    model = attached(vit(), ss.DTLConfig(), pool="mean_pre_norm").train()
    with ss.saved_bytes(model) as kept:
        model(pixel_values=torch.randn(2, 3, 16, 16), labels=torch.tensor([0, 1]))
    norm = [row for row in kept.rows if row.module == "backbone.layernorm"]
    assert norm
    assert max(row.bytes for row in norm) == 2 * 16 * 4


def test_without_a_final_norm_it_is_the_plain_mean() -> None:
    family = FAMILIES["bert"]
    found = [
        attached(family.model(), ss.DTLConfig(), pool=pool).eval()(**family.inputs()).logits
        for pool in ("mean", "mean_pre_norm")
    ]
    assert torch.equal(*found)


def test_a_method_that_writes_behind_the_norm_is_refused_this_read_out() -> None:
    backbone = vit()
    config = ss.ReadConfig(rank=4, correction="post_norm")
    with pytest.raises(ValueError, match=r'reads before the final norm.*choose pool="mean"'):
        ss.attach(backbone, config, head=ss.Classify(num_labels=3, pool="mean_pre_norm"))
    assert all(parameter.requires_grad for parameter in backbone.parameters())


# --- bytes kept at real size --------------------------------------------------------------------------------

MIB = 2**20


def kept_per_image(config: ss.DTLConfig, attention: str, checkpoint: Any = None) -> float:
    """MiB of ViT-B/16 at 224 px in float32."""
    backbone = ViTModel(ViTConfig(attn_implementation=attention), add_pooling_layer=False)
    head = ss.Classify(num_labels=100, pool="mean_pre_norm")
    model = ss.attach(backbone, config, head=head, checkpoint=checkpoint).train()
    with ss.saved_bytes(model) as kept:
        model(pixel_values=torch.randn(1, 3, 224, 224), labels=torch.tensor([3]))
    return kept.total / MIB


@pytest.mark.parametrize("kernel", [0, 5])
def test_bytes_kept_on_vit_base(kernel: int) -> None:
    # The release keeps 45.9 (DTL) and 49.3 (DTL+) with explicit attention.
    config = ss.DTLConfig(kernel=kernel)
    explicit = kept_per_image(config, "eager")
    assert 37 < explicit < 39.5
    assert 31 < kept_per_image(config, "sdpa") < 34
    late = kept_per_image(config, "eager", checkpoint="late")
    one_block = (explicit - late) / 5
    assert late + one_block < 17


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (ss.DTLConfig(late_blocks=5), "late_blocks=5, but there are 4 blocks: choose 1 to 4"),
        (ss.DTLConfig(late_blocks=2, first_read=3), "first_read=3 comes after block 2.*choose first_read from 0 to 2"),
    ],
)
def test_blocks_that_are_not_there_are_refused(config: ss.DTLConfig, what: str) -> None:
    with pytest.raises(UnsupportedBackbone, match=f"^dtl does not work on ViTModel: {what}"):
        ss.attach(vit(), config)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_text_has_no_grid_to_convolve_over(family: str) -> None:
    with pytest.raises(UnsupportedBackbone, match=r"kernel=3 convolves.*choose kernel=0"):
        ss.attach(FAMILIES[family].model(), ss.DTLConfig(kernel=3))


def test_a_kernel_larger_than_the_grid_is_refused() -> None:
    model = attached(vit(), ss.DTLConfig(kernel=8))
    with pytest.raises(ValueError, match=r"kernel=8 is too large for a token grid of 4 x 4: choose at most 7"):
        model(pixel_values=torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0),
        ("rank", 1.5),
        ("late_blocks", 0),
        ("first_read", -1),
        ("beta", 0.0),
        ("beta", float("nan")),
        ("kernel", -1),
    ],
)
def test_a_setting_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"DTLConfig: {field}={value}.*must be"):
        ss.DTLConfig(**{field: value})
