"""Texts whose words have tags: rows of words and tags, or of a text and spans of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, LargeList, List, Value
from torch.nn.utils.rnn import pad_sequence

from sidestep.data.encode import Collate, Fields, refuse_ignored
from sidestep.data.labels import LabelSpace
from sidestep.data.media import TEXT_TYPES
from sidestep.data.messages import DataError, DataWarning, listed, named_rows
from sidestep.data.tables import check_column
from sidestep.data.windows import OFFSETS, ROW, Owned, Place, Windows
from sidestep.metrics import IGNORED

OUTSIDE = "O"
"""The tag of a word that belongs to nothing."""
WORDS, PLACES, STARTS, ENDS, TAGS = "words", "places", "starts", "ends", "tags"
"""Columns of windows, of the words that a window answers for: the number of each, the number of its token (-1: it has
none), where it begins and ends in the text, and the number of its tag (-100: it has none)."""
TEXT, SPLIT = "text", "split"
"""The text of a window's row, and whether that came as a list of words."""
WORD = re.compile(r"\w+|[^\w\s]")
"""A word of a text that is not in words: letters and digits, or a single other character."""
NAMES = {"start": ("start", "begin", "start_offset"), "end": ("end", "end_offset", "stop")}
TYPES = ("label", "type", "entity", "entity_group", "tag", "class")
"""The keys by which spans are known: the first that a span has."""


@dataclass(frozen=True)
class Texts:
    """Rows as texts with the places of their words.

    Attributes:
        texts: one a row. Words that came as a list are joined by a space.
        words: the place of each word of each row.
        split: whether rows came as lists of words.
    """

    texts: Sequence[str]
    words: Sequence[Sequence[Place]]
    split: bool

    @classmethod
    def of(cls, rows: Dataset, column: str) -> Texts:
        """The texts of a column of lists of words, or of texts.

        Raises:
            DataError: for another column, and missing cells. It names the rows.
        """
        check_column(rows, column)
        feature, cells = rows.features[column], rows.with_format(None)[column][:]
        split = isinstance(feature, List | LargeList)
        kind = feature.feature if split else feature
        if not (isinstance(kind, Value) and kind.dtype in (*TEXT_TYPES, "null")):
            raise DataError(
                f"column {column!r} holds {feature}: name a column of texts, or of lists of words. Columns are "
                f"{listed(rows.column_names)}"
            )
        bare = [row for row, cell in enumerate(cells) if cell is None or (split and None in cell)]
        if bare:
            raise DataError(f"column {column!r} has no text in {named_rows(bare)}: fill or drop these rows")
        if not split:
            return cls(cells, [[match.span() for match in WORD.finditer(text)] for text in cells], split=False)
        words: list[list[Place]] = []
        for cell in cells:
            start, places = 0, []
            for word in cell:
                places.append((start, start + len(word)))
                start += len(word) + 1
            words.append(places)
        return cls([" ".join(cell) for cell in cells], words, split=True)

    def tags(self, rows: Dataset, column: str, *, tell: bool = True) -> list[list[str | None]]:
        """The tag of each word of each row, by its list or by spans of its text. None: without a label.

        With `tell` False there is no warning.

        Raises:
            DataError: for another column, a number of tags that is not that of the words, spans outside of their text
                or over each other. It names the rows.

        Warns:
            DataWarning: if spans begin or end within words, with their number.
        """
        if self.split:
            tags = tags_of(rows, column)
            odd = [row for row, (own, words) in enumerate(zip(tags, self.words, strict=True)) if len(own) != len(words)]
            if odd:
                told = f"{len(self.words[odd[0]])} words and {len(tags[odd[0]])} tags in row {odd[0] + 1}"
                raise DataError(
                    f"column {column!r} has another number of tags than there are words in {len(odd)} of {len(tags)} "
                    f"rows, {named_rows(odd)} ({told}): give each word one tag"
                )
            return tags
        return _from_spans(rows, column, self, tell=tell)


def tags_of(rows: Dataset, column: str) -> list[list[str | None]]:
    """The tags of rows in words, by name. None where a word has no label (None, -100).

    Raises:
        DataError: for another column, and rows without a list. It names the rows.
    """
    check_column(rows, column)
    feature, cells = rows.features[column], rows.with_format(None)[column][:]
    if not isinstance(feature, List | LargeList):
        raise DataError(f"column {column!r} holds {feature}: name a column of lists of tags, one for each word")
    missing = [row for row, cell in enumerate(cells) if cell is None]
    if missing:
        raise DataError(f"column {column!r} has no tags in {named_rows(missing)}: label or drop these rows")
    element = feature.feature
    if not isinstance(element, ClassLabel | Value) or element.dtype.startswith("float"):
        raise DataError(f"column {column!r} holds lists of {element}: name a column of lists of tags")
    return [[_tag(tag, element) for tag in cell] for cell in cells]


