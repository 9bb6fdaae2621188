"""The likeliest answers of a question, from logits of the beginnings and ends of its windows.

As in BERT's evaluation of SQuAD, an answer scores the sum of its two logits. "No answer" scores the least sum that a
window has at its first token. Differs: the best answers are found among all, not among the 20 best beginnings and ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sidestep.data.spans import LONGEST, NOWHERE

KEPT = 20
"""Answers of a question that are kept, among which the probability is shared."""


class Window(NamedTuple):
    """A part of a context.

    Attributes:
        logits: (tokens, 2) of beginnings and ends.
        starts, ends: (tokens,) places in the context, -1 where a token is not of it.
    """

    logits: NDArray[Any]
    starts: NDArray[Any]
    ends: NDArray[Any]


class Found(NamedTuple):
    """An answer that may be right.

    Attributes:
        text: of it. It is empty for "no answer".
        start, end: its first character in the context, and the one behind its last. None for "no answer".
        probability: its share among the answers that are kept.
    """

    text: str
    start: int | None
    end: int | None
    probability: float


def best_answers(context: str, windows: Sequence[Window], *, unanswerable: bool) -> list[Found]:
    """The likeliest answers, the best first.

    Args:
        context: of the question.
        windows: all of its parts.
        unanswerable: whether "no answer" is one of them. It is in any case where no part has a token.
    """
    scores: dict[tuple[int, int], float] = {}
    for window in windows:
        for score, start, end in _spans(window):
            text = context[start:end]
            start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
            if start < end:
                scores[start, end] = max(score, scores.get((start, end), -np.inf))
    ranked: list[tuple[float, tuple[int, int] | None]] = [
        (score, place) for place, score in sorted(scores.items(), key=lambda each: (-each[1], each[0]))[:KEPT]
    ]
    if unanswerable or not ranked:
        ranked.append((min(float(window.logits[NOWHERE].sum(dtype=np.float64)) for window in windows), None))
        ranked.sort(key=lambda each: -each[0])  # of equal scores the answer stays in front
    grown = np.exp(np.array([score for score, _ in ranked]) - ranked[0][0])
    found = []
    for (_, place), share in zip(ranked, grown / grown.sum(), strict=True):
        found.append(Found("", None, None, float(share)) if place is None else _at(context, place, float(share)))
    return found


def _at(context: str, place: tuple[int, int], share: float) -> Found:
    start, end = place
    return Found(context[start:end], start, end, share)


def _spans(window: Window) -> Iterator[tuple[float, int, int]]:
    """The best `KEPT` answers of a window: score, first character, and the one behind the last."""
    real = np.flatnonzero(window.ends > window.starts)
    if not len(real):
        return
    begins, ends = window.logits[real].astype(np.float64).T
    longest = min(LONGEST, len(real))
    # row by token, column by how many further ones the answer has
    further = np.lib.stride_tricks.sliding_window_view(np.append(ends, np.full(longest - 1, -np.inf)), longest)
    scores = (begins[:, None] + further).ravel()
    kept = min(KEPT, len(scores))
    for place in np.argpartition(-scores, kept - 1)[:kept]:
        first, more = divmod(int(place), longest)
        if first + more < len(real):
            yield float(scores[place]), int(window.starts[real[first]]), int(window.ends[real[first + more]])
