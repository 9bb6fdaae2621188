"""Answers of several people to a question, as soft scores over a list of answers (VQA).

Source: Antol et al., "VQA: Visual Question Answering", ICCV 2015 (the accuracy); Teney et al., "Tips and Tricks for
Visual Question Answering", CVPR 2018 (soft scores over a list of frequent answers).
Differs: an answer is compared in lower case with single spaces. The official evaluation also takes away articles and
punctuation and writes numbers as digits.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset

from sidestep.data.labels import SEPARATOR, LabelSpace
from sidestep.data.messages import DataError, DataWarning, named_rows
from sidestep.data.tables import check_column

AGREED = 3
"""So many of the others have to say the same, for an answer to be wholly right."""
OFTEN = 9
"""In so many training rows an answer has to stand to be learned, if nobody says how many are."""
ANSWER = "answer"
"""Where the text of an answer stands, if a cell holds more of it (as `datasets`' VQA sets do)."""


class Said(NamedTuple):
    """One answer to a question.

    Attributes:
        answer: its text.
        score: what is learned: the share of `AGREED` people that say so, 1 at most.
        credit: VQA accuracy of predicting it: the mean of that score over all sets that leave one person out.
        usual: 1.0 if no other answer is more frequent, and it came first. Else 0.0.
    """

    answer: str
    score: float
    credit: float
    usual: float


@dataclass(frozen=True)
class Answers(LabelSpace):
    """A list of answers, of which a question has one or several, with scores."""

    def encode(self, rows: Dataset, label_column: str) -> list[list[list[float]]]:
        """For each row, its answers that are in the list: number, score, credit and whether it is the usual one.

        All rows have as many, filled up with zeros.

        Raises:
            DataError: for rows without an answer.

        Warns:
            DataWarning: if rows have no answer of the list. What is predicted for these is wrong in any case.
        """
        places = {name: place for place, name in enumerate(self.names)}
        told = [
            [[float(places[one.answer]), one.score, one.credit, one.usual] for one in said if one.answer in places]
            for said in map(_said, answers_of(rows, label_column))
        ]
        if bare := [row for row, own in enumerate(told) if not own]:
            warnings.warn(
                f"column {label_column!r}: {len(bare)} of {len(told)} rows have none of the {len(self.names)} answers "
                f"that are learned, {named_rows(bare)}. They count as wrong",
                DataWarning,
                stacklevel=2,
            )
        most = max(1, *map(len, told))
        return [[*own, *[[0.0] * len(Said._fields)] * (most - len(own))] for own in told]


def answer_list(rows: Dataset, column: str, most: int | None) -> tuple[str, ...]:
    """The most frequent answers of the training rows, the most frequent first. Each row counts an answer once.

    Args:
        rows: of training.
        column: of answers (see `answers_of`).
        most: how many. None: those in at least `OFTEN` rows.

    Raises:
        DataError: for rows without an answer, or if fewer than two answers are left.
    """
    if most is not None and most < 2:
        raise DataError(f"answers={most}: choose at least 2, or leave --answers out")
    counts = Counter(answer for answers in answers_of(rows, column) for answer in dict.fromkeys(answers))
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    found = ordered[:most] if most is not None else [answer for answer in ordered if counts[answer] >= OFTEN]
    if len(found) < 2:
        raise DataError(
            f"column {column!r} has {len(counts)} different answers, and {len(found)} of them would be learned: at "
            f"least 2 are needed. Without --answers, these are the ones in {OFTEN} or more training rows"
        )
    return tuple(found)


def answers_of(rows: Dataset, column: str) -> list[list[str]]:
    """Each row's answers, in lower case and with single spaces.

    A cell is a text (several with "|" between them), a number, or a list. An element of a list may be a dictionary with
    "answer", as in `datasets`' VQA sets.

    Raises:
        DataError: naming rows without an answer, or whose answers are something else.
    """
    check_column(rows, column)
    feature = rows.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else None
    cells = rows.with_format(None)[column][:]
    if names is not None:
        cells = [None if cell is None or cell < 0 else names[cell] for cell in cells]
    found = [[_plain(each) for each in _each(cell)] for cell in cells]
    missing = [row for row, own in enumerate(found) if not own or not all(own)]
    if missing:
        raise DataError(
            f"column {column!r} has no answer in {len(missing)} of {len(found)} rows, {named_rows(missing)}. Give each "
            f'a text, a list of texts or a list of dictionaries with "{ANSWER}", or drop these rows'
        )
    return found


def _each(cell: Any) -> Sequence[Any]:
    """The answers of a cell, each as it was given."""
    if isinstance(cell, dict):  # of lists, as older data sets hold lists of dictionaries
        cell = cell.get(ANSWER)
    if isinstance(cell, str):
        return cell.split(SEPARATOR)
    return cell if isinstance(cell, list) else [cell]


def _plain(given: Any) -> str:
    answer = given.get(ANSWER) if isinstance(given, dict) else given
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)  # whole numbers with a gap come out of tables so
    if answer is None or answer != answer or isinstance(answer, list | dict):
        return ""
    return " ".join(str(answer).lower().split())


def _said(answers: Sequence[str]) -> list[Said]:
    """What was answered to one question, with scores."""
    people, counts = len(answers), Counter(answers)
    usual = counts.most_common(1)[0][0]
    return [
        Said(answer, _share(count, people), _credit(count, people), float(answer == usual))
        for answer, count in counts.items()
    ]


def _share(count: int, people: int) -> float:
    """What `count` of so many people are of those that have to agree. A few people have to agree all."""
    return min(count / min(AGREED, people), 1.0)


def _credit(count: int, people: int) -> float:
    """The mean of the share over all sets that leave one person out. One person alone is right."""
    if people == 1:
        return 1.0
    others = people - 1
    return (count * _share(count - 1, others) + (people - count) * _share(count, others)) / people
