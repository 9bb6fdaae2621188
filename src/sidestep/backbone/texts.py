"""What texts show of a model: which tokens see later ones, where a text stands, and what padding does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sidestep.backbone import dummies
from sidestep.backbone.calls import argument_names, bound
from sidestep.backbone.dummies import Inputs, Side, Texts
from sidestep.backbone.facts import Added, Causal, Layout, Left, as_tokens, said_causal
from sidestep.backbone.stack import StackPass, read_stacks, unfit
from sidestep.backbone.structure import Blocks
from sidestep.backbone.trunk import is_encoder_decoder, trunk_of
from sidestep.backbone.untouched import untouched
from sidestep.backbone.watch import Seen, attempt, watch

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
WIDE = (torch.float32, torch.float64)
LATER_MOVES = {True: (3e-5, 1e-3), False: (1e-3, 5e-2)}
"""Shares of the last token's own change, in float32 and in 16 bits. Earlier tokens that move by less stay as they are:
where experts get batches of tokens, a later one moves earlier ones a little. By more, they move. Between the two the
table decides, because rounding may move as much as a weak attention."""
CHANGED = (-1, -2, 0)
"""Which token is another one, row after row."""
TYPES_MOVE = 1e-3
"""From which share of a token's own change a change of those before it counts, where types may tell what is seen."""
PADDING_MOVES = {True: 1e-5, False: 5e-2}
"""From which share of a token's state a change by padding, or by another text of its row, counts; in float32 and in 16
bits."""
SHIFT_MOVES = {True: 1e-3, False: 0.3}
"""From which share other positions count. Rotary ones are the same but for rounding, which depth adds up: in bfloat16
to 0.13 on SmolLM2's 30 blocks. Learned ones moved MiniLM's tokens by more than their size."""


