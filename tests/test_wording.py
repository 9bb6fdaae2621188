"""How messages list names and tell a time."""

from __future__ import annotations

import pytest

from sidestep.messages import about, some


@pytest.mark.parametrize(
    ("names", "most", "text"),
    [
        ([], 4, "nothing"),
        (["a"], 4, "a"),
        (["d", "c", "b", "a"], 4, "d, c, b, a"),
        (["d", "c", "b", "a", "e"], 4, "d, c, b, a and 1 more"),
        (["a", "b", "c"], 1, "a and 2 more"),
    ],
)
def test_the_first_names_and_how_many_more(names: list[str], most: int, text: str) -> None:
    assert some(iter(names), most) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "less than 10 s"),
        (44, "about 40 s"),
        (89, "about 90 s"),
        (95, "about 2 min"),
        (241, "about 4 min"),
        (5399, "about 90 min"),
        (9000, "about 2.5 h"),
    ],
)
def test_a_time_as_a_person_says_it(seconds: float, text: str) -> None:
    assert about(seconds) == text
