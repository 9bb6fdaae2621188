"""Images as pixel values: what a transform does, that it is stored whole, and sizes that a backbone cannot take."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from transformers import (
    BitImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    PreTrainedConfig,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from sidestep.backbone.pixels import IMAGE_TRANSFORM, ImageTransform, adjusted, check_image_size, image_shape
from sidestep.backbone.processors import TimmProcessor, load_processor
from sidestep.backbone.source import LoadError
from small_tasks import tokenizer


def photo(rows: int = 40, columns: int = 60, seed: int = 0) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((columns, rows), PIL.Image.Resampling.BICUBIC)


def pixels(processor: Any, image: PIL.Image.Image) -> torch.Tensor:
    return processor(images=[image], return_tensors="pt")["pixel_values"][0]


# --- what it does -----------------------------------------------------------------------------------------


def test_a_squash_is_pillows_resize_and_the_normalisation_of_the_page() -> None:
    image, transform = photo(), ImageTransform(size=(8, 12), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    shares = np.asarray(image.resize((12, 8), PIL.Image.Resampling.BICUBIC), dtype=np.float32) / 255
    expected = (shares - np.float32([0.1, 0.2, 0.3])) / np.float32([0.5, 0.6, 0.7])
    found = pixels(transform, image)
    assert found.shape == (3, 8, 12)
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_a_crop_keeps_the_shape_and_takes_the_centre() -> None:
    transform = ImageTransform(size=10, resize="crop", resize_to=20, mean=(0, 0, 0), std=(1, 1, 1))
    resized = np.asarray(photo().resize((30, 20), PIL.Image.Resampling.BICUBIC))
    found = (pixels(transform, photo()) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(found, resized[5:15, 10:20])


def test_a_squash_to_more_than_the_size_is_cut_too() -> None:
    """As DTL's few-shot runs test: 256 x 256 whatever the shape, then the centre of 224."""
    transform = ImageTransform(size=6, resize_to=8, mean=(0, 0, 0), std=(1, 1, 1))
    resized = np.asarray(photo().resize((8, 8), PIL.Image.Resampling.BICUBIC))
    found = (pixels(transform, photo()) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(found, resized[1:7, 1:7])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert pixels(ImageTransform(size=4), photo().convert(mode)).shape == (3, 4, 4)


# --- from a processor -------------------------------------------------------------------------------------

PROCESSORS = {
    "squash": (ViTImageProcessor(size={"height": 16, "width": 16}), ("squash", None)),
    "crop": (BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}), ("crop", 32)),
    "both": (
        DeiTImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 28, "width": 28}),
        ("squash", 32),
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_hugging_face_processor_does_the_same_up_to_rounding(name: str) -> None:
    processor, expected = PROCESSORS[name]
    found = ImageTransform.of(processor)
    assert (found.resize, found.resize_to) == expected
    for image in (photo(), photo(90, 50)):
        difference = (pixels(found, image) - pixels(processor, image)).abs() * min(found.std)
        assert difference.max() <= 2.5 / 255  # both round to whole values, once and twice


def test_a_timm_processor_does_the_same_to_the_last_bit_but_one() -> None:
    processor = TimmProcessor.of("vit_base_patch16_224.augreg_in21k")
    torch.testing.assert_close(pixels(ImageTransform.of(processor), photo()), pixels(processor, photo()))


def test_another_size_keeps_the_share_that_is_cut_off() -> None:
    found = adjusted(PROCESSORS["crop"][0], size=56, normalize="imagenet")
    assert (found.size, found.resize_to, found.resize) == (56, 64, "crop")
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert adjusted(PROCESSORS["squash"][0], size=8).resize_to is None
    assert adjusted(PROCESSORS["crop"][0]) is PROCESSORS["crop"][0]


def test_a_processor_that_does_more_is_not_guessed_at() -> None:
    for processor in (
        ConvNextImageProcessor(),
        ViTImageProcessor(do_normalize=False),
        ViTImageProcessor(do_resize=False),
    ):
        with pytest.raises(ValueError, match=r"does not just resize, crop and normalise, .*ImageTransform"):
            ImageTransform.of(processor)
    with pytest.raises(ValueError, match=r"the backbone reads text \(\w+\): size"):
        adjusted(tokenizer(pad=True), size=32)
    with pytest.raises(ValueError, match="normalize='caffe': choose imagenet or half"):
        adjusted(PROCESSORS["crop"][0], normalize="caffe")


