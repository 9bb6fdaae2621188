"""Images from files: lists, folders, bad ones; views of training images; a few rows of each class."""

from __future__ import annotations

import io
import json
import os
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from torch.utils.data import DataLoader
from transformers import ConvNextImageProcessor, ViTImageProcessor

from sidestep.data import (
    Augmentation,
    Collate,
    DataError,
    DataWarning,
    Fields,
    ImageTransform,
    encode_images,
    few_shot,
    label_space,
    read,
)
from sidestep.data.images import IMAGES
from sidestep.kinds.prepare import TaskData, prepare
from small_tasks import image_folder, tokenizer, write

FIELDS = Fields(image="image", label="label")
SMALL = ImageTransform(size=8)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture(seed: int = 0, mode: str = "RGB") -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels).convert(mode)


def image_list(folder: Path, names: list[str], labels: list[str], name: str = "train800val200.txt") -> Path:
    """Images and a list of them, as VTAB-1K has it."""
    for seed, file in enumerate(names):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder / file)
    lines = [f"{file} {label}\n" for file, label in zip(names, labels, strict=True)]
    (folder / name).write_text("".join(lines))
    return folder / name


def vtab(folder: Path, count: int = 12) -> Path:
    names = [f"images/train800val200/{place:05}.png" for place in range(count)]
    return image_list(folder, names, [str(place % 3) for place in range(count)])


def paths(rows: Dataset) -> list[str]:
    cells = rows.cast_column("image", Image(decode=False))["image"][:]
    return [Path(cell["path"]).name for cell in cells]


# --- lists ------------------------------------------------------------------------------------------------


def test_a_list_gives_images_and_labels_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read(vtab(tmp_path))
    assert rows.column_names == ["image", "label"]
    assert rows["label"][:4] == ["0", "1", "2", "0"]
    assert np.array_equal(np.asarray(rows[3]["image"]), np.asarray(picture(3)))
    monkeypatch.chdir(tmp_path.parent)
    assert paths(read(Path(tmp_path.name) / "train800val200.txt")) == paths(rows)


def test_labels_of_a_list_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = read(image_list(tmp_path, ["a.png", "b.png", "c.png"], ["10", "2", "-1"]))
    assert label_space(rows, "label", "single").names == ("-1", "2", "10")


def test_paths_may_hold_spaces_and_blank_lines_are_passed_over(tmp_path: Path) -> None:
    path = image_list(tmp_path, ["my photos/a  b.png", "c.png"], ["cat", "dog"])
    path.write_text("\ufeff\n" + path.read_text().replace(" cat", "\t cat ").replace("\n", "\r\n") + "\n\n")
    rows = read(path)
    assert paths(rows) == ["a  b.png", "c.png"]
    assert rows["label"][:] == ["cat", "dog"]


def test_a_path_may_be_absolute(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "all.txt").write_text(f"{tmp_path / 'a.png'} 0\n../a.png 1\n")
    assert [image.size for image in read(tmp_path / "lists" / "all.txt")["image"]] == [(24, 20)] * 2


def refused(path: Path, text: str) -> str:
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


def test_a_list_that_names_missing_images_is_refused_with_the_folder(tmp_path: Path) -> None:
    path = vtab(tmp_path)
    lines = path.read_text() + "".join(f"images/gone{place}.png 1\n" for place in range(7))
    said = refused(path, lines)
    assert "names 7 of 19 images that are not there: 'images/gone0.png', 'images/gone1.png'" in said
    assert f"and 2 more, looked for in {tmp_path.resolve()}: " in said


def test_lines_without_a_label_are_numbered(tmp_path: Path) -> None:
    said = refused(vtab(tmp_path), "images/train800val200/00001.png 1\n\nimages/train800val200/00002.png\n")
    assert "has no label in 1 of 2 lines (line 3)" in said
    assert "one 'path label' a line" in said


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    assert "is empty" in refused(tmp_path / "a.txt", "")
    assert "is empty: give a list with one 'path label' a line" in refused(tmp_path / "a.txt", " \n\n")


# --- folders ----------------------------------------------------------------------------------------------


def test_a_class_folder_without_an_image_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", per_class=2)
    (folder / ".hidden").mkdir()
    (folder / "__MACOSX").mkdir()
    assert len(read(folder)) == 4
    (folder / "grey").mkdir()
    (folder / "grey" / "notes.txt").write_text("no image")
    with pytest.raises(DataError, match="has 1 of 3 class folders without images: 'grey': put images there"):
        read(folder)
    # below the folder of a split too
    os.renames(folder, tmp_path / "all" / "train")
    with pytest.raises(DataError, match="'grey'"):
        read(tmp_path / "all", split="train")