def _tag(cell: Any, element: Any) -> str | None:
    if cell is None or cell == IGNORED or cell == "":
        return None
    return element.int2str(cell) if isinstance(element, ClassLabel) else str(cell)


def tag_space(rows: Dataset, fields: Fields, kind: str) -> LabelSpace:
    """The tags of the training rows.

    Names of a `ClassLabel` column keep their order. Else "O" is first and the others are sorted. Of spans, and where a
    type has only one of them, both "B-" and "I-" are there.

    Raises:
        DataError: for unusable columns, and fewer than two tags.
    """
    assert fields.text is not None
    assert fields.label is not None
    texts = Texts.of(rows, fields.text)
    found = {tag for row in texts.tags(rows, fields.label, tell=False) for tag in row if tag is not None}
    feature = rows.features[fields.label]
    if isinstance(feature, List | LargeList) and isinstance(feature.feature, ClassLabel):
        return LabelSpace(kind, tuple(feature.feature.names))
    if scheme := is_scheme(found):
        found |= {f"{prefix}-{tag[2:]}" for tag in found if tag != OUTSIDE for prefix in "BI"}
    if len(found) < 2:
        raise DataError(
            f"column {fields.label!r} holds {len(found)} tag ({listed(found)}) in {len(rows)} rows: there have to be 2"
        )
    order = sorted(found, key=lambda tag: (tag != OUTSIDE, tag[2:] if scheme else "", tag))
    return LabelSpace(kind, tuple(order))


def is_scheme(tags: Sequence[str] | set[str]) -> bool:
    """Whether tags say where something begins and goes on: all but "O" are "B-...", "I-..." and the like."""
    others = [tag for tag in tags if tag != OUTSIDE]
    return bool(others) and all(re.match(r"[BIESLU]-.", tag) for tag in others)


# --- spans of texts ---------------------------------------------------------------------------------------------------


def _from_spans(rows: Dataset, column: str, texts: Texts, *, tell: bool) -> list[list[str | None]]:
    cells = rows.with_format(None)[column][:]
    check_column(rows, column)
    if any(isinstance(cell, str) for cell in cells):
        raise DataError(
            f"column {column!r} holds texts, as the rows themselves do. Give each row a list of spans, such as "
            '[{"start": 0, "end": 5, "label": "PER"}], or words and tags as lists'
        )
    missing = [row for row, cell in enumerate(cells) if cell is None]
    if missing:
        raise DataError(
            f"column {column!r} has no list of spans in {named_rows(missing)}: an empty list is a text without any. "
            "Label or drop these rows"
        )
    tags, moved, broken, across = [], 0, [], []
    for row, (cell, text, words) in enumerate(zip(cells, texts.texts, texts.words, strict=True)):
        own: list[str | None] = [OUTSIDE] * len(words)
        for span in cell:
            found = _span(span)
            if found is None or not 0 <= found[0] < found[1] <= len(text):
                broken.append(row)
                continue
            start, end, name = found
            inside = [number for number, place in enumerate(words) if place[0] < end and place[1] > start]
            if any(own[number] != OUTSIDE for number in inside):
                across.append(row)
            moved += bool(inside) and (words[inside[0]][0], words[inside[-1]][1]) != (start, end)
            for number in inside:
                own[number] = f"{'B' if number == inside[0] else 'I'}-{name}"
        tags.append(own)
    if broken:
        raise DataError(
            f"column {column!r} holds what is no span of its text in {named_rows(sorted({*broken}))}: a span has "
            "start, end (behind the last character) and label"
        )
    if across:
        raise DataError(
            f"column {column!r} has spans over each other in {named_rows(sorted({*across}))}: a word has one tag. Keep "
            "one of them"
        )
    if moved and tell:
        warnings.warn(
            f"column {column!r}: {moved} spans begin or end within a word, or at a space. They are read as the words "
            "that they touch",
            DataWarning,
            stacklevel=2,
        )
    return tags


