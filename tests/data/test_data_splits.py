"""Splits and classes of folders: what is read is what was asked for, never more."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import datasets
import PIL.Image
import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from sidestep.data import DataError, DataWarning, read
from sidestep.data.splits import chosen_split

TWO = ("train/cat/0.png", "train/dog/0.png", "val/cat/1.png", "val/dog/1.png")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def tree(root: Path, names: Iterable[str]) -> Path:
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4, 4), (shade, 0, 0)).save(root / name)
    return root


def found(rows: Dataset, root: Path) -> list[str]:
    cells = rows.cast_column("image", datasets.Image(decode=False))["image"][:]
    return [Path(cell["path"]).relative_to(root.resolve()).as_posix() for cell in cells]


def labels(rows: Dataset) -> list[str]:
    feature = rows.features["label"]
    assert isinstance(feature, ClassLabel)
    return [feature.int2str(cell) for cell in rows["label"][:]]


# --- splits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["test", "holdout", "cat"])
def test_a_split_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path: Path, split: str) -> None:
    root = tree(tmp_path / "data", TWO)
    with pytest.raises(DataError, match=rf"has no split '{split}': its splits are 'train', 'val': name one of them"):
        read(root, split=split)


@pytest.mark.parametrize("name", ["val", "dev", "valid", "Val", "validation"])
@pytest.mark.parametrize("asked", ["validation", "dev"])
def test_names_of_validation_mean_the_same_and_that_is_said(tmp_path: Path, name: str, asked: str) -> None:
    root = tree(tmp_path / "data", [path.replace("val/", f"{name}/") for path in TWO])
    if name == asked:
        rows = read(root, split=asked)
    else:
        with pytest.warns(DataWarning, match=rf"has no split '{asked}', so its split '{name}' is read .*'train'"):
            rows = read(root, split=asked)
    assert found(rows, root) == [f"{name}/cat/1.png", f"{name}/dog/1.png"]


def test_two_splits_that_may_be_meant_are_no_guess(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", [*TWO, "dev/cat/2.png", "dev/dog/2.png"])
    with pytest.raises(DataError, match="'dev', 'train', 'val', and 'dev', 'val' may all be meant"):
        read(root, split="validation")
    assert len(read(root, split="dev")) == 2


def test_only_one_split_there_is_not_read_for_another(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", TWO[:2])
    with pytest.raises(DataError, match="its splits are 'train'"):
        read(root, split="validation")


def test_a_split_may_hold_images_without_classes(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", [*TWO, "test/0.png", "test/1.png"])
    rows = read(root, split="test")
    assert rows.column_names == ["image"]
    assert found(rows, root) == ["test/0.png", "test/1.png"]
    flat = tree(tmp_path / "flat", ["train/0.png", "test/0.png"])
    assert found(read(flat, split="test"), flat) == ["test/0.png"]


def test_a_split_may_hold_a_metadata_file(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", ["train/0.png", "train/1.png", "val/0.png"])
    for split, kinds in (("train", "xy"), ("val", "y")):
        lines = [json.dumps({"file_name": f"{place}.png", "kind": kind}) for place, kind in enumerate(kinds)]
        (root / split / "metadata.jsonl").write_text("\n".join(lines))
    assert read(root, split="train")["kind"][:] == ["x", "y"]
    assert read(root, split="val")["kind"][:] == ["y"]
    with pytest.raises(DataError, match="its splits are 'train', 'val'"):
        read(root, split="test")


def test_a_split_may_have_any_name_and_be_a_link(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", ["fold1/cat/0.png", "fold1/dog/0.png"])
    tree(tmp_path / "elsewhere", ["cat/7.png", "dog/7.png"])
    (root / "fold2").symlink_to(tmp_path / "elsewhere")
    assert [Path(name).name for name in found(read(root, split="fold2"), tmp_path)] == ["7.png", "7.png"]


def test_splits_may_lie_one_folder_deeper(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", [f"flowers/{name}" for name in TWO])
    rows = read(root, split="val")
    assert found(rows, root) == ["flowers/val/cat/1.png", "flowers/val/dog/1.png"]
    assert labels(rows) == ["cat", "dog"]
    with pytest.raises(DataError, match="flowers has no split 'test': its splits are 'train', 'val'"):
        read(root, split="test")


def test_what_has_no_splits_is_read_whole(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", ["cat/0.png", "train/0.png"])
    for split in ("train", "validation", "anything"):
        assert labels(read(root, split=split)) == ["cat", "train"]


def test_the_splits_of_a_saved_folder_have_the_same_names(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": ["a", "b"]})
    DatasetDict(train=rows, dev=rows.select([0])).save_to_disk(tmp_path / "saved")
    with pytest.warns(DataWarning, match="so its split 'dev' is read"):
        assert len(read(tmp_path / "saved", split="validation")) == 1


def test_the_splits_of_a_hub_id_have_the_same_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, configuration: str | None, split: str) -> Dataset:
        if split not in ("train", "dev"):
            raise ValueError(f"Unknown split {split!r}")
        return Dataset.from_dict({"text": [split]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["train", "dev"])
    with pytest.warns(DataWarning, match="somebody/rows has no split 'validation', so its split 'dev' is read"):
        assert read("somebody/rows", split="validation")["text"][:] == ["dev"]
    with pytest.raises(DataError, match="somebody/rows has no split 'test': its splits are 'train', 'dev'"):
        read("somebody/rows", split="test")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: 1 / 0)
    with pytest.raises(DataError, match=r"looking it up .*Unknown split 'test'"):
        read("somebody/rows", split="test")


@pytest.mark.parametrize(("asked", "there"), [("train", "Train"), ("training", "train"), ("test", "testing")])
def test_a_name_may_differ_in_case_or_ending(asked: str, there: str) -> None:
    with pytest.warns(DataWarning, match=f"'{there}' is read"):
        assert chosen_split([there, "other"], asked, "data") == there


# --- classes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat/2020/0.png", "cat/2021/0.png", "dog/2020/0.png"], ["cat", "cat", "dog"]),
        (["cat/0.png", "cat/more/deep/1.png", "dog/0.png"], ["cat", "cat", "dog"]),
        (["flowers/images/cat/0.png", "flowers/images/dog/0.png"], ["cat", "dog"]),
        (["a::b/0.png", "c:d/0.png"], ["a::b", "c:d"]),
        (["[x]*?/0.png", "ü y/0.png"], ["[x]*?", "ü y"]),
        (["cat/0.png"], ["cat"]),
        (["cat/0.png", ".git/1.png", "dog/.thumbs/2.png", "dog/__pycache__/3.png", "dog/4.png"], ["cat", "dog"]),
    ],
)
def test_a_class_is_a_folder_with_all_below_it(tmp_path: Path, names: list[str], expected: list[str]) -> None:
    root = tree(tmp_path / "data", names)
    rows = read(root)
    assert labels(rows) == expected
    assert [image.size for image in rows["image"]] == [(4, 4)] * len(expected)


def test_classes_of_a_split_may_be_nested(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", ["train/cat/a/0.png", "train/dog/a/0.png", "test/dog/a/0.png", "test/cat/1.png"])
    assert labels(read(root)) == ["cat", "dog"]
    assert labels(read(root, split="test")) == ["cat", "dog"]


def test_images_beside_class_folders_are_left_out_and_named(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", ["cat/0.png", "dog/0.png", "preview.png"])
    with pytest.warns(DataWarning, match=r"1 of 3 images lie beside the 2 class folders, .*left out: 'preview\.png'"):
        rows = read(root)
    assert found(rows, root) == ["cat/0.png", "dog/0.png"]
    assert labels(rows) == ["cat", "dog"]


def test_images_without_class_folders_have_no_label(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", ["0.png", "more/1.png"])
    rows = read(root)
    assert rows.column_names == ["image"]
    assert found(rows, root) == ["0.png", "more/1.png"]


def test_the_order_is_that_of_datasets(tmp_path: Path) -> None:
    # held-out rows are drawn by place, so that another order would change results
    names = ["b/10.png", "b/9.png", "b-c/0.png", "b c/1.JPG", "B/0.png", "é/0.png"]
    root = tree(tmp_path / "data", names)
    pattern = {"train": [f"{root.resolve()}/**"]}
    theirs = datasets.load_dataset("imagefolder", data_files=pattern, split="train")
    ours = read(root)
    assert found(ours, root) == found(theirs, root)
    assert ours["label"][:] == theirs["label"][:]
    assert ours.features == theirs.features


def test_an_image_that_was_moved_to_another_class_has_the_new_label(tmp_path: Path) -> None:
    root = tree(tmp_path / "data", ["cat/0.png", "cat/1.png", "dog/2.png"])
    assert labels(read(root)) == ["cat", "cat", "dog"]
    (root / "cat" / "1.png").rename(root / "dog" / "1.png")
    assert labels(read(root)) == ["cat", "dog", "dog"]
