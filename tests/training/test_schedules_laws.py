"""What holds of every schedule that can be asked for: where it begins and ends, its bounds, and no jumps."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestep.training.schedules import rate_factor
from sidestep.training.settings import Schedule, TrainSettings

RATE = 0.25
LEAST = 1e-9  # what rounding may add up to
shares = st.sampled_from((0.0, 1.0)) | st.floats(0, 4)  # of the rate


@st.composite
def settings_of(draw: st.DrawFn, *schedules: str) -> TrainSettings:
    """Any settings of these schedules that are not refused."""
    schedule, epochs = draw(st.sampled_from(schedules)), draw(st.integers(2, 12))
    how: dict[str, Any] = {"start_rate": RATE * draw(shares), "end_rate": RATE * draw(shares)}
    if schedule == "step":
        how["milestones"] = sorted(draw(st.sets(st.integers(1, epochs - 1), min_size=1)))
    most = 0.49 if schedule == "cosine_epochs" else 0.99
    forms = {
        "warmup": st.floats(0, most),
        "warmup_epochs": st.integers(0, int(most * epochs)),
        "warmup_steps": st.integers(0, 150),
    }
    form = draw(st.sampled_from(list(forms)[: 2 if schedule == "cosine_epochs" else 3]))
    return TrainSettings(output=Path("out"), schedule=schedule, epochs=epochs, **how, **{form: draw(forms[form])})


def factors(settings: TrainSettings, per_epoch: int) -> tuple[list[float], int, int, float, float]:
    """A run's factors and two epochs' more; its steps, those of its warm-up, and the factors of start and end."""
    factor, total = rate_factor(settings, RATE, per_epoch), settings.epochs * per_epoch
    found = [factor(step) for step in range(total + 2 * per_epoch)]
    return found, total, settings.rise(per_epoch), settings.start_rate / RATE, settings.end_rate / RATE


@given(settings_of(*get_args(Schedule)), st.integers(1, 9))
def test_a_rate_stays_between_its_start_its_height_and_its_end(settings: TrainSettings, per_epoch: int) -> None:
    found, _, rise, start, end = factors(settings, per_epoch)
    lowest = {"step": 0.1 ** len(settings.milestones), "constant": 1.0}.get(settings.schedule, end)
    assert min([start, 1.0, lowest]) - LEAST <= min(found)
    assert max(found) <= max([start if rise else 1.0, 1.0, end]) + LEAST


@given(settings_of("linear", "cosine", "constant"), st.integers(1, 9))
def test_it_rises_to_its_height_and_goes_to_its_end_without_a_jump(settings: TrainSettings, per_epoch: int) -> None:
    found, total, rise, start, end = factors(settings, per_epoch)
    assert found[0] == (start if rise else 1)
    for before, after in pairwise(found[: rise + 1]):
        assert after - before == pytest.approx((1 - start) / rise, abs=LEAST)
    if rise >= total:  # a warm-up that is longer than the run
        return
    assert found[rise] == 1
    end = 1 if settings.schedule == "constant" else end
    assert found[total:] == pytest.approx([end] * (2 * per_epoch), abs=LEAST)
    for before, after in pairwise(found[rise : total + 1]):
        assert abs(after - before) <= math.pi / 2 * abs(1 - end) / (total - rise) + LEAST
        assert (after - before) * (end - 1) >= -LEAST


@given(settings_of("cosine_epochs"), st.integers(1, 9))
def test_a_cosine_by_epochs_is_set_once_an_epoch_and_still_falls_after_the_warm_up(
    settings: TrainSettings, per_epoch: int
) -> None:
    found, total, rise, start, end = factors(settings, per_epoch)
    epochs = found[::per_epoch]
    assert found == [rate for rate in epochs for _ in range(per_epoch)]
    assert found[0] == (start if rise else 1)
    assert found[total - rise :] == pytest.approx([end] * len(found[total - rise :]), abs=LEAST)
    assert found[rise] != end or end == 1


@given(settings_of("step"), st.integers(1, 9))
def test_steps_divide_the_rate_by_ten_after_their_epochs(settings: TrainSettings, per_epoch: int) -> None:
    found, total, rise, *_ = factors(settings, per_epoch)
    for step in range(rise, total):
        passed = [epoch for epoch in settings.milestones if epoch <= step // per_epoch]
        assert found[step] == pytest.approx(0.1 ** len(passed))


@given(st.floats(0, 0.999), st.integers(1, 40))
def test_a_warm_up_that_leaves_no_cosine_by_epochs_is_refused_in_any_form(share: float, epochs: int) -> None:
    rise = int(share * epochs)
    for form in ({"warmup": share}, {"warmup_epochs": rise}):
        if 2 * rise < epochs:
            TrainSettings(output=Path("out"), schedule="cosine_epochs", epochs=epochs, **form)
        else:
            with pytest.raises(ValueError, match="Warm up for less than half of the epochs"):
                TrainSettings(output=Path("out"), schedule="cosine_epochs", epochs=epochs, **form)