# --- stored -----------------------------------------------------------------------------------------------


def test_what_is_stored_comes_back_whole(tmp_path: Path) -> None:
    transform = ImageTransform(size=(4, 6), resize_to=(5, 8), interpolation="bilinear", mean=(0.1, 0.2, 1 / 3))
    transform.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert again == transform
    assert torch.equal(pixels(again, photo()), pixels(transform, photo()))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "cannot be read"),
        ('{"resize": "crop"}', "needs a size"),
        ('{"size": 4, "sice": 5}', "has no field sice: it has size, resize, "),
        ('{"size": "4"}', "size='4' of an image transform, but it must be a whole number"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / IMAGE_TRANSFORM).write_text(text)
    with pytest.raises(LoadError, match=said) as caught:
        load_processor(tmp_path)
    assert IMAGE_TRANSFORM in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"size": 0}, "size=0 of an image transform, but it must be a whole number above 0"),
        ({"size": (4, 4, 4)}, "size="),
        ({"size": True}, "size=True"),
        ({"size": 4, "resize": "stretch"}, "resize='stretch' .* must be squash or crop"),
        ({"size": 4, "resize_to": 3}, "resize_to=3 .* at least the size 4"),
        ({"size": (4, 6), "resize": "crop", "resize_to": 5}, "resize_to=5"),
        ({"size": 4, "resize": "crop", "resize_to": (5, 6)}, "with resize='crop' one number"),
        ({"size": 4, "interpolation": "cubic"}, "interpolation='cubic' .* nearest, bilinear, "),
        ({"size": 4, "mean": (0.5, 0.5)}, "mean=.* three numbers"),
        ({"size": 4, "std": (0.5, 0.5, 0.0)}, "std=.* three numbers above 0"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ImageTransform(**values)


def test_the_file_is_plain_json(tmp_path: Path) -> None:
    ImageTransform(size=4).save_pretrained(tmp_path / "deep")
    assert json.loads((tmp_path / "deep" / IMAGE_TRANSFORM).read_text())["size"] == 4


def test_without_torchvision_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sidestep\[vision\]'"):
        ImageTransform(size=5)(images=[photo()])


# --- sizes that a backbone cannot take --------------------------------------------------------------------

VIT = ViTConfig(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
)
SWIN = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)


def test_a_size_that_the_backbone_cannot_take_is_named_with_its_own() -> None:
    for backbone in (ViTModel(VIT), timm.create_model("test_vit", img_size=16, patch_size=8, dynamic_img_size=False)):
        with pytest.raises(ValueError, match="cannot take images of 3 x 24 x 24") as caught:
            check_image_size(backbone, backbone, torch.zeros(3, 24, 24))
        assert "it was made for 3 x 16 x 16 (--image-size 16). It says: " in str(caught.value)
        check_image_size(backbone, backbone, torch.zeros(3, 16, 16))


def test_a_size_that_a_backbone_takes_besides_its_own_is_not_refused() -> None:
    swin = SwinModel(SWIN)
    assert image_shape(swin) == (3, 16, 16)
    check_image_size(swin, swin, torch.zeros(3, 24, 20))
    free = timm.create_model("test_vit", img_size=16, patch_size=8, dynamic_img_size=True)
    check_image_size(free, free, torch.zeros(3, 24, 24))
    with pytest.raises(ValueError, match="3 x 20 x 20"):
        check_image_size(free, free, torch.zeros(3, 20, 20))


def test_a_model_that_says_no_size_is_tried() -> None:
    vit = ViTModel(VIT)
    vit.config = PreTrainedConfig(num_channels=3)
    assert image_shape(vit) is None
    with pytest.raises(ValueError, match=r"rows x columns\)\. It says: "):
        check_image_size(vit, vit, torch.zeros(3, 24, 24))
