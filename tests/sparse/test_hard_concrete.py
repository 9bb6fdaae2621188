"""The hard-concrete gate, its penalty and its noise."""

from __future__ import annotations

import math

import pytest
import torch

from sidestep.sparse.hard_concrete import HardConcrete, Noise, Penalty, sigmoid_slope

STRETCHES = [(-1.5, 1.5), (-0.1, 1.1), (-0.5, 2.0)]


@pytest.mark.parametrize(("low", "high"), STRETCHES)
def test_the_slope_is_autograds(low: float, high: float) -> None:
    gate, generator = HardConcrete(low=low, high=high), torch.Generator().manual_seed(0)
    alpha = (3 * torch.randn(400, generator=generator, dtype=torch.float64)).requires_grad_()
    u = torch.rand(400, generator=generator, dtype=torch.float64)
    s = torch.sigmoid(u.log() - (1 - u).log() + alpha)
    z = (s * (high - low) + low).clamp(0, 1)
    z.sum().backward()
    found, slope = gate.mask_and_slope(alpha.detach(), u)
    torch.testing.assert_close(found, z.detach())
    torch.testing.assert_close(slope, alpha.grad)
    assert torch.equal(found, gate.mask(alpha.detach(), u))
    assert 0 < int((found == 0).sum()) < int((found < 1).sum()) < 400


@pytest.mark.parametrize(("low", "high"), STRETCHES)
@pytest.mark.parametrize("alpha", [-2.0, 0.0, 5.0])
def test_as_many_gates_are_open_as_the_probability_says(low: float, high: float, alpha: float) -> None:
    gate, values = HardConcrete(low=low, high=high), torch.full((40_000,), alpha)
    p = gate.nonzero(values[0]).item()
    share = (gate.mask(values, Noise(1)(0, 0, 0, values)) > 0).double().mean().item()
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / len(values)) + 1e-4


def test_the_papers_stretch_gives_its_figures() -> None:
    gate = HardConcrete()
    p = gate.nonzero(torch.tensor([5.0, 0.0]))
    torch.testing.assert_close(p, torch.tensor([0.9933, 0.5]), atol=1e-4, rtol=0)


def test_noise_at_its_ends_gives_finite_gates() -> None:
    z, slope = HardConcrete().mask_and_slope(torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert z.tolist() == [0.0, 1.0]
    assert slope.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["product", "sum"])
@pytest.mark.parametrize("structured", [False, True])
def test_the_factors_are_the_penaltys_derivatives(kind: str, structured: bool) -> None:
    gate, penalty = HardConcrete(), Penalty(weight=0.3, kind=kind)
    alpha = torch.linspace(-3, 4, 11, dtype=torch.float64, requires_grad=True)
    group = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    p, of_group = gate.nonzero(alpha), gate.nonzero(group) if structured else None
    value = penalty.value(p.sum(), of_group)
    value.backward()
    with torch.no_grad():
        torch.testing.assert_close(sigmoid_slope(p) * penalty.entry_factor(of_group), alpha.grad)
        if structured:
            torch.testing.assert_close(sigmoid_slope(of_group) * penalty.group_factor(p.sum()), group.grad)


def test_noise_is_made_again_and_differs_by_everything() -> None:
    like = torch.zeros(1000)
    noise = [Noise(seed)(*place, like) for seed in (0, 1) for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    assert torch.equal(noise[0], Noise(0)(0, 0, 0, like))
    for number, one in enumerate(noise):
        for other in noise[:number]:
            assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 0.15
    assert Noise(0)(0, 0, 0, like.bfloat16()).dtype == torch.float32


def test_noise_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Noise(0)(0, 0, 0, torch.zeros(3))
    assert torch.equal(torch.get_rng_state(), before)
