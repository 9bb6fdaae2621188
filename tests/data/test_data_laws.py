"""What is read of a table equals what was written into it, whatever its cells are."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sidestep.data import DataError, TableOptions, read
from sidestep.disk.table_files import ENDINGS, write_table

Columns = dict[str, list[Any]]
SEPARATORS = {".csv": ",", ".tsv": "\t"}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
#: What readers are known to change, and what separates cells, rows and files.
ODD = ("007", "NA", "null", "nan", "", " a ", "1e5", "=1+1", "2024-01-02", '"', '""', ",", "a\tb", "\n", "a\rb", "\r\n")
MARK = "\ufeff"

letters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])  # arrow's names end at a zero byte
texts = st.text(letters) | st.sampled_from((*ODD, MARK, "\x85", "\u2028", "\x1a"))
fewer = settings(max_examples=settings().max_examples // 4)  # a dataset takes long to make


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "cache")
        yield place


@st.composite
def tables(draw: st.DrawFn, *kinds: st.SearchStrategy[Any], least: int = 1) -> Columns:
    """Columns of cells, each column of one kind; a name has no tab, by which a .csv may be taken for a .tsv."""
    names = draw(
        st.lists(texts.filter(lambda name: name and "\t" not in name), min_size=least, max_size=4, unique=True)
    )
    assume(not names[0].startswith(MARK))  # which would be the file's
    rows = draw(st.integers(1, 6))
    return {name: draw(st.lists(draw(st.sampled_from(kinds)), min_size=rows, max_size=rows)) for name in names}


def objects(columns: Columns) -> list[dict[str, Any]]:
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def put(path: Path, columns: Columns, encoding: str = "utf-8", **how: Any) -> None:
    """Write a table as Python's own writer does."""
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=SEPARATORS[path.suffix], **how)
        writer.writerows([list(columns), *zip(*columns.values(), strict=True)])


@fewer
@given(tables(texts), st.sampled_from(list(SEPARATORS)), st.sampled_from(({}, {"quoting": csv.QUOTE_ALL})))
def test_the_cells_of_a_table_are_the_texts_that_were_written(
    place: Path, columns: Columns, suffix: str, how: dict[str, Any]
) -> None:
    put(place / f"a{suffix}", columns, **how)
    assert read(place / f"a{suffix}").to_dict() == columns


@fewer
@given(tables(st.text(st.characters(exclude_characters="\0\t\r\n", exclude_categories=["Cs"])), least=2))
def test_so_are_those_of_a_table_without_header_and_quotes(place: Path, columns: Columns) -> None:
    lines = ["\t".join(cells) for cells in zip(*columns.values(), strict=True)]
    assume(not lines[0].startswith(MARK))
    (place / "a.tsv").write_text("\n".join(lines), encoding="utf-8", newline="")
    rows = read(place / "a.tsv", TableOptions(columns=tuple(columns), header=False, quoting=False))
    assert rows.to_dict() == columns


@fewer
@given(tables(texts), st.sampled_from(ENCODINGS))
def test_an_encoding_that_is_named_reads_the_file_and_one_that_a_message_names_too(
    place: Path, columns: Columns, encoding: str
) -> None:
    put(place / "a.csv", columns, encoding)
    assert read(place / "a.csv", TableOptions(encoding=encoding)).to_dict() == columns
    try:
        found = read(place / "a.csv")
    except DataError as error:
        if (named := re.search(r"give that as its encoding \(--encoding (\S+)\)", str(error))) is None:
            return  # another encoding of Python's is only supposed
        found = read(place / "a.csv", TableOptions(encoding=named[1]))
    assert found.to_dict() == columns


@fewer
@given(tables(texts), st.sampled_from(list(ENDINGS)))
def test_texts_are_written_as_they_were_read(place: Path, columns: Columns, suffix: str) -> None:
    write_table(Dataset.from_dict(columns), place / f"a{suffix}", overwrite=True)
    assert read(place / f"a{suffix}").to_dict() == columns


# --- cells with types --------------------------------------------------------------------------------------

whole = st.integers(-(2**63), 2**63 - 1)
plain = (whole, st.floats(allow_nan=False), st.booleans(), texts)
kinds = [kind | st.none() for kind in (*plain, *(st.lists(kind, max_size=3) for kind in plain))]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


def put_json(path: Path, columns: Columns) -> None:
    rows = objects(columns)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))


@fewer
@given(tables(*kinds), st.sampled_from((".json", ".jsonl", ".parquet")), st.booleans())
def test_cells_of_one_type_are_what_was_written(place: Path, columns: Columns, suffix: str, ours: bool) -> None:
    path = place / f"b{suffix}"
    if ours:
        write_table(Dataset.from_dict(columns), path, overwrite=True)
    elif suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    else:
        put_json(path, columns)
    assert repr(read(path).to_dict()) == repr(columns)  # where True is not 1, nor 1 1.0


def told_apart(value: Any) -> Any:
    """A value in which True is not 1; whole numbers may be decimal ones where they are as large."""
    if isinstance(value, list):
        return list(map(told_apart, value))
    if isinstance(value, dict):
        return {key: told_apart(inner) for key, inner in value.items()}
    return repr(value) if isinstance(value, bool) else value


@fewer
@given(st.lists(json_values, min_size=1, max_size=4), st.sampled_from((".json", ".jsonl")))
def test_any_cells_of_json_stay_or_are_all_its_text(place: Path, cells: list[Any], suffix: str) -> None:
    put_json(place / f"c{suffix}", {"a": ["x"] * len(cells), "b": cells})
    found = read(place / f"c{suffix}")["b"][:]
    as_text = [
        cell if cell is None or isinstance(cell, str) else json.dumps(cell, ensure_ascii=False) for cell in cells
    ]
    assert told_apart(found) in (told_apart(cells), as_text)
