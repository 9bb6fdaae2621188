"""A traced pass: the bare model is run on tiny inputs, and its behaviour tells what the backbone is."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sidestep.backbone import dummies
from sidestep.backbone.calls import argument_names
from sidestep.backbone.dummies import Inputs
from sidestep.backbone.facts import FRAMES, Added, Causal, Facts, StackFacts, mask_of_frames, said_causal
from sidestep.backbone.fakes import has_values, hollow, unlogged
from sidestep.backbone.families import family_of
from sidestep.backbone.grids import patch_grid
from sidestep.backbone.packs import packs
from sidestep.backbone.stack import StackPass, check_rows, corner, read_stacks, unfit
from sidestep.backbone.structure import Blocks, convolves, likely_norm, likely_widths, possible_blocks
from sidestep.backbone.texts import TextPass, apart, caches, said
from sidestep.backbone.trunk import SOUND_INPUTS, trunk_of
from sidestep.backbone.untouched import undisturbed
from sidestep.backbone.watch import Seen, attempt, watch

MASK_MOVES = 1e-3
"""From which share of a token's state a mask of sounds matters."""
KEPT_ON = "_sidestep_facts"
"""Attribute of a trunk that holds its facts, and what they depend on besides."""

MOST_KNOWN = 16
_OF_SHAPES: dict[Hashable, Facts] = {}
"""Facts of the last models without values, by all that these have. Plans make the same model many times."""


def facts_of(model: nn.Module) -> Facts:
    """The facts of a model, which are found once and kept on its trunk.

    Raises:
        ValueError: if the model does what no fold can follow. The message names it and says what to do.
    """
    trunk = trunk_of(model)
    real, key = has_values(trunk), _key(trunk)
    known: tuple[str, Facts] | None = vars(trunk).get(KEPT_ON)
    if known is not None and known[0] == key and (known[1].source != "shapes" or not real):
        return known[1]
    made_of = None if real or not key else (type(model), key, str(model), _sizes(model))
    found = _OF_SHAPES.get(made_of) or _found(model, real=real)
    if made_of is not None:
        if len(_OF_SHAPES) == MOST_KNOWN:
            _OF_SHAPES.pop(next(iter(_OF_SHAPES)))
        _OF_SHAPES[made_of] = found
    vars(trunk)[KEPT_ON] = key, found
    return found


def _sizes(model: nn.Module) -> tuple[tuple[str, torch.Size], ...]:
    return tuple((name, parameter.shape) for name, parameter in model.named_parameters())


def _found(model: nn.Module, *, real: bool) -> Facts:
    """The facts of the likeliest lists of blocks that a fold can follow.

    Raises:
        ValueError: if it can follow none of them. The message is that of the likeliest.
    """
    first: ValueError | None = None
    for blocks in possible_blocks(model):
        try:
            found = (_traced(model, blocks) if real else None) or _shapes(model, blocks)
            if found is not None or all(own.certain for own in blocks):
                return found or _guessed(model, blocks)
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


def _key(trunk: Any) -> str:
    """What facts depend on besides the modules: the config, as it is now."""
    config = getattr(trunk, "config", None)
    if config is None:
        return ""
    fields = sorted(config.to_dict().items())  # whoever puts a field back may put it at the end
    return json.dumps([fields, getattr(config, "_attn_implementation", None)], default=str)


# --- a pass of the model itself -------------------------------------------------------------------------------------


def _traced(model: nn.Module, blocks: Sequence[Blocks]) -> Facts | None:
    """What passes of the model show, or None if nothing that we know how to make is an input of it."""
    trunk = trunk_of(model)
    for texts in dummies.texts(trunk, model):
        if (passed := attempt(trunk, TextPass.of, model, blocks, texts)) is not None:
            return _of_texts(passed)
    for inputs in dummies.others(trunk):
        if (seen := attempt(trunk, watch, trunk, blocks, inputs)) is not None:
            return _of_others(model, blocks, seen)
    return None


