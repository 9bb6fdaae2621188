"""Images of a column, decoded as RGB."""

from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from datasets import Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from sidestep.backbone.pixels import to_rgb
from sidestep.data.media import Medium, is_local

TURNED = (5, 6, 7, 8)
"""Orientations, as cameras tell them, of pictures that are looked at on their side."""
ERRORS: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError)
UNOPENED: tuple[type[Exception], ...] = (*ERRORS, TypeError)
"""What opening a cell raises that has neither a file here nor bytes, too."""
"""What Pillow raises for an image that it cannot read."""


def _rgb(cell: dict[str, Any]) -> PIL.Image.Image:
    image = to_rgb(_opened(cell))
    PIL.ImageOps.exif_transpose(image, in_place=True)
    return image


def _opened(cell: dict[str, Any]) -> PIL.Image.Image:
    """The picture as it is in its file.

    `datasets` leaves files open that cannot be decoded. A picture that `datasets` turns has lost what its file says of
    it.
    """
    content = cell["bytes"]
    if content is None:
        if not is_local(cell["path"]):
            return Image().decode_example(cell)
        content = Path(cell["path"]).read_bytes()
    image = PIL.Image.open(BytesIO(content))
    image.load()
    return image


def size_of(cell: dict[str, Any], row: int) -> tuple[int, int]:
    """Width and height of an image as it is looked at. Its header is read, and not its pixels.

    Args:
        cell: "bytes" or "path" of it.
        row: its number, from 1.

    Raises:
        DataError: if it cannot be read, with its file or row.
    """
    try:
        given = cell["bytes"]
        with PIL.Image.open(cell["path"] if given is None else BytesIO(given)) as image:
            turned = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) in TURNED
            return image.size[::-1] if turned else image.size
    except UNOPENED:
        return IMAGES.decode(cell, row).size  # of what lies in a store, or the error that names it


IMAGES = Medium(
    name="image",
    field="image",
    feature=Image(),
    extensions=frozenset(ImageFolder.EXTENSIONS),
    opened=_rgb,
    errors=ERRORS,
)
"""Decoded as a PIL image in RGB."""
