"""One stack of a backbone in one watched pass: its hidden states, their axes and widths, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import ModelOutput

from sidestep.backbone.calls import part_of
from sidestep.backbone.dummies import Inputs
from sidestep.backbone.facts import Added, Layout, as_tokens
from sidestep.backbone.families import family_of, prefix_tokens
from sidestep.backbone.grids import Grid, counted_grid, counted_prefix, fits, sides
from sidestep.backbone.structure import Blocks, is_norm
from sidestep.backbone.trunk import trunk_of
from sidestep.backbone.watch import Call, Seen

UNLIKE = 0.25
"""By how much the first map of a stack may be longer or wider than the image. Rounding makes it so."""


class Ending(NamedTuple):
    """The fields of `StackFacts` of these names."""

    norm: str | None
    ends: bool
    mixed: bool
    again: bool = False
    after: int | None = None


@dataclass(frozen=True)
class StackPass:
    """One stack in one pass.

    Attributes:
        owner: the class of the trunk, for messages.
        blocks: of the stack.
        stages: the calls of each stage's blocks, in order. A block that runs several times has a call for each.
        seen: the whole pass.
        layout, element: as in `StackFacts`.
        output: the stack's own output hidden state, where it is known.
    """

    owner: str
    blocks: Blocks
    stages: list[list[Call]]
    seen: Seen
    layout: Layout
    element: int
    output: Tensor | None

    @property
    def calls(self) -> list[Call]:
        """Of all stages, in order."""
        return [call for stage in self.stages for call in stage]

    @property
    def first(self) -> Tensor:
        """(batch, tokens, width): what the first block got."""
        return as_tokens(self.calls[0].given, self.layout)

    @property
    def last(self) -> Tensor:
        """(batch, tokens, width): what the last block gave."""
        return as_tokens(self._given(self.calls[-1]), self.layout)

    @classmethod
    def read(cls, owner: str, blocks: Blocks, seen: Seen, rows: int) -> StackPass:
        """Follow a pass through the blocks of a stack.

        Args:
            owner: the class of the trunk.
            blocks: of the stack.
            seen: the pass.
            rows: of its batch.

        Raises:
            ValueError: if a block does not run once and in order, or hands on what is no hidden state.
        """
        calls = _in_order(owner, blocks, seen)
        element = _which_element(calls)
        if not blocks.certain or len({call.name for call in calls}) < len(calls):
            _check_chain(owner, blocks, calls, element)
        layout = _layout(owner, _handed_on(owner, calls, element), seen.inputs, rows)
        own = seen.of(blocks.root[0]) if blocks.root[0] else []
        output = _hidden(own[-1].output if own else None if blocks.root[0] else seen.output)
        if output is None and not blocks.certain and _text_tokens(seen.inputs) is not None:
            raise unfit(owner, "it gives no last hidden state")
        return cls(owner, blocks, _stages(blocks, calls, layout, element), seen, layout, element, output)

    @property
    def states(self) -> list[list[Tensor]]:
        """Of each stage, its input and the output of each of its blocks, as (batch, tokens, width)."""
        return [
            [as_tokens(own[0].given, self.layout), *(as_tokens(self._given(call), self.layout) for call in own)]
            for own in self.stages
        ]

    def _given(self, call: Call) -> Tensor:
        """The hidden state that a block gave."""
        state: Tensor = part_of(call.output, self.element)
        return state

    def grids(self, model: nn.Module) -> list[Grid | None]:
        """Rows and columns of the tokens behind each block, where the model or the family table tells them."""
        trunk, family = trunk_of(model), family_of(model)
        return [family.grid(trunk, self.seen.inputs, call.arguments, self._given(call)) for call in self.calls]

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Of the blocks of each stage."""
        return tuple(tuple(call.name for call in own) for own in self.stages)

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """As in `StackFacts`."""
        return tuple(tuple(state.shape[-1] for state in stage) for stage in self.states)

    @property
    def reshapes(self) -> bool:
        """As in `StackFacts`."""
        return any(_shape(states[0]) != _shape(states[1]) for states in self.states)

    def prefixes(self, model: nn.Module) -> tuple[tuple[int, int], ...] | None:
        """As in `StackFacts`."""
        image = sides(self.seen.inputs)
        counts = {state.shape[1] for stage in self.states for state in stage}
        if image is None or len(counts) == 1 or self.layout in ("grid", "channels"):
            return None
        grids = iter(self.grids(model))
        found = []
        for states in self.states:
            told = [next(grids) for _ in states[1:]][-1]
            given, last = states[0].shape[1], states[-1].shape[1]
            behind = counted_prefix(image, last) if not fits(told, last) else last - told[0] * told[1]
            found.append((behind if given == last else counted_prefix(image, given), behind))
        return tuple(found)

    def ending(self, added: Added | None, tokens: int) -> Ending:
        """Where the stack ends.

        The norm takes the last block's output in, and gives the stack's own output. A model may mix its last block's
        output with earlier ones before the norm. Then the norm is the one that gives the stack's own output.
        """
        states = _views(self._given(self.calls[-1]), self.layout, added, tokens)
        outputs = [] if self.output is None else _views(self.output, self.layout, None, tokens)
        if _meet(states, outputs):
            return Ending(None, True, False)
        if self.output is not None and self.output.ndim == 4 and states[-1].ndim == 3:
            outputs = []  # maps that something behind makes of the tokens
        behind = self.seen.calls[1 + self.seen.calls.index(self.calls[-1]) :]
        norms = [call for call in behind if self._is_norm(call)]
        fed = [call for call in norms if _meet(states, [call.given])]
        for call in fed if not outputs else (*fed, *norms):
            if not outputs or _meet(_views(call.output, self.layout, added, tokens), outputs):
                again = sum(other.name == call.name for other in fed) > 1
                return Ending(call.name, True, call not in fed, again)
        return Ending(None, not outputs, False, after=self._width_after() if outputs else None)

    @property
    def is_reshaped(self) -> bool:
        """Whether the stack's own output has other tokens or another width than what the last block gave."""
        return self.output is not None and self.output.ndim == 3 and self.output.shape != self.last.shape

    def _width_after(self) -> int | None:
        """As `StackFacts.after`."""
        own = self.output
        if own is None or own.ndim != 3 or len(own) != len(self.first) or not isinstance(self.seen.output, ModelOutput):
            return None
        return own.shape[-1]

    def _is_norm(self, call: Call) -> bool:
        root, module = self.blocks.root
        inside = call.name.removeprefix(f"{root}.")
        if root and inside == call.name:
            return False
        if not (isinstance(call.given, Tensor) and isinstance(call.output, Tensor)):
            return False
        axes = self._given(self.calls[-1]).ndim  # else it norms what was pooled
        return (
            is_norm(module.get_submodule(inside)) and call.given.shape == call.output.shape and call.output.ndim == axes
        )


