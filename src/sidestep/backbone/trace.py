"""A traced pass: the bare model is run on tiny inputs, and what a backbone is, is read off what it does."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from sidestep.backbone import dummies
from sidestep.backbone.calls import argument_names, bound
from sidestep.backbone.dummies import Inputs, Texts
from sidestep.backbone.facts import Added, Causal, Facts, Layout, StackFacts, as_tokens, said_causal
from sidestep.backbone.fakes import has_values, hollow
from sidestep.backbone.structure import Blocks, convolves, find_blocks, is_norm, likely_norm, likely_widths
from sidestep.backbone.trunk import trunk_of
from sidestep.backbone.untouched import undisturbed, untouched
from sidestep.families import family_of, no_grid

KEPT_ON = "_sidestep_facts"
"""Attribute of a trunk that holds its facts, and what they depend on besides."""
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
LATER_MOVES = {torch.float32: 3e-5, torch.float64: 3e-5}
"""From which share of the last token's own change a change of earlier tokens counts (expert batching moves them a
little). In 16 bits: 1e-3, and below 5e-2 the table decides."""
PADDING_MOVES = 1e-5
"""From which share of the hidden states' size a change counts, in float32; in 16 bits 5e-2."""


def facts_of(model: nn.Module) -> Facts:
    """The facts of a model, which are found once and kept on its trunk.

    Raises:
        ValueError: if the model does what no fold can follow; the message names it and says what to do.
    """
    trunk = trunk_of(model)
    real, key = has_values(trunk), _key(trunk)
    known: tuple[str, Facts] | None = vars(trunk).get(KEPT_ON)
    if known is not None and known[0] == key and (known[1].source != "shapes" or not real):
        return known[1]
    blocks = find_blocks(model)
    found = _traced(model, blocks) if real else None
    found = found or _shapes(model, blocks) or _guessed(model, blocks)
    vars(trunk)[KEPT_ON] = key, found
    return found


def _key(trunk: Any) -> str:
    """What facts depend on besides the modules: the config, as it is now."""
    config = getattr(trunk, "config", None)
    if config is None:
        return ""
    return json.dumps([config.to_dict(), getattr(config, "_attn_implementation", None)], default=str)


# --- a pass, watched --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of a module: its name in the trunk, its first argument and its output."""

    name: str
    given: Any
    output: Any


@dataclass(frozen=True)
class Seen:
    """A pass of a trunk: the calls of its blocks and of the modules outside of them, in the order of their ends."""

    calls: list[Call]
    output: Any

    def of(self, name: str) -> list[Call]:
        """The calls of one module."""
        return [call for call in self.calls if call.name == name]


def watch(trunk: nn.Module, blocks: Sequence[Blocks], inputs: Inputs) -> Seen:
    """Run a trunk on inputs, without a cache, and note what happens."""
    names = [name for stack in blocks for name, _ in stack.all]
    outside = [
        name for name, _ in trunk.named_modules() if name and not any(name.startswith(f"{block}.") for block in names)
    ]
    calls: list[Call] = []
    handles = [_note(trunk.get_submodule(name), name, calls) for name in outside]
    try:
        return Seen(calls, _run(trunk, inputs))
    finally:
        for handle in handles:
            handle.remove()


def _note(module: nn.Module, name: str, calls: list[Call]) -> Any:
    names = argument_names(module)

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = bound(names, args, kwargs).get(names[0]) if names else next(iter(args), None)
        calls.append(Call(name, given, output))

    return module.register_forward_hook(note, with_kwargs=True)


def _run(trunk: Any, inputs: Inputs) -> Any:
    if isinstance(trunk, PreTrainedModel):
        return trunk(**inputs, **({"use_cache": False} if "use_cache" in argument_names(trunk) else {}))
    # timm's: the part in front of pooling and classifier
    return getattr(trunk, "forward_features", trunk)(*inputs.values())


