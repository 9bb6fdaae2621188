"""Rows written to csv, tsv, json, jsonl and parquet files, in one step."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset

from sidestep.data import DataError
from sidestep.disk.atomic import check_file, whole

DIGITS = 4
"""After the point, of a share in a csv or tsv file."""


def write_table(rows: Dataset, path: Path, *, shares: Collection[str] = (), overwrite: bool = False) -> None:
    """Write rows to a .csv, .tsv, .json, .jsonl or .parquet file, in one step.

    Args:
        rows: to write.
        path: of the file.
        shares: columns of probabilities, which a csv or tsv file has with `DIGITS` digits. Other files have them whole.
        overwrite: whether a file that is there is replaced.

    Raises:
        DataError: if the file exists already, or ends in something else.
        OutputError: if it cannot be written.
    """
    check_table(path, overwrite=overwrite)
    ending = path.suffix.lower()
    with whole(path) as beside:
        if ending in DELIMITERS:
            _write_csv(rows, beside, DELIMITERS[ending], shares)
        else:
            WRITERS[ending](rows, beside)


def check_table(path: Path, *, overwrite: bool) -> None:
    """Refuses a file that `write_table` would refuse.

    Raises:
        DataError: if the file exists already, or ends in something unknown.
        OutputError: if it could not be written.
    """
    check_file(path)
    if path.suffix.lower() not in ENDINGS:
        raise DataError(f"{path} ends in {path.suffix!r}: choose a file that ends in {', '.join(ENDINGS)}")
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists already: choose another file, or replace it with --overwrite")


def _write_json(rows: Dataset, path: Path) -> None:
    # not `to_json`, which rounds numbers
    text = json.dumps(list(rows), indent=1, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _write_lines(rows: Dataset, path: Path) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _write_csv(rows: Dataset, path: Path, delimiter: str, shares: Collection[str]) -> None:
    # not `to_csv`, whose reader (pandas) turns whole numbers beside a missing one into decimal ones
    with open(path, "w", encoding="utf-8", newline="") as file:
        # a line end of two characters, so that a cell with either of them is put in quotes
        writer = csv.writer(_Lines(file), delimiter=delimiter, lineterminator="\r\n")
        writer.writerow(rows.column_names)
        writer.writerows([_cell(value, name in shares) for name, value in row.items()] for row in rows)


def _cell(value: Any, share: bool) -> str:
    """A value as the text of one cell, which is empty for None and for NaN."""
    if value is None or value != value:
        return ""
    if share and isinstance(value, float):
        return f"{value:.{DIGITS}f}"
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)


@dataclass
class _Lines:
    """Writes lines that end in one character."""

    file: TextIO

    def write(self, line: str) -> int:
        return self.file.write(line.removesuffix("\r\n") + "\n")


DELIMITERS = {".csv": ",", ".tsv": "\t"}
WRITERS: dict[str, Callable[[Dataset, Path], object]] = {
    ".json": _write_json,
    ".jsonl": _write_lines,
    ".parquet": lambda rows, path: rows.to_parquet(str(path)),
}
ENDINGS = (*DELIMITERS, *WRITERS)
