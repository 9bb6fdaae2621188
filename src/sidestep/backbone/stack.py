"""One stack of a backbone in one watched pass: its hidden states, their axes and widths, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.utils import ModelOutput

from sidestep.backbone.dummies import Inputs
from sidestep.backbone.facts import Added, Layout, as_tokens
from sidestep.backbone.families import Grid, family_of, prefix_tokens
from sidestep.backbone.structure import Blocks, convolves, is_norm
from sidestep.backbone.trunk import trunk_of
from sidestep.backbone.watch import Call, Seen


@dataclass(frozen=True)
class StackPass:
    """One stack in one pass.

    Attributes:
        owner: the class of the trunk, for messages.
        blocks: of the stack.
        calls: one of each block, in order.
        seen: the whole pass.
        layout, element: as in `StackFacts`.
        output: the stack's own output hidden state, where it is known.
    """

    owner: str
    blocks: Blocks
    calls: list[Call]
    seen: Seen
    layout: Layout
    element: int
    output: Tensor | None

    @property
    def first(self) -> Tensor:
        """(batch, tokens, width): what the first block got."""
        return as_tokens(self.calls[0].given, self.layout)

    @property
    def last(self) -> Tensor:
        """(batch, tokens, width): what the last block gave."""
        return as_tokens(_element(self.calls[-1].output, self.element), self.layout)

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
        calls, sides = _in_order(owner, blocks, seen), _sides(seen.inputs)
        ran = [call.name for call in calls]
        blocks = blocks.visited(None if ran == [name for name, _ in blocks.all] else ran)
        element = _which_element(calls)
        _check_visits(owner, blocks, calls, element)
        layouts: list[Layout] = []
        for call in calls:
            for hidden in (call.given, _element(call.output, element)):
                if not isinstance(hidden, Tensor):
                    raise unfit(owner, f"its block {call.name} takes or gives {_what(hidden)}, no hidden state")
                # embeddings that were made to require one (enable_input_require_grads) are for the fold to judge
                if hidden.requires_grad and not calls[0].given.requires_grad:
                    raise unfit(owner, f"its block {call.name} has a gradient, though the whole model is frozen")
                if not call.grad:
                    raise unfit(
                        owner, f"its block {call.name} runs without autograd, so nothing beside it can be trained"
                    )
                layouts.append(_layout(owner, call.name, hidden, rows, sides))
        if len(several := set(layouts)) > 1 and several != {"grid", "channels"}:
            raise unfit(owner, f"its blocks hand on hidden states of several layouts ({', '.join(sorted(several))})")
        own = seen.of(blocks.root[0]) if blocks.root[0] else []
        output = _hidden(own[-1].output if own else None if blocks.root[0] else seen.output)
        # small maps look like either, and the first one is the largest
        return cls(owner, blocks, calls, seen, layouts[0], element, output)

    @property
    def visits(self) -> tuple[str, ...] | None:
        """As in `StackFacts`."""
        names = [name for name, _ in self.blocks.all]
        return tuple(names) if len(set(names)) < len(names) else None

    @property
    def states(self) -> list[list[Tensor]]:
        """Of each stage, its input and the output of each of its blocks, as (batch, tokens, width)."""
        found, calls = [], iter(self.calls)
        for stage in self.blocks.stages:
            own = [next(calls) for _ in stage]
            states = [own[0].given, *(_element(call.output, self.element) for call in own)]
            found.append([as_tokens(state, self.layout) for state in states])
        return found

    def grids(self, model: nn.Module) -> list[Grid | None]:
        """Rows and columns of the tokens behind each block, where they stand in a grid."""
        trunk, family = trunk_of(model), family_of(model)
        return [
            family.grid(trunk, self.seen.inputs, call.arguments, _element(call.output, self.element))
            for call in self.calls
        ]

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """As in `StackFacts`."""
        return tuple(tuple(state.shape[-1] for state in stage) for stage in self.states)

    def ending(self, added: Added | None, tokens: int) -> tuple[str | None, bool]:
        """The final norm's name, if there is one, and whether the stack's own output is what came out of that place.

        The norm takes the last block's output in, and gives the stack's own output. A model may mix its last block's
        output with earlier ones before the norm. Then the norm is the one that gives the stack's own output.
        """
        states = _views(_element(self.calls[-1].output, self.element), self.layout, added, tokens)
        outputs = [] if self.output is None else _views(self.output, self.layout, None, tokens)
        if _meet(states, outputs):
            return None, True
        if self.output is not None and self.output.ndim == 4 and states[-1].ndim == 3:
            outputs = []  # maps that something behind makes of the tokens
        behind = self.seen.calls[1 + self.seen.calls.index(self.calls[-1]) :]
        norms = [call for call in behind if self._is_norm(call)]
        fed = [call for call in norms if _meet(states, [call.given])]
        for call in fed if not outputs else (*fed, *norms):
            if not outputs or _meet(_views(call.output, self.layout, added, tokens), outputs):
                return call.name, True
        return None, not outputs

    def _is_norm(self, call: Call) -> bool:
        root, module = self.blocks.root
        inside = call.name.removeprefix(f"{root}.")
        if root and inside == call.name:
            return False
        if not (isinstance(call.given, Tensor) and isinstance(call.output, Tensor)):
            return False
        axes = _element(self.calls[-1].output, self.element).ndim  # else it norms what was pooled
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


def _check_visits(owner: str, blocks: Blocks, calls: Sequence[Call], element: int) -> None:
    """Raise where a block runs several times, but not on what the one before gave: on several inputs, it may be."""
    names = [name for name, _ in blocks.all]
    if len(set(names)) == len(names):
        return
    for call, following in pairwise(calls):
        if not _equal(_element(call.output, element), following.given):
            raise unfit(owner, f"its block {following.name} runs several times, and not on what {call.name} gave")


def unfit(owner: str, why: str) -> ValueError:
    """The error of a model that no fold can follow."""
    return ValueError(
        f"{owner} cannot be folded over: {why}. Sidestep needs blocks that run once each, in order, and hand on hidden "
        "states of (batch, tokens, width): attach to a part of the model that does so, or choose another backbone"
    )


def _which_element(calls: Sequence[Call]) -> int:
    """Which element of the blocks' tuples the next block gets, or the first where no element is handed on as it is."""
    for call, following in pairwise(calls):
        if isinstance(call.output, tuple) and isinstance(following.given, Tensor):
            for number, part in enumerate(call.output):
                if isinstance(part, Tensor) and _equal(part, following.given):
                    return number
    return 0


