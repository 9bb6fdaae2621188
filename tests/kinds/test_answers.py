"""The likeliest answers by hand, and against all that there are."""

from __future__ import annotations

import numpy as np
import pytest

from sidestep.data.spans import LONGEST
from sidestep.kinds.answers import KEPT, Window, best_answers

CONTEXT = "In 1066 the Normans took it"
PLACES = [(0, 2), (3, 7), (8, 11), (12, 19), (20, 24), (25, 27)]


def window(places: list[tuple[int, int]], begins: list[float], ends: list[float], null: float = 0.0) -> Window:
    """A special token, a token of the question, the places, a special token."""
    around = [(-1, -1), (-1, -1), *places, (-1, -1)]
    logits = [[null / 2, null / 2], [90, 90], *map(list, zip(begins, ends, strict=True)), [90, 90]]
    return Window(np.array(logits, np.float32), *np.array(around).T)


def test_an_answer_is_where_both_logits_together_are_largest_and_no_end_stands_before_its_beginning() -> None:
    found = best_answers(CONTEXT, [window(PLACES, [0, 0, 4, 0, 5, 0], [9, 0, 0, 6, 0, 2])], unanswerable=False)
    assert [each[:3] for each in found[:3]] == [
        ("the Normans", 8, 19),  # 4 + 6
        ("In", 0, 2),  # 0 + 9. "In" as an end behind the other beginnings is none
        ("took it", 20, 27),  # 5 + 2
    ]
    assert found[1].probability / found[0].probability == pytest.approx(np.exp(-1))
    assert sum(each.probability for each in found) == pytest.approx(1)


def test_no_answer_scores_the_least_that_a_window_has_at_its_first_token() -> None:
    parts = [
        window(PLACES[:3], [0, 3, 0], [0, 3, 0], null=8),  # its best is 6
        window(PLACES[3:], [0, 0, 0], [0, 0, 0], null=5),
    ]
    first, *_ = found = best_answers(CONTEXT, parts, unanswerable=True)
    assert first.text == "1066"
    none = next(each for each in found if each.start is None)
    assert (none.text, none.end) == ("", None)
    assert none.probability / first.probability == pytest.approx(np.exp(5 - 6))
    assert all(each.start is not None for each in best_answers(CONTEXT, parts, unanswerable=False))
    parts[1] = window(PLACES[3:], [0, 0, 0], [0, 0, 0], null=7)
    assert best_answers(CONTEXT, parts, unanswerable=True)[0].text == ""
    parts[1] = window(PLACES[3:], [0, 0, 0], [0, 0, 0], null=6)  # of equal scores the answer
    assert best_answers(CONTEXT, parts, unanswerable=True)[0].text == "1066"


def test_a_stretch_of_two_windows_counts_once_with_its_better_score() -> None:
    parts = [window(PLACES[:4], [0, 1, 0, 0], [0, 1, 0, 0]), window(PLACES[1:], [3, 0, 0, 0, 0], [4, 0, 0, 0, 0])]
    found = best_answers(CONTEXT, parts, unanswerable=False)
    assert [each.text for each in found].count("1066") == 1
    assert found[0].text == "1066"
    assert found[0].probability / found[1].probability == pytest.approx(np.exp(7 - 3))  # "1066 the"


def test_white_space_that_a_token_holds_is_no_part_of_an_answer() -> None:
    places = [(0, 2), (2, 7), (7, 11)]
    found = best_answers(CONTEXT, [window(places, [0, 5, 0], [0, 5, 0])], unanswerable=False)
    assert found[0][:3] == ("1066", 3, 7)


def test_a_context_without_a_token_has_no_answer() -> None:
    found = best_answers("\x00", [window([], [], [])], unanswerable=False)
    assert found == [("", None, None, 1.0)]


@pytest.mark.parametrize("seed", range(6))
def test_the_best_are_those_of_all_stretches_of_all_windows(seed: int) -> None:
    chance = np.random.default_rng(seed)
    context = "ab " * 60
    places = [(3 * word, 3 * word + 2) for word in range(60)]
    edges = [(0, 60)] if seed % 2 else [(0, 25), (15, 45), (35, 60)]
    parts, scores = [], dict[tuple[int, int], float]()
    for start, end in edges:
        begins, ends = chance.normal(size=(2, end - start))
        parts.append(window(places[start:end], list(begins), list(ends)))
        rounded = parts[-1].logits[2:-1].astype(float)
        for first in range(end - start):
            for last in range(first, min(first + LONGEST, end - start)):
                place = (places[start + first][0], places[start + last][1])
                scores[place] = max(scores.get(place, -np.inf), rounded[first, 0] + rounded[last, 1])
    ranked = sorted(scores, key=lambda place: -scores[place])[:KEPT]
    found = best_answers(context, parts, unanswerable=False)
    assert [(each.start, each.end) for each in found] == ranked
    shares = np.exp([scores[place] for place in ranked])
    np.testing.assert_allclose([each.probability for each in found], shares / shares.sum(), rtol=1e-9)
