"""Sparse diffs: exact in the weights and out of them, with gradients and state for the nonzeros alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sidestep.sparse.diff import SparseDiff


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"first": (4, 5), "second": (3,), "third": (2, 3, 4)}
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def placed(dtype: torch.dtype = torch.float32, count: int = 12, values: torch.dtype = torch.float32) -> SparseDiff:
    diff = SparseDiff(tensors(dtype), count, values)
    diff.place_at_random(seed=1)
    with torch.no_grad():
        diff.values.copy_(torch.randn(count, generator=torch.Generator().manual_seed(2)))
    diff.write()
    return diff


def dense(diff: SparseDiff) -> dict[str, Tensor]:
    """The diff as dense tensors, entry by entry."""
    out = {name: torch.zeros(shape) for name, shape in diff.shapes.items()}
    for name, (positions, values) in diff.entries().items():
        for position, value in zip(positions.tolist(), values, strict=True):
            out[name].view(-1)[position] = value
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_are_their_own_values_plus_the_diff_and_back_bit_for_bit(dtype: torch.dtype) -> None:
    before, diff = tensors(dtype), placed(dtype)
    change = dense(diff)
    assert sum(int((part != 0).sum()) for part in change.values()) == 12
    for name, tensor in diff.tensors.items():
        assert torch.equal(tensor, (before[name].float() + change[name]).to(dtype))
    for _ in range(3):
        diff.write()
    diff.revert()
    assert all(torch.equal(tensor.detach(), before[name]) for name, tensor in diff.tensors.items())


def test_placing_again_gives_the_old_entries_back() -> None:
    before, diff = tensors(), placed()
    diff.place({"second": torch.tensor([0, 2]), "first": (torch.tensor([7]), torch.tensor([1.5]))})
    assert {name: part.tolist() for name, part in diff.support().items()} == {"first": [7], "second": [0, 2]}
    assert diff.values.tolist() == [1.5, 0, 0]
    change = diff.tensors["first"] - before["first"]
    assert change.view(-1).nonzero().flatten().tolist() == [7]
    assert torch.equal(diff.tensors["third"], before["third"])


@pytest.mark.parametrize("contiguous", [True, False])
def test_gradients_are_gathered_in_float32_and_the_dense_ones_freed_one_by_one(contiguous: bool) -> None:
    diff = placed()
    if not contiguous:
        first = diff.tensors["first"]
        first.data = first.data.t().contiguous().t()
    alive: list[int] = []
    held = list(diff.tensors.values())
    for tensor in held:
        tensor.register_post_accumulate_grad_hook(lambda _: alive.append(sum(t.grad is not None for t in held)))
    factors = {name: torch.randn(shape) for name, shape in diff.shapes.items()}
    for _ in range(2):
        sum((factors[name] * tensor.square()).sum() for name, tensor in diff.tensors.items()).backward()
    assert alive == [0] * 6  # looked at behind the diff's own hook, at each tensor
    assert all(tensor.grad is None for tensor in diff.tensors.values())
    for name, positions in diff.support().items():
        part = next(part for part in diff._parts if part.name == name)
        exact = (4 * factors[name] * diff.tensors[name]).detach().reshape(-1)[positions]
        torch.testing.assert_close(diff.values.grad[part.low : part.high], exact)


@pytest.mark.parametrize("fused", [True, False])
def test_what_any_optimizer_did_is_in_the_weights_at_the_next_write(fused: bool) -> None:
    before, diff = tensors(), placed()
    optimizer = torch.optim.AdamW([diff.values], lr=0.1, fused=fused)
    diff.values.grad = torch.ones_like(diff.values)
    optimizer.step()
    diff.write()
    change = dense(diff)
    assert all(torch.equal(t, before[name] + change[name]) for name, t in diff.tensors.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_values_are_added_as_the_file_will_hold_them(dtype: torch.dtype) -> None:
    before, diff = tensors(), placed(values=dtype)
    assert diff.values.dtype == torch.float32
    for name, (positions, values) in diff.entries().items():
        assert torch.equal(values, values.to(dtype).float())
        assert torch.equal(diff.tensors[name].view(-1)[positions], before[name].view(-1)[positions] + values)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda diff: pickle.loads(pickle.dumps(diff))], ids=["copy", "pickle"])
def test_a_copy_is_a_diff_of_its_own(how: Any) -> None:
    diff = placed()
    twin = how(diff)
    sum(tensor.sum() for tensor in twin.tensors.values()).backward()
    assert torch.equal(twin.values.grad, torch.ones(12))
    assert diff.values.grad is None
    twin.revert()
    before = tensors()
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.tensors.items())
    assert not torch.equal(diff.tensors["first"], before["first"])


def test_unplaced_it_changes_nothing() -> None:
    before, diff = tensors(), SparseDiff(tensors(), 5, torch.float32)
    assert not diff.is_placed
    diff.write()
    diff.revert()
    assert all(torch.equal(tensor, before[name]) for name, tensor in diff.tensors.items())
    sum(tensor.sum() for tensor in diff.tensors.values()).backward()
    assert diff.is_idle
    assert all(tensor.grad is None for tensor in [diff.values, *diff.tensors.values()])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="48 nonzeros in weights of 47 entries: choose 1 to 47"):
        SparseDiff(tensors(), 48, torch.float32)
    diff = placed()
    with pytest.raises(
        ValueError, match="a diff of fourth, but there is no such tensor: there are first, second, third"
    ):
        diff.place({"fourth": torch.tensor([0])})
    with pytest.raises(ValueError, match="positions 1 to 3 in second, which has 3 entries"):
        diff.place({"second": torch.tensor([1, 3])})
    with pytest.raises(ValueError, match="without nonzeros"):
        diff.place({})
    assert len(diff.positions) == 12
