"""What holds of a sparse diff of any tensors: it is in the weights as it should be, and out of them bit for bit."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from sidestep.sparse.codec import DTYPES, SparseTensor, decode, encode
from sidestep.sparse.diff import SparseDiff

Entries = dict[str, tuple[Tensor, Tensor]]


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8).clone()


def assert_bits(tensors: dict[str, nn.Parameter], wanted: dict[str, Tensor]) -> None:
    assert all(torch.equal(bits(tensor), bits(wanted[name])) for name, tensor in tensors.items())


@st.composite
def numbers(draw: st.DrawFn, count: int, dtype: torch.dtype) -> Tensor:
    """Any numbers of a precision, infinities and both zeros among them; a NaN has no bits that casts would keep."""
    size = count * dtype.itemsize
    drawn = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8).view(dtype)
    return torch.where(drawn.isnan(), 1, drawn)


@st.composite
def weights(draw: st.DrawFn) -> dict[str, nn.Parameter]:
    """Tensors of one precision or several, some not contiguous, with an entry at least."""
    found = {}
    kinds = draw(st.lists(st.sampled_from((*DTYPES, torch.float64)), min_size=1, max_size=2))
    for name in ("c", "a", "d.b")[: draw(st.integers(1, 3))]:
        shape = draw(st.lists(st.integers(0 if found else 1, 4), max_size=3))
        tensor = draw(numbers(math.prod(shape), draw(st.sampled_from(kinds)))).reshape(shape)
        if shape and draw(st.booleans()):
            tensor = tensor.transpose(0, -1).contiguous().transpose(0, -1)
        found[name] = nn.Parameter(tensor)
    return found


@st.composite
def entries(draw: st.DrawFn, tensors: dict[str, nn.Parameter]) -> Entries:
    """Positions in some of the tensors, and values there."""
    found: Entries = {}
    for name, tensor in tensors.items():
        places = draw(st.sets(st.integers(0, tensor.numel() - 1), max_size=8)) if tensor.numel() else ()
        found[name] = (torch.tensor(sorted(places), dtype=torch.int64), draw(numbers(len(places), torch.float32)))
    assume(any(len(places) for places, _ in found.values()))
    return found


def summed(before: dict[str, Tensor], diff: SparseDiff) -> dict[str, Tensor]:
    """The weights with a diff, entry by entry."""
    found = {name: tensor.clone() for name, tensor in before.items()}
    for name, (places, values) in diff.entries().items():
        for place, value in zip(places.tolist(), values.to(diff.value_dtype).float(), strict=True):
            where = np.unravel_index(place, tuple(found[name].shape))
            # an entry that the diff names has the sum in the widest precision of all tensors
            found[name][where] = found[name][where].to(diff.base.dtype) + value
    return found


@given(weights(), st.sampled_from(DTYPES), st.data())
def test_wherever_it_is_placed_the_weights_are_the_sum_and_their_own_again(
    tensors: dict[str, nn.Parameter], dtype: torch.dtype, data: st.DataObject
) -> None:
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    diff = SparseDiff(tensors, 1, dtype)
    for _ in range(2):
        diff.place(data.draw(entries(tensors)))
        with torch.no_grad():
            diff.values.add_(data.draw(numbers(len(diff.values), torch.float32)))
        diff.write()
        diff.write()
        wanted = summed(before, diff)
        assert all(torch.equal(tensor.nan_to_num(7), wanted[name].nan_to_num(7)) for name, tensor in tensors.items())
        with diff.lifted():
            assert_bits(tensors, before)
        again = SparseDiff({name: nn.Parameter(tensor.clone()) for name, tensor in before.items()}, 1, dtype)
        again.place(diff.entries())
        assert_bits(again.tensors, dict(tensors))
    diff.revert()
    assert_bits(tensors, before)


@given(weights(), st.sampled_from(DTYPES), st.data())
def test_what_goes_through_the_codec_gives_the_same_weights(
    tensors: dict[str, nn.Parameter], dtype: torch.dtype, data: st.DataObject
) -> None:
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    diff = SparseDiff(tensors, 1, dtype)
    diff.place(data.draw(entries(tensors)))
    parts = {
        name: SparseTensor(shape=diff.shapes[name], positions=places, values=values)
        for name, (places, values) in diff.entries(rounded=False).items()
    }
    rounded = diff.values.detach().to(dtype)
    assume(not bool((rounded.isinf() & diff.values.isfinite()).any()))  # which the codec refuses
    read = decode(encode(parts, dtype))
    again = SparseDiff({name: nn.Parameter(tensor) for name, tensor in before.items()}, 1, dtype)
    again.place({name: (part.positions, part.values) for name, part in read.items()})
    assert torch.equal(again.positions, diff.positions)
    assert_bits(again.tensors, dict(tensors))
