"""Questions and answers as windows: how cells are read, which tokens are labels, what is refused and what is said."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace
from typing import Any

import pytest
from datasets import Dataset

from sidestep.data import DataError, DataWarning, Fields, LabelSpace, Separators
from sidestep.data import spans as reading
from sidestep.data.spans import ANSWERS, CONTEXT, ENDS, LONGEST, STARTS, answers_of, encode_questions
from small_tasks import WORDS, tokenizer
from span_tasks import COLUMNS, asked

FIELDS = Fields(**COLUMNS)
SPANS = LabelSpace("spans", ("start", "end"))
OPEN = LabelSpace("spans", ("start", "end"), unanswerable=True)


def row(context: str, answers: Any, question: str = "the film") -> dict[str, Any]:
    return {"question": question, "context": context, "answers": answers}


def read(*rows: dict[str, Any]) -> list[list[tuple[str, int]]]:
    return [[tuple(answer) for answer in own] for own in answers_of(Dataset.from_list(list(rows)), FIELDS)]


def encoded(rows: list[dict[str, Any]], max_length: int | None = None, labels: LabelSpace | None = OPEN) -> Dataset:
    fields = FIELDS if labels is not None else replace(FIELDS, label=None)
    return encode_questions(Dataset.from_list(rows), fields, tokenizer(pad=True), labels, max_length)[0]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ({"text": ["book", "a book"], "answer_start": [6, 4]}, [("book", 6), ("a book", 4)]),
        ({"text": [], "answer_start": []}, []),
        ({"text": [""], "answer_start": [-1]}, []),
        ({"text": "book", "answer_start": 6}, [("book", 6)]),
        ([{"text": "book", "answer_start": 6}, {"text": "the", "answer_start": 0}], [("book", 6), ("the", 0)]),
        ("book", [("book", 6)]),
        (" ", []),
    ],
)
def test_cells_of_answers_come_in_several_forms(cell: Any, expected: list[tuple[str, int]]) -> None:
    assert read(row("the a book is a book", cell)) == [expected]


@pytest.mark.parametrize("seed", range(4))
def test_the_labels_of_a_window_are_the_first_answer_that_it_holds_whole(seed: int) -> None:
    chance = random.Random(seed)
    rows = []
    for _ in range(12):
        words = chance.choices(WORDS, k=chance.randrange(1, 30))
        answers: dict[str, list[Any]] = {"text": [], "answer_start": []}
        for _ in range(chance.randrange(3)):
            start = chance.randrange(len(words))
            answers["text"].append(" ".join(words[start : start + chance.randrange(1, 6)]))
            answers["answer_start"].append(len(" ".join([*words[:start], ""])))
        rows.append(row(" ".join(words), answers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        found = encoded(rows, max_length=chance.choice((9, 12, 32)))
    seen: dict[int, set[tuple[int, int]]] = {}
    for window in found:
        context, answers = rows[window["row"]]["context"], rows[window["row"]]["answers"]
        places = [place for place in zip(window[STARTS], window[ENDS], strict=True) if place[0] >= 0]
        assert len(window[STARTS]) == len(window["input_ids"]) == window["length"]
        assert all(context[start:end] in WORDS for start, end in places)
        assert window[CONTEXT] in ("", context)
        held = [
            (start, start + len(text))
            for text, start in zip(answers["text"], answers["answer_start"], strict=True)
            if places[0][0] <= start and start + len(text) <= places[-1][1]
        ]
        first, last = window["labels"]
        if held:
            assert (window[STARTS][first], window[ENDS][last]) == held[0]
        else:
            assert (first, last) == (0, 0)
            assert window[STARTS][0] == -1
        seen.setdefault(window["row"], set()).update(places)
    assert list(seen) == list(range(len(rows)))
    for number, places in seen.items():  # no word is lost
        assert len(places) == len(rows[number]["context"].split())
    stored = [(window["row"], window[CONTEXT], window[ANSWERS]) for window in found if window[CONTEXT]]
    assert stored == [(number, each["context"], each["answers"]["text"]) for number, each in enumerate(rows)]


def test_rows_are_read_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = asked(7, longest=20)
    whole = encoded(rows, max_length=12)
    monkeypatch.setattr(reading, "ROWS", 3)
    assert encoded(rows, max_length=12).to_list() == whole.to_list()
    with pytest.raises(DataError, match=r"columns 'question' and 'context'.* in row 5 .*A window has 12"):
        encoded([*rows[:4], asked(1)[0] | {"question": "the " * 20}], max_length=12)


def test_without_labels_no_answers_are_read() -> None:
    found = encoded([{"question": "the film", "context": "a book"}], labels=None)
    assert {"labels", ANSWERS}.isdisjoint(found.column_names)


def test_a_separator_stands_between_question_and_context() -> None:
    rows, words = Dataset.from_list([row("a book", "book")]), tokenizer(pad=True)
    found, _ = encode_questions(rows, FIELDS, words, None, None, Separators(pair=" very"))
    assert words.decode(found[0]["input_ids"]) == "[CLS] the film very [SEP] a book [SEP]"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            [row("a book", "book"), row("a film", "good"), row("a film", "bad")],
            r"'answers': 2 answers do not stand in 'context' at their place, and 0 of them stand elsewhere in it. They "
            r"are in rows 2, 3 .*'good' of row 2 stands nowhere in it\). Correct these places",
        ),
        (
            [row("a book", {"text": ["book"], "answer_start": [90]})],
            "at 90 in row 1 is no text, and 'book' stands at 2",
        ),
        (
            [row("a book", {"text": ["book"], "answer_start": [1]})],
            "1 of them .*at 1 in row 1 is ' boo', and 'book' sta",
        ),
        ([row("a book", {"text": ["book"], "answer_start": [-4]})], "at -4 in row 1 is no text"),
        (
            [row("a book", "film")],
            r"They stand in 'question': is that the context \(--text2\), and 'context' the quest",
        ),
        ([row("a book", "book"), row("a film", None)], "column 'answers' has no answers in row 2 .*: answer or drop"),
        ([row("a book", {"text": ["book"], "answer_start": [2, 3]})], "holds {'text': .* as many texts as places"),
        ([row("a book", 3)], "column 'answers' holds 3 in row 1 .*: answers are"),
        ([row("a book", "book"), row(" ", "book")], "column 'context' holds no text in row 2 .*: no answer can stand"),
    ],
)
def test_answers_that_cannot_be_used_are_refused_by_row(rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(DataError, match=says):
        encoded(rows)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"text": "question"}, r"text='question', text2=None: kind='spans' reads a question and the context"),
        ({"text": "question", "text2": "body"}, "body"),
        ({**COLUMNS, "image": "picture"}, "image='picture' with kind='spans'"),
    ],
)
def test_the_columns_are_a_question_and_a_context(fields: dict[str, str], says: str) -> None:
    with pytest.raises(DataError, match=says):
        encode_questions(Dataset.from_list(asked(2)), Fields(**fields), tokenizer(pad=True), None, None)


@pytest.mark.parametrize(
    ("rows", "labels", "says"),
    [
        ([row("a book", "book"), row("a film", "")], OPEN, "'answers': 1 of 2 questions have a text as their answer"),
        ([row("the " * 20, {"text": ["the " * 12], "answer_start": [0]})], OPEN, "1 of 1 questions .* no window holds"),
        ([row("a book", {"text": [], "answer_start": []})], SPANS, "1 of 1 questions have no answer, but training had"),
    ],
)
def test_what_is_read_otherwise_than_it_stands_is_counted(rows: Any, labels: LabelSpace, says: str) -> None:
    with pytest.warns(DataWarning, match=says):
        encoded(rows, max_length=12, labels=labels)


def test_answers_that_are_too_long_to_be_predicted_are_counted() -> None:
    words = tokenizer(pad=True)
    text = " ".join(["book"] * (LONGEST + 1))
    rows = Dataset.from_list([row(text, {"text": [text[:-5]], "answer_start": [0]})] * 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        encode_questions(rows, FIELDS, words, OPEN, 64)
    rows = Dataset.from_list([row(text, {"text": [text], "answer_start": [0]})] * 2)
    with pytest.warns(DataWarning, match="2 of 2 questions have an answer of more than 30 tokens"):
        encode_questions(rows, FIELDS, words, OPEN, 64)
