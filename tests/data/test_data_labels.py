"""Labels that look alike, are left out by the loss, or stand in files of wide characters."""

from __future__ import annotations

import codecs
import gzip
import json
import warnings
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features

from sidestep.data import (
    Collate,
    CollateWritten,
    DataError,
    DataWarning,
    TableOptions,
    holdout_whole,
    label_space,
    read,
)
from sidestep.data.encode import refuse_ignored
from small_tasks import tokenizer

# --- labels that look alike -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cells", "said"),
    [
        ("single", ["good", "Good", "bad"], "'Good' and 'good'"),
        ("single", ["good", "good ", " good", "bad"], "' good' and 'good' and 'good '"),
        ("single", ["not good", "notgood", "not  good"], "'not  good' and 'not good' and 'notgood'"),
        ("single", ["a", "A", "b", "B\t"], r"'A' and 'a', 'B\\t' and 'b'"),
        ("single", ["straße", "STRASSE"], "'STRASSE' and 'straße'"),
        ("multi", ["a|b", "A|c"], "'A' and 'a'"),
        ("multi", [["a "], ["a", "b"]], "'a' and 'a '"),
    ],
)
def test_labels_that_differ_by_spaces_or_case_only_are_named(kind: str, cells: list[object], said: str) -> None:
    rows = Dataset.from_dict({"label": cells})
    with pytest.warns(
        DataWarning, match="column 'label' holds labels that differ by spaces or upper and lower"
    ) as caught:
        space = label_space(rows, "label", kind)
    assert f"case only: {said}. They are classes of their own" in str(caught[0].message).replace("\\t", r"\\t")
    assert len(caught) == 1
    assert space.encode(rows, "label")


def test_names_of_a_class_label_column_are_compared_too() -> None:
    features = Features({"label": ClassLabel(names=["Cat", "cat", "dog"])})
    with pytest.warns(DataWarning, match="'Cat' and 'cat'"):
        label_space(Dataset.from_dict({"label": [0, 1]}, features=features), "label", "single")


