"""What texts show of a model: which tokens see later ones, where a text stands, and what padding does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from sidestep.backbone import dummies
from sidestep.backbone.calls import argument_names, bound
from sidestep.backbone.dummies import Inputs, Side, Texts
from sidestep.backbone.facts import Added, Causal, Layout, Left, as_tokens, said_causal
from sidestep.backbone.stack import Stack, read_stacks, unfit
from sidestep.backbone.structure import Blocks
from sidestep.backbone.trunk import trunk_of
from sidestep.backbone.untouched import untouched
from sidestep.backbone.watch import Seen, attempt, watch

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
WIDE = (torch.float32, torch.float64)
LATER_MOVES, LATER_MOVES_NARROW = 3e-5, 1e-3
"""From which share of the last token's own change a change of earlier tokens counts, in float32 and in 16 bits. Not
from zero on: where experts get batches of tokens, a later one moves earlier ones a little."""
CLEARLY_MOVES = 5e-2
"""In 16 bits rounding may move as much as a weak attention. Below this share the table decides."""
CHANGED = (-1, -2, 0)
"""Which token is another one, row after row."""
TYPES_MOVE = 1e-3
PADDING_MOVES, PADDING_MOVES_NARROW = 1e-5, 5e-2
"""From which share of the hidden states' size a change by padding counts."""


