"""What scores are to be seen against: those of one answer for all rows, and how much of each class was found.

An accuracy of 0.9 is little where nine rows of ten are of one class.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidestep.metrics import GREATER_IS_BETTER, Kind, ScoreWarning, of_evaluation, scores, text_scores

FEW = 10
"""Up to so many classes are shown one by one, and so many different texts count as classes."""


@dataclass(frozen=True, kw_only=True)
class OfClass:
    """What was found of a class.

    Attributes:
        rows: that are of it.
        recall: the share of them that was predicted so; None where there are none.
    """

    rows: int
    recall: float | None


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """The scores of a task on rows, and what they are to be seen against.

    Attributes:
        scores: see `metrics.scores` and `metrics.text_scores`.
        constant: by score, what the best single answer for all rows reaches: of accuracy the share of the largest
            class, of a regression that of the mean. Empty for retrieval, where each row has an answer of its own.
        classes: by name; empty where there are none, or more than `FEW` different texts.
    """

    scores: dict[str, float]
    constant: dict[str, float] = field(default_factory=dict)
    classes: dict[str, OfClass] = field(default_factory=dict)


def assess(
    kind: Kind, predictions: NDArray[Any], targets: NDArray[Any], names: Sequence[str] | None = None
) -> Assessment:
    """The assessment of logits, numbers or similarities; arguments and errors as of `metrics.scores`."""
    found = scores(kind, predictions, targets, names)
    if kind == "retrieval":
        return Assessment(scores=found)
    return Assessment(
        scores=found,
        constant=_constant(kind, np.asarray(predictions), np.asarray(targets)),
        classes=_of_each(kind, np.asarray(predictions), np.asarray(targets), names or ()),
    )


def assess_evaluation(kind: Kind, evaluation: Any, names: Sequence[str] | None = None) -> Assessment:
    """The assessment of what a Trainer's evaluation gave."""
    return assess(kind, *of_evaluation(kind, evaluation), names)


def assess_texts(written: Sequence[str], targets: Sequence[str]) -> Assessment:
    """The assessment of texts; arguments and errors as of `metrics.text_scores`."""
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


def _constant(kind: Kind, predictions: NDArray[Any], targets: NDArray[Any]) -> dict[str, float]:
    if kind == "regress":
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ScoreWarning
            )  # that a correlation with the mean is not defined is plain here
            return scores(kind, np.full(len(targets), targets.mean(dtype=np.float64)), targets)
    answers = _usual_class(predictions, targets) if kind == "single" else _usual_sets(targets)
    found = [scores(kind, np.tile(answer, (len(targets), 1)), targets) for answer in answers]
    return {name: (max if GREATER_IS_BETTER[name] else min)(each[name] for each in found) for name in found[0]}


def _usual_class(predictions: NDArray[Any], targets: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Logits of the answers among which the best one is, for every score: the largest class; of two classes both."""
    classes = predictions.shape[1]
    largest = np.bincount(targets, minlength=classes).argmax()
    for each in (0, 1) if classes == 2 else (largest,):
        yield np.eye(classes)[each]


def _usual_sets(targets: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """Logits of such answers for several labels a row: the most frequent set; all labels; the best of the frequent."""
    true = targets.astype(int)
    sets, times = np.unique(true, axis=0, return_counts=True)
    yield sets[times.argmax()] - 0.5
    yield np.full(true.shape[1], 0.5)
    counts = true.sum(axis=0)
    order = np.argsort(-counts, kind="stable")
    # f1_micro of the k most frequent labels: twice the hits over all that is predicted and all that is true
    taken = np.arange(1, len(order) + 1)
    f1 = 2 * np.cumsum(counts[order]) / (taken * len(true) + counts.sum())
    yield np.isin(np.arange(len(order)), order[: f1.argmax() + 1]) - 0.5


def _of_each(kind: Kind, predictions: NDArray[Any], targets: NDArray[Any], names: Sequence[str]) -> dict[str, OfClass]:
    if kind == "regress":
        return {}
    classes = np.arange(predictions.shape[1])
    single = kind == "single"
    true = targets[:, None] == classes if single else targets > 0
    chosen = predictions.argmax(axis=1)[:, None] == classes if single else predictions > 0
    rows, hits = true.sum(axis=0), (true & chosen).sum(axis=0)
    return {
        name: OfClass(rows=int(count), recall=float(hit / count) if count else None)
        for name, count, hit in zip(names or map(str, classes.tolist()), rows, hits, strict=True)
    }
