"""Questions whose answers stand in a text: rows of a question, a context and the answers, as SQuAD has them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from numpy.typing import NDArray

from sidestep.data.encode import Fields, check_fields
from sidestep.data.joins import NOTHING, Separators
from sidestep.data.labels import LabelSpace
from sidestep.data.messages import DataError, DataWarning, named_rows
from sidestep.data.tables import check_column
from sidestep.data.windows import OFFSETS, ROW, Windows

STARTS, ENDS, CONTEXT, ANSWERS = "starts", "ends", "context", "answers"
"""Columns of windows: where each token begins and ends in the context (-1: it is not of the context). Of a row's first
window alone, the context and the texts of all right answers."""
NOWHERE = 0
"""The token of a window at which "no answer" begins and ends, as BERT has it: the first one."""
LONGEST = 30
"""Tokens of an answer that is predicted, at most, as in BERT's evaluation of SQuAD."""
ROWS = 1000
"""So many are cut into windows at a time. What a tokenizer gives takes several times the memory of a dataset."""
SHOWN = 60
"""Characters of an answer that a message shows."""


class Answer(NamedTuple):
    """A right answer: its text, and where that begins in the context."""

    text: str
    start: int

    @property
    def place(self) -> tuple[int, int]:
        """The first character, and the one behind the last, without white space around the text."""
        start = self.start + len(self.text) - len(self.text.lstrip())
        return start, start + len(self.text.strip())


# --- reading ----------------------------------------------------------------------------------------------------------


def check_questions(rows: Dataset, fields: Fields) -> None:
    """Refuses columns that are not a question and a context.

    Raises:
        DataError: naming the column. For contexts without a text also the rows.
    """
    for name in ("image", "audio", "video"):
        if (column := getattr(fields, name)) is not None:
            raise DataError(f"{name}={column!r} with kind='spans': a question and a text are read. Leave it out")
    if fields.text is None or fields.text2 is None:
        raise DataError(
            f"text={fields.text!r}, text2={fields.text2!r}: kind='spans' reads a question and the context in which its "
            "answer stands. Name both columns (--text question --text2 context)"
        )
    check_fields(rows, fields)
    empty = [row for row, text in enumerate(rows.with_format(None)[fields.text2][:]) if not text.strip()]
    if empty:
        raise DataError(
            f"column {fields.text2!r} holds no text in {named_rows(empty)}: no answer can stand there. Fill or drop "
            "these rows"
        )


def answers_of(rows: Dataset, fields: Fields) -> list[list[Answer]]:
    """The right answers of each row. Empty where a question has none.

    A cell is {"text": [...], "answer_start": [...]}, a list of such objects for one answer each, or a text. A text
    without a place stands where it comes first in the context. An empty text is no answer.

    Raises:
        DataError: for other cells, cells that are missing, and answers that do not stand in their context at their
            place. It names the rows.
    """
    assert fields.text is not None
    assert fields.text2 is not None
    assert fields.label is not None
    check_column(rows, fields.label)
    table = rows.with_format(None)
    cells, contexts = table[fields.label][:], table[fields.text2][:]
    if missing := [row for row, cell in enumerate(cells) if cell is None]:
        raise DataError(
            f"column {fields.label!r} has no answers in {named_rows(missing)}: answer or drop these rows. A question "
            'without an answer has empty lists, {"text": [], "answer_start": []}'
        )
    given = [_given(cell) for cell in cells]
    if unread := [row for row, own in enumerate(given) if own is None]:
        raise DataError(
            f"column {fields.label!r} holds {str(cells[unread[0]])[:SHOWN]} in {named_rows(unread)}: answers are "
            '{"text": [...], "answer_start": [...]} with as many texts as places, or a text'
        )
    found: list[list[Answer]] = []
    misplaced = _Misplaced(fields, table[fields.text][:])
    for row, (own, context) in enumerate(zip(given, contexts, strict=True)):
        found.append([])
        for text, start in own or ():
            place = context.find(text) if start is None else start
            if place < 0 or context[place : place + len(text)] != text:
                misplaced.add(row, text, start, context)
            else:
                found[-1].append(Answer(text, place))
    misplaced.refuse()
    return found