def _of_texts(passed: TextPass) -> Facts:
    added = passed.added()
    stacks = _named(passed.model, passed.stacks, passed.causal(added), added, len(passed.text))
    padding, left = passed.padding(added)
    names = caches(trunk_of(passed.model), passed.seen)
    read = _read(passed.seen)
    found = Facts(source="traced", stacks=stacks, padding=padding, left=left, caches=names, read=read)
    return replace(found, packs=found.is_causal and packs(passed.model))


def _of_others(model: nn.Module, blocks: Sequence[Blocks], seen: Seen) -> Facts:
    """Facts of a model of images or sounds, whose parts are not tokens that could be changed one by one."""
    stacks = read_stacks(model, blocks, seen, dummies.ROWS)
    masked = _masked(model, blocks, seen, stacks)
    if stacks[0].prefixes(model) is not None:
        trunk = trunk_of(model)
        turned = attempt(trunk, watch, trunk, blocks, corner(seen.inputs, stacks[0]))
        check_rows(model, stacks[0], None if turned is None else read_stacks(model, blocks, turned, dummies.ROWS)[0])
    causal = [said(model, stack) for stack in stacks]
    named = _named(model, stacks, causal, [None] * len(stacks), 0)
    first = next(iter(named))
    named[first] = replace(named[first], **masked)
    return Facts(source="traced", stacks=named, caches=caches(trunk_of(model), seen), read=_read(seen))


def _read(seen: Seen) -> dict[str, tuple[int, ...]]:
    """The shapes, without rows, of images or sounds and their mask, or of the pictures that texts need beside them."""
    tensors = {name: value for name, value in seen.inputs.items() if isinstance(value, torch.Tensor)}
    texts = not next(iter(tensors.values())).is_floating_point()
    read = {name: value for name, value in tensors.items() if not texts or value.is_floating_point()}
    return {name: tuple(tensor.shape[1:]) for name, tensor in read.items()}


def _named(
    model: nn.Module,
    stacks: Sequence[StackPass],
    causal: Sequence[Causal],
    added: Sequence[Added | None],
    tokens: int,
) -> dict[str, StackFacts]:
    """The facts of stacks by name, where a lone stack is a decoder if it is causal."""
    found: dict[str, StackFacts] = {}
    for stack, sees, place in zip(stacks, causal, added, strict=True):
        ending = stack.ending(place, tokens)
        prefixes = stack.prefixes(model)
        name = "decoder" if len(stacks) == 1 and sees != "no" else stack.blocks.name
        found[name] = StackFacts(
            causal=sees,
            layout=stack.layout,
            element=stack.element,
            stages=stack.names,
            widths=stack.widths,
            reshapes=stack.reshapes,
            spatial=stack.layout in ("grid", "channels") or any(stack.grids(model)) or prefixes is not None,
            norm=ending.norm,
            ends=ending.ends,
            after=ending.after,
            mixed=ending.mixed,
            again=ending.again,
            added=place,
            prefixes=prefixes,
            linear=stack.seen.linear,
        )
    return found


