"""A sparse diff of a model's weights, trained with memory for its nonzeros alone.

Forward and backward use the model's own dense weights, into which the diff is written. As soon as a tensor's dense
gradient is there, it is cut down to the diff's entries and freed. So one tensor's dense gradient is alive at a time,
and gradients and optimizer state have as many entries as the diff. After SIFT (Song et al., arXiv 2312.11875), whose
hooks take the slice of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle

from sidestep.messages import some

UNPLACED = -1
"""Stands for a position that is not chosen yet."""

GradientSight = Callable[[str, Tensor], None]
"""Called in backward with a tensor's name and its dense gradient, which is freed afterwards."""


class Part(NamedTuple):
    """The nonzeros of one tensor.

    They are the diff's entries `low` to `high`. The tensor begins at `start` of all entries.
    """

    name: str
    start: int
    low: int
    high: int


class SparseDiff(nn.Module):
    """What is added to tensors at some of their entries, with one list of positions over all tensors, laid end to end.

    The tensors hold the sum of their own values and the diff's, in their own precision. Own values are kept, never
    computed by subtraction, so `revert` is exact in every precision.

    Attributes:
        values: (nonzeros,) float32, trained.
        positions: (nonzeros,) int64, ascending. All are `UNPLACED` until `place` is called.
        base: (nonzeros,) the tensors' own values there.
        value_dtype: to which values are rounded before they are added. Gradients pass through the rounding.
    """

    values: nn.Parameter
    positions: Tensor
    base: Tensor

    def __init__(self, tensors: Mapping[str, nn.Parameter], nonzeros: int, value_dtype: torch.dtype) -> None:
        """Args are the tensors by name, how many entries will be nonzero, and `value_dtype`.

        Raises:
            ValueError: if there are fewer entries than `nonzeros`, or a tensor does not hold plain numbers.
        """
        super().__init__()
        self._tensors = dict(tensors)
        self.value_dtype = value_dtype
        self._sight: GradientSight | None = None
        if not 0 < nonzeros <= self.total:
            raise ValueError(f"{nonzeros} nonzeros in weights of {self.total} entries: choose 1 to {self.total}")
        self._parts: list[Part] = []
        self._handles: list[RemovableHandle] = []
        first = next(iter(self._tensors.values()))
        self.values = nn.Parameter(torch.zeros(nonzeros, dtype=torch.float32, device=first.device))
        self.register_buffer("positions", torch.full((nonzeros,), UNPLACED, device=first.device))
        widest = first.dtype
        for tensor in self._tensors.values():
            widest = torch.promote_types(widest, tensor.dtype)
        self.register_buffer("base", torch.zeros(nonzeros, dtype=widest, device=first.device), persistent=False)
        self.hook()

    # --- what it holds ---------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Entries of all tensors."""
        return sum(tensor.numel() for tensor in self._tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors by name, in the order in which they are laid end to end."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    @property
    def starts(self) -> dict[str, int]:
        """Where each tensor begins in all of them laid end to end."""
        starts, start = {}, 0
        for name, tensor in self._tensors.items():
            starts[name] = start
            start += tensor.numel()
        return starts

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        """All tensors by name."""
        return dict(self._tensors)

    @property
    def is_placed(self) -> bool:
        """Whether the positions have been chosen."""
        return bool(self._parts)

    @property
    def is_idle(self) -> bool:
        """Whether gradients are gathered for positions that have not been chosen."""
        return self.gathers and not self._parts

    @property
    def gathers(self) -> bool:
        """Whether the tensors' gradients are gathered for `values` and freed."""
        return bool(self._handles)

    def support(self) -> dict[str, Tensor]:
        """The positions in each tensor that has nonzeros, by its name: ascending, in the flat tensor."""
        return {part.name: self._index(part) for part in self._parts}

    def entries(self, *, rounded: bool = True) -> dict[str, tuple[Tensor, Tensor]]:
        """The same with the values there, rounded to `value_dtype` or as they are trained."""
        values = (self._rounded() if rounded else self.values).detach()
        return {part.name: (self._index(part), values[part.low : part.high]) for part in self._parts}

    def covers(self, parameter: Tensor) -> bool:
        """Whether a parameter is one of the tensors, so that it requires a gradient without being trained itself."""
        return any(parameter is tensor for tensor in self._tensors.values())

    # --- where it is -----------------------------------------------------------------------------------------------

    def place(self, entries: Mapping[str, tuple[Tensor, Tensor] | Tensor]) -> None:
        """Choose the positions, and with them the values.

        While the positions change, the tensors hold their own values again.

        Args:
            entries: for each tensor with nonzeros its ascending positions in the flat tensor, with or without the
                values there (without: zeros). If there are fewer or more than before, `values` is a new parameter.

        Raises:
            ValueError: if a tensor or a position is not there.
        """
        self.place_flat(*self.flat(entries))

    def flat(self, entries: Mapping[str, tuple[Tensor, Tensor] | Tensor]) -> tuple[Tensor, Tensor]:
        """Positions in all tensors laid end to end and values, of entries as `place` takes them.

        Raises:
            ValueError: as `place`.
        """
        positions, values, starts = [], [], self.starts
        for name in sorted(entries, key=lambda name: starts.get(name, 0)):
            given = entries[name]
            index, value = given if isinstance(given, tuple) else (given, torch.zeros(len(given)))
            if name not in starts:
                raise ValueError(f"a diff of {name}, but there is no such tensor: there are {some(self._tensors)}")
            numel = self._tensors[name].numel()
            if len(index) and (int(index[0]) < 0 or int(index[-1]) >= numel):
                raise ValueError(f"positions {int(index[0])} to {int(index[-1])} in {name}, which has {numel} entries")
            positions.append(index.to(self.positions.device) + starts[name])
            values.append(value.to(self.values))
        if not sum(map(len, positions)):
            raise ValueError("a diff without nonzeros: give at least one position")
        return torch.cat(positions), torch.cat(values)

    @torch.no_grad()
    def place_flat(self, positions: Tensor, values: Tensor | None = None) -> None:
        """As `place`, with positions in all tensors laid end to end."""
        self.revert()
        if len(positions) != len(self.values):
            self.values = nn.Parameter(self.values.new_zeros(len(positions)))
        self.values.copy_(torch.zeros(len(positions)) if values is None else values)
        self.positions = positions.to(self.positions.device, copy=True)
        self._parts = list(self._cut(self.starts))
        own = [_at(self._tensors[part.name], self._index(part)).to(self.base.dtype) for part in self._parts]
        self.base = torch.cat([self.base[:0], *own])
        if not self._handles:
            self.hook()
        self.write()

    def place_at_random(self, seed: int) -> None:
        """A uniformly random choice of positions, with zeros as values."""
        if self.positions.is_meta or isinstance(self.positions, FakeTensor):  # a plan's have no values
            share, low = len(self.positions) / self.total, 0
            for name, start in self.starts.items():
                high = round((start + self._tensors[name].numel()) * share)
                self._parts += [Part(name, start, low, high)] if high > low else []
                low = high
            return
        chosen = np.random.default_rng(seed).choice(self.total, len(self.positions), replace=False, shuffle=False)
        self.place_flat(torch.from_numpy(np.sort(chosen)))

    # --- into the weights and out of them --------------------------------------------------------------------------

    @torch.no_grad()
    def write(self) -> None:
        """Write the tensors' own values plus the diff's.

        Done before every pass, because nothing tells of all changes: fused optimizers leave a parameter's version as it
        is. Written around autograd's check for the same reason: two passes before a backward write the same twice.
        """
        rounded = self._rounded()
        for part in self._parts:
            span = slice(part.low, part.high)
            _put(self._tensors[part.name], self._index(part), self.base[span] + rounded[span])
        _forget_casts()

    @torch.no_grad()
    def revert(self) -> None:
        """Give the tensors their own values back, bit for bit."""
        for part in self._parts:
            _put(self._tensors[part.name], self._index(part), self.base[part.low : part.high])
        _forget_casts()

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """The tensors have their own values meanwhile."""
        self.revert()
        try:
            yield
        finally:
            self.write()

    # --- gradients -------------------------------------------------------------------------------------------------

    def watch(self, sight: GradientSight | None) -> None:
        """Show somebody the dense gradients of all tensors before they are freed, where None ends it."""
        self._sight = sight

    def hook(self) -> None:
        """Have the tensors' gradients gathered and freed.

        All tensors require a gradient, also where there are no nonzeros. An optimizer's list of parameters has to be
        the same wherever the diff is.
        """
        self.unhook()
        for name, tensor in self._tensors.items():
            hook = tensor.requires_grad_().register_post_accumulate_grad_hook(partial(self._gather, name))
            self._handles.append(hook)

    def unhook(self) -> None:
        """Leave the tensors' gradients to others, without a change of the tensors' flags."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _gather(self, name: str, tensor: Tensor) -> None:
        """Add a dense gradient's entries to those of `values`, and free it."""
        gradient, tensor.grad = tensor.grad, None
        part = next((part for part in self._parts if part.name == name), None)
        assert gradient is not None
        with torch.no_grad():
            if part is not None:
                if self.values.grad is None:
                    self.values.grad = torch.zeros_like(self.values)
                self.values.grad[part.low : part.high].add_(_at(gradient, self._index(part)))
            if self._sight is not None:
                self._sight(name, gradient)

    # --- small parts -----------------------------------------------------------------------------------------------

    def _rounded(self) -> Tensor:
        """The values as a file will hold them, in their own precision."""
        if self.value_dtype == torch.float32:
            return self.values
        return self.values.to(self.value_dtype).to(self.values.dtype)

    def _index(self, part: Part) -> Tensor:
        return self.positions[part.low : part.high] - part.start

    def _cut(self, starts: Mapping[str, int]) -> Iterator[Part]:
        """The positions' share of each tensor that has any."""
        edges = torch.tensor([*starts.values(), self.total], device=self.positions.device)
        cuts = torch.searchsorted(self.positions, edges).tolist()
        for (name, start), low, high in zip(starts.items(), cuts[:-1], cuts[1:], strict=True):
            if high > low:
                yield Part(name, start, low, high)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.hook()  # a copied parameter has left its hooks behind


def _at(tensor: Tensor, index: Tensor) -> Tensor:
    """The entries of the flat tensor at `index`."""
    tensor = tensor.detach()
    return tensor.view(-1).index_select(0, index) if tensor.is_contiguous() else tensor.take(index)


def _forget_casts() -> None:
    """Within one autocast context weights are cast once, and a change written around autograd is not noticed."""
    if not torch.compiler.is_compiling():
        torch.clear_autocast_cache()


def _put(tensor: Tensor, index: Tensor, values: Tensor) -> None:
    """Write entries of the flat tensor, rounded to its precision."""
    data, values = tensor.data, values.to(tensor.dtype)
    if data.is_contiguous():
        data.view(-1).index_copy_(0, index, values)
    else:
        data.put_(index, values)