def _in_order(owner: str, blocks: Blocks, seen: Seen) -> list[Call]:
    names = [name for name, _ in blocks.all]
    calls = [call for call in seen.calls if call.name in set(names)]
    ran = [call.name for call in calls]
    if ran == names or (len(ran) > len(names) and set(ran) == set(names)):  # the latter share their weights
        return calls
    if missed := [name for name in names if name not in ran]:
        what = "none of its blocks runs" if len(missed) == len(names) else f"its block {missed[0]} does not run"
        raise unfit(owner, f"{what} in a pass (layers that are skipped, or called in parts)")
    raise unfit(owner, f"its blocks run in another order than they stand in ({', '.join(ran)})")


def _check_chain(owner: str, blocks: Blocks, calls: Sequence[Call], element: int) -> None:
    """Raise where a block does not run on what the one before it in its stage gave.

    One that runs several times may run on several inputs, and modules that are no blocks run side by side.
    """
    number = {name: number for number, stage in enumerate(blocks.stages) for name, _ in stage}
    for call, following in pairwise(calls):
        given, output = following.given, part_of(call.output, element)
        if number[call.name] == number[following.name] and not _same(output, given):
            raise unfit(owner, f"its block {following.name} does not run on what {call.name} gave")


def _stages(blocks: Blocks, calls: Sequence[Call], layout: Layout, element: int) -> list[list[Call]]:
    """The calls of each stage: as the blocks' lists have it, and a new one where a block changes tokens or width."""
    number = {name: number for number, stage in enumerate(blocks.stages) for name, _ in stage}
    stages: list[list[Call]] = []
    for before, call in zip([None, *calls], calls, strict=False):
        given, output = (as_tokens(state, layout) for state in (call.given, part_of(call.output, element)))
        if before is None or number[before.name] != number[call.name] or _shape(given) != _shape(output):
            stages.append([])
        stages[-1].append(call)
    return stages


