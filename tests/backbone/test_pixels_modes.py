"""Pictures of every mode that Pillow opens: 8 bits a channel, scaled rightly or refused in words."""

from __future__ import annotations

import io
import struct

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset, Features, Image
from PIL import ImageCms

from sidestep.backbone.pixels import to_rgb
from sidestep.backbone.processors import TimmProcessor
from sidestep.data import DataError, DataWarning, Fields, ImageTransform, encode_images
from sidestep.data.images import IMAGES

GREY = np.array([[0, 1, 128], [200, 254, 255]], dtype=np.uint8)
COLOURS = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)


def stored(image: PIL.Image.Image, form: str, **how: object) -> dict[str, object]:
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return {"bytes": buffer.getvalue(), "path": None}


def values(cell: dict[str, object]) -> np.ndarray:
    image = IMAGES.decode(cell, None)
    assert image.mode == "RGB"
    return np.asarray(image)


def grey(array: np.ndarray) -> np.ndarray:
    return np.repeat(array[..., None], 3, axis=2)


def tiff(pixels: bytes, bits: int, *, white_is_zero: bool = False, orientation: int | None = None) -> dict[str, object]:
    """A TIFF file of 3 x 2 grey pixels in whole numbers of so many bits."""
    tags = {
        256: 3,
        257: 2,
        258: bits,
        259: 1,
        262: 0 if white_is_zero else 1,
        273: 200,
        277: 1,
        278: 2,
        279: len(pixels),
    }
    if orientation is not None:
        tags[274] = orientation
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, tags[tag]) for tag in sorted(tags))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    return {"bytes": head.ljust(200, b"\0") + pixels, "path": None}


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_grey_of_16_bits_is_scaled_whatever_its_byte_order(mode: str) -> None:
    order = ">u2" if mode == "I;16B" else "=u2" if mode == "I;16N" else "<u2"
    wide = GREY.astype(np.uint16) * 257
    image = PIL.Image.frombytes(mode, (3, 2), wide.astype(order).tobytes())
    assert np.array_equal(np.asarray(to_rgb(image)), grey(GREY))
    if mode != "I;16N":
        assert np.array_equal(values(stored(image, "TIFF")), grey(GREY))


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG2000"])
def test_files_with_16_bits_are_scaled(form: str) -> None:
    image = PIL.Image.fromarray(GREY.astype(np.uint16) * 257)
    assert np.array_equal(values(stored(image, form)), grey(GREY))


@pytest.mark.parametrize("most", [255, 1023, 4095, 65535])
def test_a_pgm_file_is_scaled_by_its_largest_value(most: int) -> None:
    given = (GREY.astype(np.int64) * most // 255).astype(np.uint8 if most < 256 else ">u2")
    cell = {"bytes": f"P5 3 2 {most}\n".encode() + given.tobytes(), "path": None}
    assert np.abs(values(cell).astype(int) - grey(GREY)).max() <= 1  # what is rounded down twice


@pytest.mark.parametrize("orientation", [None, 1])
def test_a_tiff_file_may_have_12_bits(orientation: int | None) -> None:
    wide = [int(value) * 16 for value in GREY.flatten()]
    # two pixels in three bytes, rows are filled up
    rows = [f"{a:012b}{b:012b}{c:012b}0000" for a, b, c in (wide[:3], wide[3:])]
    pixels = b"".join(int(row, 2).to_bytes(5, "big") for row in rows)
    assert np.array_equal(values(tiff(pixels, 12, orientation=orientation)), grey(GREY))


def test_white_may_be_zero() -> None:
    pixels = (GREY.astype(np.uint16) * 257).astype("<u2").tobytes()
    assert np.array_equal(values(tiff(pixels, 16, white_is_zero=True)), grey(255 - GREY))


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.array([[0, 70_000]], dtype=np.int32), "mode 'I' holds whole numbers of 32 bits"),
        (np.array([[-5, 200]], dtype=np.int32), "mode 'I' holds whole numbers of 32 bits"),
        (np.array([[0.0, 1.0]], dtype=np.float32), "mode 'F' holds decimal numbers of 32 bits"),
        (np.array([[0.0, 3000.0]], dtype=np.float32), "mode 'F' holds decimal numbers of 32 bits"),
    ],
)
def test_numbers_without_a_known_white_are_refused_in_words(array: np.ndarray, said: str) -> None:
    cell = stored(PIL.Image.fromarray(array), "TIFF")
    with pytest.raises(DataError, match=f"image .* in row 3 cannot be read .*{said}.*Save it with 8 or 16 bits"):
        IMAGES.decode({**cell, "path": "a.tif"}, 3)
    good = stored(PIL.Image.fromarray(GREY), "PNG")
    rows = Dataset.from_dict({"image": [cell, good]}, features=Features({"image": Image()}))
    with pytest.warns(DataWarning, match="1 of 2 images of the rows cannot be read"):
        assert len(IMAGES.drop_unreadable(rows, "image")) == 1
    with pytest.raises(DataError, match="row 1"):
        encode_images(rows, Fields(image="image"), ImageTransform(size=4), None)[0]


