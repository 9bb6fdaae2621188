"""Images of a column, decoded as RGB."""

from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
from datasets import Image
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from sidestep.backbone.pixels import to_rgb
from sidestep.data.media import Medium, is_local


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


IMAGES = Medium(
    name="image",
    field="image",
    feature=Image(),
    extensions=frozenset(ImageFolder.EXTENSIONS),
    opened=_rgb,
    errors=(OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError),
)
"""Decoded as a PIL image in RGB."""
