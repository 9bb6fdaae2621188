"""What scores are to be compared with: the scores of one answer for all rows, and the recall of each class.

An accuracy of 0.9 is little where nine rows of ten are of one class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sidestep.metrics import text_scores

FEW = 10
"""Up to so many classes are shown one by one, and so many different texts count as classes."""


@dataclass(frozen=True, kw_only=True)
class OfClass:
    """What was found of a class.

    Attributes:
        rows: how many are of the class.
        recall: the share of these rows that was predicted so. None if there are no such rows.
        f1: of the class, where its rows are entities of texts.
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


def _spaced(text: str) -> str:
    return " ".join(text.split())
