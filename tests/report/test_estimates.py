from __future__ import annotations

import pytest
from scipy import stats

from sidestep.report.estimates import estimate


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
