"""Every place of a backbone that a method may read: its blocks, with the facts of a traced pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from sidestep.backbone.calls import part_of
from sidestep.backbone.facts import Facts, StackFacts
from sidestep.backbone.families import Pool, family_of, prefix_tokens
from sidestep.backbone.structure import Named, convolves
from sidestep.backbone.trace import facts_of
from sidestep.backbone.trunk import device_of, is_encoder_decoder, trunk_of
from sidestep.interface.sites import Place, Site


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One stack of a backbone.

    Attributes:
        name: "encoder" or "decoder".
        stages: the blocks of each stage, in the order of a pass.
        head: whether the head reads this stack.
        facts: what a pass of it shows.
        norm: the final norm and its name within the trunk, or None.
    """

    name: str
    stages: tuple[tuple[Named, ...], ...]
    head: bool
    facts: StackFacts
    norm: Named | None


def find_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of a Hugging Face or timm model, in running order.

    Raises:
        ValueError: if no repeated blocks are found, or several towers, or blocks that no fold can follow.
    """
    trunk, stacks = trunk_of(model), facts_of(model).stacks
    return [
        Stack(
            name=name,
            stages=tuple(tuple((block, trunk.get_submodule(block)) for block in stage) for stage in facts.stages),
            head=facts is list(stacks.values())[-1],
            facts=facts,
            norm=None if facts.norm is None else (facts.norm, trunk.get_submodule(facts.norm)),
        )
        for name, facts in stacks.items()
    ]


def default_pool(model: nn.Module, facts: Facts | None = None) -> Pool:
    """The read-out of a model's family: last token when causal, first token of an encoder-decoder's decoder."""
    if is_encoder_decoder(model):
        return "cls"
    return "last" if (facts or facts_of(model)).is_causal else family_of(model).pool


def find_places(model: nn.Module, *, with_blocks: bool = True) -> list[Place]:
    """Every site of a backbone and the module it sits on, in the order of a pass.

    Names are relative to the trunk (`trunk_of`). With `with_blocks`, sites carry their `FrozenBlock` and
    `BlockWeights` where the family table can fill them.
    """
    family = family_of(model)
    told = prefix_tokens(trunk_of(model), family)
    places: list[Place] = []
    for stack in find_stacks(model):
        facts, depth = stack.facts, sum(map(len, stack.stages))
        prefixes = facts.prefixes or ((told, told),) * len(stack.stages)
        maps = facts.layout in ("grid", "channels")
        convolutional = facts.reshapes or (maps and all(convolves(b) for stage in stack.stages for _, b in stage))
        index = 0
        for number, (stage, widths, (given, prefix)) in enumerate(
            zip(stack.stages, facts.widths, prefixes, strict=True)
        ):
            site = Site(
                kind="stage",
                stack=stack.name,
                stage=number,
                index=index,
                depth=depth,
                width=widths[0],
                prefix=prefix,
                causal=facts.causal != "no",
                final_norm=stack.norm is not None,
                head=stack.head,
                spatial=facts.spatial,
                convolutional=convolutional,
            )
            parts = [family.frozen_block(block) if with_blocks and family.frozen_block else None for _, block in stage]
            first = replace(site, next_block=parts[0], prefix=given)
            places.append(Place(site=first, name=stage[0][0], module=stage[0][1]))
            for (name, block), width, following in zip(stage, widths[1:], [*parts[1:], None], strict=True):
                weights = family.block_weights(block) if with_blocks and family.block_weights else None
                site = replace(site, kind="block", index=index, width=width, next_block=following, weights=weights)
                own = None if facts.linear is None else frozenset(n for n in facts.linear if n.startswith(f"{name}."))
                places.append(Place(site=site, name=name, module=block, linear=own))
                index += 1
        if stack.norm is not None:
            end = replace(site, kind="norm", next_block=None, weights=None, norm=stack.norm[1])
            places.append(Place(site=end, name=stack.norm[0], module=stack.norm[1]))
    return places


def prove_replay(model: nn.Module, tokens: int = 5) -> None:
    """Compare every block with what its `FrozenBlock` makes of the same random hidden state.

    Where there are no values (on the meta device, fake tensors) there is nothing to compare.

    Raises:
        ValueError: if the two differ: a method would then run its queries through something else than the block.
    """
    places = find_places(model)
    for before, place in pairwise(places):
        block = before.site.next_block
        device = device_of(place.module)
        if block is None or device.type == "meta":
            continue
        shape = (1, tokens, place.site.width)
        dtype = next(place.module.parameters()).dtype
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        if isinstance(hidden, FakeTensor):
            continue
        with torch.no_grad(), _evaluating(place.module):
            out = place.module(hidden)
            error = (block.replay(hidden) - part_of(out, 0)).abs().max().item()
        if error > (1e-4 if dtype in (torch.float32, torch.float64) else 0.1):
            raise ValueError(
                f"block {place.site.index} ({type(place.module).__name__}) does not equal the sum of the parts that "
                f"sidestep/backbone/families.py takes it apart into (they differ by {error:.2g})"
            )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode. Afterwards each of its parts is in its own mode again."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
