"""What holds of the selection for any tensors: it is a stable sort's, whatever the precision, ties and chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_selection import by_sorting
from torch import Tensor

from sidestep.sparse.selection import largest, sweep_over

FLOATS = {torch.float32: 32, torch.float16: 16, torch.bfloat16: 32, torch.float64: 32}


@st.composite
def tensors(draw: st.DrawFn, *, finite: bool = True) -> dict[str, Tensor]:
    """Tensors of any shapes and precisions, with many equal entries."""
    found = {}
    for name in draw(st.lists(st.text(max_size=3), unique=True, min_size=1, max_size=4)):
        dtype = draw(st.sampled_from(list(FLOATS)))
        numbers = st.floats(width=FLOATS[dtype], allow_nan=not finite, allow_infinity=not finite)
        few = draw(st.lists(numbers | st.sampled_from((0.0, -0.0, 1.0, -1.0)), min_size=1, max_size=6))
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        picked = torch.tensor(few, dtype=torch.float64).to(dtype)
        if finite:
            picked = picked.nan_to_num(posinf=1, neginf=-1)  # bfloat16 rounds the largest of float32 up
        index = draw(
            st.lists(
                st.integers(0, len(few) - 1), min_size=torch.Size(shape).numel(), max_size=torch.Size(shape).numel()
            )
        )
        found[name] = picked[torch.tensor(index, dtype=torch.int64)].reshape(shape)
    return found


@given(tensors(), st.integers(0, 80), st.integers(1, 9))
def test_the_largest_of_any_tensors_are_those_of_a_stable_sort(
    entries: dict[str, Tensor], count: int, chunk: int
) -> None:
    found = largest(sweep_over(entries, chunk), count)
    assert {name: positions.tolist() for name, (positions, _) in found.items()} == by_sorting(entries, count)
    for name, (positions, values) in found.items():
        assert torch.equal(values, entries[name].flatten()[positions])


@given(tensors(finite=False), st.integers(0, 80))
def test_what_is_not_finite_is_refused_wherever_it_is(entries: dict[str, Tensor], count: int) -> None:
    if all(bool(tensor.isfinite().all()) for tensor in entries.values()):
        largest(sweep_over(entries), count)
    else:
        with pytest.raises(ValueError, match="not finite"):
            largest(sweep_over(entries), count)
