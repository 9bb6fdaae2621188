"""Averages in 8 bits keep a value to a tenth of itself, and say what they need."""

from __future__ import annotations

import sys

import pytest
import torch

from sidestep.sparse.moments import BLOCK, EightBit, Float32


@pytest.mark.parametrize("signed", [True, False])
def test_a_part_is_kept_to_a_tenth_of_itself_and_the_rest_stays(signed: bool) -> None:
    averages = EightBit()
    like = torch.zeros(3 * BLOCK + 5)
    state = averages.zeros("average", like, signed=signed)
    assert not averages.read(state, "average", slice(0, len(like)), signed=signed).any()
    scale = torch.logspace(-9, -3, BLOCK + 5)  # a wide range in one block
    values = scale * torch.rand(BLOCK + 5, generator=torch.Generator().manual_seed(0)).add(0.5)
    values = values if not signed else values * torch.where(torch.arange(BLOCK + 5) % 2 == 0, 1.0, -1.0)
    span = slice(2 * BLOCK, len(like))
    averages.write(values, state, "average", span, signed=signed)
    assert not averages.read(state, "average", slice(0, 2 * BLOCK), signed=signed).any()
    found = averages.read(state, "average", span, signed=signed)
    for part in (slice(0, BLOCK), slice(BLOCK, None)):
        large = values[part].abs() > 1e-2 * values[part].abs().max()
        torch.testing.assert_close(found[part][large], values[part][large], rtol=0.1, atol=0.0)


def test_bytes_are_a_quarter_and_a_scale_for_each_block() -> None:
    like = torch.zeros(10 * BLOCK)
    kept = EightBit().zeros("average", like, signed=True).values()
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) == 10 * (BLOCK + 4)


def test_averages_in_float32_are_changed_in_place() -> None:
    averages = Float32()
    state = averages.zeros("average", torch.ones(4), signed=True)
    averages.read(state, "average", slice(1, 3), signed=True).add_(2.0)
    assert state["average"].tolist() == [0.0, 2.0, 2.0, 0.0]


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "sidestep\[quantize\]"'):
        EightBit()