@dataclass(frozen=True)
class TextPass:
    """One watched pass of a text and of the same text with one other token.

    Its rows are the text, and the text with another last token, with another last but one, and with another first one.
    Where there is a decoder, it has three more. In those, the same tokens of the decoder's text are other ones.

    Attributes:
        model: the bare model.
        blocks: its stacks.
        texts: makes its inputs.
        text, target: what encoder (or the lone stack) and decoder read. None: there is no decoder.
        seen: the pass.
    """

    model: nn.Module
    blocks: Sequence[Blocks]
    texts: Texts
    text: Tensor
    target: Tensor | None
    seen: Seen

    @classmethod
    def of(cls, model: nn.Module, blocks: Sequence[Blocks], texts: Texts) -> TextPass:
        """Run it."""
        text = texts.text(texts.short, seed=1)
        target = texts.text(texts.short, seed=2) if len(blocks) > 1 else None
        rows, decoder = [text, *(texts.changed(text, place) for place in CHANGED)], None
        if target is not None:
            decoder = [*[target] * len(rows), *(texts.changed(target, place) for place in CHANGED)]
            rows += [text] * len(CHANGED)
        seen = watch(trunk_of(model), blocks, texts.batch(rows, decoder=decoder))
        return cls(model, blocks, texts, text, target, seen)

    @cached_property
    def stacks(self) -> list[StackPass]:
        """As they are in this pass."""
        return read_stacks(self.model, self.blocks, self.seen, rows=1 + len(self.blocks) * len(CHANGED))

    def again(self, inputs: Inputs) -> list[StackPass] | None:
        """The stacks in a pass of other rows, or None if the model does not take these inputs."""
        seen = attempt(trunk_of(self.model), watch, trunk_of(self.model), self.blocks, inputs)
        rows = len(next(iter(inputs.values())))
        return None if seen is None else read_stacks(self.model, self.blocks, seen, rows)

    def added(self) -> list[Added]:
        """Where the texts stand, in each stack."""
        found = [self._added(number, stack) for number, stack in enumerate(self.stacks)]
        return [replace(found[0], pictures=True)] if found == [Added()] and self._pictures_stand_in_front() else found

    def _added(self, number: int, stack: StackPass) -> Added:
        """Where a text stands among a stack's tokens: where another last token moves what the first block gets.

        Raises:
            ValueError: if a text does not stand in one place, because then no mask could be brought to the tokens.
        """
        first, length = stack.first, len(self.text)
        moved = (first[0] != first[_changed(number)]).any(-1).nonzero().flatten().tolist()
        if first.shape[1] == length and (len(moved) != 1 or moved == [length - 1]):
            return Added()
        if len(moved) != 1 or moved[0] < length - 1:
            raise unfit(
                stack.owner,
                f"of a text of {length} tokens its {stack.blocks.name} makes {first.shape[1]}, and which of them "
                "belongs to which token of the text cannot be told",
            )
        own = None if stack.output is None or stack.output.ndim != 3 else stack.output.shape[1]
        kept = own == first.shape[1] and self._adds_as_many(number, first.shape[1] - length)
        return Added(before=moved[0] - (length - 1), kept=kept, cropped=own == length)

    def _adds_as_many(self, number: int, extra: int) -> bool:
        """Whether a stack adds this many tokens to a longer text too.

        Else the stack fills up to some length, with padding.
        """
        longer = self.texts.text(len(self.text) + 1, seed=4)
        decoder = None if self.target is None else [longer] * 2
        stacks = self.again(self.texts.batch([longer] * 2, decoder=decoder))
        return stacks is not None and stacks[number].first.shape[1] - len(longer) == extra

    # --- which tokens see later ones --------------------------------------------------------------------------------

    def causal(self, added: Sequence[Added]) -> list[Causal]:
        """Of each stack, whether earlier tokens stay as they are when the last one changes."""
        found = [self._causal(*each) for each in zip(range(len(added)), self.stacks, added, strict=True)]
        if found == ["yes"] and (self._types_see_each_other() or self._pictures_see_each_other()):
            return ["partly"]
        return found

    def _causal(self, number: int, stack: StackPass, added: Added) -> Causal:
        states = stack.last[:, added.before : added.before + len(self.text)].float()
        # a last token may be alone in its block of a blockwise attention, and then the one before it ends another
        last, before, first = ((states[0] - states[_changed(number) + n]).abs().amax(-1) for n in range(len(CHANGED)))
        if not last.isfinite().all() or last[-1] == 0 or before[-2] == 0 or not first[1:].any():
            return said(self.model, stack)  # its tokens tell each other nothing here
        share = max(last[:-1].max() / last[-1], before[:-2].max() / before[-2]).item()
        little, much = LATER_MOVES[stack.last.dtype in WIDE]
        if little < share < much:
            return said(self.model, stack)
        return "no" if share >= much else "yes"

    def _types_see_each_other(self) -> bool:
        """Whether tokens of one type see each other both ways."""
        half = len(self.text) // 2
        rows = [self.text, self.texts.changed(self.text, half - 1)]
        for name in TOKEN_TYPES:
            for first in (0, 1) if name in self.texts.names else ():
                types = torch.full((2, len(self.text)), 1 - first, device=self.texts.device)
                types[:, :half] = first
                stacks = self.again({**self.texts.batch(rows), name: types})
                if stacks is not None and _moves_before(stacks[0].last[0], stacks[0].last[1], half - 1):
                    return True
        return False

    @cached_property
    def _pictured(self) -> tuple[Inputs, StackPass] | None:
        """A batch of the text and a picture, with another last token in its second row, and its pass."""
        rows = [self.text, self.texts.changed(self.text, -1)]
        for texts in dummies.with_pictures(trunk_of(self.model), self.texts) if not self.texts.also else ():
            inputs = texts.batch(rows)
            if (stacks := self.again(inputs)) is not None:
                return inputs, stacks[0]
        return None

    def _pictures_stand_in_front(self) -> bool:
        """Whether a picture's tokens stand in front of the text, and in the model's own output too."""
        if self._pictured is None:
            return False
        stack = self._pictured[1]
        moved = (stack.first[0] != stack.first[1]).any(-1).nonzero().flatten().tolist()
        tokens, own = stack.first.shape[1], None if stack.output is None else stack.output.shape[1]
        return tokens > len(self.text) and moved == [tokens - 1] and own == tokens

    def _pictures_see_each_other(self) -> bool:
        """Whether the tokens of a picture in front of a text see each other both ways."""
        if self._pictured is None:
            return False
        (inputs, stack), trunk = self._pictured, trunk_of(self.model)
        last = stack.first.shape[1] - len(self.text) - 1
        # where the stack gets it: a vision tower mixes a picture's tokens before
        with untouched(trunk), _turned(self.blocks[0].all[0][1], stack.layout, last):
            seen = watch(trunk, self.blocks, inputs)
        other = read_stacks(self.model, self.blocks, seen, rows=2)[0]
        return last > 0 and _moves_before(stack.last[0], other.last[0], last)

    # --- padding ----------------------------------------------------------------------------

    def padding(self, added: Sequence[Added]) -> tuple[bool | None, Left | None]:
        """What padding on the right and on the left does to kept tokens (see `Facts`)."""
        if not self.texts.has_mask or self.texts.long <= self.texts.short:
            return None, None
        both = self._moves(added, ["right", "left"]) or self._moves(added, ["right"])
        if both is None:
            return None, None
        wide = self.stacks[0].last.dtype in WIDE
        counts = PADDING_MOVES[wide]
        right = both[0] <= counts
        if len(both) == 1 or both[1] <= counts:
            return right, "kept" if len(both) > 1 else None
        if "position_ids" in self.texts.names:
            ids = torch.arange(self.texts.long, device=self.texts.device).repeat(2, 1)
            ids[0] = (ids[0] - (self.texts.long - self.texts.short)).clamp(min=0)
            placed = self._moves(added, ["left"], position_ids=ids)
            if placed is not None and placed[0] < both[1] / 2:
                return right, "positions"
        return right, "moved" if both[1] > SHIFT_MOVES[wide] else "kept"

    def _moves(self, added: Sequence[Added], sides: Sequence[Side], **more: Tensor) -> list[float] | None:
        """How far a text's states move when it is padded on each of these sides, beside a longer text.

        None if the model takes no such batch.
        """
        texts = self.texts
        rows, decoder = [self.text] * len(sides), None if self.target is None else [self.target] * (len(sides) + 1)
        inputs = texts.batch([*rows, texts.text(texts.long, seed=3)], [*sides, "right"], decoder=decoder)
        padded = self.again({**inputs, **more})
        if padded is None:
            return None
        return [self._move(padded, row, side, added) for row, side in enumerate(sides)]

    def _move(self, padded: Sequence[StackPass], row: int, side: Side, added: Sequence[Added]) -> float:
        """How far the states of the text in this row of a padded batch are from the states that the text has alone."""
        length, shift = len(self.text), self.texts.long - self.texts.short if side == "left" else 0
        found = []
        for number, (alone, other, place) in enumerate(zip(self.stacks, padded, added, strict=True)):
            start = place.before + (shift if number == 0 else 0)
            own = alone.last[0, place.before : place.before + length]
            found.append(apart(own, other.last[row, start : start + length]))
        return max(found)