# --- what the pass shows of a stack -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
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
    def read(cls, owner: str, blocks: Blocks, seen: Seen, rows: int, sides: tuple[int, int] | None) -> Stack:
        """Follow a pass through the blocks of a stack.

        Args:
            owner: the class of the trunk.
            blocks: of the stack.
            seen: the pass.
            rows: of its batch.
            sides: rows and columns of the images, if it read images.

        Raises:
            ValueError: if a block does not run once and in order, or hands on what is no hidden state.
        """
        calls = _in_order(owner, blocks, seen)
        element = _which_element(calls)
        layouts = set[Layout]()
        for call in calls:
            for hidden in (call.given, _element(call.output, element)):
                if not isinstance(hidden, Tensor):
                    raise _unfit(owner, f"its block {call.name} takes or gives {_what(hidden)}, no hidden state")
                layouts.add(_layout(owner, call.name, hidden, rows, sides))
        if len(layouts) > 1:
            raise _unfit(owner, f"its blocks hand on hidden states of several layouts ({', '.join(sorted(layouts))})")
        output = _hidden(seen.output) if not blocks.root[0] else None
        if (own := seen.of(blocks.root[0])) and blocks.root[0]:
            output = _hidden(own[-1].output)
        return cls(owner, blocks, calls, seen, layouts.pop(), element, output)

    @property
    def widths(self) -> tuple[tuple[int, ...], ...]:
        """As in `StackFacts`."""
        found, calls = [], iter(self.calls)
        for stage in self.blocks.stages:
            own = [next(calls) for _ in stage]
            states = [own[0].given, *(_element(call.output, self.element) for call in own)]
            found.append(tuple(as_tokens(state, self.layout).shape[-1] for state in states))
        return tuple(found)

    @property
    def counts(self) -> tuple[tuple[int, ...], ...]:
        """Of each stage, the tokens of its input and of the output of each of its blocks."""
        found, calls = [], iter(self.calls)
        for stage in self.blocks.stages:
            own = [next(calls) for _ in stage]
            states = [own[0].given, *(_element(call.output, self.element) for call in own)]
            found.append(tuple(as_tokens(state, self.layout).shape[1] for state in states))
        return tuple(found)

    def ending(self, added: Added | None, tokens: int) -> tuple[str | None, bool]:
        """The final norm's name, if there is one, and whether the stack's own output is what came out of that place.

        The norm is what the last block's output goes into, and what the stack's own output comes out of.
        """
        raw = self.calls[-1].output
        states = _views(_element(raw, self.element), self.layout, added, tokens)
        outputs = [] if self.output is None else _views(self.output, self.layout, None, tokens)
        if _meet(states, outputs):
            return None, True
        if self.output is not None and self.output.ndim == 4 and states[-1].ndim == 3:
            outputs = []  # maps that something behind makes of the tokens
        after = self.seen.calls[1 + max(n for n, call in enumerate(self.seen.calls) if call is self.calls[-1]) :]
        norms = [call for call in after if self._is_norm(call) and _meet(states, [call.given])]
        for call in norms:
            if not outputs or _meet(_views(call.output, self.layout, added, tokens), outputs):
                return call.name, True
        return None, not outputs

    def _is_norm(self, call: Call) -> bool:
        root, module = self.blocks.root
        inside = call.name.removeprefix(f"{root}.")
        if root and inside == call.name:
            return False
        plain = isinstance(call.given, Tensor) and isinstance(call.output, Tensor)
        return plain and is_norm(module.get_submodule(inside)) and call.given.shape == call.output.shape


def _in_order(owner: str, blocks: Blocks, seen: Seen) -> list[Call]:
    names = [name for name, _ in blocks.all]
    calls = [call for call in seen.calls if call.name in set(names)]
    ran = [call.name for call in calls]
    if ran == names:
        return calls
    counts = {name: ran.count(name) for name in names}
    twice = next((name for name, count in counts.items() if count > 1), None)
    if twice is not None:
        raise _unfit(owner, f"its block {twice} runs {counts[twice]} times in one pass (layers that share weights)")
    if missed := [name for name, count in counts.items() if count == 0]:
        what = "none of its blocks runs" if len(missed) == len(names) else f"its block {missed[0]} does not run"
        raise _unfit(owner, f"{what} in a pass (layers that are skipped, or called in parts)")
    raise _unfit(owner, f"its blocks run in another order than they stand in ({', '.join(ran)})")


def _unfit(owner: str, why: str) -> ValueError:
    return ValueError(
        f"{owner} cannot be folded over: {why}. Sidestep needs blocks that run once each, in order, and hand on hidden "
        "states of (batch, tokens, width): attach to a part of the model that does so, or choose another backbone"
    )


