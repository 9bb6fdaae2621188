"""Images of a column: decoded as RGB, named where they cannot be, and left out where that is asked for."""

import warnings
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps
import pyarrow.compute as pc
from datasets import Dataset, Image

from sidestep.backbone.pixels import to_rgb
from sidestep.data.messages import DataError, DataWarning, listed


def decode(cell: dict[str, Any], row: int | None) -> PIL.Image.Image:
    """The image in RGB.

    Args:
        cell: "bytes" or "path" of it.
        row: its number, from 1, or None if it is not known.

    Raises:
        DataError: if it cannot be read, with its file or row.
    """
    try:
        image = to_rgb(_opened(cell))
        PIL.ImageOps.exif_transpose(image, in_place=True)
        return image
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        place = " in ".join([repr(cell["path"])] * bool(cell["path"]) + [f"row {row}"] * bool(row))
        raise DataError(
            f"image {place or '(no path)'} cannot be read ({error}): replace or drop it, or leave out all such with "
            "--skip-bad-images"
        ) from error


def decoded(batch: Mapping[str, list[Any]]) -> list[PIL.Image.Image]:
    """The images of a batch of rows, whose undecoded images have the name "pixel_values".

    Raises:
        DataError: as `decode`. It names the row where "row" is among the columns.
    """
    cells = batch["pixel_values"]
    return [decode(cell, row) for cell, row in zip(cells, batch.get("row", [None] * len(cells)), strict=True)]


def drop_unreadable(rows: Dataset, column: str, what: str = "rows") -> Dataset:
    """The rows whose images can be read.

    Each image is decoded once to find out.

    Args:
        rows: with a column of images, or of paths of images.
        column: its name.
        what: the rows, as a warning calls them.

    Raises:
        DataError: if no image can be read.

    Warns:
        DataWarning: if some cannot, with their count and the first of them.
    """
    good, bad = [], []
    for place, cell in enumerate(undecoded(rows, column)[column]):
        try:
            decode(cell, place + 1)
            good.append(place)
        except DataError:
            bad.append(_name(cell, place))
    if not good:
        raise DataError(f"none of {len(rows)} images of the {what} can be read: {listed(bad)}: check the files")
    if not bad:
        return rows
    warnings.warn(
        f"{len(bad)} of {len(rows)} images of the {what} cannot be read and were left out: {listed(bad)}",
        DataWarning,
        stacklevel=2,
    )
    return rows.select(good)


def refuse_absent(rows: Dataset, column: str) -> None:
    """Refuses files that are not there or hold nothing, which costs no decoding.

    Raises:
        DataError: naming the first of them.
    """
    bad = [path for path in _local_paths(rows, column) if not _holds_something(Path(path))]
    if bad:
        raise DataError(
            f"{len(bad)} of {len(rows)} images of column {column!r} are not there or empty (0 bytes): {listed(bad)}. "
            "Replace or drop them, or leave out all such with --skip-bad-images"
        )


def undecoded(rows: Dataset, column: str, *others: str) -> Dataset:
    """That column as "bytes" and "path", and other columns beside it."""
    return rows.with_format(None).select_columns([column, *others]).cast_column(column, Image(decode=False))


def numbered(rows: Dataset, column: str) -> Dataset:
    """The undecoded images of a column as "pixel_values", with the numbers of their "row" from 1."""
    images = undecoded(rows, column)
    if column != "pixel_values":
        images = images.rename_column(column, "pixel_values")
    return images.add_column("row", list(range(1, len(rows) + 1)))


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


def _local_paths(rows: Dataset, column: str) -> Iterator[str]:
    """The files of images that are not in the rows themselves."""
    # batch by batch: taken whole, the bytes of images would fill the memory
    for table in undecoded(rows, column).with_format("arrow").iter(batch_size=1000):
        cells = table.column(column)
        outside = pc.struct_field(cells, "path").filter(pc.struct_field(cells, "bytes").is_null())
        yield from filter(is_local, outside.to_pylist())


def is_local(path: str | None) -> bool:
    """Whether it is a file.

    `datasets` itself reads what is in a store.
    """
    return path is not None and "://" not in path


def _holds_something(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _name(cell: dict[str, Any], place: int) -> str:
    return cell["path"] or f"row {place + 1}"