@pytest.mark.parametrize(("mode", "form"), [("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("LA", "TIFF"), ("1", "TIFF")])
def test_grey_of_8_bits_is_kept(mode: str, form: str) -> None:
    array = np.where(GREY > 127, 255, 0).astype(np.uint8) if mode == "1" else GREY
    assert np.array_equal(values(stored(PIL.Image.fromarray(array).convert(mode), form)), grey(array))


@pytest.mark.parametrize(("mode", "form"), [("RGB", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP"), ("CMYK", "TIFF")])
def test_colours_of_8_bits_are_kept(mode: str, form: str) -> None:
    how = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(values(stored(PIL.Image.fromarray(COLOURS).convert(mode), form, **how)), COLOURS)


@pytest.mark.parametrize(("mode", "most"), [("YCbCr", 3), ("HSV", 12)])
def test_other_colours_come_back_but_for_rounding(mode: str, most: int) -> None:
    image = PIL.Image.fromarray(COLOURS).convert(mode)
    found = np.asarray(to_rgb(image)).astype(int)
    assert np.abs(found - COLOURS).max() <= most  # 8 bits of another space; a wrong space differs by 100 and more
    if mode == "YCbCr":
        assert np.array_equal(values(stored(image, "TIFF")), found)


def test_colours_of_lab_come_back_but_for_rounding() -> None:
    spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.applyTransform(
        PIL.Image.fromarray(COLOURS), ImageCms.buildTransform(*spaces, inMode="RGB", outMode="LAB")
    )
    assert image is not None
    found = values(stored(image, "TIFF")).astype(int)
    assert np.abs(found - COLOURS).mean() < 3


@pytest.mark.parametrize("mode", ["P", "PA"])
def test_colours_of_a_palette_are_kept_under_any_transparency(mode: str) -> None:
    image = PIL.Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 9, 9, 200])
    expected = np.array([[[255, 0, 0], [0, 255, 0], [9, 9, 200]]])
    if mode == "PA":
        assert np.array_equal(values(stored(image.convert("PA"), "TIFF")), expected)
        return
    for transparency in (0, bytes([0, 255, 128]), bytes([7])):
        assert np.array_equal(values(stored(image, "PNG", transparency=transparency)), expected)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_colours_that_were_multiplied_by_their_opacity_are_divided_by_it(mode: str) -> None:
    plain = PIL.Image.fromarray(np.array([[[200, 200, 200, 128]]], dtype=np.uint8)).convert(mode[:-1] + "A")
    assert np.abs(np.asarray(to_rgb(plain.convert(mode))).astype(int) - 200).max() <= 1


@pytest.mark.parametrize(("form", "wide"), [("PNG", False), ("JPEG", False), ("TIFF", False), ("PNG", True)])
def test_a_picture_is_turned_as_the_camera_was_held(form: str, wide: bool) -> None:
    image = PIL.Image.fromarray(GREY.astype(np.uint16) * 257) if wide else PIL.Image.fromarray(GREY)
    exif = PIL.Image.Exif()
    exif[PIL.Image.ExifTags.Base.Orientation] = 6
    found = values(stored(image, form, exif=exif, **({"quality": 100} if form == "JPEG" else {})))
    # a JPEG file of the best quality rounds once
    assert np.abs(found.astype(int) - grey(np.rot90(GREY, -1))).max() <= (2 if form == "JPEG" else 0)


def test_processors_that_are_given_a_picture_scale_it_too() -> None:
    size = 4
    wide = PIL.Image.fromarray(np.full((size, size), 32768, dtype=np.uint16))
    narrow = PIL.Image.fromarray(np.full((size, size), 128, dtype=np.uint8))
    for processor in (ImageTransform(size=size), timm_processor(size)):
        found, expected = (processor(images=[image])["pixel_values"] for image in (wide, narrow))
        assert found.equal(expected)


def timm_processor(size: int) -> TimmProcessor:
    return TimmProcessor(
        input_size=(3, size, size),
        interpolation="bicubic",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        crop_pct=1.0,
        crop_mode="center",
    )
