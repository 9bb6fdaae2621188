"""Entities of tags and their scores, against seqeval."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities

from sidestep.kinds.entities import Entity, Scheme, entity_scores

NAMES = ("O", "B-a", "I-a", "B-b", "I-b")
ALL_PREFIXES = (*NAMES, "E-a", "S-a", "E-b", "S-b")
tags = st.lists(st.sampled_from(NAMES), max_size=8)


@given(st.lists(st.sampled_from(ALL_PREFIXES), max_size=8))
def test_entities_are_those_of_seqeval(row: list[str]) -> None:
    found = Scheme(ALL_PREFIXES).entities(row)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = [(name, start, end + 1) for name, start, end in get_entities(row)]
    assert [tuple(entity) for entity in found] == expected


@given(st.lists(st.tuples(tags, tags).map(lambda pair: tuple(row[: min(map(len, pair))] for row in pair)), min_size=1))
def test_scores_are_those_of_seqeval(rows: list[tuple[list[str], list[str]]]) -> None:
    scheme = Scheme(NAMES)
    true, found = [row[0] for row in rows], [row[1] for row in rows]
    ours = entity_scores([*map(scheme.entities, found)], [*map(scheme.entities, true)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [score(true, found, zero_division=0) for score in (precision_score, recall_score, f1_score)]
        of_types = f1_score(true, found, average=None, zero_division=0)
    assert [ours.precision, ours.recall, ours.f1] == pytest.approx(theirs)
    assert [f1 for _, f1 in ours.of_type.values()] == pytest.approx(list(np.atleast_1d(of_types)))


@pytest.mark.parametrize(
    ("row", "broken"),
    [
        (["I-a"], 1),
        (["B-a", "I-a", "I-a"], 0),
        (["B-a", "I-b"], 1),
        (["O", "I-a", "I-a", "O", "I-a"], 2),
        ([], 0),
    ],
)
def test_tags_that_go_on_with_nothing_are_counted(row: list[str], broken: int) -> None:
    assert Scheme(NAMES).broken(row) == broken


def test_plain_tags_are_runs_and_those_without_an_outside_stand_alone() -> None:
    named = Scheme(("O", "person", "place"))
    assert named.entities(["person", "person", "O", "place", "person"]) == [
        Entity("person", 0, 2),
        Entity("place", 3, 4),
        Entity("person", 4, 5),
    ]
    parts = Scheme(("NOUN", "VERB"))
    assert parts.each
    found, true = [["NOUN", "VERB", "VERB"], ["NOUN"]], [["NOUN", "NOUN", "VERB"], ["VERB"]]
    slow = entity_scores([*map(parts.entities, found)], [*map(parts.entities, true)])
    assert parts.scores(found, true) == slow
    assert parts.entities(["NOUN", "NOUN", "VERB"]) == [
        Entity("NOUN", 0, 1),
        Entity("NOUN", 1, 2),
        Entity("VERB", 2, 3),
    ]