@pytest.mark.parametrize("cells", [["a", "b"], ["1", "1.0", "-1"], ["a-b", "ab"], ["é", "e"], [1, 2]])
def test_other_labels_are_not_warned_of(cells: list[object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label_space(Dataset.from_dict({"label": cells}), "label", "single")


# --- labels that the loss leaves out ----------------------------------------------------------------------


def test_rows_whose_label_the_loss_leaves_out_have_none() -> None:
    rows = Dataset.from_dict({"label": [0, -100, 1, -1]})
    with pytest.raises(DataError, match=r"has no label in 1 of 4 rows, row 2 \(the first is 1\)"):
        label_space(rows, "label", "single")
    with pytest.raises(DataError, match="has no label in 2 of 2 rows"):
        label_space(Dataset.from_dict({"label": [-100, -100]}), "label", "single")
    with pytest.raises(DataError, match="has no label in 1 of 2 rows"):
        label_space(Dataset.from_dict({"label": [[-100], [1, 2]]}), "label", "multi")
    # a number to predict
    assert label_space(rows, "label", "regress").encode(rows, "label") == [0.0, -100.0, 1.0, -1.0]


def test_a_batch_of_labels_that_the_loss_leaves_out_is_an_error() -> None:
    rows = [{"pixel_values": [0.0], "labels": label} for label in (-100, -100)]
    with pytest.raises(DataError, match="all 2 labels of a batch are -100, which the loss leaves out"):
        Collate()(rows)
    rows[1]["labels"] = 0
    assert Collate()(rows)["labels"].tolist() == [-100, 0]
    numbers = [{"pixel_values": [0.0], "labels": -100.0}]
    assert Collate()(numbers)["labels"].tolist() == [-100.0]


@pytest.mark.parametrize("kind", ["lm", "text2text"])
def test_a_batch_of_targets_that_the_loss_leaves_out_is_an_error(kind: str) -> None:
    collate = CollateWritten(tokenizer(pad=True), kind=kind)
    rows = [{"input_ids": [1, 2], "labels": [-100, -100]}, {"input_ids": [1], "labels": [-100]}]
    with pytest.raises(DataError, match="all 3 labels of a batch are -100"):
        collate(rows)
    rows[1]["labels"] = [4]
    assert collate(rows)["labels"].max() == 4
    refuse_ignored([])


# --- files of wide characters -----------------------------------------------------------------------------

CSV, LINES = "text,label\ncrème,1\n日本語,0\n", '{"text": "crème", "label": "1"}\n{"text": "日本語", "label": "0"}\n'
EXPECTED = {"text": ["crème", "日本語"], "label": ["1", "0"]}
MARKED = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
MARKS = {
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


def put(path: Path, text: str, encoding: str, *, marked: bool = True) -> Path:
    content = (MARKS.get(encoding, b"") if marked else b"") + text.encode(encoding)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize(("name", "text"), [("a.csv", CSV), ("a.jsonl", LINES), ("a.csv.gz", CSV), ("a.json", LINES)])
@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("given", ["utf-8", "latin-1"])
def test_the_error_names_the_encoding_and_following_it_works(
    tmp_path: Path, name: str, text: str, encoding: str, marked: bool, given: str
) -> None:
    path = put(tmp_path / name, text, encoding, marked=marked)
    with pytest.raises(DataError, match=rf"is not {given}, but utf-\S+: give that as its encoding") as caught:
        read(path, TableOptions(encoding=given))
    named = str(caught.value).split("--encoding ")[1].rstrip(")")
    assert read(path, TableOptions(encoding=named))[:] == EXPECTED
    # the exact name works too, and does not make the mark a part of the first name
    assert read(path, TableOptions(encoding=encoding))[:] == EXPECTED


def test_a_list_of_images_may_have_wide_characters(tmp_path: Path) -> None:
    path = put(tmp_path / "a.txt", "gone.png 1\n", "utf-16")
    with pytest.raises(DataError, match="but utf-16"):
        read(path)
    with pytest.raises(DataError, match=r"images that are not there: 'gone\.png'"):
        read(path, TableOptions(encoding="utf-16"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le"])
def test_a_file_of_single_bytes_is_not_taken_for_wide(tmp_path: Path, encoding: str) -> None:
    path = put(tmp_path / "a.csv", "text,label\nabcd,1\nx,y\n", "utf-8")
    with pytest.raises(DataError):
        read(path, TableOptions(encoding=encoding))


def test_a_zero_byte_in_a_text_is_no_encoding(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label\n" + b"some words here,1\n" * 50 + b"a\0b,1\n")
    assert read(path)["text"][50] == "a\0b"
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({"text": "a\0b"}))
    assert read(lines)["text"][:] == ["a\0b"]


# --- held-out rows that belong together --------------------------------------------------------------------


def test_rows_with_the_same_cell_are_held_out_together() -> None:
    rows = Dataset.from_dict({"context": [f"text {number % 10}" for number in range(40)], "row": list(range(40))})
    train, dev = holdout_whole(rows, "context", 0.2, seed=3)
    assert len(set(dev["context"][:])) == 2
    assert not set(train["context"][:]) & set(dev["context"][:])
    assert sorted(train["row"][:] + dev["row"][:]) == list(range(40))
    assert train["row"][:] == sorted(train["row"][:])
    assert holdout_whole(rows, "context", 0.2, seed=3)[1]["row"][:] == dev["row"][:]


@pytest.mark.parametrize(
    ("fraction", "cells", "says"), [(0.1, ["a", "a"], "2 rows with 1 different cells in 'text'"), (1.5, ["a"], "=1.5")]
)
def test_what_cannot_be_divided_is_said(fraction: float, cells: list[str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        holdout_whole(Dataset.from_dict({"text": cells}), "text", fraction, seed=0)
