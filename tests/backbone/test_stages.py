"""Stages of images: where one begins, on which grid its tokens stand, and how many tokens stand before the grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

import sidestep as ss
from architectures import TEXT
from sidestep.backbone import facts_of, find_places
from sidestep.backbone.grids import counted_grid, counted_prefix
from tiny import randomize

PYRAMID: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_encoder_blocks": 2, "image_size": 64}
SHORT: dict[str, Any] = {
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
}


def pvt() -> nn.Module:
    """A class token stands before the grid of its last stage."""
    return t.PvtModel(
        t.PvtConfig(**PYRAMID, **SHORT, patch_sizes=[4, 2], strides=[4, 2], sequence_reduction_ratios=[2, 1])
    )


def cvt() -> nn.Module:
    """The same, and its blocks are told rows and columns."""
    two: dict[str, Any] = {
        "patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1], "embed_dim": [8, 16],
        "num_heads": [1, 2], "depth": [1, 2], "cls_token": [False, True], "qkv_bias": [True, True],
        "drop_rate": [0.0, 0.0], "attention_drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0],
        "mlp_ratio": [2.0, 2.0], "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3],
        "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1],
    }  # fmt: skip
    return t.CvtModel(t.CvtConfig(**two))


def levit() -> nn.Module:
    """Its stages make tokens fewer and wider on the way, and tell nobody the grid."""
    return t.LevitModel(
        t.LevitConfig(image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[1, 2, 3], depths=[1, 1, 1])
    )


def mobilenet() -> nn.Module:
    """One list of blocks of many widths."""
    return t.MobileNetV2Model(t.MobileNetV2Config(depth_multiplier=0.25, image_size=64, min_depth=8))


def mobilevit() -> nn.Module:
    """Blocks of convolutions, and blocks with lists of attentions inside."""
    return t.MobileViTModel(
        t.MobileViTConfig(
            image_size=64,
            hidden_sizes=[16, 16, 16],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
            num_attention_heads=2,
        )
    )


def regnet() -> nn.Module:
    return t.RegNetModel(
        t.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 2, 1, 1], groups_width=8)
    )


def poolformer() -> nn.Module:
    """Lists in a list, and no linear map in the blocks."""
    return t.PoolFormerModel(
        t.PoolFormerConfig(
            hidden_sizes=[8, 16],
            depths=[1, 2],
            num_encoder_blocks=2,
            patch_sizes=[7, 3],
            strides=[4, 2],
            padding=[2, 1],
        )
    )


#: Builds the model. Then the widths of its blocks, stage by stage, and the tokens before each stage's grid.
STAGES: dict[str, tuple[Callable[[], nn.Module], list[list[int]], list[int]]] = {
    "pvt": (pvt, [[8], [16, 16]], [0, 1]),
    "cvt": (cvt, [[8], [16, 16]], [0, 1]),
    "levit": (levit, [[32], [48, 48]], [0, 0]),
    "mobilenet": (mobilenet, [[8, 8], [8, 8, 8], [16, 16, 16, 16], [24, 24, 24], [40, 40, 40], [80]], [0] * 6),
    "mobilevit": (mobilevit, [[8], [16], [16], [24, 24]], [0] * 4),
    "regnet": (regnet, [[8], [16, 16], [16], [16]], [0] * 4),
    "poolformer": (poolformer, [[8], [16, 16]], [0, 0]),
}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return STAGES[name][0]().eval()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_begins_where_tokens_or_width_change(name: str) -> None:
    _, widths, prefixes = STAGES[name]
    model = model_of(name)
    blocks = [place.site for place in find_places(model) if place.site.kind == "block"]
    found = [[site.width for site in blocks if site.stage == stage] for stage in range(blocks[-1].stage + 1)]
    assert facts_of(model).source == "traced"
    assert found == widths
    assert [next(site.prefix for site in blocks if site.stage == n) for n in range(len(found))] == prefixes


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["square", "wide"])
@pytest.mark.parametrize("name", STAGES)
def test_read_learns_on_every_form_of_stages(name: str, size: tuple[int, int]) -> None:
    """A row alone has the answer that it has in a batch, and every trained weight gets a gradient."""
    if name in ("levit", "pvt") and size[0] != size[1]:
        pytest.skip("it takes images of its own size only")
    model = ss.attach(model_of(name), ss.ReadConfig(rank=2), head=ss.Classify(num_labels=3))
    randomize(model)
    images = torch.randn(2, 3, *size)
    model(pixel_values=images, labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        both, alone = model(pixel_values=images).logits, model(pixel_values=images[1:]).logits
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


def test_tokens_that_do_not_stand_row_by_row_are_refused() -> None:
    hiera = t.HieraModel(
        t.HieraConfig(
            embed_dim=8, image_size=[64, 64], depths=[1, 1], num_heads=[1, 2], num_query_pool=1, query_stride=[2, 2]
        )
    )
    with pytest.raises(ValueError, match="do not stand row by row"):
        ss.attach(hiera.eval(), ss.ReadConfig(rank=2))


def test_lists_that_run_side_by_side_are_no_blocks() -> None:
    """XLM's attentions and feed-forward maps stand in lists of their own, and none reads what the one before gave."""
    xlm = t.XLMModel(t.XLMConfig(vocab_size=40, emb_dim=16, n_layers=2, n_heads=2))
    with pytest.raises(ValueError, match="several towers"):
        ss.attach(xlm.eval(), ss.ReadConfig(rank=2))


def test_a_tower_of_pictures_in_a_model_of_texts_is_left_out() -> None:
    vision = {name: TEXT[name] for name in TEXT if name != "vocab_size"}
    vision |= {"image_size": 16, "patch_size": 4, "model_type": "siglip_vision_model"}
    text = {**TEXT, "model_type": "modernbert", "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}
    model = t.ModernVBertModel(t.ModernVBertConfig(text_config=text, vision_config=vision)).eval()
    blocks = [place.name for place in find_places(model) if place.site.kind == "block"]
    assert blocks == [f"text_model.layers.{n}" for n in range(TEXT["num_hidden_layers"])]


@pytest.mark.parametrize(
    ("image", "tokens", "prefix", "grid"),
    [
        ((224, 224), 50, 1, (7, 7)),
        ((96, 160), 15, 0, (3, 5)),
        ((96, 160), 16, 1, (3, 5)),
        ((96, 160), 6, 0, (2, 3)),
        ((160, 96), 60, 0, (10, 6)),
        ((224, 224), 201, 5, (14, 14)),
    ],
)
def test_a_grid_is_counted_by_the_images_shape(
    image: tuple[int, int], tokens: int, prefix: int, grid: tuple[int, int]
) -> None:
    assert counted_prefix(image, tokens) == prefix
    assert counted_grid(image, tokens - prefix) == grid


def test_an_own_heads_batch_norm_is_put_back() -> None:
    """LeViT's classifier normalises by running means, which move in training."""
    torch.manual_seed(0)
    config = levit().config
    config.num_labels = 3
    backbone = t.LevitForImageClassification(config).eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = ss.attach(backbone, ss.ReadConfig(rank=2)).train()
    model(pixel_values=torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 2])).loss.backward()
    moved = [name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])]
    assert any("running_mean" in name for name in moved)
    ss.detach(model)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
