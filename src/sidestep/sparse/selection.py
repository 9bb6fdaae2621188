"""Exactly the largest entries over many tensors, in chunks: projection to a density, without a sort or a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

CHUNK = 1 << 18
"""Entries that are worked on at a time."""

Sweep = Callable[[], Iterable[tuple[str, int, Tensor]]]
"""Called for each look at the entries, gives them in the same order: a tensor's name, where in it a chunk begins, and
the chunk's entries, flat."""

_HALF = 16  # bits of a magnitude that one sweep decides on
_INFINITY = 0x7F800000


def sweep_over(tensors: Mapping[str, Tensor], chunk: int = CHUNK) -> Sweep:
    """The entries of tensors that are there."""

    def sweep() -> Iterator[tuple[str, int, Tensor]]:
        for name, tensor in tensors.items():
            for start, part in enumerate(tensor.detach().reshape(-1).split(chunk)):
                yield name, start * chunk, part

    return sweep


def largest(sweep: Sweep, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Where the `count` entries largest in magnitude over all tensors are, and their values.

    Of equal ones at the border, those that come first are taken. Zeros are never taken. If there are fewer nonzeros
    than `count`, all nonzeros are taken. Magnitudes are compared in float32, whose bits are ordered as whole numbers.
    The first sweep counts the upper half of these bits. The second sweep counts the lower half where the border lies.
    The third sweep collects.

    Args:
        sweep: see `Sweep`. It is called three times.
        count: how many, at least 0.

    Returns:
        For each tensor its positions (sorted, int64, in the flat tensor) and the entries there.

    Raises:
        ValueError: if an entry is not finite.
    """
    upper = _histogram(31 - _HALF, (_magnitudes(part) >> _HALF for _, _, part in sweep()))
    if bool(upper[_INFINITY >> _HALF :].any()):
        raise ValueError("an entry is not finite, so no entries are the largest: was training stable?")
    high, above = _border(upper, count)
    lower = _histogram(_HALF, (_lower_half(part, high) for _, _, part in sweep()))
    low, within = _border(lower, count - above)
    border = (high << _HALF) + low
    ties = count - above - within if border else 0
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, start, part in sweep():
        bits = _magnitudes(part)
        places = (bits > border).nonzero().flatten()
        if ties:
            equal = (bits == border).nonzero().flatten()[:ties]
            ties -= len(equal)
            places = torch.cat([places, equal]).sort().values
        found.setdefault(name, []).append((places + start, part[places]))
    return {name: _joined(parts) for name, parts in found.items()}


def _magnitudes(part: Tensor) -> Tensor:
    """The bits of the float32 magnitudes, int32, in the same order."""
    return part.abs().float().view(torch.int32)


def _lower_half(part: Tensor, high: int) -> Tensor:
    """The lower half of those magnitudes whose upper half is `high`."""
    bits = _magnitudes(part)
    return bits[bits >> _HALF == high] & ((1 << _HALF) - 1)


def _histogram(bits: int, parts: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(1 << bits, dtype=torch.int64)
    for part in parts:
        total += torch.bincount(part, minlength=1 << bits).cpu()
    return total


def _border(histogram: Tensor, count: int) -> tuple[int, int]:
    """The bin in which the `count`-th entry from above lies (0 if there are fewer), and the entries above that bin."""
    at_least = histogram.flip(0).cumsum(0).flip(0)
    index = max(int((at_least >= count).sum()) - 1, 0)
    return index, int(at_least[index] - histogram[index])


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    positions, values = zip(*parts, strict=True)
    return torch.cat(positions), torch.cat(values)
