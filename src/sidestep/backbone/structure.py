"""The repeated blocks of a backbone, as its modules are laid out. `trace` shows what a pass makes of the blocks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from sidestep.backbone.families import DEFAULT, Family, family_of
from sidestep.backbone.trunk import is_encoder_decoder, other_towers, reads_mixed, tower_of, trunk_of
from sidestep.interface.layers import is_linear

Named = tuple[str, nn.Module]
"""A module and its name within the trunk."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The blocks of one stack.

    Attributes:
        name: "encoder" or "decoder". A lone stack is an encoder here, and a decoder if it turns out to be causal.
        root: the module whose call runs the stack, and its name within the trunk.
        stages: the blocks of every stage.
        head: whether the head reads this stack.
        certain: whether the blocks are what such blocks are. Else each of them has to read what the one before gave.
    """

    name: str
    root: Named
    stages: tuple[tuple[Named, ...], ...]
    head: bool
    certain: bool = True

    @property
    def all(self) -> list[Named]:
        """The blocks of all stages, in order."""
        return [block for stage in self.stages for block in stage]


def possible_blocks(model: nn.Module) -> Iterator[list[Blocks]]:
    """The stacks of a Hugging Face or timm model in running order, as they may be, the likeliest first.

    Raises:
        ValueError: if no repeated blocks are found, or several towers.
    """
    trunk, family = trunk_of(model), family_of(model)
    if is_encoder_decoder(model):
        encoder = _blocks("encoder", trunk, ("encoder", trunk.encoder), family, head=False)
        yield [encoder, _blocks("decoder", trunk, ("decoder", trunk.decoder), family, head=True)]
        return
    root = tower_of(trunk)
    refusal: ValueError | None = None
    try:
        yield [_blocks("encoder", trunk, root, family, head=True)]
    except ValueError as error:
        refusal = error
    others = [] if family.blocks is not None else _other_lists(trunk, root[1])
    for lists in others:
        yield [Blocks(name="encoder", root=root, stages=_stages(root[0], lists), head=True, certain=False)]
    if refusal is not None:
        raise refusal


def _blocks(name: str, trunk: nn.Module, root: Named, family: Family, *, head: bool) -> Blocks:
    containers = _block_lists(root[1], family, other_towers(trunk, root[1]) if reads_mixed(trunk) else ())
    if not containers:
        raise ValueError(
            f"{type(trunk).__name__} holds no list of repeated blocks. Sidestep needs a Transformer or a convolutional "
            "network, or another model whose blocks stand in an nn.ModuleList or nn.Sequential"
        )
    if family.blocks is None and not _is_one_tower(containers):
        raise ValueError(
            f"{type(trunk).__name__} has several towers of blocks ({', '.join(containers)}): "
            "attach to one of them (for example model.vision_model)"
        )
    return Blocks(name=name, root=root, stages=_stages(root[0], containers), head=head)


def _stages(root: str, containers: Mapping[str, nn.Module]) -> tuple[tuple[Named, ...], ...]:
    prefix = f"{root}." if root else ""
    return tuple(
        tuple((f"{prefix}{path}.{child}", block) for child, block in container.named_children())
        for path, container in containers.items()
    )


def _is_one_tower(containers: Iterable[str]) -> bool:
    """Whether lists of blocks are one, or the numbered stages of one module."""
    paths = list(containers)
    owners = {path.rpartition(".")[0].rpartition(".")[0] for path in paths}
    return len(paths) == 1 or (len(owners) == 1 and all(_is_indexed(path) for path in paths))


def _other_lists(trunk: nn.Module, root: nn.Module) -> list[dict[str, nn.Module]]:
    """Lists that may hold the blocks, where those of `_block_lists` do not: outermost ones.

    First all that stand in one module, as its stages, then each alone, the largest first. Lists that were found, but do
    not do, have to lie within such a list. Or they are of several towers, of which one reads the model's own input.
    """
    lists = {
        path: module
        for path, module in _lists(root).items()
        if len(module) > 1 and all(any(True for _ in child.children()) for child in module)
    }
    towers = _block_lists(root, DEFAULT)
    own = _block_lists(root, DEFAULT, other_towers(trunk, root))
    if not _is_one_tower(towers) and own and _is_one_tower(own):
        return [own]
    outer = {
        path: module
        for path, module in lists.items()
        if not any(path.startswith(f"{other}.") for other in lists if other != path)
        and all(tower.startswith(f"{path}.") for tower in towers)
    }
    sizes = {path: sum(parameter.numel() for parameter in module.parameters()) for path, module in outer.items()}
    owners = {path.rpartition(".")[0] for path in outer}
    stages = [outer] if len(outer) > 1 and len(owners) == 1 else []
    return [*stages, *(_of_stages({path: outer[path]}) for path in sorted(outer, key=lambda path: -sizes[path]))]


def _is_indexed(path: str) -> bool:
    """Whether a block list belongs to a numbered stage ("layers.0.blocks")."""
    return any(part.isdigit() for part in path.split("."))


def _block_lists(root: nn.Module, family: Family, but: Collection[str] = ()) -> dict[str, nn.Module]:
    """Lists of blocks by path: those that the family names, else Hugging Face's checkpointing layers (the innermost),
    else lists named "blocks". None of them is inside of the parts `but`.
    """
    lists = {
        path: module for path, module in _lists(root).items() if not any(path.startswith(f"{part}.") for part in but)
    }
    if family.blocks is not None:
        return {path: module for path, module in lists.items() if re.fullmatch(family.blocks, path)}
    checkpointing = {
        path: module
        for path, module in lists.items()
        if all(isinstance(child, GradientCheckpointingLayer) for child in module)
    }
    if checkpointing:
        innermost = {
            path: module
            for path, module in checkpointing.items()
            if not any(other.startswith(f"{path}.") for other in checkpointing)
        }
        return _of_stages(_attending(innermost))
    named = {path: module for path, module in lists.items() if path.rpartition(".")[2] == "blocks"}
    return _of_stages(named or _outermost_repeats(lists))


def _lists(root: nn.Module) -> dict[str, Any]:
    return {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0
    }


def _attending(lists: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Without lists whose blocks do not attend, where others do: a front of convolutions is not the stack."""
    attending = {path: module for path, module in lists.items() if any(attends(part) for part in module.children())}
    return attending or lists