def _element(output: Any, number: int) -> Any:
    return output[number] if isinstance(output, tuple) else output


def _layout(owner: str, name: str, hidden: Tensor, rows: int, sides: tuple[int, int] | None) -> Layout:
    shape = tuple(hidden.shape)
    if hidden.ndim == 3 and shape[0] == rows:
        return "tokens"
    if hidden.ndim == 3 and shape[1] == rows:
        return "tokens first"
    if hidden.ndim == 4 and shape[0] == rows and sides is not None:
        high, wide = sides

        def fits(a: int, b: int) -> float:
            return abs(a * wide - b * high) / (a * wide)

        return "grid" if fits(shape[1], shape[2]) <= fits(shape[2], shape[3]) else "channels"
    raise unfit(owner, f"for {rows} rows its block {name} takes or gives a tensor of shape {shape}")


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


def _what(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _sides(inputs: Inputs) -> tuple[int, int] | None:
    """Rows and columns of images, or None for sounds and texts."""
    given = next(iter(inputs.values()))
    return (given.shape[-2], given.shape[-1]) if given.ndim in (4, 5) else None


# --- all stacks of a pass -------------------------------------------------------------------------------------------


def read_stacks(model: nn.Module, blocks: Sequence[Blocks], seen: Seen, rows: int) -> list[StackPass]:
    """Every stack of a model in one pass of a batch of so many rows.

    Raises:
        ValueError: if no fold can follow one of them.
    """
    stacks = [StackPass.read(type(trunk_of(model)).__name__, own, seen, rows) for own in blocks]
    for stack in stacks:
        _check_widths(stack)
        if stack.layout in ("tokens", "tokens first"):
            _check_grid(model, stack)
    return stacks


def _check_widths(stack: StackPass) -> None:
    """Raise where the width changes within a stage, except in the first block of a convolutional stage."""
    for own, widths in zip(stack.blocks.stages, stack.widths, strict=True):
        inside = widths[1:] if all(convolves(block) for _, block in own) else widths
        if len(set(inside)) > 1:
            raise unfit(stack.owner, f"the width changes from {inside[0]} to {inside[-1]} within a stage")


def _check_grid(model: nn.Module, stack: StackPass) -> None:
    """Raise where tokens become fewer on a grid that is not known, or stand on another than the family table says."""
    counts, grids = [state.shape[1] for stage in stack.states for state in stage], stack.grids(model)
    if not any(grids):
        if (other := next((count for count in counts if count != counts[0]), None)) is not None:
            raise unfit(
                stack.owner,
                f"the number of tokens changes from {counts[0]} to {other} between its blocks, and on which grid they "
                "stand is not known",
            )
        return
    prefix = prefix_tokens(trunk_of(model), family_of(model))
    for call, grid in zip(stack.calls, grids, strict=True):
        hidden = _element(call.output, stack.element)
        if grid is not None and hidden.shape[1] != prefix + grid[0] * grid[1]:
            raise unfit(
                stack.owner,
                f"its block {call.name} gives {hidden.shape[1]} tokens, which are not {prefix} and a grid of "
                f"{grid[0]} x {grid[1]}, as the family table has it",
            )
