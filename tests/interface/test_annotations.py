"""What annotations say: which values fit, what is said of others, and what becomes of lists and whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest

from sidestep.interface.annotations import Rule, check_fields, fits, from_fields, worded

if TYPE_CHECKING:
    from somewhere import Other

Even = Annotated[int, Rule("an even number", lambda value: value % 2 == 0)]


@dataclass(frozen=True, kw_only=True)
class Config:
    size: int = 1
    share: float = 0.5
    how: Literal["a", "b"] | None = None
    names: Sequence[str] | None = None
    ends: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [0, -(10**400)], [True, 1.0, "1", None]),
        (float, [0, 1.5, -1e308, 10**300], [True, float("nan"), float("inf"), 10**400, "1", None]),
        (bool, [True], [0, 1, "true"]),
        (str, ["", "a"], [b"a", None, ["a"]]),
        (Literal["a", 1], ["a", 1], [True, 1.0, "b", ["a"], {"a": 1}]),
        (int | None, [1, None], [1.5, "none"]),
        (tuple[int, ...], [(), (1, 2), [3]], [(1.5,), 1, "12", {1: 2}]),
        (tuple[float, float], [(1, 2.5)], [(1,), (1, 2, 3), ("a", 1)]),
        (Sequence[str], [["a"], ("a", "b"), []], ["ab", [1], None]),
        (dict[str, int], [{}, {"a": 1}], [{1: 1}, {"a": "b"}, [["a", 1]]]),
        (Even, [2, 0], [1, 2.0, "2"]),
        (Any, [None, 1, object()], []),
    ],
    ids=lambda value: "case",  # not by their texts, which hold addresses
)
def test_values_fit_or_do_not(kind: Any, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not fits(value, kind)] == []
    assert [value for value in bad if fits(value, kind)] == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int | None, "a whole number or null"),
        (Literal["a"], '"a"'),
        (Literal["a", "b", "c"] | None, '"a", "b", "c" or null'),
        (tuple[float, float], "a list of 2: a finite number, a finite number"),
        (Sequence[str | None], "a list of which each is a text or null"),
        (dict[str, bool], "an object whose keys are a text and whose values are true or false"),
        (Even, "an even number"),
        (list[Even], "a list of which each is an even number"),
    ],
    ids=lambda value: "case",
)
def test_an_annotation_in_words(kind: Any, words: str) -> None:
    assert worded(kind) == words


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "2"}, "Config: size='2', but it must be a whole number"),
        ({"size": 2.5}, "Config: size=2.5, but it must be a whole number"),
        ({"share": float("nan")}, "Config: share=nan, but it must be a finite number"),
        ({"how": ["a"]}, r"Config: how=\['a'\], but it must be \"a\", \"b\" or None"),
        ({"names": "ab"}, "Config: names='ab', but it must be a list of which each is a text or None"),
        ({"zork": 1}, "Config has no field zork: it has size, share, how, names, ends"),
    ],
)
def test_a_field_that_does_not_fit_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_fields(Config, values)


def test_lists_become_tuples_and_whole_numbers_ints() -> None:
    config = from_fields(Config, {"size": 8.0, "share": 2.0, "names": ["a"], "ends": [0, 1]})
    assert config == Config(size=8, share=2.0, names=("a",), ends=(0, 1))
    assert (type(config.size), type(config.share)) == (int, float)


def test_a_field_that_is_lacking_is_named() -> None:
    @dataclass(frozen=True)
    class Needs:
        one: int
        two: int

    with pytest.raises(ValueError, match="Needs needs two"):
        from_fields(Needs, {"one": 1})


def test_annotations_that_only_a_type_checker_knows_fit_everything() -> None:
    @dataclass(frozen=True)
    class Foreign:
        other: Other
        many: list[int]

    foreign = Foreign(1, [2])
    check_fields(foreign)
    assert foreign == Foreign(1, (2,))
