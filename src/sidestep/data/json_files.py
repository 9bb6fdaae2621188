"""Rows of json: a list of objects, or one object after the other.

Differs from `datasets.load_dataset("json")`: that reader (arrow, pandas) turns texts that look like dates into dates,
and rounds large whole numbers. Here a text stays the text it is. Whole numbers that no type holds exactly become text.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, Value

FORM = "json (a list of objects, or one object a line)"
WHOLE = range(-(2**63), 2**63)
"""What int64 holds."""
EXACT = 2**53
"""Up to here float64 holds every whole number."""
MIXED = getattr(datasets, "Json", None)
"""The type of cells of several types; releases of `datasets` before 4.7 have none."""


def read_json(text: str) -> Dataset:
    """The rows of a file's text, where a key that an object lacks is None.

    Raises:
        ValueError: for what is no json, or no objects.
    """
    rows = _rows(list(_values(text)))
    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        raise ValueError("no rows")
    columns = {name: [row.get(name) for row in rows] for name in names}
    features = {name: _feature(cells) for name, cells in columns.items()}
    for name, feature in features.items():
        if feature == Value("string"):
            columns[name] = [_text(cell) for cell in columns[name]]
    return Dataset.from_dict(columns, features=Features(features))


def _values(text: str) -> Iterator[Any]:
    decoder, place = json.JSONDecoder(), _next(text, 0)
    while place < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        yield value
        place = _next(text, place)


def _next(text: str, place: int) -> int:
    """Where the next value begins."""
    while text[place : place + 1] in (" ", "\t", "\n", "\r"):
        place += 1
    return place


def _rows(values: list[Any]) -> Sequence[Mapping[str, Any]]:
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
        if values and all(isinstance(value, str) for value in values):
            return [{"text": value} for value in values]
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise ValueError(f"value {number} is {json.dumps(value)[:40]}, not an object")
    return values


def _feature(cells: Sequence[Any]) -> Any:
    """The type that gives the cells back as they were."""
    kinds = {type(cell) for cell in cells if cell is not None}
    if kinds == {int} and all(cell in WHOLE for cell in cells if cell is not None):
        return Value("int64")
    if kinds in ({float}, {int, float}) and all(abs(cell) <= EXACT for cell in cells if type(cell) is int):
        return Value("float64")
    if kinds <= {int, float, str} and (str not in kinds or len(kinds) == 1):
        return Value("string") if kinds else Value("null")
    return Value("bool") if kinds == {bool} else _nested(cells)


def _nested(cells: Sequence[Any]) -> Any:
    """The type of lists and objects that are of one form, else the one of cells of several types."""
    try:
        found = pa.array(cells)
    except (pa.ArrowException, ValueError, OverflowError):
        return _mixed(cells)
    if found.to_pylist() != list(cells):
        return _mixed(cells)
    return Features.from_arrow_schema(pa.schema([("cells", found.type)]))["cells"]


def _mixed(cells: Sequence[Any]) -> Any:
    if MIXED is None:
        return Value("string")
    # it rounds decimal numbers to ten digits
    kept = Dataset.from_dict({"cells": cells}, features=Features({"cells": MIXED()}))["cells"][:]
    return MIXED() if kept == list(cells) else Value("string")


def _text(cell: Any) -> str | None:
    """A cell as json writes it, but a text as it is."""
    return cell if cell is None or isinstance(cell, str) else json.dumps(cell, ensure_ascii=False)
