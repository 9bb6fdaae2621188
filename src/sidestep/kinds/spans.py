"""Answers that stand in a text: extractive question answering, as SQuAD has it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from sidestep.data import Augmentation, Collate, Fields, LabelSpace, Separators, holdout_whole
from sidestep.data.joins import NOTHING
from sidestep.data.spans import (
    ANSWERS,
    CONTEXT,
    ENDS,
    STARTS,
    answers_of,
    check_questions,
    encode_questions,
)
from sidestep.data.windows import ROW
from sidestep.kinds.answers import Found, Window, best_answers
from sidestep.kinds.assess import Assessment, assess_answers
from sidestep.kinds.base import OWN, PREDICTION, Probabilities, register
from sidestep.kinds.from_tokens import FromTokens, Outputs
from sidestep.kinds.task_data import TaskData
from sidestep.metrics import METRICS
from sidestep.model.heads import Span

START, END, BEST = "start", "end", "nbest"
"""Columns of predictions: the answer's first character in the context and the one behind its last, and the likeliest
answers."""


class Question(NamedTuple):
    """A row of the user's.

    Attributes:
        found: the likeliest answers, the best first.
        answers: the right ones. Empty if there are none, or they are not known.
    """

    found: list[Found]
    answers: list[str]


@register
class Spans(FromTokens):
    """Where the answer of a question begins and ends in its context."""

    name = "spans"
    answer = "a question whose answer stands in its context"
    metrics, best = METRICS["spans"], "f1"
    beside = (STARTS, ENDS, CONTEXT, ANSWERS)
    own_head = "spans"

    def check_columns(self, rows: Dataset, fields: Fields) -> None:
        """Refuses columns that are not a question and a context."""
        check_questions(rows, fields)

    def labels(self, rows: Dataset, fields: Fields) -> LabelSpace:
        """The two outputs, and whether some of the training questions have no answer."""
        unanswerable = not all(answers_of(rows, fields))
        return LabelSpace(self.name, (START, END), unanswerable=unanswerable)

    def hold_out(self, rows: Dataset, fields: Fields, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
        """Whole contexts are held out: the questions about one are in the same part."""
        check_questions(rows, fields)
        assert fields.text2 is not None
        return holdout_whole(rows, fields.text2, fraction, seed)

    def encode(
        self,
        rows: Dataset,
        fields: Fields,
        processor: Any,
        labels: LabelSpace | None,
        max_length: int | None,
        augment: Augmentation | None = None,
        *,
        separators: Separators = NOTHING,
    ) -> tuple[Dataset, int]:
        """Windows with the first and the last token of an answer."""
        return encode_questions(rows, fields, processor, labels, max_length, separators)

    def collate(self, fields: Fields, processor: Any) -> Collate:
        """Padded on the right, so that labels count from a window's first token."""
        return Collate(processor, padding_side="right")

    def head(self, data: TaskData, pool: Any = None) -> Span:
        """Two logits for each token."""
        return Span(pool=pool)

    def blank_head(self, outputs: int, pool: Any = None) -> Span:
        """The same for a plan."""
        return Span(pool=pool)

    def score(self, outputs: Outputs, encoded: Dataset, labels: LabelSpace) -> Assessment:
        """Exact match and F1 as SQuAD 2.0's evaluation has them."""
        rows = [*_questions(encoded, outputs, labels)]
        return assess_answers([row.found[0].text for row in rows], [row.answers for row in rows])

    def columns(
        self, outputs: Outputs, encoded: Dataset, labels: LabelSpace, probabilities: Probabilities
    ) -> dict[str, list[Any]]:
        """The best answer of each row with its place and probability, and with "all" the likeliest ones as lists.

        An empty text without a place is "no answer".
        """
        rows = [row.found for row in _questions(encoded, outputs, labels)]
        found: dict[str, list[Any]] = {
            PREDICTION: [best.text for best, *_ in rows],
            START: [best.start for best, *_ in rows],
            END: [best.end for best, *_ in rows],
        }
        if probabilities != "none":
            found[OWN] = [best.probability for best, *_ in rows]
        if probabilities == "all":
            found[BEST] = [[each._asdict() for each in row] for row in rows]
        return found


def _questions(encoded: Dataset, outputs: Outputs, labels: LabelSpace) -> Iterator[Question]:
    """The rows of the user's in their order, from all of their windows."""
    table = encoded.with_format(None)
    windows: dict[int, list[Window]] = {}
    contexts: dict[int, str] = {}
    answers: dict[int, list[str]] = {}
    right = table[ANSWERS] if ANSWERS in table.column_names else [[]] * len(table)
    parts = (table[name] for name in (ROW, STARTS, ENDS, CONTEXT))
    for row, starts, ends, context, own, logits in zip(*parts, right, outputs, strict=True):
        windows.setdefault(row, []).append(Window(logits, np.array(starts), np.array(ends)))
        if context:  # with the first window alone
            contexts[row], answers[row] = context, own
    for row in sorted(windows):
        yield Question(best_answers(contexts[row], windows[row], unanswerable=labels.unanswerable), answers[row])
