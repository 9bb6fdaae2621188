"""The largest entries over many tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sidestep.sparse.selection import largest, sweep_over


def by_sorting(tensors: dict[str, Tensor], count: int) -> dict[str, list[int]]:
    """The same by a stable sort of everything."""
    flat = torch.cat([tensor.flatten().float().abs() for tensor in tensors.values()])
    order = torch.sort(flat, descending=True, stable=True).indices[:count]
    chosen = order[flat[order] > 0].sort().values
    found, start = {}, 0
    for name, tensor in tensors.items():
        inside = chosen[(chosen >= start) & (chosen < start + tensor.numel())]
        found[name] = (inside - start).tolist()
        start += tensor.numel()
    return found


def random_tensors(dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"matrix": (13, 7), "vector": (5,), "one": (), "cube": (2, 3, 4)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 2, 40, 120, 121, 500])
def test_exactly_the_largest_are_found(dtype: torch.dtype, count: int) -> None:
    tensors = random_tensors(dtype)
    found = largest(sweep_over(tensors, 8), count)
    assert {name: positions.tolist() for name, (positions, _) in found.items()} == by_sorting(tensors, count)
    for name, (positions, values) in found.items():
        assert torch.equal(values, tensors[name].flatten()[positions])
    assert sum(len(positions) for positions, _ in found.values()) == min(count, 121)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("count", range(0, 13, 2))
def test_ties_go_to_the_first_and_the_count_is_kept(chunk: int, count: int) -> None:
    tensors = {"a": torch.tensor([1.0, -2.0, 1.0, 0.0]), "b": torch.tensor([[-1.0, 1.0], [2.0, 1.0]])}
    found = largest(sweep_over(tensors, chunk), count)
    assert {name: positions.tolist() for name, (positions, _) in found.items()} == by_sorting(tensors, count)


def test_magnitudes_of_every_size_are_told_apart() -> None:
    """Next to one another in float32, subnormal numbers and the largest included."""
    values = torch.tensor([1e-45, 3e-45, 1.0, 1.0 + 2**-23, -1.0 - 2**-22, 3.4e38, -3.3e38, 0.0])
    for count in range(9):
        found = largest(sweep_over({"": values}, 3), count)
        assert found[""][0].tolist() == by_sorting({"": values}, count)[""]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        largest(sweep_over({"a": torch.tensor([1.0, value])}), 1)
