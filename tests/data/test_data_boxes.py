"""Boxes in pixels and as shares: in both forms, and what is refused with its row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestep.data import DataError
from sidestep.data.boxes import Boxes, sizes_of


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 pixels wide, 20 high."""
    path = tmp_path_factory.mktemp("boxes") / "wide.png"
    PIL.Image.new("RGB", (40, 20)).save(path)
    return str(path)


def rows(picture: str, *boxes: Any) -> Dataset:
    return Dataset.from_dict({"picture": [picture] * len(boxes), "box": list(boxes)})


def test_shares_are_of_the_pictures_own_sides(picture: str) -> None:
    found = rows(picture, [10, 5, 30, 15])
    assert Boxes("grounding", ()).shares(found, "box", "picture") == [[0.5, 0.5, 0.5, 0.5]]
    assert Boxes("grounding", (), form="xywh").shares(found, "box", "picture") == [[0.625, 0.625, 0.75, 0.75]]


@pytest.mark.parametrize("text", ["10 5 30 15", "10, 5, 30, 15", "[10, 5, 30.0, 15]"])
def test_a_tables_cell_is_read(picture: str, text: str) -> None:
    assert Boxes("grounding", ()).shares(rows(picture, text), "box", "picture") == [[0.5, 0.5, 0.5, 0.5]]


@given(st.data(), st.sampled_from(["xyxy", "xywh"]))
@settings(max_examples=25, deadline=None)
def test_pixels_come_back_from_shares(data: st.DataObject, form: Any) -> None:
    """The tolerance is rounding in float64."""
    width, height = data.draw(st.integers(2, 900)), data.draw(st.integers(2, 900))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    box = [left, top, right, bottom] if form == "xyxy" else [left, top, right - left, bottom - top]
    image = PIL.Image.new("L", (width, height))
    given_rows = Dataset.from_list([{"picture": image, "box": box}])
    space = Boxes("grounding", (), form=form)
    shares = np.array(space.shares(given_rows, "box", "picture"))
    assert space.pixels(shares, np.array([[width, height]]))[0] == pytest.approx(box, abs=1e-6)


def test_predictions_are_cut_at_the_edges() -> None:
    found = Boxes("grounding", ()).pixels(np.array([[0.9, 0.1, 0.4, 0.4]]), np.array([[100.0, 50.0]]))
    assert found[0] == pytest.approx([70, 0, 100, 15])


def test_a_picture_on_its_side_has_the_size_that_one_looks_at(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    found = Dataset.from_dict({"picture": [str(tmp_path / "turned.jpg")]})
    assert sizes_of(found, "picture").tolist() == [[20, 40]]


@pytest.mark.parametrize(
    ("box", "said"),
    [
        ([5, 5, 5, 9], r"boxes without a size in 1 of 2 rows, row 2 .*: \[5, 5, 5, 9\] by left, top, right and bottom"),
        ([9, 5, 5, 9], "boxes without a size in 1 of 2 rows, row 2"),
        (
            [5, 5, 50, 9],
            r"boxes outside their pictures in 1 of 2 rows, row 2 .*: \[5, 5, 50, 9\] in a picture of 40 x 20",
        ),
        ([-3, 5, 20, 9], "boxes outside their pictures in 1 of 2 rows, row 2"),
        ([5, 5, 9], "has no box in 1 of 2 rows, row 2"),
        (None, "has no box in 1 of 2 rows, row 2"),
        ([1, 2, float("nan"), 4], "has no box in 1 of 2 rows, row 2"),
    ],
)
def test_a_box_that_is_none_is_refused_by_its_row(picture: str, box: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Boxes("grounding", ()).shares(rows(picture, [1.0, 1, 4, 4], box), "box", "picture")


def test_a_pixel_too_far_is_rounding(picture: str) -> None:
    (found,) = Boxes("grounding", ()).shares(rows(picture, [-0.4, 0, 40.6, 20]), "box", "picture")
    assert found == [0.5, 0.5, 1, 1]


def test_a_form_is_known_and_an_unreadable_picture_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="boxes='cxcywh': choose xyxy or xywh"):
        Boxes("grounding", (), form="cxcywh")  # type: ignore[arg-type]  # which is refused
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken.png' in row 1 cannot be read"):
        Boxes("grounding", ()).shares(rows(str(tmp_path / "broken.png"), [1, 1, 4, 4]), "box", "picture")
