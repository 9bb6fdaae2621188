"""What scores are to be seen against: no single answer for all rows is better, and recalls are scikit-learn's."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import recall_score

from sidestep.data import LabelSpace
from sidestep.kinds import kind_named
from sidestep.kinds.assess import FEW, OfClass, assess_answers, assess_texts
from sidestep.metrics import Kind, scores, span_scores, text_scores


def drawn(kind: Kind, classes: int, seed: int, rows: int = 40) -> tuple[NDArray[Any], NDArray[Any]]:
    """Predictions and targets with classes of unequal sizes."""
    chance = np.random.default_rng(seed)
    if kind == "regress":
        return chance.normal(size=rows), chance.exponential(size=rows)
    predictions = chance.normal(size=(rows, classes))
    if kind == "multi":
        return predictions, (chance.random((rows, classes)) < chance.random(classes)).astype(float)
    shares = chance.dirichlet(np.ones(classes))
    return predictions, chance.choice(classes, size=rows, p=shares)


def constants(kind: Kind, classes: int) -> list[NDArray[Any]]:
    """Every answer that can be given to all rows."""
    if kind == "single":
        return list(np.eye(classes))
    return [np.array(each) - 0.5 for each in product((0, 1), repeat=classes)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("kind", "classes"), [("single", 2), ("single", 3), ("single", 6), ("multi", 1), ("multi", 4)])
def test_no_single_answer_is_better(kind: Kind, classes: int, seed: int) -> None:
    predictions, targets = drawn(kind, classes, seed)
    found = kind_named(kind).assess(predictions, targets)
    each = [scores(kind, np.tile(answer, (len(targets), 1)), targets) for answer in constants(kind, classes)]
    assert found.constant == {name: pytest.approx(max(one[name] for one in each)) for name in each[0]}
    assert found.constant.keys() == found.scores.keys()


def test_accuracy_is_seen_against_the_largest_class() -> None:
    targets = np.array([0] * 9 + [1])
    found = kind_named("single").assess(np.tile([1.0, 0.0], (10, 1)), targets)
    assert found.scores["accuracy"] == found.constant["accuracy"] == 0.9
    # always the second class: one of ten is right, and all of that class are found
    assert found.constant["f1"] == pytest.approx(2 * 0.1 * 1 / 1.1)
    assert found.constant["matthews"] == 0


@pytest.mark.parametrize("column", [False, True])
def test_a_number_is_seen_against_the_mean(column: bool) -> None:
    predictions, targets = drawn("regress", 1, 3)
    found = kind_named("regress").assess(predictions[:, None] if column else predictions, targets)
    assert found.constant["mse"] == pytest.approx(np.var(targets))
    assert (found.constant["pearson"], found.constant["spearman"]) == (0, 0)
    assert found.classes == {}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_recalls_are_those_of_scikit_learn(kind: Kind, seed: int) -> None:
    predictions, targets = drawn(kind, 4, seed)
    names = ("a", "b", "c", "d")
    chosen = predictions.argmax(1) if kind == "single" else predictions > 0
    true = targets if kind == "single" else targets > 0
    expected = recall_score(true, chosen, average=None, labels=range(4), zero_division=np.nan)
    found = kind_named(kind).assess(predictions, targets, names).classes
    rows = np.bincount(targets, minlength=4) if kind == "single" else targets.sum(0)
    assert found.keys() == set(names)
    for place, name in enumerate(names):
        assert found[name].rows == rows[place]
        assert found[name].recall == (pytest.approx(expected[place]) if rows[place] else None)


def test_accuracy_is_the_mean_of_the_recalls_by_rows() -> None:
    predictions, targets = drawn("single", 5, 1)
    found = kind_named("single").assess(predictions, targets)
    hits = sum(each.rows * (each.recall or 0) for each in found.classes.values())
    assert hits / len(targets) == pytest.approx(found.scores["accuracy"])


def test_texts_are_seen_against_the_most_frequent_one() -> None:
    targets = ["very good", "bad", " very good", "so so"]
    found = assess_texts(["very  good", "good", "very good", "so so"], targets)
    assert found.scores == text_scores(["very  good", "good", "very good", "so so"], targets)
    assert found.constant["exact_match"] == 0.5
    assert found.classes == {
        "bad": OfClass(rows=1, recall=0),
        "so so": OfClass(rows=1, recall=1),
        "very good": OfClass(rows=2, recall=1),
    }


def test_texts_that_are_all_different_are_no_classes() -> None:
    targets = [str(number) for number in range(FEW + 1)]
    assert assess_texts(targets, targets).classes == {}


def test_answers_are_seen_against_the_most_frequent_one() -> None:
    right = [["Paris", "paris!"], ["the Seine", "Seine"], ["Paris, France", "Paris"], []]
    found = assess_answers(["Paris", "Seine river", "", ""], right)
    assert found.scores == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3 + 0 + 1) / 4)}
    assert found.constant == span_scores(["Paris"] * 4, right) == {"exact_match": 0.5, "f1": 0.5}
    assert found.classes == {
        "answerable": OfClass(rows=3, recall=pytest.approx(1 / 3), f1=pytest.approx((1 + 2 / 3) / 3)),
        "unanswerable": OfClass(rows=1, recall=1, f1=1),
    }


def test_no_answer_may_be_the_most_frequent_one() -> None:
    found = assess_answers(["Paris", "Paris", "Paris"], [["Paris"], [], []])
    assert found.constant == {"exact_match": pytest.approx(2 / 3), "f1": pytest.approx(2 / 3)}
    assert assess_answers(["Paris"], [["Paris"]]).classes == {}
    assert assess_answers(["Paris"], [[]]).classes["answerable"] == OfClass(rows=0, recall=None)


def test_retrieval_has_scores_alone() -> None:
    found = kind_named("retrieval").assess(np.eye(3), np.arange(3))
    assert found.scores["rsum"] == 600
    assert (found.constant, found.classes) == ({}, {})


class Evaluation:
    """What a Trainer gives, of a model with a tuple of outputs."""

    def __init__(self, predictions: Any, targets: Any) -> None:
        self.predictions, self.label_ids = predictions, targets


def test_the_first_output_of_a_trainers_evaluation_counts() -> None:
    predictions, targets = drawn("single", 3, 0)
    evaluation = Evaluation((predictions, np.zeros(3)), targets)
    data = SimpleNamespace(labels=LabelSpace("single", ()))
    assert kind_named("single").assess_evaluation(evaluation, data) == kind_named("single").assess(predictions, targets)
