"""Cells are what the file holds: no reader, cache or writer changes a value."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, List, Value

from sidestep.data import DataError, DataWarning, Fields, check_fields, label_space, read
from sidestep.data.pairs import captioned
from sidestep.disk.table_files import ENDINGS, write_table

TEXTS = ["2020-01-01", "2020-01-01T10:00:00Z", "12:30", "007", "1.50", "1e5", "NA", "null", "true", "", " x ", "9" * 30]
IDS = [2**53 + 1, -(2**53) - 1, 2**63 - 1, 0]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def put_json(path: Path, columns: dict[str, list[Any]]) -> None:
    path.write_text(json.dumps(objects(columns)))


def put_lines(path: Path, columns: dict[str, list[Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, objects(columns))))


def put_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    pq.write_table(pa.table(columns), path)


def put_csv(path: Path, columns: dict[str, list[Any]]) -> None:
    Dataset.from_dict(columns).to_csv(path, index=False)


def objects(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


FORMATS: dict[str, Callable[[Path, dict[str, list[Any]]], None]] = {
    ".json": put_json,
    ".jsonl": put_lines,
    ".parquet": put_parquet,
}


# --- files that were replaced -----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [*FORMATS, ".csv"])
def test_a_file_that_was_replaced_is_read_again_whatever_its_time_and_size(tmp_path: Path, ending: str) -> None:
    path, put = tmp_path / f"a{ending}", (FORMATS | {".csv": put_csv})[ending]
    sizes = []
    for texts in (["old"], ["new"], ["old"]):
        put(path, {"text": texts})
        os.utime(path, (1_700_000_000, 1_700_000_000))
        sizes.append(path.stat().st_size)
        assert read(path)["text"][:] == texts
    assert len(set(sizes)) == 1


def test_rows_that_were_read_stay_when_their_file_is_replaced(tmp_path: Path) -> None:
    put_parquet(tmp_path / "a.parquet", {"text": ["old"]})
    before = read(tmp_path / "a.parquet")
    put_parquet(tmp_path / "a.parquet", {"text": ["new"]})
    assert read(tmp_path / "a.parquet")["text"][:] == ["new"]
    assert before["text"][:] == ["old"]


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", FORMATS)
def test_texts_stay_texts(tmp_path: Path, ending: str) -> None:
    # each alone: a reader looks at the whole column
    columns = {f"c{place}": [text, text] for place, text in enumerate(TEXTS)}
    FORMATS[ending](tmp_path / f"a{ending}", columns)
    rows = read(tmp_path / f"a{ending}")
    assert rows[:] == columns
    assert all(feature == Value("string") for feature in rows.features.values())


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("missing", [[], [None]])
def test_large_whole_numbers_are_exact_beside_missing_ones(tmp_path: Path, ending: str, missing: list[None]) -> None:
    FORMATS[ending](tmp_path / f"a{ending}", {"id": [*IDS, *missing]})
    assert read(tmp_path / f"a{ending}")["id"][:] == [*IDS, *missing]


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([2**64, 1], [str(2**64), "1"]),
        ([-(2**63) - 1, None], [str(-(2**63) - 1), None]),
        ([2**53 + 1, 0.5], [str(2**53 + 1), "0.5"]),
        ([1, 0.5, None], [1.0, 0.5, None]),
        ([True, None], [True, None]),
        ([None, None], [None, None]),
    ],
)
def test_numbers_of_json_are_exact_or_text(tmp_path: Path, cells: list[Any], expected: list[Any]) -> None:
    put_json(tmp_path / "a.json", {"text": ["a"] * len(cells), "x": cells})
    found = read(tmp_path / "a.json")["x"][:]
    assert found == expected
    assert list(map(type, found)) == list(map(type, expected))


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="older datasets have no column of several types: text")
@pytest.mark.parametrize(
    "cells",
    [[1, "x"], [True, 1], [[1], ["x"]], [{"b": 1}, {"c": "2020-01-01"}], [["2020-01-01"], []], [{"b": "007"}] * 2],
)
def test_lists_objects_and_mixed_cells_of_json_stay_as_they_are(tmp_path: Path, cells: list[Any]) -> None:
    put_lines(tmp_path / "a.jsonl", {"text": ["a", "b"], "x": cells})
    found = read(tmp_path / "a.jsonl")["x"][:]
    assert json.dumps(found) == json.dumps(cells)


@pytest.mark.parametrize("cells", [[1 / 3, "x"], [{"b": 1 / 3}, {"c": 1}], [2**70, "x"], [[2**70], ["x"]]])
def test_mixed_cells_that_no_type_keeps_are_text(tmp_path: Path, cells: list[Any]) -> None:
    put_lines(tmp_path / "a.jsonl", {"text": ["a", "b"], "x": cells})
    assert read(tmp_path / "a.jsonl")["x"][:] == [cell if isinstance(cell, str) else json.dumps(cell) for cell in cells]


def test_json_may_be_indented_and_lack_keys(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{\n "text": "a",\n "n": 1\n}\n\n{"text": "b", "m": ["x"]}\n')
    assert read(path)[:] == {"text": ["a", "b"], "n": [1, None], "m": [None, ["x"]]}
    path.write_text('["a", "b"]')
    assert read(path)[:] == {"text": ["a", "b"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1}\n{"a": ', "line 2 column 7"),
        ('{"a": 1}\n[1]', "value 2 is [1], not an object"),
        ("[1, 2]", "value 1 is 1, not an object"),
        ("[{}]", "no rows"),
        ("[]", "no rows"),
        ('{"a": "\\ud83d"}', "surrogates not allowed"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_list_of_objects_is_refused_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"cannot be read as json \(a list of objects") as caught:
        read(tmp_path / "a.json")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_any_texts_of_arrow_are_texts_and_labels(tmp_path: Path, kind: pa.DataType) -> None:
    table = pa.table({"text": pa.array(["a", "b"]).cast(kind), "label": pa.array(["x", "007"]).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    check_fields(rows, Fields(text="text", label="label"))
    assert rows["text"][:] == ["a", "b"]
    assert label_space(rows, "label", "single").names == ("007", "x")
    rows.to_parquet(tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet")[:] == rows[:]


def test_texts_within_lists_and_objects_may_be_views(tmp_path: Path) -> None:
    lists, inner = pa.array([["x", "y"], []], pa.list_(pa.string_view())), pa.struct([("b", pa.string_view())])
    table = pa.table({"label": lists, "more": pa.array([{"b": "x"}, None], inner)})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert rows.features["label"] == List(Value("string"))
    assert rows[:] == {"label": [["x", "y"], []], "more": [{"b": "x"}, None]}
    assert label_space(rows, "label", "multi").names == ("x", "y")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view()])
def test_paths_and_captions_may_be_any_texts_of_arrow(tmp_path: Path, kind: pa.DataType) -> None:
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    table = pa.table({"image": pa.array([str(tmp_path / "a.png")]).cast(kind), "text": pa.array(["one"]).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    assert captioned(read(tmp_path / "a.parquet"), Fields(image="image", text="text"))["text"][:] == [["one"]]


# --- metadata of images -----------------------------------------------------------------------------------


def images(root: Path, names: list[str]) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4, 4)).save(root / name)
    return root


def test_metadata_keep_their_values_and_may_be_replaced(tmp_path: Path) -> None:
    root = images(tmp_path / "a::b", ["0.png", "more/1.png"])
    for label in ("007", "008"):
        (root / "metadata.csv").write_text(f"file_name,label,day\n0.png,{label},2020-01-01\nmore/1.png,NA,\n")
        os.utime(root / "metadata.csv", (1, 1))
        rows = read(root)
        assert rows.column_names == ["image", "label", "day"]
        assert rows["label"][:] == [label, "NA"]
        assert rows["day"][:] == ["2020-01-01", ""]
        assert [image.size for image in rows["image"]] == [(4, 4)] * 2


def test_images_without_metadata_are_left_out_and_named(tmp_path: Path) -> None:
    root = images(tmp_path / "data", ["0.png", "more/1.png", "more/2.png"])
    (root / "metadata.csv").write_text("file_name,kind\nmore/../0.png,x\nmore/1.png,y\n")
    with pytest.warns(DataWarning, match=r"1 of 3 images stand in no metadata file and were left out: 'more/2\.png'"):
        assert read(root)["kind"][:] == ["x", "y"]


def test_names_of_metadata_begin_at_their_folder(tmp_path: Path) -> None:
    root = images(tmp_path / "data", ["a/0.png", "b/0.png"])
    for name in ("a", "b"):
        (root / name / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "kind": name}))
    assert read(root)["kind"][:] == ["a", "b"]
    (root / "b" / "metadata.jsonl").write_text('{"file_name": "0.png", "other": "x"}')
    with pytest.raises(DataError, match="have different columns"):
        read(root)
    (root / "b" / "metadata.jsonl").write_text('{"file_name": "gone.png", "kind": "b"}')
    with pytest.raises(DataError, match=r"names 1 of 1 images that are not there: .*gone\.png"):
        read(root)
    (root / "b" / "metadata.jsonl").write_text('{"name": "0.png"}')
    with pytest.raises(DataError, match="has no column 'file_name' of texts, but 'name'"):
        read(root)


# --- written back -----------------------------------------------------------------------------------------

CELLS = {"text": [*TEXTS, "a\rb", "a\nb", 'say "x", y', "a\tb", "\u2028", "ü"]}


@pytest.mark.parametrize("ending", ENDINGS)
def test_texts_are_written_as_they_were_read(tmp_path: Path, ending: str) -> None:
    write_table(Dataset.from_dict(CELLS), tmp_path / f"a{ending}")
    assert read(tmp_path / f"a{ending}")["text"][:] == CELLS["text"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_numbers_are_written_as_they_were_read(tmp_path: Path, ending: str) -> None:
    columns = {"id": [*IDS, None], "x": [0.1, 1e-300, 1 / 3, None, float("nan")], "t": [True, False, None, True, True]}
    write_table(Dataset.from_dict(columns), tmp_path / f"a{ending}")
    rows = read(tmp_path / f"a{ending}")
    if ending in (".csv", ".tsv"):
        assert rows["id"][:] == [*map(str, IDS), ""]
        assert rows["x"][:] == ["0.1", "1e-300", str(1 / 3), "", ""]
        assert rows["t"][:] == ["True", "False", "", "True", "True"]
    else:
        assert rows["id"][:] == columns["id"]
        assert rows["x"][:4] == columns["x"][:4]
        assert rows["t"][:] == columns["t"]


def test_lists_and_dates_are_cells_of_a_table(tmp_path: Path) -> None:
    columns = {"label": [["a", "ü"], []], "day": [datetime.date(2020, 1, 2), None]}
    write_table(Dataset.from_dict(columns), tmp_path / "a.csv")
    assert read(tmp_path / "a.csv")[:] == {"label": ['["a", "ü"]', "[]"], "day": ["2020-01-02", ""]}