def _which_element(calls: Sequence[Call]) -> int:
    """Which element of the blocks' tuples the next block gets; the first where none is handed on as it is."""
    for call, following in zip(calls, calls[1:], strict=False):
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
    raise _unfit(owner, f"for {rows} rows its block {name} takes or gives a tensor of shape {shape}")


def _hidden(output: Any) -> Tensor | None:
    """The last hidden state among the outputs of a trunk or a stack; None if it is not told."""
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
    """Whether two tensors are the same; those without values, whether they share their memory."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if isinstance(a, FakeTensor):
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return torch.equal(a, b)


def _what(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


# --- all stacks -------------------------------------------------------------------------------------------------------


def _stacks(
    model: nn.Module, blocks: Sequence[Blocks], seen: Seen, rows: int, sides: tuple[int, int] | None
) -> list[Stack]:
    owner = type(trunk_of(model)).__name__
    stacks = [Stack.read(owner, own, seen, rows, sides) for own in blocks]
    _check_grids(model, stacks)
    return stacks


def _check_grids(model: nn.Module, stacks: Sequence[Stack]) -> None:
    """Raise where widths or numbers of tokens change, and the grid on which methods would follow that is not known."""
    for stack in stacks:
        if stack.layout in ("grid", "channels") or family_of(model).grid is not no_grid:
            continue
        counts = [count for stage in stack.counts for count in stage]
        if len(set(counts)) > 1:
            raise _unfit(
                stack.owner,
                f"the number of tokens changes from {counts[0]} to {next(n for n in counts if n != counts[0])} between "
                "its blocks, and on which grid they stand is not known",
            )
    for stack in stacks:
        for own, widths in zip(stack.blocks.stages, stack.widths, strict=True):
            inside = widths[1:] if all(convolves(block) for _, block in own) else widths
            if len(set(inside)) > 1:
                raise _unfit(stack.owner, f"the width changes from {inside[0]} to {inside[-1]} within a stage")


def _facts(stacks: Sequence[Stack], causal: Sequence[Causal], added: Sequence[Added | None], tokens: int) -> Facts:
    found: dict[str, StackFacts] = {}
    for stack, sees, place in zip(stacks, causal, added, strict=True):
        norm, ends = stack.ending(place, tokens)
        name = "decoder" if len(stacks) == 1 and sees != "no" else stack.blocks.name
        found[name] = StackFacts(
            causal=sees,
            layout=stack.layout,
            element=stack.element,
            widths=stack.widths,
            norm=norm,
            ends=ends,
            added=place,
        )
    return Facts(source="traced", stacks=found)


# --- a pass of the model itself -----------------------------------------------------------------------------------------


def _traced(model: nn.Module, blocks: Sequence[Blocks]) -> Facts | None:
    """What passes of the model show; None if nothing that we know how to make is an input of it."""
    trunk = trunk_of(model)
    for texts in dummies.texts(trunk, model):
        if (seen := _attempt(trunk, lambda t=texts: _TextPass.of(trunk, blocks, t))) is not None:
            return _facts_of_texts(model, blocks, seen)
    for inputs in dummies.others(trunk):
        if (other := _attempt(trunk, lambda given=inputs: watch(trunk, blocks, given))) is not None:
            return _facts_of_others(model, blocks, inputs, other)
    return None


def _attempt(trunk: nn.Module, run: Callable[[], Any]) -> Any:
    """What a pass gives; None where the model does not take its inputs.

    The model is put back after each: Swin, for one, makes its windows smaller for small images, and for good.
    """
    with _quiet(), untouched(trunk):
        try:
            return run()
        except Exception:  # whatever a model raises for inputs that are not its own
            return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of models on inputs that nobody gave them."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@dataclass(frozen=True)
class _TextPass:
    """A text, the same with another last token, and (for a decoder) the first again with another last token there."""

    texts: Texts
    text: Tensor
    target: Tensor | None
    seen: Seen

    @classmethod
    def of(cls, trunk: nn.Module, blocks: Sequence[Blocks], texts: Texts) -> _TextPass:
        text, target = texts.text(texts.short, seed=1), None
        rows, decoder = [text, texts.changed(text, -1), texts.changed(text, 0)], None
        if len(blocks) > 1:
            target = texts.text(texts.short, seed=2)
            rows += [text, text]
            decoder = [target, target, target, texts.changed(target, -1), texts.changed(target, 0)]
        return cls(texts, text, target, watch(trunk, blocks, texts.batch(rows, decoder=decoder)))

    @property
    def rows(self) -> int:
        """Of the batch."""
        return 3 if self.target is None else 5


def _facts_of_texts(model: nn.Module, blocks: Sequence[Blocks], passed: _TextPass) -> Facts:
    length = len(passed.text)
    stacks = _stacks(model, blocks, passed.seen, passed.rows, None)
    # the rows in which another last token stands; the next has another first one
    changed = [1, 3][: len(stacks)]
    added = [_place_of_text(stack, row, length) for stack, row in zip(stacks, changed, strict=True)]
    causal = [_sees(model, *parts, length) for parts in zip(stacks, changed, added, strict=True)]
    if causal == ["yes"] and (_mixes_types(model, blocks, passed) or _mixes_pictures(model, blocks, passed)):
        causal = ["partly"]
    found = _facts(stacks, causal, added, length)
    return replace(found, caches=_caches(passed), **_padding(model, blocks, passed, stacks, added))


def _place_of_text(stack: Stack, changed: int, length: int) -> Added:
    """Where the tokens of a text stand among those that the first block gets.

    Raises:
        ValueError: if they are not there one by one: no mask could be brought to them.
    """
    first = stack.first
    moved = (first[0] != first[changed]).any(-1).nonzero().flatten().tolist()
    if first.shape[1] == length and (len(moved) != 1 or moved == [length - 1]):
        return Added()
    if len(moved) != 1 or not 0 <= moved[0] - (length - 1):
        raise _unfit(
            stack.owner,
            f"of a text of {length} tokens its {stack.blocks.name} makes {first.shape[1]}, and which of them belongs to "
            "which token of the text cannot be told",
        )
    own = stack.output
    whole = own is not None and own.ndim == 3 and own.shape[1] == first.shape[1]
    cropped = own is not None and own.ndim == 3 and own.shape[1] == length
    return Added(before=moved[0] - (length - 1), kept=whole, cropped=cropped)


def _sees(model: nn.Module, stack: Stack, changed: int, added: Added, length: int) -> Causal:
    """Whether earlier tokens stay as they are when the last one changes."""
    states = stack.last[:, added.before : added.before + length].float()
    apart, forwards = ((states[0] - states[row]).abs().amax(-1) for row in (changed, changed + 1))
    if not apart.isfinite().all() or apart[-1] == 0 or not forwards[1:].any():
        return _said(model, stack)  # its tokens tell each other nothing here
    share = (apart[:-1].max() / apart[-1]).item()
    plain = stack.last.dtype in LATER_MOVES
    if not plain and 1e-3 < share < 5e-2:
        return _said(model, stack)
    return "no" if share > LATER_MOVES.get(stack.last.dtype, 1e-3) else "yes"


def _said(model: nn.Module, stack: Stack) -> Causal:
    causal = stack.blocks.name == "decoder" if stack.blocks.root[0] else said_causal(model)
    return "yes" if causal else "no"


def _mixes_types(model: nn.Module, blocks: Sequence[Blocks], passed: _TextPass) -> bool:
    """Whether tokens of one type see each other both ways, in a stack that is causal on plain texts."""
    texts, text = passed.texts, passed.text
    half = len(text) // 2
    for name in TOKEN_TYPES:
        if name not in texts.names:
            continue
        for first in (0, 1):
            types = torch.full((2, len(text)), 1 - first)
            types[:, :half] = first
            batch = {**texts.batch([text, texts.changed(text, half - 1)]), name: types.to(texts.device)}
            seen = _attempt(trunk_of(model), lambda given=batch: watch(trunk_of(model), blocks, given))
            if seen is None:
                continue
            states = _stacks(model, blocks, seen, 2, None)[0].last.float()
            apart = (states[0] - states[1]).abs().amax(-1)
            if apart[: half - 1].max() > 1e-3 * apart[half - 1]:
                return True
    return False


def _mixes_pictures(model: nn.Module, blocks: Sequence[Blocks], passed: _TextPass) -> bool:
    """Whether the tokens of a picture in front of a text see each other both ways, in a stack that is causal without."""
    trunk, texts = trunk_of(model), passed.texts
    if "pixel_values" not in texts.names or texts.also:
        return False
    for with_picture in dummies.with_pictures(trunk, texts):
        batch = with_picture.batch([passed.text, texts.changed(passed.text, -1)])
        seen = _attempt(trunk, lambda given=batch: watch(trunk, blocks, given))
        if seen is None:
            continue
        plain = _stacks(model, blocks, seen, 2, None)[0]
        pictures = plain.first.shape[1] - len(passed.text)
        if pictures < 2:
            return False
        # the last token of the picture, where the stack gets it: a vision tower mixes them before
        with untouched(trunk), _moved(blocks[0].all[0][1], plain.layout, pictures - 1):
            seen = watch(trunk, blocks, batch)
        other = _stacks(model, blocks, seen, 2, None)[0]
        apart = (plain.last[0].float() - other.last[0].float()).abs().amax(-1)
        return bool(apart[: pictures - 1].max() > 1e-3 * apart[pictures - 1])
    return False


@contextmanager
def _moved(block: nn.Module, layout: Layout, position: int) -> Iterator[None]:
    """The token at this position is another one where the block gets it."""
    names = argument_names(block)

    def move(module: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = bound(names, args, kwargs)[names[0]].clone()
        as_tokens(hidden, layout)[:, position] *= -1
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, names[0]: hidden})

    handle = block.register_forward_pre_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _caches(passed: _TextPass) -> tuple[str, ...]:
    """What a model may return under a name that it takes again: its memory of the tokens so far."""
    output = passed.seen.output
    if not isinstance(output, ModelOutput):
        return ()
    names = [field.name for field in fields(output) if not field.name.endswith("hidden_states")]
    return tuple(name for name in names if name in passed.texts.names)


def _padding(
    model: nn.Module,
    blocks: Sequence[Blocks],
    passed: _TextPass,
    stacks: Sequence[Stack],
    added: Sequence[Added],
) -> dict[str, Any]:
    """Whether kept tokens stay as they are when padding is added, on the right and on the left."""
    texts, text = passed.texts, passed.text
    if not texts.has_mask or texts.long <= texts.short:
        return {}
    whole = texts.text(texts.long, seed=3)
    decoder = None if passed.target is None else [passed.target] * 2

    def stays(left: bool, **more: Tensor) -> bool | None:
        batch = texts.batch([text, whole], left=left, decoder=decoder)
        trunk = trunk_of(model)
        seen = _attempt(trunk, lambda: watch(trunk, blocks, {**batch, **more}))
        if seen is None:
            return None
        shift = texts.long - texts.short if left else 0
        padded = _stacks(model, blocks, seen, 2, None)
        return all(
            _stays(alone, other, place, len(text), shift if stack.name == "encoder" or len(stacks) == 1 else 0)
            for alone, other, place, stack in zip(stacks, padded, added, blocks, strict=True)
        )

    right, left = stays(False), stays(True)
    if left is not False:
        return {"padding": right, "left": None if left is None else "kept"}
    if "position_ids" in texts.names:
        ids = torch.arange(texts.long, device=texts.device).repeat(2, 1)
        ids[0] = (ids[0] - (texts.long - texts.short)).clamp(min=0)
        if stays(True, position_ids=ids):
            return {"padding": right, "left": "positions"}
    return {"padding": right, "left": "moved"}


def _stays(alone: Stack, padded: Stack, added: Added, length: int, shift: int) -> bool:
    before = alone.last[0, added.before : added.before + length]
    return _close(before, padded.last[0, added.before + shift : added.before + shift + length])


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = PADDING_MOVES if a.dtype in LATER_MOVES else 5e-2
    return bool((a.float() - b.float()).abs().max() <= tolerance * a.float().abs().max().clamp(min=1.0))


def _facts_of_others(model: nn.Module, blocks: Sequence[Blocks], inputs: Inputs, seen: Seen) -> Facts:
    """Of a model of images or sounds: their parts are not tokens that could be changed one by one."""
    first = next(iter(inputs.values()))
    stacks = _stacks(model, blocks, seen, len(first), _sides(first))
    causal = [_said(model, stack) for stack in stacks]
    found = _facts(stacks, causal, [None] * len(stacks), 0)
    _check_sound_mask(model, blocks, inputs, stacks)
    return found


def _sides(given: Tensor) -> tuple[int, int] | None:
    """Rows and columns of images; None for sounds and texts."""
    return (given.shape[-2], given.shape[-1]) if given.ndim in (4, 5) else None


def _check_sound_mask(model: nn.Module, blocks: Sequence[Blocks], inputs: Inputs, stacks: Sequence[Stack]) -> None:
    """Raise where a mask of samples or frames matters, which are more than the tokens that are made of them."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape[1] == stacks[0].first.shape[1]:
        return
    shorter = mask.clone()
    shorter[0, mask.shape[1] // 2 :] = 0
    trunk = trunk_of(model)
    seen = _attempt(trunk, lambda: watch(trunk, blocks, {**inputs, "attention_mask": shorter}))
    if seen is None or not _close(_stacks(model, blocks, seen, len(mask), None)[0].last, stacks[0].last):
        raise _unfit(
            stacks[0].owner,
            f"its mask has {mask.shape[1]} positions, and its {stacks[0].blocks.name} makes {stacks[0].first.shape[1]} "
            "tokens of them: which tokens are padding cannot be told",
        )


# --- a pass without values ----------------------------------------------------------------------------------------------


def _shapes(model: nn.Module, blocks: Sequence[Blocks]) -> Facts | None:
    """What a pass of fake tensors shows, with causality from the table; None if the model cannot be run on them."""
    trunk = trunk_of(model)
    with undisturbed(torch.device("cpu")), suppress(_NoShapes), FakeTensorMode(allow_non_fake_inputs=True):
        copied = hollow_of(trunk)
        for inputs, rows in _fake_inputs(trunk, copied, model, blocks):
            if (seen := _attempt(copied, lambda given=inputs: watch(copied, blocks, given))) is None:
                continue
            first = next(iter(inputs.values()))
            stacks = _stacks(model, blocks, seen, rows, _sides(first))
            text = "input_ids" in inputs and stacks[0].first.shape[1] == first.shape[1]
            added = [Added() if text else None] * len(stacks)
            found = _facts(stacks, [_said(model, stack) for stack in stacks], added, first.shape[1])
            likely = dict(zip(found.stacks, blocks, strict=True))
            told = {name: _or_likely(stack, likely[name]) for name, stack in found.stacks.items()}
            return replace(found, source="shapes", stacks=told)
    return None


class _NoShapes(Exception):
    """A model that cannot be copied without values."""


def hollow_of(trunk: nn.Module) -> nn.Module:
    """The copy, in eval mode."""
    try:
        return hollow(trunk)
    except Exception as error:  # of whatever cannot be copied
        raise _NoShapes from error


def _fake_inputs(
    trunk: nn.Module, copied: nn.Module, model: nn.Module, blocks: Sequence[Blocks]
) -> Iterator[tuple[Mapping[str, Any], int]]:
    """The same inputs as for a real pass; of texts one batch of three rows."""
    for texts in dummies.texts(copied, model):
        decoder = [texts.text(texts.short, seed=2)] * 3 if len(blocks) > 1 else None
        yield texts.batch([texts.text(texts.short, seed=1)] * 3, decoder=decoder), 3
    for inputs in dummies.others(copied):
        yield inputs, 2


def _or_likely(stack: StackFacts, blocks: Blocks) -> StackFacts:
    """Without values, a hidden state that was copied on its way to the norm is not recognised behind it."""
    return stack if stack.ends else replace(stack, norm=likely_norm(blocks), ends=True)


# --- no pass ----------------------------------------------------------------------------------------------------------


def _guessed(model: nn.Module, blocks: Sequence[Blocks]) -> Facts:
    found: dict[str, StackFacts] = {}
    for stack in blocks:
        causal: Causal = "yes" if (stack.name == "decoder" if len(blocks) > 1 else said_causal(model)) else "no"
        layout: Layout = "channels" if all(convolves(block) for _, block in stack.all) else "tokens"
        name = "decoder" if len(blocks) == 1 and causal == "yes" else stack.name
        widths, norm = likely_widths(stack), likely_norm(stack)
        found[name] = StackFacts(causal=causal, layout=layout, widths=widths, norm=norm, added=Added())
    return Facts(source="guessed", stacks=found)