def _of_stages(lists: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The blocks within stages, where the lists hold stages: each has one list of blocks of one class."""
    found: dict[str, nn.Module] = {}
    for path, module in lists.items():
        inner = {name: _blocks_within(child) for name, child in module.named_children()}
        if not all(inner.values()):
            return lists
        found |= {".".join(filter(None, (path, name, own[0]))): own[1] for name, own in inner.items() if own}
    return found


def _blocks_within(stage: nn.Module) -> Named | None:
    """The one list of blocks of a stage, or None if it is a block itself."""
    if isinstance(stage, nn.ModuleList):
        return "", stage
    lists = [
        (name, module)
        for name, module in stage.named_children()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len({type(child) for child in module}) == 1
        and (attends(module[0]) or convolves(module[0]))
    ]
    return lists[0] if len(lists) == 1 else None


def _outermost_repeats(lists: dict[str, nn.Module]) -> dict[str, nn.Module]:
    repeats = {
        path: module
        for path, module in lists.items()
        if len({type(child) for child in module.children()}) == 1
        and any(is_linear(part) for part in next(module.children()).modules())
        and not is_linear(next(module.children()))
    }
    return {
        path: module
        for path, module in repeats.items()
        if not any(path.startswith(f"{other}.") for other in repeats if other != path)
    }


def attends(block: nn.Module) -> bool:
    """Whether a block mixes its tokens by attention."""
    return any("attention" in type(module).__name__.lower() for module in block.modules())


def convolves(block: nn.Module) -> bool:
    """Whether a block mixes its tokens by convolution, without attention."""
    return not attends(block) and any(isinstance(module, nn.Conv2d) for module in block.modules())


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, with no more in it than an activation."""
    return "Norm" in type(module).__name__ and not any(list(child.parameters()) for child in module.children())


# --- guesses, for a model that cannot be run on anything that we know how to make -----------------------------------


def likely_norm(blocks: Blocks) -> str | None:
    """The name of the norm that is registered after the blocks, in the nearest enclosing module that has one."""
    root, parts = blocks.root[1], blocks.stages[0][0][0].removeprefix(f"{blocks.root[0]}.").split(".")[:-1]
    for level in range(len(parts) - 1, -1, -1):
        owner, inside = root.get_submodule(".".join(parts[:level])), parts[level]
        names = [name for name, _ in owner.named_children()]
        for name in names[names.index(inside) + 1 :]:
            if is_norm(owner.get_submodule(name)):
                return ".".join([*filter(None, [blocks.root[0]]), *parts[:level], name])
    return None


def likely_widths(blocks: Blocks) -> tuple[tuple[int, ...], ...]:
    """Channels of each stage's input and of the output of each of its blocks, by their norms."""
    return tuple(_widths([block for _, block in stage]) for stage in blocks.stages)


def _widths(stage: list[nn.Module]) -> tuple[int, ...]:
    if all(convolves(block) for block in stage):
        return (_map_widths(stage[0])[0], *(_map_widths(block)[1] for block in stage))
    return (_width(stage[0]),) * (1 + len(stage))


def _width(block: nn.Module) -> int:
    """Channels of a block's hidden state: the size of its own norms (a nested one may belong to an attention head)."""
    norms = [child for child in block.children() if is_norm(child)]
    norms = norms or [module for module in block.modules() if is_norm(module)]
    sizes = [parameter.numel() for norm in norms for parameter in norm.parameters()]
    if not sizes:
        raise ValueError(f"{type(block).__name__} has no norm from which its width could be read")
    return sizes[0]


def _map_widths(block: nn.Module) -> tuple[int, int]:
    """Channels of what goes into a block of convolutions, and of what its last norm gives."""
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in block.modules() if is_norm(module)]
    if not (convolutions and norms):
        raise ValueError(f"{type(block).__name__} has no convolution and norm from which its width could be read")
    return convolutions[0].in_channels, next(norms[-1].parameters()).numel()
