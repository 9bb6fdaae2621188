"""Solved linear maps, against scikit-learn and by leaving out rows one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from torch import Tensor

from sidestep.data import DataError
from sidestep.kinds import solve as module
from sidestep.kinds.solve import RIDGES, Solution, solve


def rows(count: int, channels: int, outputs: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors of unequal scales and means, and scores that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, channels, generator=generator) * (torch.rand(channels, generator=generator) + 0.1) + 1
    noise = torch.randn(count, outputs, generator=generator)
    scores = vectors @ torch.randn(channels, outputs, generator=generator) * 0.3 + noise
    return vectors, scores - scores.mean(0)


def solved(vectors: Tensor, targets: Tensor, problem: Any, outputs: int, **how: Any) -> Solution:
    return solve(lambda start, end: vectors[start:end], targets, problem, outputs=outputs, **how)


def predicted(found: Solution, vectors: Tensor) -> Tensor:
    return vectors @ found.weight.T + found.bias


def standard(vectors: Tensor) -> np.ndarray:
    wide = vectors.double()
    return ((wide - wide.mean(0)) / wide.std(0, unbiased=False)).numpy()


@pytest.mark.parametrize(("count", "channels"), [(300, 20), (40, 90)], ids=["more rows", "more channels"])
def test_a_regression_is_ridge_with_the_penalty_that_leaving_out_rows_chooses(count: int, channels: int) -> None:
    vectors, scores = rows(count, channels, outputs=1)
    found = solved(vectors, scores[:, 0], "regress", 1)
    theirs = RidgeCV(alphas=[count * penalty for penalty in RIDGES]).fit(standard(vectors), scores[:, 0].numpy())
    assert found.penalty * count == pytest.approx(theirs.alpha_)
    torch.testing.assert_close(
        predicted(found, vectors)[:, 0].double(),
        torch.from_numpy(theirs.predict(standard(vectors))),
        rtol=1e-4,
        atol=1e-4,
    )


def test_the_penalty_has_the_least_error_of_rows_that_were_left_out() -> None:
    vectors, scores = rows(25, 6, outputs=2)
    errors = []
    z = standard(vectors)
    for penalty in RIDGES:
        total = 0.0
        for row in range(25):
            others = [number for number in range(25) if number != row]
            # the penalty is per row of all, as the map of all is what is chosen
            one = Ridge(alpha=25 * penalty).fit(z[others], scores[others].numpy())
            total += float(np.square(one.predict(z[[row]])[0] - scores[row].numpy()).sum())
        errors.append(total)
    assert solved(vectors, scores, "regress", 2).penalty == RIDGES[int(np.argmin(errors))]


@pytest.mark.parametrize(("count", "channels"), [(300, 20), (40, 90)], ids=["more rows", "more channels"])
@pytest.mark.parametrize("balanced", [False, True])
def test_classes_are_logistic_regression_to_convergence(count: int, channels: int, balanced: bool) -> None:
    vectors, scores = rows(count, channels)
    classes = (scores + torch.tensor([0.5, 0, 0])).argmax(1)
    found = solved(vectors, classes, "single", 3, penalty=0.01, balanced=balanced)
    weights = "balanced" if balanced else None
    theirs = LogisticRegression(C=1 / (0.01 * count), max_iter=5000, tol=1e-10, class_weight=weights)
    shares = theirs.fit(standard(vectors), classes.numpy()).predict_proba(standard(vectors))
    torch.testing.assert_close(
        predicted(found, vectors).double().softmax(1), torch.from_numpy(shares), rtol=0, atol=1e-4
    )


def test_several_classes_a_row_are_one_logistic_regression_each() -> None:
    vectors, scores = rows(200, 15)
    several = (scores > 1).float()
    found = solved(vectors, several, "multi", 3, penalty=0.01)
    for number in range(3):
        # the loss is the mean over rows and classes, so a class has a third of it
        theirs = LogisticRegression(C=1 / (3 * 0.01 * 200), max_iter=5000, tol=1e-10)
        shares = theirs.fit(standard(vectors), several[:, number].numpy()).predict_proba(standard(vectors))[:, 1]
        ours = predicted(found, vectors)[:, number].double().sigmoid()
        torch.testing.assert_close(ours, torch.from_numpy(shares), rtol=0, atol=1e-4)


def test_noise_asks_for_a_larger_penalty_than_a_clear_rule() -> None:
    vectors, scores = rows(300, 60)
    clear = solved(vectors, (vectors[:, 0] > 1).long(), "single", 2).penalty
    noise = torch.randint(2, (300,), generator=torch.Generator().manual_seed(1))
    assert solved(vectors, noise, "single", 2).penalty > clear
    assert scores.shape == (300, 3)


@pytest.mark.parametrize("problem", ["regress", "single"])
def test_chunks_and_what_is_held_change_nothing(problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, scores = rows(150, 20)
    targets, outputs = (scores, 3) if problem == "regress" else (scores.argmax(1), 3)
    whole = solved(vectors, targets, problem, outputs)
    monkeypatch.setattr(module, "CHUNK", 7)
    monkeypatch.setattr(module, "HELD", 0)
    parts = solved(vectors, targets, problem, outputs)
    assert parts.penalty == whole.penalty
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-3, atol=1e-4)


def test_the_same_rows_give_the_same_bits() -> None:
    vectors, scores = rows(120, 200)
    one, two = (solved(vectors, scores.argmax(1), "single", 3) for _ in range(2))
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.bias, two.bias)


def test_more_rows_and_channels_than_can_be_taken_lose_some_variance_which_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vectors, scores = rows(300, 120)
    exact = solved(vectors, scores[:, 0], "regress", 1)
    assert exact.lost == 0
    monkeypatch.setattr(module, "LARGEST", 100)
    spanned = solved(vectors, scores[:, 0], "regress", 1)
    assert 0 < spanned.lost < 0.3
    both = torch.stack([predicted(one, vectors)[:, 0] for one in (exact, spanned)])
    assert torch.corrcoef(both)[0, 1] > 0.9


def test_a_channel_that_is_constant_says_nothing() -> None:
    vectors, scores = rows(80, 10)
    more = torch.cat([vectors, torch.full((80, 2), 3.5)], dim=1)
    plain, found = (solved(one, scores.argmax(1), "single", 3, penalty=0.1) for one in (vectors, more))
    torch.testing.assert_close(found.weight[:, :10], plain.weight, rtol=1e-3, atol=1e-4)
    assert found.weight[:, 10:].abs().max() < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_states_that_are_no_numbers_are_refused(value: float) -> None:
    vectors, scores = rows(30, 5)
    vectors[3, 2] = value
    with pytest.raises(DataError, match="states are not all finite numbers, so nothing can be solved"):
        solved(vectors, scores.argmax(1), "single", 3)


def test_a_class_with_one_row_is_refused() -> None:
    vectors, _ = rows(30, 5)
    with pytest.raises(DataError, match=r"2 of 4 classes have fewer than two training rows \(the first is number 2\)"):
        solved(vectors, torch.tensor([0] * 15 + [1] * 14 + [2]), "single", 4)


def test_targets_that_are_no_numbers_are_refused() -> None:
    vectors, _ = rows(30, 5)
    with pytest.raises(DataError, match="targets are not all finite"):
        solved(vectors, torch.full((30,), float("nan")), "regress", 1)


def test_states_that_are_the_same_for_all_rows_are_refused() -> None:
    with pytest.raises(DataError, match="the same states for all 12 training rows"):
        solve(lambda start, end: torch.ones(end - start, 5), torch.arange(12) % 2, "single", outputs=2)


@pytest.mark.parametrize("channels", [6, 400])  # the Gram matrix of channels, and that of rows
def test_memory_below_one_gram_matrix_says_what_it_needs(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40, channels, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(module.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    side = min(channels, 40)
    with pytest.raises(DataError, match=rf"{side} x {side} needs .* and 1000 B of memory are free. Read fewer levels"):
        solve(lambda start, end: x[start:end], x[:, 0], "regress", outputs=1)
