import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from sidestep.kinds import kind_named
from sidestep.metrics import (
    GREATER_IS_BETTER,
    METRICS,
    ComputeMetrics,
    ScoreWarning,
    normalised,
    scores,
    span_scores,
    text_scores,
)

RANDOM = np.random.default_rng(0)


def logits_of(classes: list[int], width: int) -> np.ndarray:
    """Random logits (rows, width) whose largest is the class's."""
    logits = RANDOM.normal(size=(len(classes), width))
    logits[np.arange(len(classes)), classes] = 10.0
    return logits


def test_every_kind_gives_its_metrics_and_its_primary_one():
    found = {
        "single": scores("single", logits_of([0, 1, 1], 2), np.array([0, 1, 0])),
        "multi": scores("multi", RANDOM.normal(size=(4, 3)), RANDOM.integers(0, 2, (4, 3))),
        "regress": scores("regress", RANDOM.normal(size=5), RANDOM.normal(size=5)),
    }
    for kind, values in found.items():
        assert tuple(values) == METRICS[kind]
        assert kind_named(kind).best in kind_named(kind).metrics == METRICS[kind]
        assert all(type(value) is float for value in values.values())
        assert set(values) <= set(GREATER_IS_BETTER)


def test_two_classes_by_hand():
    # true positives 2, false positives 1, false negatives 1, true negatives 3
    chosen, true = [1, 1, 1, 0, 0, 0, 0], np.array([1, 1, 0, 1, 0, 0, 0])
    found = scores("single", logits_of(chosen, 2), true, names=("no", "yes"))
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["f1_macro"] == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert found["f1_micro"] == pytest.approx(5 / 7)
    assert found["matthews"] == pytest.approx((2 * 3 - 1 * 1) / (3 * 3 * 4 * 4) ** 0.5)


def test_f1_is_of_the_second_class_and_only_of_two():
    found = scores("single", logits_of([0, 0, 0], 2), np.array([0, 0, 1]))
    assert found["f1"] == 0.0
    assert "f1" not in scores("single", logits_of([0, 1, 2], 3), np.array([0, 1, 2]))


def test_one_class_everywhere_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores("single", logits_of([0, 0], 3), np.array([0, 0]))
    assert found == {"accuracy": 1.0, "f1_macro": 1.0, "f1_micro": 1.0, "matthews": 0.0}