@dataclass(frozen=True)
class TextPass:
    """One watched pass of a text and of the same text with one other token.

    Rows: the text; with another last token; another last but one; another first one. Where there is a decoder, three
    more, in which those tokens of what the decoder reads are others.

    Attributes:
        model: the bare model.
        blocks: its stacks.
        texts: makes its inputs.
        text, target: what encoder (or the lone stack) and decoder read; None: there is no decoder.
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

    @property
    def stacks(self) -> list[Stack]:
        """As they are in this pass."""
        return read_stacks(self.model, self.blocks, self.seen, rows=1 + len(self.blocks) * len(CHANGED))

    def again(self, inputs: Inputs) -> list[Stack] | None:
        """The stacks in a pass of other rows; None if the model does not take these inputs."""
        seen = attempt(trunk_of(self.model), watch, trunk_of(self.model), self.blocks, inputs)
        rows = len(next(iter(inputs.values())))
        return None if seen is None else read_stacks(self.model, self.blocks, seen, rows)

    def added(self) -> list[Added]:
        """Where the texts stand, in each stack."""
        return [self._added(number, stack) for number, stack in enumerate(self.stacks)]

    def _added(self, number: int, stack: Stack) -> Added:
        """Where a text stands among a stack's tokens: where another last token moves what the first block gets.

        Raises:
            ValueError: if that is not one place: no mask could be brought to the tokens.
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
        """Whether a stack adds this many tokens to a longer text too; else it fills up to some length, with padding."""
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

    def _causal(self, number: int, stack: Stack, added: Added) -> Causal:
        states = stack.last[:, added.before : added.before + len(self.text)].float()
        # a last token may be alone in its block of a blockwise attention, and then the one before it ends another
        last, before, first = ((states[0] - states[_changed(number) + n]).abs().amax(-1) for n in range(len(CHANGED)))
        if not last.isfinite().all() or last[-1] == 0 or before[-2] == 0 or not first[1:].any():
            return said(self.model, stack)  # its tokens tell each other nothing here
        share = max(last[:-1].max() / last[-1], before[:-2].max() / before[-2]).item()
        wide = stack.last.dtype in WIDE
        if not wide and LATER_MOVES_NARROW < share < CLEARLY_MOVES:
            return said(self.model, stack)
        return "no" if share > (LATER_MOVES if wide else LATER_MOVES_NARROW) else "yes"

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

    def _pictures_see_each_other(self) -> bool:
        """Whether the tokens of a picture in front of a text see each other both ways."""
        trunk = trunk_of(self.model)
        for texts in dummies.with_pictures(trunk, self.texts) if not self.texts.also else ():
            inputs = texts.batch([self.text] * 2)
            if (stacks := self.again(inputs)) is None:
                continue
            last = stacks[0].first.shape[1] - len(self.text) - 1
            # where the stack gets it: a vision tower mixes a picture's tokens before
            with untouched(trunk), _turned(self.blocks[0].all[0][1], stacks[0].layout, last):
                seen = watch(trunk, self.blocks, inputs)
            other = read_stacks(self.model, self.blocks, seen, rows=2)[0]
            return last > 0 and _moves_before(stacks[0].last[0], other.last[0], last)
        return False

    # --- padding, and what is remembered ----------------------------------------------------------------------------

    def padding(self, added: Sequence[Added]) -> tuple[bool | None, Left | None]:
        """What padding on the right and on the left does to kept tokens (see `Facts`)."""
        if not self.texts.has_mask or self.texts.long <= self.texts.short:
            return None, None
        both = self._stay(added, ["right", "left"]) or self._stay(added, ["right"])
        if both is None:
            return None, None
        right, *left = both
        if not left or left[0]:
            return right, "kept" if left else None
        if "position_ids" in self.texts.names:
            ids = torch.arange(self.texts.long, device=self.texts.device).repeat(2, 1)
            ids[0] = (ids[0] - (self.texts.long - self.texts.short)).clamp(min=0)
            if self._stay(added, ["left"], position_ids=ids) == [True]:
                return right, "positions"
        return right, "moved"

    def _stay(self, added: Sequence[Added], sides: Sequence[Side], **more: Tensor) -> list[bool] | None:
        """Whether a text's states stay as they are when it is padded on each of these sides, beside a longer text.

        None if the model takes no such batch.
        """
        texts = self.texts
        rows, decoder = [self.text] * len(sides), None if self.target is None else [self.target] * (len(sides) + 1)
        inputs = texts.batch([*rows, texts.text(texts.long, seed=3)], [*sides, "right"], decoder=decoder)
        padded = self.again({**inputs, **more})
        if padded is None:
            return None
        return [self._stays(padded, row, side, added) for row, side in enumerate(sides)]

    def _stays(self, padded: Sequence[Stack], row: int, side: Side, added: Sequence[Added]) -> bool:
        """Whether the text in this row of a padded batch has the states that it has alone, in every stack."""
        length, shift = len(self.text), self.texts.long - self.texts.short if side == "left" else 0
        for number, (alone, other, place) in enumerate(zip(self.stacks, padded, added, strict=True)):
            start = place.before + (shift if number == 0 else 0)
            own = alone.last[0, place.before : place.before + length]
            if not close(own, other.last[row, start : start + length]):
                return False
        return True

    def caches(self) -> tuple[str, ...]:
        """What the model may return under a name that it takes again: its memory of the tokens so far."""
        output = self.seen.output
        if not isinstance(output, ModelOutput):
            return ()
        names = [field.name for field in fields(output) if not field.name.endswith("hidden_states")]
        return tuple(name for name in names if name in self.texts.names)


def said(model: nn.Module, stack: Stack) -> Causal:
    """Whether a stack is causal, as far as the family table and transformers say."""
    causal = stack.blocks.name == "decoder" if stack.blocks.root[0] else said_causal(model)
    return "yes" if causal else "no"


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two hidden states are the same but for rounding."""
    tolerance = PADDING_MOVES if a.dtype in WIDE else PADDING_MOVES_NARROW
    return bool((a.float() - b.float()).abs().max() <= tolerance * a.float().abs().max().clamp(min=1.0))


def _changed(number: int) -> int:
    """The first row in which a token of a stack's text is another one: the last."""
    return 1 + len(CHANGED) * number


def _moves_before(one: Tensor, other: Tensor, position: int) -> bool:
    """Whether tokens (tokens, width) before a position differ too, where that one was changed."""
    apart = (one.float() - other.float()).abs().amax(-1)
    return bool(apart[:position].max() > TYPES_MOVE * apart[position])


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