def _shape(states: Tensor) -> tuple[int, int]:
    """How many tokens there are, and of which width."""
    return states.shape[1], states.shape[2]


def unfit(owner: str, why: str) -> ValueError:
    """The error of a model that no fold can follow."""
    return ValueError(
        f"{owner} cannot be folded over: {why}. Sidestep needs blocks that run once each, in order, and hand on hidden "
        "states of (batch, tokens, width): attach to a part of the model that does so, or choose another backbone"
    )


def _which_element(calls: Sequence[Call]) -> int:
    """Which element of the blocks' tuples the next block gets, or the first where no element is handed on as it is."""
    for call, following in pairwise(calls):
        if isinstance(call.output, tuple | list) and isinstance(following.given, Tensor):
            for number, part in enumerate(call.output):
                if isinstance(part, Tensor) and _equal(part, following.given):
                    return number
    return 0


def _handed_on(owner: str, calls: Sequence[Call], element: int) -> list[tuple[str, Tensor]]:
    """What each block was given and gave, with the block's name.

    Raises:
        ValueError: if it is no hidden state, or nothing beside the blocks could be trained.
    """
    found: list[tuple[str, Tensor]] = []
    for call in calls:
        for hidden in (call.given, part_of(call.output, element)):
            if not isinstance(hidden, Tensor):
                raise unfit(owner, f"its block {call.name} takes or gives {_what(hidden)}, no hidden state")
            # embeddings that were made to require one (enable_input_require_grads) are for the fold to judge
            if hidden.requires_grad and not calls[0].given.requires_grad:
                raise unfit(owner, f"its block {call.name} has a gradient, though the whole model is frozen")
            if not call.grad:
                raise unfit(owner, f"its block {call.name} runs without autograd, so nothing beside it can be trained")
            found.append((call.name, hidden))
    return found


def _layout(owner: str, states: Sequence[tuple[str, Tensor]], inputs: Inputs, rows: int) -> Layout:
    """The axes of hidden states of the named blocks, for inputs of so many rows.

    Raises:
        ValueError: if they are none of those that are known, or not the same everywhere.
    """
    image, text = sides(inputs), _text_tokens(inputs)
    found: set[Layout] = set()
    for name, hidden in states:
        shape = tuple(hidden.shape)
        if hidden.ndim == 3 and shape[0] == rows:
            found.add("width first" if shape[2] == text != shape[1] else "tokens")
        elif hidden.ndim == 3 and shape[1] == rows:
            found.add("tokens first")
        elif hidden.ndim == 4 and shape[0] == rows and image is not None:
            found.add("grid")
        else:
            raise unfit(owner, f"for {rows} rows its block {name} takes or gives a tensor of shape {shape}")
    if len(found) > 1:
        raise unfit(owner, f"its blocks hand on hidden states of several layouts ({', '.join(sorted(found))})")
    (layout,) = found
    if layout != "grid" or image is None:
        return layout
    maps = _maps_layout(image, [hidden for _, hidden in states])
    if maps is None:
        name, hidden = states[0]
        raise unfit(owner, f"for images of {image} its block {name} takes a tensor of shape {tuple(hidden.shape)}")
    return maps


def _maps_layout(image: tuple[int, int], maps: Sequence[Tensor]) -> Layout | None:
    """Whether maps of four axes have their channels last or first: two are shaped as the image. None: no two are."""

    def unlike(first: int) -> list[float]:
        return [abs(one.shape[first] * image[1] / (one.shape[first + 1] * image[0]) - 1) for one in maps]

    last, front = unlike(1), unlike(2)
    better, other = (last, front) if sum(last) < sum(front) else (front, last)  # small ones look like either
    if better[0] > UNLIKE or any(a > UNLIKE >= b for a, b in zip(better, other, strict=True)):
        return None
    return "grid" if better is last else "channels"