def _given(cell: Any) -> list[tuple[str, int | None]] | None:
    """Texts and places as a cell has them. None where it is no cell of answers."""
    if isinstance(cell, str):
        return [(cell, None)] if cell.strip() else []
    if isinstance(cell, Mapping):
        texts, starts = cell.get("text"), cell.get("answer_start")
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        if not isinstance(texts, Sequence):
            return None
        starts = [None] * len(texts) if starts is None else starts
        if not isinstance(starts, Sequence) or len(starts) != len(texts):
            return None
        pairs = list(zip(texts, starts, strict=True))
        fit = all(isinstance(text, str) and (start is None or type(start) is int) for text, start in pairs)
        return [(text, start) for text, start in pairs if text.strip()] if fit else None
    if isinstance(cell, Sequence):
        parts = [_given(part) for part in cell]
        return None if None in parts else [each for part in parts for each in part or ()]
    return None


@dataclass
class _Misplaced:
    """Answers that do not stand where they should."""

    fields: Fields
    questions: Sequence[str]
    rows: list[int] = field(default_factory=list)
    elsewhere: int = 0
    asked: int = 0
    first: str = ""

    def add(self, row: int, text: str, start: int | None, context: str) -> None:
        """Note one."""
        place = context.find(text)
        if not self.rows:
            shown = repr(text[:SHOWN])
            where = "nowhere in it" if place < 0 else f"at {place}"
            self.first = f"{shown} of row {row + 1} stands {where}"
            if start is not None:
                there = repr(context[start : start + len(text)][:SHOWN]) if 0 <= start < len(context) else "no text"
                self.first = f"at {start} in row {row + 1} is {there}, and {shown} stands {where}"
        self.rows.append(row)
        self.elsewhere += place >= 0
        self.asked += text in self.questions[row]

    def refuse(self) -> None:
        """Raise `DataError` if there are any."""
        if not self.rows:
            return
        text, context = self.fields.text, self.fields.text2
        advice = "Correct these places, which count characters from 0, or drop these rows"
        if self.asked == len(self.rows):
            advice = f"They stand in {text!r}: is that the context (--text2), and {context!r} the question (--text)?"
        raise DataError(
            f"column {self.fields.label!r}: {len(self.rows)} answers do not stand in {context!r} at their place, and "
            f"{self.elsewhere} of them stand elsewhere in it. They are in {named_rows(sorted({*self.rows}))} "
            f"({self.first}). {advice}"
        )


# --- encoding ---------------------------------------------------------------------------------------------------------


def encode_questions(
    rows: Dataset,
    fields: Fields,
    tokenizer: Any,
    labels: LabelSpace | None,
    max_length: int | None,
    separators: Separators = NOTHING,
) -> tuple[Dataset, int]:
    """Rows as windows of token ids: the question in front of a part of its context.

    The labels of a window are the first and the last token of the first answer that lies in it whole. Where none does,
    both are `NOWHERE`.

    Args:
        rows: with the columns that `fields` names.
        fields: `text` is the question, `text2` the context. `label` is needed with `labels`.
        tokenizer: a fast tokenizer.
        labels: None: without labels.
        max_length: tokens of a window. None: the tokenizer's limit.
        separators: between question and context.

    Returns:
        A dataset with a row for each window. Second, how many texts were cut: none.

    Raises:
        DataError: for unusable columns, cells or answers.

    Warns:
        DataWarning: if answers have no place, are held whole by no window, or are too long to be predicted. Also if
            questions have no answer, and training had no such question.
    """
    check_questions(rows, fields)
    answers = None if labels is None else answers_of(rows, fields)
    parts, told = [], _Told()
    for first in range(0, len(rows), ROWS):
        part = rows.select(range(first, min(first + ROWS, len(rows))))
        own = None if answers is None else answers[first : first + ROWS]
        parts.append(_encode(part, fields, tokenizer, own, max_length, separators, first, told))
    if labels is not None and answers is not None:
        told.questions, told.without = len(rows), sum(not own for own in answers)
        told.unplaced = sum(isinstance(cell, str) and bool(cell.strip()) for cell in rows[fields.label or ""])
        told.warn(fields, labels)
    return concatenate_datasets(parts), 0


