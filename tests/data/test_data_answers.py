"""Answers of several people as scores over a list: by VQA's definition, whatever form a cell has."""

from __future__ import annotations

from itertools import combinations

import pytest
from datasets import ClassLabel, Dataset, Features

from sidestep.data import DataError, DataWarning
from sidestep.data.answers import Answers, answer_list, answers_of


def column(*cells: object) -> Dataset:
    return Dataset.from_dict({"answer": list(cells)})


def left_out(answers: list[str], chosen: str) -> float:
    """VQA accuracy by its definition: the mean over all sets without one person, of those who say the same over 3."""
    sets = list(combinations(answers, len(answers) - 1))
    return sum(min(one.count(chosen) / 3, 1) for one in sets) / len(sets)


@pytest.mark.parametrize("agreeing", range(1, 11))
def test_scores_of_ten_people_are_those_of_vqa(agreeing: int) -> None:
    people = ["yes"] * agreeing + ["no"] * (10 - agreeing)
    (row,) = Answers("vqa", ("no", "yes")).encode(column(people), "answer")
    for number, score, credit, usual in row:
        name = ("no", "yes")[int(number)]
        if name not in people:
            assert (score, credit, usual) == (0, 0, 0)  # filled up
            continue
        assert score == min(people.count(name) / 3, 1)
        assert credit == pytest.approx(left_out(people, name))
        assert usual == (name == ("yes" if agreeing >= 5 else "no"))


def test_one_person_is_right_and_few_have_to_agree() -> None:
    rows = column(["blue"], ["blue", "blue"], ["blue", "red"])
    one, both, split = Answers("vqa", ("blue", "red")).encode(rows, "answer")
    assert one == [[0, 1, 1, 1], [0, 0, 0, 0]]
    assert both == one
    # of the one who is left, half the time this one
    assert split == [[0, 0.5, 0.5, 1], [1, 0.5, 0.5, 0]]


@pytest.mark.parametrize(
    "cell",
    [
        ["Light  blue", "light blue", "red"],
        [{"answer": "Light Blue", "answer_confidence": "yes"}, {"answer": "light blue"}, {"answer": "red"}],
        {"answer": ["light blue", "LIGHT BLUE ", "red"], "answer_id": [1, 2, 3]},
        "light blue|Light Blue|red",
    ],
)
def test_every_form_of_a_cell_says_the_same(cell: object) -> None:
    assert answers_of(column(cell), "answer") == [["light blue", "light blue", "red"]]


def test_numbers_and_classes_are_answers_too() -> None:
    assert answers_of(column(2.0, 3.5), "answer") == [["2"], ["3.5"]]
    features = Features({"answer": ClassLabel(names=["no", "yes"])})
    assert answers_of(Dataset.from_dict({"answer": [1, 0]}, features=features), "answer") == [["yes"], ["no"]]


def test_the_most_frequent_answers_are_learned_and_each_row_counts_once() -> None:
    rows = column(*[["a", "a", "b"]] * 9, *[["c"]] * 10, *[["d"] * 10] * 8)
    assert answer_list(rows, "answer", None) == ("c", "a", "b")
    assert answer_list(rows, "answer", 2) == ("c", "a")
    with pytest.warns(
        DataWarning, match="8 of 27 rows have none of the 3 answers that are learned, rows 20, 21"
    ) as said:
        told = Answers("vqa", ("c", "a", "b")).encode(rows, "answer")
    assert "They count as wrong" in str(said[0].message)
    assert told[-1] == [[0, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("cell", [None, "", " ", "yes||no"])
def test_rows_without_an_answer_are_named(cell: object) -> None:
    with pytest.raises(DataError, match=r"'answer' has no answer in 1 of 2 rows, row 2 \(the first is 1\)"):
        answers_of(column("yes", cell), "answer")


@pytest.mark.parametrize("cell", [[], ["yes", None], ["yes", " "]])
def test_lists_without_an_answer_are_named(cell: list[object]) -> None:
    with pytest.raises(DataError, match="no answer in 1 of 2 rows, row 2"):
        answers_of(column(["yes"], cell), "answer")


def test_a_list_needs_two_answers() -> None:
    with pytest.raises(DataError, match="has 2 different answers, and 0 of them would be learned: at least 2"):
        answer_list(column("yes", "no"), "answer", None)
    with pytest.raises(DataError, match="answers=1: choose at least 2"):
        answer_list(column("yes", "no"), "answer", 1)