def _text_tokens(inputs: Inputs) -> int | None:
    """How many tokens the texts of a batch have, or None for images and sounds."""
    given = next(iter(inputs.values()))
    return None if given.is_floating_point() or given.ndim != 2 else given.shape[1]


def _hidden(output: Any) -> Tensor | None:
    """The last hidden state among the outputs of a trunk or a stack, or None if it is not told."""
    if isinstance(output, ModelOutput):
        found = output.get("last_hidden_state")
        return found if isinstance(found, Tensor) else None
    found = output[0] if isinstance(output, tuple) and output else output
    return found if isinstance(found, Tensor) and found.ndim > 2 else None


def _views(hidden: Any, layout: Layout, added: Added | None, tokens: int) -> list[Tensor]:
    """Forms in which a hidden state may be handed on: as it is, as tokens, and as those of the text alone."""
    if not isinstance(hidden, Tensor):
        return []
    views = [hidden]
    if layout != "tokens" and hidden.ndim in (3, 4):
        views.append(as_tokens(hidden, layout))
    if added is not None:
        views.append(views[-1][:, added.before : added.before + tokens])
    return views


def _meet(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return any(isinstance(b, Tensor) and _equal(a, b) for a in some for b in others)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, or, without values, whether they share their memory."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if isinstance(a, FakeTensor):
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return torch.equal(a, b)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and _equal(a, b)


def _what(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


# --- all stacks of a pass -------------------------------------------------------------------------------------------


def read_stacks(model: nn.Module, blocks: Sequence[Blocks], seen: Seen, rows: int) -> list[StackPass]:
    """Every stack of a model in one pass of a batch of so many rows.

    Raises:
        ValueError: if no fold can follow one of them.
    """
    stacks = [StackPass.read(type(trunk_of(model)).__name__, own, seen, rows) for own in blocks]
    for stack in stacks:
        if stack.layout not in ("grid", "channels"):
            _check_grid(model, stack)
    return stacks


def _check_grid(model: nn.Module, stack: StackPass) -> None:
    """Raise where tokens become fewer, and no images are read, or stand on another grid than the family table says."""
    counts, grids = [state.shape[1] for states in stack.states for state in states], stack.grids(model)
    other = next((count for count in counts if count != counts[0]), None)
    if other is not None and sides(stack.seen.inputs) is None:
        raise unfit(
            stack.owner,
            f"the number of tokens changes from {counts[0]} to {other} between its blocks, and which of them become "
            "one is not known",
        )
    prefix = prefix_tokens(trunk_of(model), family_of(model))
    for call, grid in zip(stack.calls, grids, strict=True) if other is None else ():
        if grid is not None and counts[0] != prefix + grid[0] * grid[1]:
            raise unfit(
                stack.owner,
                f"its block {call.name} gives {counts[0]} tokens. They are not {prefix} and a grid of {grid[0]} x "
                f"{grid[1]}, as the family table has it",
            )


def check_rows(model: nn.Module, stack: StackPass, turned: StackPass | None) -> None:
    """Raise where a grid that is counted is not filled row by row.

    Args:
        model: the bare model.
        stack: of a pass of images.
        turned: the same, with another upper right corner (`corner`).
    """
    prefixes, image = stack.prefixes(model), sides(stack.seen.inputs)
    if prefixes is None or image is None or turned is None or any(stack.grids(model)):
        return
    prefix = prefixes[0][0]
    rows, columns = counted_grid(image, stack.first.shape[1] - prefix)
    moved = (stack.first - turned.first).abs().amax((0, 2))[prefix:].unflatten(0, (rows, columns))
    if moved[0, -1] <= max(moved[0, 0], moved[-1, 0], moved[-1, -1]):  # a stem of convolutions moves those beside it
        raise unfit(
            stack.owner,
            "its tokens become fewer, and they do not stand row by row, so which of them become one is not known",
        )


def corner(inputs: Inputs, stack: StackPass) -> Inputs:
    """The inputs with the upper right cell of the first block's grid turned to its negative."""
    image = sides(inputs)
    assert image is not None
    rows, columns = counted_grid(image, stack.first.shape[1] - counted_prefix(image, stack.first.shape[1]))
    name = next(iter(inputs))
    other = inputs[name].clone()
    other[..., : image[0] // rows, image[1] - image[1] // columns :] *= -1
    return {**inputs, name: other}