def test_several_classes_by_hand():
    logits = np.array([[2.0, -1.0, 0.5], [-3.0, 0.1, -0.2], [1.0, -1.0, -1.0]])
    true = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    found = scores("multi", logits, true)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["f1_micro"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["f1_macro"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)


def test_numbers_by_hand():
    predictions, targets = np.array([[1.0], [2.0], [4.0], [3.0]]), np.array([1.0, 2.0, 3.0, 5.0])
    found = scores("regress", predictions, targets)
    assert found["pearson"] == pytest.approx(np.corrcoef(predictions[:, 0], targets)[0, 1])
    assert found["spearman"] == pytest.approx(stats.spearmanr(predictions[:, 0], targets).statistic)
    assert found["mse"] == pytest.approx(5 / 4)


@pytest.mark.parametrize(
    ("predictions", "targets", "what"),
    [([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], "predictions of 3"), ([1.0], [1.0], "predictions and targets of 1")],
)
def test_an_undefined_correlation_is_zero_and_says_so(predictions, targets, what):
    with pytest.warns(ScoreWarning, match=f"{what} rows are all the same") as caught:
        found = scores("regress", np.array(predictions), np.array(targets))
    assert len(caught) == 1
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    assert found["mse"] == pytest.approx(np.mean((np.array(predictions) - np.array(targets)) ** 2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ranking", np.zeros(2), np.zeros(2)), "kind='ranking': choose single, multi, regress"),
        (("regress", np.zeros(2), np.zeros(3)), "2 predictions for 3 targets"),
        (("regress", np.zeros(0), np.zeros(0)), "at least one"),
        (
            ("single", np.array([[np.nan, 0.0], [0.0, 1.0]]), np.zeros(2)),
            "predictions are not finite in 1 of 2",
        ),
        (("regress", np.zeros(2), np.array([np.inf, 0.0])), "targets are not finite in 1 of 2 rows"),
        (("regress", np.zeros((2, 3)), np.zeros(2)), r"predictions have shape \(2, 3\), targets \(2,\)"),
        (("single", np.zeros(2), np.zeros(2)), r"should be \(rows, classes\) and \(rows\)"),
        (("multi", np.zeros((2, 3)), np.zeros(2)), r"should be \(rows, classes\) and \(rows, classes\)"),
        (("single", np.zeros((2, 3)), np.zeros(2), ("a", "b")), "3 columns, but there are 2 classes: a, b"),
        (("single", np.zeros((2, 2)), np.array([0, 2])), "targets are 0 to 2: they should be 0 to 1"),
        (("multi", np.zeros((1, 2)), np.array([[-1, 0]])), "targets are -1 to 0: they should be 0 to 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        scores(*arguments)


def test_compute_metrics_takes_the_logits_and_can_be_sent_to_another_process():
    logits, targets = logits_of([0, 1, 1], 2), np.array([0, 1, 0])
    compute = pickle.loads(pickle.dumps(ComputeMetrics("single", ("no", "yes"))))
    expected = scores("single", logits, targets)
    for predictions in (logits, (logits, np.zeros((3, 7)))):
        assert compute(SimpleNamespace(predictions=predictions, label_ids=targets)) == expected


def test_written_texts_are_compared_whole_and_by_words() -> None:
    found = text_scores(["a good  film", "Good film!", "bad", "the"], ["a good film", "good film", "a bad book", "a"])
    # whole: white space does not count, case does; by words: 1, 1, 2 * 1 / (1 + 2), and two texts without a word
    assert found == {"exact_match": 0.25, "token_f1": pytest.approx((1 + 1 + 2 / 3 + 1) / 4)}
    assert text_scores(["bad bad"], ["bad"])["token_f1"] == pytest.approx(2 / 3)
    assert text_scores([""], ["bad"]) == {"exact_match": 0.0, "token_f1": 0.0}


@pytest.mark.parametrize(
    ("found", "answers", "match", "f1"),
    [
        ("the Normans!", ["Normans"], 1, 1),  # articles, case and punctuation do not count
        ("10th and 11th centuries", ["in the 10th and 11th centuries"], 0, 2 * 4 / (4 + 5)),
        ("Rollo", ["King Charles", "Rollo of Normandy", "Duke Rollo"], 0, 2 * 1 / (1 + 2)),  # the best of them
        ("b b a", ["b c"], 0, 2 * 1 / (2 + 2)),  # a word counts as often as both have it
        ("", [], 1, 1),
        ("France", [], 0, 0),
        ("", ["France"], 0, 0),
        ("the", ["France"], 0, 0),
        ("", ["the", "France"], 0, 0),  # "the" has no word, so it is no answer beside another
        ("", ["the"], 1, 1),
        ("well\u2013known", ["a\u2013known"], 0, 0),
        ("a\u2013known", ["\u2013known"], 1, 1),  # an article ends where no letter follows
    ],
)
def test_answers_are_compared_as_squads_evaluation_does(
    found: str, answers: list[str], match: float, f1: float
) -> None:
    assert span_scores([found], [answers]) == {"exact_match": match, "f1": pytest.approx(f1)}


def test_scores_of_answers_are_means_over_the_questions() -> None:
    found = span_scores(["France", "in France", "", "Rollo"], [["France"], ["France"], [], ["France"]])
    assert found == {"exact_match": 0.5, "f1": pytest.approx((1 + 2 / 3 + 1 + 0) / 4)}
    assert normalised("The  Normans, of a land") == "normans of land"
    with pytest.raises(ValueError, match="1 answers for 2 questions"):
        span_scores(["a"], [["a"], ["b"]])


def test_texts_and_targets_have_to_be_as_many() -> None:
    with pytest.raises(ValueError, match="1 texts for 2 targets"):
        text_scores(["a"], ["a", "b"])


def test_recalls_by_hand() -> None:
    # two images with two texts each, and one with one; the second text of image 0 is closer to image 1
    near = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.1], [0.2, 0.7, 0.6], [0.1, 0.2, 0.9], [0.0, 0.1, 0.5]])
    found = scores("retrieval", near, np.array([0, 0, 1, 1, 2]))
    assert found["t2i_r1"] == pytest.approx(100 * 3 / 5)  # texts 0, 2 and 4
    assert found["i2t_r1"] == pytest.approx(100 * 1 / 3)  # image 0; text 1 is before image 1's, text 3 before image 2's
    assert (found["t2i_r5"], found["i2t_r10"]) == (100, 100)
    assert found["rsum"] == pytest.approx(60 + 100 / 3 + 400)
    assert scores("retrieval", np.zeros((12, 12)), np.arange(12))["rsum"] == 0  # of equal ones the wrong come first
    with pytest.raises(ValueError, match="1 of 3 images have no text"):
        scores("retrieval", near, np.array([0, 0, 1, 1, 1]))