def caches(trunk: nn.Module, seen: Seen) -> tuple[str, ...]:
    """What a model may return under a name that it takes again, but for its inputs: its memory of earlier tokens."""
    if not isinstance(seen.output, ModelOutput):
        return ()
    names = [field.name for field in fields(seen.output) if not field.name.endswith("hidden_states")]
    return tuple(name for name in names if name in argument_names(trunk) and name not in (*seen.inputs, "labels"))


def said(model: nn.Module, stack: StackPass) -> Causal:
    """Whether a stack is causal, as far as the family table and transformers say."""
    causal = stack.blocks.name == "decoder" if is_encoder_decoder(model) else said_causal(model)
    return "yes" if causal else "no"


def apart(a: Tensor, b: Tensor) -> float:
    """How far two hidden states (..., width) are from each other: a token's difference over its size, the largest."""
    a, b = a.float(), b.float()
    # by tokens: the first one of a language model may be a thousand times as large as the others
    shares = torch.linalg.vector_norm(a - b, dim=-1) / torch.linalg.vector_norm(a, dim=-1).clamp(min=1e-12)
    return shares.max().item()


def _changed(number: int) -> int:
    """The first row in which a token of a stack's text is another one: the last."""
    return 1 + len(CHANGED) * number


def _moves_before(one: Tensor, other: Tensor, position: int) -> bool:
    """Whether tokens (tokens, width) before a position differ too, where that one was changed."""
    moved = (one.float() - other.float()).abs().amax(-1)
    return bool(moved[:position].max() > TYPES_MOVE * moved[position])


@contextmanager
def _turned(block: nn.Module, layout: Layout, position: int) -> Iterator[None]:
    """The token at this position is its negative where the block gets it."""
    names = argument_names(block)

    def turn(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = bound(names, args, kwargs)[names[0]].clone()
        as_tokens(hidden, layout)[:, position] *= -1
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, names[0]: hidden})

    handle = block.register_forward_pre_hook(turn, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
