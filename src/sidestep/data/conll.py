"""Rows of words and tags as the CoNLL shared tasks write them: a word a line, an empty line behind each sentence."""

from __future__ import annotations

from collections.abc import Iterable

from datasets import Dataset, Features, List, Value

FORM = "CoNLL (a word and its tags a line, sentences apart by an empty line)"
DOCUMENT = "-DOCSTART-"
"""Begins a document, and is no word."""
FEATURES = Features({"tokens": List(Value("string")), "tags": List(Value("string"))})


def read_conll(lines: Iterable[str]) -> Dataset:
    """A row for each sentence, with its "tokens" (the first column) and "tags" (the last one).

    Columns are apart by tabs, where a line has any, else by spaces.

    Raises:
        ValueError: for a line with another number of columns than the first. It names the line.
    """
    sentences: list[list[list[str]]] = [[]]
    width = None
    for number, line in enumerate(lines, 1):
        cells = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        if not any(cell.strip() for cell in cells):
            sentences.append([])
            continue
        width = width or len(cells)
        if len(cells) != width or width < 2:
            raise ValueError(
                f"line {number} has {len(cells)} columns, where the first one has {width}: a word and tags"
            )
        if cells[0] != DOCUMENT:
            sentences[-1].append(cells)
    rows = [sentence for sentence in sentences if sentence]
    columns = {name: [[cells[place] for cells in row] for row in rows] for name, place in (("tokens", 0), ("tags", -1))}
    return Dataset.from_dict(columns, features=FEATURES)
