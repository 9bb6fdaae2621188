"""An image is one image: by its file however the path is spelled, by its bytes where they are in the rows."""

from __future__ import annotations

import os
from pathlib import Path

import PIL.Image
import pytest
from datasets import Dataset, Features, Image, Value

from sidestep.backbone.processors import PairProcessor, load_processor
from sidestep.data import DataError, Fields, TableOptions
from sidestep.data.pairs import captioned, encode_pairs, read_pairs
from small_tasks import image_backbone, text_backbone, write

FIELDS = Fields(image="image", text="text")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pictures, and links to the first."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        PIL.Image.new("RGB", (20, 20), colour).save(tmp_path / name)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.png").symlink_to("a.png")
    (tmp_path / "sub" / "up.png").symlink_to("../a.png")
    os.link(tmp_path / "a.png", tmp_path / "hard.png")
    (tmp_path / "here").symlink_to(".")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SPELLINGS = ["a.png", "./a.png", "sub/../a.png", "{here}/a.png", "link.png", "sub/up.png", "hard.png", "here/a.png"]


def pairs(paths: list[str]) -> list[dict[str, str]]:
    return [{"image": path, "text": f"caption {number}"} for number, path in enumerate(paths)]


def paths_of(rows: Dataset) -> list[str]:
    return [cell["path"] for cell in rows.cast_column("image", Image(decode=False))["image"][:]]


@pytest.mark.parametrize("first", range(len(SPELLINGS)))
def test_a_file_is_one_image_by_every_spelling_of_its_path(place: Path, first: int) -> None:
    spelled = [path.format(here=place) for path in (*SPELLINGS[first:], *SPELLINGS[:first])]
    for source in (Dataset.from_list(pairs(["b.png", *spelled])), "rows.csv"):
        if isinstance(source, str):
            write(place / source, pairs(["b.png", *spelled]))
            rows = read_pairs(source, FIELDS, TableOptions(), split="train")
        else:
            rows = captioned(source, FIELDS)
        assert [len(texts) for texts in rows["text"][:]] == [1, len(SPELLINGS)]
        assert rows["text"][1] == [f"caption {number + 1}" for number in range(len(SPELLINGS))]
        assert [os.path.basename(path) for path in paths_of(rows)] == ["b.png", os.path.basename(spelled[0])]


def test_captions_of_one_file_have_one_label(place: Path) -> None:
    image, text = (load_processor(made) for made in (image_backbone(place / "vit"), text_backbone(place / "bert")))
    processor = PairProcessor(image=image, text=text)
    rows = captioned(Dataset.from_list(pairs(["b.png", "a.png", "./a.png", "link.png"])), FIELDS)
    assert encode_pairs(rows, FIELDS, processor, None)[0].with_format(None)["labels"][:] == [0, 1, 1, 1]


def test_images_without_a_file_are_told_apart_by_their_bytes(place: Path) -> None:
    red, blue = ((place / name).read_bytes() for name in ("a.png", "b.png"))
    cells = [{"bytes": red, "path": "x.png"}, {"bytes": blue, "path": "x.png"}, {"bytes": red, "path": "y.png"}]
    features = Features({"image": Image(decode=False), "text": Value("string")})
    rows = Dataset.from_dict({"image": cells, "text": ["one", "two", "three"]}, features=features)
    assert captioned(rows, FIELDS)["text"][:] == [["one", "three"], ["two"]]


def test_files_that_are_not_there_are_named_as_they_were_given(place: Path) -> None:
    with pytest.raises(DataError, match=r"2 of 3 images are not there: 'none\.png', 'sub/none\.png', looked for from"):
        captioned(Dataset.from_list(pairs(["a.png", "none.png", "sub/none.png", "none.png"])), FIELDS)


def test_an_address_is_no_file(place: Path) -> None:
    rows = captioned(Dataset.from_list(pairs(["https://x.org/a.png", "https://x.org/./a.png"])), FIELDS)
    assert len(rows) == 2


@pytest.mark.parametrize("name", ["x" * 300, "none/" + "x" * 300, "sub", "a\0.png", " "])
def test_what_is_no_file_is_not_there(place: Path, name: str) -> None:
    with pytest.raises(DataError, match="1 of 2 images are not there"):
        captioned(Dataset.from_list(pairs(["a.png", name])), FIELDS)


def test_a_name_of_rows_that_is_empty_or_too_long_is_refused() -> None:
    with pytest.raises(DataError, match="the name of the rows is empty"):
        read_pairs("", FIELDS, TableOptions(), split="train")
    with pytest.raises(DataError, match=r"cannot be read \(File name too long\)"):
        read_pairs("x" * 300 + ".csv", FIELDS, TableOptions(), split="train")
