"""Boxes in pictures: in pixels, as they are labelled, and as shares of the picture, as they are learned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from sidestep.data.images import size_of
from sidestep.data.labels import LabelSpace
from sidestep.data.media import undecoded
from sidestep.data.messages import DataError, named_rows
from sidestep.data.tables import check_column
from sidestep.messages import some

BoxForm = Literal["xyxy", "xywh"]
"""Left, top, right and bottom, or left, top, width and height."""
OVER = 1.0
"""Pixels by which a box may stand out of its picture, as rounding makes it. It is cut there."""


@dataclass(frozen=True)
class Boxes(LabelSpace):
    """A box.

    Attributes:
        form: of the labels, and of predictions.
    """

    form: BoxForm = "xyxy"

    def __post_init__(self) -> None:
        if self.form not in get_args(BoxForm):
            raise DataError(f"boxes={self.form!r}: choose {' or '.join(get_args(BoxForm))} (--boxes)")

    @property
    def outputs(self) -> int:
        """Four numbers."""
        return 4

    def stored(self) -> dict[str, Any]:
        """With the form."""
        return {**super().stored(), "boxes": self.form}

    def shares(self, rows: Dataset, label_column: str, image_column: str) -> list[list[float]]:
        """Each row's box by centre, width and height, as shares of its picture's width and height.

        Raises:
            DataError: for rows whose label is no box, whose box has no size or stands out of its picture, or whose
                picture cannot be read. It names the rows.
        """
        boxes, sizes = _boxes(rows, label_column), sizes_of(rows, image_column)
        if self.form == "xywh":
            boxes[:, 2:] += boxes[:, :2]
        _refuse_flat(boxes, label_column, self.form)
        ends = np.tile(sizes, 2)
        _refuse_outside(boxes, ends, label_column, self.form)
        shares = boxes.clip(0, ends) / ends
        return np.hstack([(shares[:, :2] + shares[:, 2:]) / 2, shares[:, 2:] - shares[:, :2]]).tolist()

    def pixels(self, shares: NDArray[Any], sizes: NDArray[Any]) -> list[list[float]]:
        """Boxes in pixels, in the form of the labels, cut at the edges of their pictures.

        Args:
            shares: (rows, 4) by centre, width and height.
            sizes: (rows, 2) width and height of the pictures.
        """
        corners = shares_as_corners(shares.astype(np.float64)).clip(0, 1) * np.tile(sizes, 2)
        if self.form == "xywh":
            corners[:, 2:] -= corners[:, :2]
        return corners.tolist()


def shares_as_corners(boxes: NDArray[Any]) -> NDArray[Any]:
    """Boxes (rows, 4) by left, top, right and bottom, of those by centre, width and height."""
    half = boxes[:, 2:] / 2
    return np.hstack([boxes[:, :2] - half, boxes[:, :2] + half])


def sizes_of(rows: Dataset, column: str) -> NDArray[np.float64]:
    """(rows, 2): width and height of each picture, as it is looked at.

    Raises:
        DataError: for a picture that cannot be read, with its file or row.
    """
    cells = undecoded(rows, column)[column]
    return np.array([size_of(cell, place + 1) for place, cell in enumerate(cells)], dtype=np.float64).reshape(-1, 2)


def _boxes(rows: Dataset, column: str) -> NDArray[np.float64]:
    """(rows, 4): the numbers of the labels."""
    check_column(rows, column)
    cells = [_numbers(cell) for cell in rows.with_format(None)[column][:]]
    bad = [row for row, box in enumerate(cells) if box is None]
    if bad:
        raise DataError(
            f"column {column!r} has no box in {len(bad)} of {len(cells)} rows, {named_rows(bad)}. Give each a list of "
            "four numbers in pixels (in a table as [12, 5, 60, 40]), or drop these rows"
        )
    return np.array(cells, dtype=np.float64)


def _numbers(cell: Any) -> list[float] | None:
    """The four finite numbers of a cell. None: it does not hold these."""
    if isinstance(cell, str):
        try:
            cell = json.loads(cell if cell.strip().startswith("[") else f"[{','.join(cell.replace(',', ' ').split())}]")
        except ValueError:
            return None
    if not isinstance(cell, Sequence) or len(cell) != 4:
        return None
    numbers = [float(each) for each in cell if isinstance(each, int | float)]
    return numbers if len(numbers) == 4 and np.isfinite(numbers).all() else None


def _refuse_flat(boxes: NDArray[Any], column: str, form: BoxForm) -> None:
    flat = np.flatnonzero((boxes[:, 2:] <= boxes[:, :2]).any(axis=1)).tolist()
    if flat:
        raise DataError(
            f"column {column!r} has boxes without a size in {len(flat)} of {len(boxes)} rows, {named_rows(flat)}: "
            f"{_shown(boxes, flat)} by left, top, right and bottom. They are read as {form} (--boxes). Correct or drop "
            "these rows"
        )


def _refuse_outside(boxes: NDArray[Any], ends: NDArray[Any], column: str, form: BoxForm) -> None:
    far = np.flatnonzero(((boxes < -OVER) | (boxes > ends + OVER)).any(axis=1)).tolist()
    if far:
        width, height = ends[far[0], :2].astype(int).tolist()
        raise DataError(
            f"column {column!r} has boxes outside their pictures in {len(far)} of {len(boxes)} rows, "
            f"{named_rows(far)}: {_shown(boxes, far[:1])} in a picture of {width} x {height} pixels. They are "
            f"read as {form} (--boxes). Correct or drop these rows"
        )


def _shown(boxes: NDArray[Any], rows: Sequence[int]) -> str:
    return some((f"[{', '.join(f'{number:g}' for number in boxes[row])}]" for row in rows), 3)