def _encode(
    rows: Dataset,
    fields: Fields,
    tokenizer: Any,
    answers: Sequence[Sequence[Answer]] | None,
    max_length: int | None,
    separators: Separators,
    first: int,
    told: _Told,
) -> Dataset:
    table = rows.with_format(None)
    contexts = table[fields.text2 or ""][:]
    windows = Windows.of(
        tokenizer,
        contexts,
        before=[question + separators.pair for question in table[fields.text or ""][:]],
        max_length=max_length,
        columns=f"columns {fields.text!r} and {fields.text2!r}",
        first=first,
    )
    columns: dict[str, Any] = {name: value for name, value in windows.columns.items() if name != OFFSETS}
    places = [np.array(window) for window in windows.columns[OFFSETS]]
    columns[STARTS], columns[ENDS] = ([window[:, end] for window in places] for end in (0, 1))
    owners, heads = columns[ROW], {own[0] for own in windows.by_row.values()}
    columns[CONTEXT] = [contexts[row] if number in heads else "" for number, row in enumerate(owners)]
    columns[ROW] = [first + row for row in owners]
    if answers is not None:
        columns[ANSWERS] = [
            [answer.text for answer in answers[row]] if number in heads else [] for number, row in enumerate(owners)
        ]
        columns["labels"] = list(_labels(owners, places, answers, told))
    return Dataset.from_dict(columns, features=_features(columns))


def _labels(
    owners: Sequence[int], places: Sequence[NDArray[Any]], answers: Sequence[Sequence[Answer]], told: _Told
) -> Iterator[tuple[int, int]]:
    """The labels of each window."""
    tokens: dict[int, int] = {}
    for row, window in zip(owners, places, strict=True):
        label = next(filter(None, (_tokens(window, *answer.place) for answer in answers[row])), None)
        if label is not None:
            tokens[row] = label[1] - label[0] + 1
        yield label or (NOWHERE, NOWHERE)
    told.long += sum(count > LONGEST for count in tokens.values())
    told.split += sum(bool(own) and row not in tokens for row, own in enumerate(answers))


def _tokens(places: NDArray[Any], start: int, end: int) -> tuple[int, int] | None:
    """The first and the last token of a stretch of a text. None where the window does not hold it whole.

    Args:
        places: (tokens, 2) where each token begins and ends.
        start: first character of the stretch.
        end: the one behind its last.
    """
    real = places[:, 1] > places[:, 0]
    inside = np.flatnonzero(real & (places[:, 0] < end) & (places[:, 1] > start))
    if not len(inside) or places[real][0, 0] > start or places[real][-1, 1] < end:
        return None
    return int(inside[0]), int(inside[-1])


def _features(columns: Mapping[str, Sequence[Any]]) -> Features:
    """The types of the columns, so that empty lists have one."""
    numbers = dict.fromkeys((ROW, "length"), Value("int64"))
    lists = {"attention_mask": "int8", "token_type_ids": "int8", ANSWERS: "string", "labels": "int64"}
    kinds = {**numbers, CONTEXT: Value("string")}
    return Features({name: kinds.get(name) or List(Value(lists.get(name, "int32"))) for name in columns})


@dataclass
class _Told:
    """What is said of the answers of a dataset.

    Attributes:
        questions: of all rows.
        without: questions without an answer.
        unplaced: answers whose place is not given.
        split: questions of whose answers no window holds one whole.
        long: questions whose answer has more than `LONGEST` tokens.
    """

    questions: int = 0
    without: int = 0
    unplaced: int = 0
    split: int = 0
    long: int = 0

    def warn(self, fields: Fields, labels: LabelSpace) -> None:
        """Say it."""
        found = {
            "have a text as their answer and no place. It is taken where it comes first in the context": self.unplaced,
            "have an answer that no window holds whole, so the model cannot learn or find it. Give a larger max_length "
            "(--max-length) if the model can read more": self.split,
            f"have an answer of more than {LONGEST} tokens, which is the most that is predicted": self.long,
            "have no answer, but training had no such question. An answer is predicted for them, which counts as "
            "wrong": 0 if labels.unanswerable else self.without,
        }
        for what, count in found.items():
            if count:
                said = f"column {fields.label!r}: {count} of {self.questions} questions {what}"
                warnings.warn(said, DataWarning, stacklevel=4)
