from __future__ import annotations

import math

import pytest
from scipy import stats

from sidestep.report.estimates import difference, estimate


def test_the_interval_is_students() -> None:
    values = [0.61, 0.64, 0.6, 0.66]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    found = estimate(values)
    assert (found.low, found.high, found.count) == (pytest.approx(low), pytest.approx(high), 4)


def test_one_value_has_no_interval() -> None:
    found = estimate([0.5])
    assert (found.mean, found.half, found.low, found.high) == (0.5, None, 0.5, 0.5)


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_a_difference_is_paired_by_seed() -> None:
    one, other = {0: 0.70, 1: 0.80, 2: 0.60}, {2: 0.58, 0: 0.69, 1: 0.77}
    found = difference([one], [other])
    paired = estimate([0.01, 0.03, 0.02])
    assert found is not None
    assert (found.mean, found.half, found.count) == (pytest.approx(paired.mean), pytest.approx(paired.half), 3)


def test_without_shared_seeds_the_means_are_compared_as_welch_does() -> None:
    one, other = {0: 1.0, 1: 3.0, 2: 2.0}, {5: 0.0, 6: 4.0}
    found = difference([one], [other])
    expected = stats.ttest_ind([1.0, 3.0, 2.0], [0.0, 4.0], equal_var=False).confidence_interval(0.95)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_tasks_with_the_same_spread_share_their_degrees_of_freedom() -> None:
    seeds = {0: 0.1, 1: 0.2, 2: 0.3}
    zero = dict.fromkeys(seeds, 0.0)
    found = difference([seeds] * 4, [zero] * 4)
    assert found is not None
    # four tasks of three seeds: eight degrees of freedom, and the variance of a mean of four
    assert found.half == pytest.approx(stats.t.ppf(0.975, 8) * 0.1 / 3**0.5 / 2)
    assert found.count == 12


@pytest.mark.parametrize(
    ("one", "other"), [({0: 1.0}, {0: 0.5}), ({0: 1.0, 1: 2.0}, {1: 0.5}), ({0: 1.0}, {1: 0.5, 2: 1})]
)
def test_a_single_seed_has_no_noise_to_judge_by(one: dict[int, float], other: dict[int, float]) -> None:
    assert difference([one], [other]) is None
    assert difference([{0: 1.0, 1: 2.0}, one], [{0: 1.0, 1: 2.5}, other]) is None


def test_seeds_that_change_nothing_leave_no_interval() -> None:
    found = difference([{0: 0.6, 1: 0.6}], [{0: 0.5, 1: 0.5}])
    assert found is not None
    assert (found.mean, found.half) == (pytest.approx(0.1), 0.0)


@pytest.mark.parametrize("size", [1e150, 1e-160])
def test_a_difference_of_odd_sizes_is_finite(size: float) -> None:
    found = difference([{0: size, 1: -size}], [{0: 0.0, 1: size}])
    assert found is not None
    assert found.half is not None
    assert math.isfinite(found.half)
