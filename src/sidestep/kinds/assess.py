"""What scores are to be compared with: the scores of one answer for all rows, and the recall of each class.

An accuracy of 0.9 is little where nine rows of ten are of one class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress

from sidestep.metrics import normalised, span_scores, text_scores

FEW = 10
"""Up to so many classes are shown one by one, and so many different texts count as classes."""


@dataclass(frozen=True, kw_only=True)
class OfClass:
    """What was found of a class.

    Attributes:
        rows: how many are of the class.
        recall: the share of these rows that was predicted so. None if there are no such rows.
        f1: of the class, where its rows are entities of texts. Of questions, the mean F1 of their answers.
    """

    rows: int
    recall: float | None
    f1: float | None = None


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """The scores of a task on rows, and what they are to be compared with.

    Attributes:
        scores: see `metrics.scores` and `metrics.text_scores`.
        constant: by score, what the best single answer for all rows reaches. For accuracy that is the share of the
            largest class, for a regression the score of the mean. Empty for retrieval, where each row has an answer of
            its own.
        classes: by name. Empty if there are no classes, or more than `FEW` different texts.
    """

    scores: dict[str, float]
    constant: dict[str, float] = field(default_factory=dict)
    classes: dict[str, OfClass] = field(default_factory=dict)


def assess_texts(written: Sequence[str], targets: Sequence[str]) -> Assessment:
    """The assessment of texts. Arguments and errors as of `metrics.text_scores`."""
    found = text_scores(written, targets)
    # as exact_match compares them: without regard to the amount of white space
    said, asked = (list(map(_spaced, texts)) for texts in (written, targets))
    counts, right = Counter(asked), Counter(target for text, target in zip(said, asked, strict=True) if text == target)
    usual, _ = counts.most_common(1)[0]
    few = sorted(counts) if len(counts) <= FEW else ()
    return Assessment(
        scores=found,
        constant=text_scores([usual] * len(targets), targets),
        classes={name: OfClass(rows=counts[name], recall=right[name] / counts[name]) for name in few},
    )


def assess_answers(found: Sequence[str], answers: Sequence[Sequence[str]]) -> Assessment:
    """The assessment of answers that stand in texts. Arguments and errors as of `metrics.span_scores`.

    Where some questions have no answer, those with and those without one are the classes.
    """
    scores = span_scores(found, answers)
    # each right answer of a question once, as the scores compare them. "": none
    right = [set(filter(None, map(normalised, own))) or {""} for own in answers]
    usual, _ = Counter(answer for own in right for answer in sorted(own)).most_common(1)[0]
    parts = {"answerable": [own != {""} for own in right], "unanswerable": [own == {""} for own in right]}
    classes = {}
    for name, keep in parts.items() if any(parts["unanswerable"]) else ():
        part = span_scores([*compress(found, keep)], [*compress(answers, keep)]) if any(keep) else {}
        classes[name] = OfClass(rows=sum(keep), recall=part.get("exact_match"), f1=part.get("f1"))
    return Assessment(scores=scores, constant=span_scores([usual] * len(answers), answers), classes=classes)


def _spaced(text: str) -> str:
    return " ".join(text.split())
