"""Sites are plain data, and a `FrozenBlock` is the block it was taken from."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from architectures import ARCHITECTURES, timm_vit
from sidestep.backbone import find_places
from sidestep.interface.sites import Projection, Site, of_stack, stacks
from tiny import FAMILIES, call


def scaled_timm_vit() -> nn.Module:
    """timm's ViT with LayerScale, every parameter random."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        num_classes=3,
        init_values=0.1,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def randomized(model: nn.Module) -> nn.Module:
    """The model with random biases and norms (zeros hide errors)."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


REPLAYED = ("bert", "roberta", "electra", "vit", "deit", "dinov2", "timm vit", "timm vit, registers")


@pytest.mark.parametrize("name", [*REPLAYED, "timm vit with LayerScale"])
@torch.no_grad()
def test_replay_equals_the_block_on_its_own_input(name: str) -> None:
    if "LayerScale" in name:
        model, batch = scaled_timm_vit(), {"pixel_values": torch.randn(2, 3, 16, 16)}
    else:
        model, batch = randomized(ARCHITECTURES[name].model()), ARCHITECTURES[name].inputs()
    batch.pop("attention_mask", None)
    seen: list[tuple[Tensor, Tensor]] = []
    places = find_places(model)
    for place in places:
        if place.site.kind == "block":
            place.module.register_forward_hook(lambda module, args, out: seen.append((args[0], first(out))))
    call(model, batch)
    ahead = [place.site.next_block for place in places if place.site.next_block is not None]
    assert len(ahead) == len(seen) > 1
    for block, (given, out) in zip(ahead, seen, strict=True):
        torch.testing.assert_close(block.replay(given), out, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(given, out, atol=1e-2)


def test_blocks_of_another_kind_are_not_taken_apart() -> None:
    assert all(place.site.next_block is None for place in find_places(timm_vit(block_fn=ResPostBlock)))
    model = timm_vit()
    model.blocks[1].attn = nn.Identity()
    assert [place.site.next_block is None for place in find_places(model)[:3]] == [False, True, False]


@pytest.mark.parametrize("bias", [True, False])
def test_the_parts_of_a_fused_projection_make_up_the_whole(bias: bool) -> None:
    fused, x = nn.Linear(6, 12, bias=bias), torch.randn(2, 3, 6)
    parts = [Projection(module=fused, part=part, parts=3) for part in range(3)]
    torch.testing.assert_close(torch.cat([part(x) for part in parts], dim=-1), fused(x))
    assert all((part.bias is not None) == bias for part in parts)
    fused.to(torch.float64)
    assert parts[1].weight.dtype == torch.float64


@torch.no_grad()
def test_a_branch_is_scaled_and_dropped_as_in_the_block() -> None:
    model = timm_vit(drop_path_rate=0.5, init_values=0.1).train()
    block = find_places(model)[2].site.next_block
    assert block is not None
    ones = torch.ones(64, 1, 16)
    # a branch of the last block is kept with one half, and then scaled by two
    assert set(block.scale_mlp(ones).mul(10).round().unique().tolist()) == {0.0, 2.0}
    model.eval()
    torch.testing.assert_close(block.scale_attention(ones), 0.1 * ones)


def test_a_site_knows_the_block_that_its_hidden_state_goes_into() -> None:
    sites = [place.site for place in find_places(FAMILIES["vit"].model())]
    assert [(site.kind, site.next_block is not None) for site in sites] == [
        ("stage", True),
        ("block", True),
        ("block", True),
        ("block", False),
        ("norm", False),
    ]
    assert [site.norm is not None for site in sites] == [False, False, False, False, True]
    assert all(place.site.next_block is None for place in find_places(FAMILIES["vit"].model(), with_blocks=False))


@pytest.mark.parametrize(("family", "spatial"), [("vit", True), ("swin", True), ("timm_vit", True), ("bert", False)])
def test_the_tokens_of_images_stand_in_a_grid(family: str, spatial: bool) -> None:
    assert {place.site.spatial for place in find_places(FAMILIES[family].model())} == {spatial}


def test_only_the_last_block_is_last() -> None:
    sites = [place.site for place in find_places(FAMILIES["t5"].model())]
    assert stacks(sites) == ["encoder", "decoder"]
    for stack in stacks(sites):
        assert [site.index for site in of_stack(sites, stack) if site.last] == [2]


def test_positions_go_on_after_the_cache() -> None:
    site = Site(kind="block", stack="decoder", stage=0, index=0, depth=1, width=4)
    hidden = torch.randn(2, 3, 4)
    assert site.positions(hidden).tolist() == [0, 1, 2]
    later = site.during(keep=None, key_keep=None, memory_keep=None, grid=None, past=5, cache=None)
    assert later.positions(hidden).tolist() == [5, 6, 7]
    assert site.past == 0