def _span(span: Any) -> tuple[int, int, str] | None:
    """Start, end and type of a span as it is given: an object with names, or three values."""
    if isinstance(span, Mapping):
        start, end = (next((span[key] for key in keys if key in span), None) for keys in NAMES.values())
        name = next((span[key] for key in TYPES if key in span), None)
    elif isinstance(span, Sequence) and len(span) == 3:
        start, end, name = span
    else:
        return None
    if not (isinstance(start, int) and isinstance(end, int)) or name in (None, ""):
        return None
    return start, end, str(name)


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode_tagged(
    rows: Dataset, fields: Fields, tokenizer: Any, labels: LabelSpace | None, max_length: int | None
) -> tuple[Dataset, int]:
    """Rows as windows of token ids. Long ones are cut into several, and none of their words is lost.

    A word's label stands at its first token, in the one window that answers for it. All other tokens have -100.

    Args:
        rows: with a column of texts or of lists of words.
        fields: `text`. `label` is needed with `labels`.
        tokenizer: a fast tokenizer.
        labels: the tags. None: without labels.
        max_length: tokens of a window. None: the tokenizer's limit.

    Returns:
        A dataset with a row for each window. Second, how many texts were cut: none.

    Raises:
        DataError: for unusable columns, cells or tags.
    """
    assert fields.text is not None
    texts = Texts.of(rows, fields.text)
    windows = Windows.of(tokenizer, texts.texts, max_length=max_length, columns=f"column {fields.text!r}")
    tags = None if labels is None else _numbers(texts.tags(rows, fields.label or ""), labels, fields.label or "")
    columns: dict[str, Any] = {name: value for name, value in windows.columns.items() if name != OFFSETS}
    for name in (WORDS, PLACES, STARTS, ENDS, *([] if tags is None else [TAGS])):
        columns[name] = [[] for _ in range(len(windows))]
    first = {row: own[0] for row, own in windows.by_row.items()}
    for row, (owners, words) in enumerate(zip(windows.owners(texts.words), texts.words, strict=True)):
        for word, (owner, (start, end)) in enumerate(zip(owners, words, strict=True)):
            window, token = owner or Owned(first[row], -1)
            own = {WORDS: word, PLACES: token, STARTS: start, ENDS: end}
            for name, value in (own if tags is None else {**own, TAGS: tags[row][word]}).items():
                columns[name][window].append(value)
    columns[TEXT] = [texts.texts[row] for row in columns[ROW]]
    columns[SPLIT] = [texts.split] * len(windows)
    if tags is not None:
        columns["labels"] = [
            _labels(*each) for each in zip(columns["length"], columns[PLACES], columns[TAGS], strict=True)
        ]
    return Dataset.from_dict(columns, features=_features(columns)), 0


def _labels(length: int, places: Sequence[int], tags: Sequence[int]) -> list[int]:
    """The label of each token. One that several words share has that of the first."""
    labels = [IGNORED] * length
    for token, tag in reversed([*zip(places, tags, strict=True)]):
        if token >= 0:
            labels[token] = tag
    return labels


def _numbers(tags: Sequence[Sequence[str | None]], labels: LabelSpace, column: str) -> list[list[int]]:
    index = {name: number for number, name in enumerate(labels.names)}
    unknown = [row for row, own in enumerate(tags) if not index.keys() >= {tag for tag in own if tag is not None}]
    if unknown:
        names = sorted({tag for row in unknown for tag in tags[row] if tag is not None} - index.keys())
        raise DataError(
            f"column {column!r} holds tags that training never had: {listed(names)}, in {named_rows(unknown)}. "
            f"Training had {listed(labels.names, limit=20)}: correct or drop these rows, or train with all tags"
        )
    return [[IGNORED if tag is None else index[tag] for tag in row] for row in tags]


def _features(columns: Mapping[str, Sequence[Any]]) -> Features:
    """The types of the columns, so that empty lists have one."""
    kinds = {TEXT: Value("string"), SPLIT: Value("bool"), ROW: Value("int64"), "length": Value("int64")}
    return Features({name: kinds.get(name, List(Value("int64"))) for name in columns})


@dataclass
class CollateTagged(Collate):
    """A Trainer's data collator: texts with a label for each token, padding left out of the loss."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Tensors with the rows along their first axis, "labels" (batch, tokens) among them.

        Raises:
            DataError: as `Collate`, and if the loss would leave out all tokens.
        """
        plain = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
        batch = super().__call__(plain)
        if "labels" in rows[0]:
            refuse_ignored([label for row in rows for label in row["labels"]])
            batch["labels"] = pad_sequence(
                [torch.tensor(row["labels"]) for row in rows],
                batch_first=True,
                padding_value=IGNORED,
                padding_side=self.padding_side or "right",
            )
        return batch
