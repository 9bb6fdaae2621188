"""The checksum of rows: the same for the same contents, wherever they lie, and another for any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from datasets import Dataset

from sidestep.data import Fields, LabelSpace, encode_images
from sidestep.data.contents import content_hash
from sidestep.data.pairs import WithImages

ROWS: dict[str, list[Any]] = {
    "input_ids": [[1, 2, 3], [4, 5], [6]],
    "attention_mask": [[1, 1, 1], [1, 1], [1]],
    "length": [3, 2, 1],
    "labels": [0, 1, 0],
    "target": ["a", "b", "größer"],
}


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [
        ("input_ids", 0, [1, 3, 2]),
        ("input_ids", 2, [7]),
        ("attention_mask", 1, [0, 1]),
        ("length", 2, 2),
        ("labels", 0, 1),
        ("target", 2, "grösser"),
        ("target", 1, None),
    ],
)
def test_each_cell_counts(column: str, row: int, value: Any) -> None:
    cells = list(ROWS[column])
    cells[row] = value
    assert content_hash(Dataset.from_dict({**ROWS, column: cells})) != content_hash(Dataset.from_dict(ROWS))


def test_the_same_rows_have_one_checksum_however_they_are_held(tmp_path: Path) -> None:
    rows = Dataset.from_dict({name: cells * 700 for name, cells in ROWS.items()})  # several batches
    rows.save_to_disk(tmp_path / "rows")
    known = content_hash(rows)
    assert content_hash(Dataset.load_from_disk(tmp_path / "rows")) == known
    assert content_hash(rows.select([*range(2100)])) == known
    assert content_hash(rows.with_format("torch")) == known
    assert content_hash(rows.select([1, 0, *range(2, 2100)])) != known
    assert content_hash(rows.select([*range(2099)])) != known


def test_tokens_that_move_to_the_next_row_are_other_rows() -> None:
    first, second = ({"input_ids": ids} for ids in ([[1, 2], [3]], [[1], [2, 3]]))
    assert content_hash(Dataset.from_dict(first)) != content_hash(Dataset.from_dict(second))


def pictures(folder: Path, seeds: list[int]) -> Dataset:
    folder.mkdir()
    for place, seed in enumerate(seeds):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{place}.png")
    files = [str(folder / f"{place}.png") for place in range(len(seeds))]
    rows = Dataset.from_dict({"image": files, "label": ["a", "b"]})
    return encode_images(rows, Fields(image="image", label="label"), None, LabelSpace("single", ("a", "b")))


def test_pictures_count_by_their_bytes_and_not_by_their_place(tmp_path: Path) -> None:
    here, there = pictures(tmp_path / "here", [0, 1]), pictures(tmp_path / "there", [0, 1])
    other = pictures(tmp_path / "other", [0, 2])
    assert content_hash(here) == content_hash(there)
    assert content_hash(here) != content_hash(other)
    texts = Dataset.from_dict({"input_ids": [[1], [2]], "labels": [0, 1]})
    paired = [content_hash(texts.with_transform(WithImages(images))) for images in (here, there, other)]
    assert paired[0] == paired[1] != paired[2]


def test_a_picture_that_is_gone_counts_by_its_name(tmp_path: Path) -> None:
    rows = pictures(tmp_path / "here", [0, 1])
    known = content_hash(rows)
    (tmp_path / "here" / "1.png").unlink()
    assert content_hash(rows) != known
