"""How messages list names."""

from __future__ import annotations

import pytest

from sidestep.wording import some


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