def _masked(model: nn.Module, blocks: Sequence[Blocks], seen: Seen, stacks: Sequence[StackPass]) -> dict[str, Any]:
    """The facts of the first stack that say how a mask of sounds is brought to its tokens, if one matters.

    Raises:
        ValueError: if it matters, and the model has no module that brings it to fewer tokens.
    """
    trunk, mask, first = trunk_of(model), seen.inputs.get("attention_mask"), stacks[0].first
    if mask is None:
        return {}
    shorter = mask.clone()
    shorter[0, mask.shape[1] // 2 :] = 0
    other = attempt(trunk, watch, trunk, blocks, {**seen.inputs, "attention_mask": shorter})
    if other is None:
        return {}  # its mask is none of samples or frames
    matters = apart(read_stacks(model, blocks, other, dummies.ROWS)[0].last, stacks[0].last) > MASK_MOVES
    if mask.shape[1] == first.shape[1]:
        return {"added": Added()} if matters else {}
    for name, module in trunk.named_modules():
        if any(hasattr(module, method) for method in FRAMES):
            brought = attempt(trunk, mask_of_frames, module, first.shape[1], shorter)
            if brought is not None and brought.shape == (dummies.ROWS, first.shape[1]) and not brought.all():
                return {"frames": str(name)}
    if matters:
        raise unfit(
            stacks[0].owner,
            f"its mask has {mask.shape[1]} positions, and its {stacks[0].blocks.name} makes {first.shape[1]} tokens of "
            "them: which tokens are padding cannot be told",
        )
    return {}


# --- a pass without values ------------------------------------------------------------------------------------------


def _shapes(model: nn.Module, blocks: Sequence[Blocks]) -> Facts | None:
    """What a pass of fake tensors shows, with causality from the table.

    None if the model cannot be run on fake tensors.
    """
    with undisturbed(torch.device("cpu")), unlogged(), FakeTensorMode(allow_non_fake_inputs=True):
        try:
            copied = hollow(trunk_of(model))
        except Exception:  # of whatever holds what cannot be copied
            return None
        for inputs, rows in _fake_inputs(copied, model, len(blocks)):
            if (seen := attempt(copied, watch, copied, blocks, inputs)) is not None:
                stacks = _of_shapes(model, blocks, read_stacks(model, blocks, seen, rows))
                return Facts(source="shapes", stacks=stacks, caches=caches(copied, seen), read=_read(seen))
    return None


def _fake_inputs(copied: nn.Module, model: nn.Module, stacks: int) -> Iterator[tuple[Inputs, int]]:
    """The same inputs as for a real pass, and their rows, but of texts one batch, whose rows are alike."""
    for texts in dummies.texts(copied, model):
        rows = [texts.text(texts.short, seed=1)] * 3
        yield texts.batch(rows, decoder=rows if stacks > 1 else None), len(rows)
    for inputs in dummies.others(copied):
        yield inputs, dummies.ROWS


def _of_shapes(model: nn.Module, blocks: Sequence[Blocks], stacks: Sequence[StackPass]) -> dict[str, StackFacts]:
    read = next(iter(stacks[0].seen.inputs.values()))
    texts = not read.is_floating_point() and read.ndim == 2
    added = [Added() if texts else None] * len(stacks)
    found = _named(model, stacks, [said(model, stack) for stack in stacks], added, read.shape[1])
    # without values, a hidden state that was copied on its way to the norm is not recognised behind it
    return {
        name: facts if facts.ends or stack.is_reshaped else replace(facts, norm=likely_norm(own), ends=True, after=None)
        for own, stack, (name, facts) in zip(blocks, stacks, found.items(), strict=True)
    }


# --- no pass --------------------------------------------------------------------------------------------------------


def _guessed(model: nn.Module, blocks: Sequence[Blocks]) -> Facts:
    """What the order of the modules suggests, which the fold checks in its first pass.

    Raises:
        ValueError: for a model of sounds, whose mask would not be understood.
    """
    if dummies.main_input(model) in SOUND_INPUTS:
        raise unfit(type(trunk_of(model)).__name__, "it takes none of the sounds that it was tried with")
    found: dict[str, StackFacts] = {}
    for stack in blocks:
        causal = stack.name == "decoder" if len(blocks) > 1 else said_causal(model)
        found["decoder" if len(blocks) == 1 and causal else stack.name] = StackFacts(
            causal="yes" if causal else "no",
            layout="channels" if all(convolves(block) for _, block in stack.all) else "tokens",
            stages=tuple(tuple(name for name, _ in stage) for stage in stack.stages),
            widths=likely_widths(stack),
            spatial=family_of(model).grid is patch_grid or all(convolves(block) for _, block in stack.all),
            norm=likely_norm(stack),
            added=Added(),
        )
    taken = ("past_key_values",) if "past_key_values" in argument_names(trunk_of(model)) else ()
    return Facts(source="guessed", stacks=found, caches=taken)