def test_a_class_folder_that_is_a_link_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", per_class=2)
    os.renames(folder / "dark", tmp_path / "elsewhere")
    (folder / "dark").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"1 of 2 class folders .* 'dark': .*links to folders are not followed"):
        read(folder)


def test_a_folder_that_is_no_class_may_lie_beside_images_without_labels(tmp_path: Path) -> None:
    (tmp_path / "data" / "notes").mkdir(parents=True)
    picture().save(tmp_path / "data" / "a.png")
    assert len(read(tmp_path / "data")) == 1
    (tmp_path / "data" / "more").mkdir()
    picture().save(tmp_path / "data" / "more" / "b.png")
    lines = [json.dumps({"file_name": name, "kind": kind}) for name, kind in (("a.png", "x"), ("more/b.png", "y"))]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    assert sorted(read(tmp_path / "data")["kind"]) == ["x", "y"]


# --- images that cannot be read ---------------------------------------------------------------------------


def spoilt(folder: Path) -> Path:
    """Twelve images of which three cannot be read."""
    image_folder(folder, per_class=6)
    (folder / "bright" / "1.png").write_bytes(b"")
    whole = (folder / "dark" / "2.png").read_bytes()
    (folder / "dark" / "2.png").write_bytes(whole[: len(whole) // 2])
    (folder / "dark" / "4.png").write_bytes(b"no image at all")
    return folder


def test_a_file_of_zero_bytes_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    rows = read(spoilt(tmp_path / "data"))
    with pytest.raises(DataError, match=r"1 of 12 images of column 'image' are not there .*bright/1\.png"):
        prepare(rows, rows, FIELDS, SMALL)
    table = Dataset.from_dict({"image": ["gone.png", "gone too.png"], "label": ["a", "b"]})
    with pytest.raises(DataError, match=r"2 of 2 images .* 'gone\.png', 'gone too\.png'\. Replace or drop"):
        prepare(table, table, FIELDS, SMALL)


def test_bad_images_are_left_out_counted_and_named(tmp_path: Path) -> None:
    rows = read(spoilt(tmp_path / "data"))
    with pytest.warns(DataWarning, match=r"3 of 12 images of the rows cannot be read .*bright/1\.png.*dark/2\.png"):
        good = IMAGES.drop_unreadable(rows, "image")
    assert paths(good) == ["0.png", "2.png", "3.png", "4.png", "5.png", "0.png", "1.png", "3.png", "5.png"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert IMAGES.drop_unreadable(good, "image") is good


def test_prepare_leaves_bad_images_out_of_both_parts(tmp_path: Path) -> None:
    rows, dev = read(spoilt(tmp_path / "data")), read(image_folder(tmp_path / "dev", per_class=2))
    with pytest.warns(DataWarning, match="3 of 12 images of the training rows"):
        data = prepare(rows, dev, FIELDS, SMALL, skip_bad_files=True)
    assert (len(data.train), len(data.dev), data.handling["skipped_files"]) == (9, 4, 3)
    assert all(row["pixel_values"].shape == (3, 8, 8) for row in data.train)
    with pytest.warns(DataWarning, match="3 of 12 images of the dev rows"):
        assert len(prepare(dev, rows, FIELDS, SMALL, skip_bad_files=True).dev) == 9


def test_rows_without_a_good_image_are_refused(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"image": [{"bytes": b"x", "path": None}]}, features=Features({"image": Image()}))
    with pytest.raises(DataError, match="none of 1 images of the rows can be read: 'row 1'"):
        IMAGES.drop_unreadable(rows, "image")


def test_images_within_the_rows_need_no_files(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    cells = [{"bytes": buffer.getvalue(), "path": "of a machine far away.png"}] * 4
    features = Features({"image": Image(), "label": Value("string")})
    Dataset.from_dict({"image": cells, "label": ["a", "b"] * 2}, features=features).to_parquet(tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    data = prepare(rows, rows, FIELDS, SMALL, skip_bad_files=True)
    assert torch.equal(data.train[0]["pixel_values"], SMALL(images=[picture()])["pixel_values"][0])


@pytest.mark.parametrize("mode", ["P", "L", "1", "LA", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_read_augmented_or_not(tmp_path: Path, mode: str) -> None:
    image = PIL.Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 160)
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    (image if mode == "I;16" else picture(mode=mode)).save(file)
    rows = Dataset.from_dict({"image": [str(file)]})
    views = Augmentation(views="randaugment", transform=SMALL)
    for augment in (None, views):
        pixels = encode_images(rows, Fields(image="image"), SMALL, None, augment)[0]["pixel_values"]
        assert pixels.shape == (3, 8, 8)
        assert pixels.std() > 0.05  # neither clipped to white nor all black


def test_what_is_for_images_is_refused_for_texts() -> None:
    rows, fields = Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]}), Fields(text="text", label="label")
    for asked in ({"skip_bad_files": True}, {"augment": "flip"}):
        with pytest.raises(DataError, match=r"is for images.*, but a column of text is read: leave --"):
            prepare(rows, rows, fields, tokenizer(pad=True), **asked)


# --- views ------------------------------------------------------------------------------------------------


def prepared(folder: Path, **how: Any) -> TaskData:
    rows = read(folder)
    return prepare(rows, rows, FIELDS, SMALL, **how)


def views_of(data: TaskData, epoch: int = 0) -> torch.Tensor:
    assert data.augment is not None
    data.augment.epoch.number = epoch
    return torch.stack([row["pixel_values"] for row in data.train])


@pytest.mark.parametrize("views", ["flip", "crop", "randaugment"])
def test_views_hang_on_seed_epoch_and_row_alone(tmp_path: Path, views: str) -> None:
    folder = image_folder(tmp_path / "data", per_class=6)
    data = prepared(folder, augment=views, seed=3)
    first = views_of(data)
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    assert torch.equal(views_of(data), first)
    assert torch.equal(views_of(prepared(folder, augment=views, seed=3)), first)
    # one alone, in another order, in a batch
    assert torch.equal(data.train[7]["pixel_values"], first[7])
    assert torch.equal(torch.stack(list(data.train[[4, 2]]["pixel_values"])), first[[4, 2]])
    assert not torch.equal(views_of(data, epoch=1), first)
    assert not torch.equal(views_of(prepared(folder, augment=views, seed=4)), first)
    assert first.shape == (12, 3, 8, 8)


def test_two_rows_of_one_image_have_views_of_their_own(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    rows = Dataset.from_dict({"image": [str(tmp_path / "a.png")] * 4, "label": ["x", "y"] * 2})
    views = views_of(prepare(rows, rows, FIELDS, SMALL, augment="crop"))
    assert all(not torch.equal(views[0], other) for other in views[1:])


@pytest.mark.parametrize("views", ["flip", "crop", "randaugment"])
def test_views_leave_the_global_generators_as_they_were(tmp_path: Path, views: str) -> None:
    data = prepared(image_folder(tmp_path / "data", per_class=2), augment=views)

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = draw()
    seed()
    views_of(data)
    assert draw() == expected


@pytest.mark.parametrize("views", ["flip", "crop", "randaugment"])
def test_dev_rows_are_never_augmented(tmp_path: Path, views: str) -> None:
    folder = image_folder(tmp_path / "data", per_class=3)
    data, plain = prepared(folder, augment=views), prepared(folder)
    for row, other in zip(data.dev, plain.dev, strict=True):
        assert torch.equal(row["pixel_values"], other["pixel_values"])
    assert not torch.equal(views_of(data), torch.stack([row["pixel_values"] for row in plain.train]))
    assert plain.augment is None


def test_a_flip_is_the_image_or_its_mirror_image(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", per_class=6)
    plain = torch.stack([row["pixel_values"] for row in prepared(folder).train])
    found = views_of(prepared(folder, augment="flip"))
    mirrored = [torch.allclose(view, other.flip(-1), atol=0.02) for view, other in zip(found, plain, strict=True)]
    same = [torch.equal(view, other) for view, other in zip(found, plain, strict=True)]
    assert all(one != other for one, other in zip(mirrored, same, strict=True))
    assert 0 < sum(mirrored) < 12


def test_the_transform_of_views_is_that_of_dev(tmp_path: Path) -> None:
    rows = read(image_folder(tmp_path / "data", per_class=2))
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    data = prepare(rows, rows, FIELDS, processor, augment="crop", seed=5)
    expected = ImageTransform(size=8, interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3)
    assert data.processor == data.augment.transform == expected
    assert data.handling == {"augment": "crop", "augment_seed": 5, "transform": expected.to_dict()}
    with pytest.raises(ValueError, match="ConvNextImageProcessor does not just resize"):
        prepare(rows, rows, FIELDS, ConvNextImageProcessor(), augment="crop")
    with pytest.raises(DataError, match="augment='mixup': choose 'none', 'flip', 'crop', 'randaugment'"):
        prepare(rows, rows, FIELDS, processor, augment="mixup")


def test_processes_that_load_data_see_the_epoch(tmp_path: Path) -> None:
    data = prepared(image_folder(tmp_path / "data", per_class=2), augment="crop")
    # as the Trainer's rows: a copy, whose transform has to be the one that is told the epoch
    rows = data.train.remove_columns("labels")
    expected = views_of(data, epoch=2)
    loader = DataLoader(rows, batch_size=4, collate_fn=Collate(), num_workers=1)
    assert torch.equal(next(iter(loader))["pixel_values"], expected)


# --- shots ------------------------------------------------------------------------------------------------


def test_shots_are_so_many_of_each_class_and_the_same_every_time(tmp_path: Path) -> None:
    rows = read(image_folder(tmp_path / "data", per_class=10))
    draws = {}
    for seed in range(3):
        found = few_shot(rows, FIELDS, 4, seed)
        assert found["label"][:] == [0] * 4 + [1] * 4
        draws[seed] = paths(found)
        assert paths(few_shot(rows, FIELDS, 4, seed)) == draws[seed]
        assert set(paths(few_shot(rows, FIELDS, 2, seed))) <= set(draws[seed])
    assert len({tuple(names) for names in draws.values()}) == 3


def test_shots_do_not_hang_on_the_order_of_the_rows_or_where_the_folder_is(tmp_path: Path) -> None:
    first = read(image_folder(tmp_path / "here", per_class=10))
    second = read(image_folder(tmp_path / "there" / "deep", per_class=10)).shuffle(seed=1)
    chosen = [
        sorted(zip(few_shot(rows, FIELDS, 3, 0)["label"], paths(few_shot(rows, FIELDS, 3, 0)), strict=True))
        for rows in (first, second)
    ]
    assert chosen[0] == chosen[1]


def test_shots_of_texts_and_of_images_within_the_rows() -> None:
    rows = Dataset.from_dict({"text": [f"word {place}" for place in range(20)], "label": ["a", "b"] * 10})
    fields = Fields(text="text", label="label")
    found = few_shot(rows, fields, 2, 0)["text"][:]
    assert sorted(found) == sorted(few_shot(rows.shuffle(seed=3), fields, 2, 0)["text"][:])
    buffers = [io.BytesIO() for _ in range(6)]
    for seed, buffer in enumerate(buffers):
        picture(seed).save(buffer, "PNG")
    cells = [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    images = Dataset.from_dict({"image": cells, "label": [0, 1] * 3}, features=features)
    assert few_shot(images, FIELDS, 2, 0)["label"][:].count(1) == 2


def test_a_class_with_fewer_rows_is_named(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", per_class=3)
    (folder / "dark" / "0.png").unlink()
    rows = read(folder)
    with pytest.raises(DataError, match=r"shots=3, but 1 of 2 classes have fewer training rows \('dark' has 2\): "):
        few_shot(rows, FIELDS, 3, 0)
    with pytest.raises(DataError, match="shots=0: choose at least 1"):
        few_shot(rows, FIELDS, 0, 0)
    lists = Dataset.from_dict({"text": ["a"], "label": [["x", "y"]]})
    with pytest.raises(DataError, match="holds lists of labels"):
        few_shot(lists, Fields(text="text", label="label"), 1, 0)


def test_shots_are_drawn_from_what_is_not_held_out(tmp_path: Path) -> None:
    rows = read(image_folder(tmp_path / "data", per_class=10))
    data = prepare(rows, None, FIELDS, SMALL, dev_fraction=0.5, shots=2, shots_seed=7)
    assert (len(data.train), len(data.dev)) == (4, 10)
    assert data.handling == {"shots": 2, "shots_seed": 7, "transform": SMALL.to_dict()}
    dev = {row["pixel_values"].sum().item() for row in data.dev}
    assert not dev & {row["pixel_values"].sum().item() for row in data.train}
    assert prepare(rows, rows, FIELDS, SMALL, shots=2, seed=3).handling["shots_seed"] == 3


def test_a_table_of_paths_works_like_a_list(tmp_path: Path) -> None:
    listed = read(vtab(tmp_path))
    cells = listed.cast_column("image", Image(decode=False))["image"][:]
    table = [{"image": cell["path"], "label": label} for cell, label in zip(cells, listed["label"][:], strict=True)]
    data = [prepare(rows, rows, FIELDS, SMALL) for rows in (listed, read(write(tmp_path / "rows.csv", table)))]
    for one, other in zip(data[0].train, data[1].train, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert one["labels"] == other["labels"]
