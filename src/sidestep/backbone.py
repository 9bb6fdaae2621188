"""The frozen backbone: find its stacks, blocks and norms; freeze it; hold it in eval mode; name it by its digest."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from sidestep.families import Family, Pool, family_of, no_grid, prefix_tokens
from sidestep.sites import Place, Site

Noise = Literal["drop_path", "dropout", "all"]


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One stack of a backbone, as found.

    Attributes:
        name: "encoder" or "decoder".
        root: the module whose call runs the stack.
        stages: the blocks of every stage, each with its name within the backbone.
        norm: the final norm and its name, or None.
        causal: whether tokens see earlier ones only.
        head: whether the head reads this stack.
    """

    name: str
    root: nn.Module
    stages: tuple[tuple[tuple[str, nn.Module], ...], ...]
    norm: tuple[str, nn.Module] | None
    causal: bool
    head: bool


# --- finding ---------------------------------------------------------------------------------------------------


def trunk_of(model: Any) -> Any:
    """The backbone without its task head (a Hugging Face model's base model; a timm model itself)."""
    return model.base_model if isinstance(model, PreTrainedModel) else model


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has both stacks (an encoder taken out of one does not)."""
    trunk = trunk_of(model)
    return hasattr(trunk, "encoder") and hasattr(trunk, "decoder") and trunk.config.is_encoder_decoder


def is_causal(model: nn.Module) -> bool:
    """Whether the model's only stack is causal: the family table or its attention modules say so."""
    said = (getattr(module, "is_causal", False) is True for module in trunk_of(model).modules())
    return not is_encoder_decoder(model) and (family_of(model).causal or any(said))


def default_pool(model: nn.Module) -> Pool:
    """The read-out of a model's family: last token when causal, first token of an encoder-decoder's decoder."""
    if is_encoder_decoder(model):
        return "cls"
    return "last" if is_causal(model) else family_of(model).pool


POSITION_TABLES = ("position_embeddings", "position_embedding", "positions_embed", "embed_positions", "wpe")
"""What transformers' models call the table in which each position has a row."""


def positions(model: nn.Module) -> tuple[int | None, int | None]:
    """How many tokens a model of texts has positions for: of those that it reads, and of those that it writes.

    None where it has no table of them: rotary and relative positions go on beyond the length of pretraining. A model of
    one stack has one table for both.
    """
    trunk = trunk_of(model)
    if is_encoder_decoder(model):
        return _positions(trunk.encoder), _positions(trunk.decoder)
    both = _positions(trunk)
    return both, both


def _positions(stack: nn.Module) -> int | None:
    tables = (module for name, module in stack.named_modules() if name.rpartition(".")[2] in POSITION_TABLES)
    return min((_token_rows(table) for table in tables if isinstance(table, nn.Embedding)), default=None)


def _token_rows(table: nn.Embedding) -> int:
    """The rows of tokens alone: RoBERTa's come after that of padding, BART's after two that nothing uses."""
    first = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - first


def find_stacks(model: nn.Module) -> list[Stack]:
    """The stacks of a Hugging Face or timm model, in running order.

    Raises:
        ValueError: if no repeated blocks are found, or several towers.
    """
    trunk, family = trunk_of(model), family_of(model)
    if is_encoder_decoder(model):
        encoder = _stack("encoder", trunk, trunk.encoder, "encoder.", family, causal=False, head=False)
        decoder = _stack("decoder", trunk, trunk.decoder, "decoder.", family, causal=True, head=True)
        return [encoder, decoder]
    causal = is_causal(model)
    return [_stack("decoder" if causal else "encoder", trunk, trunk, "", family, causal=causal, head=True)]


def _stack(
    name: str, trunk: nn.Module, root: nn.Module, prefix: str, family: Family, *, causal: bool, head: bool
) -> Stack:
    containers = _block_lists(root, family)
    if not containers:
        raise ValueError(
            f"{type(trunk).__name__} holds no list of repeated blocks: Sidestep needs a Transformer (or a model "
            "whose blocks stand in an nn.ModuleList or nn.Sequential), or a ResNet"
        )
    blocks = [block for container in containers.values() for block in container.children()]
    if family.layout != "channels" and all(_convolves(block) for block in blocks):
        raise ValueError(
            f"the blocks of {type(trunk).__name__} are convolutions ({type(blocks[0]).__name__}): Sidestep needs a "
            "Transformer, whose blocks hand on (batch, tokens, width), and of convolutional networks it takes ResNets"
        )
    owners = {path.rpartition(".")[0].rpartition(".")[0] for path in containers}
    one_tower = len(containers) == 1 or (len(owners) == 1 and all(_is_indexed(path) for path in containers))
    if family.blocks is None and not one_tower:
        raise ValueError(
            f"{type(trunk).__name__} has several towers of blocks ({', '.join(containers)}): "
            "attach to one of them (for example model.vision_model)"
        )
    stages = tuple(
        tuple((f"{prefix}{path}.{child}", block) for child, block in container.named_children())
        for path, container in containers.items()
    )
    norm = _final_norm(root, next(iter(containers)), family)
    named = None if norm is None else (f"{prefix}{norm[0]}", norm[1])
    return Stack(name=name, root=root, stages=stages, norm=named, causal=causal, head=head)


def _is_indexed(path: str) -> bool:
    """Whether a block list belongs to a numbered stage ("layers.0.blocks")."""
    return any(part.isdigit() for part in path.split("."))


def _block_lists(root: nn.Module, family: Family) -> dict[str, nn.Module]:
    """Lists of blocks by path: those that the family names, else Hugging Face's checkpointing layers (the innermost),
    else lists named "blocks".
    """
    lists: dict[str, Any] = {
        path: module
        for path, module in root.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 0
    }
    if family.blocks is not None:
        return {path: module for path, module in lists.items() if re.fullmatch(family.blocks, path)}
    checkpointing = {
        path: module
        for path, module in lists.items()
        if all(isinstance(child, GradientCheckpointingLayer) for child in module)
    }
    if checkpointing:
        return {
            path: module
            for path, module in checkpointing.items()
            if not any(other.startswith(f"{path}.") for other in checkpointing)
        }
    named = {path: module for path, module in lists.items() if path.rpartition(".")[2] == "blocks"}
    return named or _outermost_repeats(lists)


def _outermost_repeats(lists: dict[str, nn.Module]) -> dict[str, nn.Module]:
    repeats = {
        path: module
        for path, module in lists.items()
        if len({type(child) for child in module.children()}) == 1
        and any(isinstance(part, nn.Linear) for part in next(module.children()).modules())
        and not isinstance(next(module.children()), nn.Linear)
    }
    return {
        path: module
        for path, module in repeats.items()
        if not any(path.startswith(f"{other}.") for other in repeats if other != path)
    }


def _convolves(block: nn.Module) -> bool:
    """Whether a block mixes its tokens by convolution, without attention."""
    attends = any("attention" in type(module).__name__.lower() for module in block.modules())
    return not attends and any(isinstance(module, nn.Conv2d) for module in block.modules())


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def _final_norm(root: nn.Module, blocks: str, family: Family) -> tuple[str, nn.Module] | None:
    """The norm that stands after the blocks, in the nearest enclosing module that has one."""
    if family.final_norm is not None:
        parent, _, name = family.final_norm.rpartition(".")
        norm = getattr(root.get_submodule(parent), name) if family.final_norm else None
        return None if norm is None else (family.final_norm, norm)
    parts = blocks.split(".")
    for level in range(len(parts) - 1, -1, -1):
        owner, inside = root.get_submodule(".".join(parts[:level])), parts[level]
        names = [name for name, _ in owner.named_children()]
        for name in names[names.index(inside) + 1 :]:
            if _is_norm(owner.get_submodule(name)):
                return ".".join([*parts[:level], name]), owner.get_submodule(name)
    return None


def _width(block: nn.Module) -> int:
    """Channels of a block's hidden state: the size of its own norms (a nested one may belong to an attention head)."""
    norms = [child for child in block.children() if _is_norm(child)]
    norms = norms or [module for module in block.modules() if _is_norm(module)]
    sizes = [parameter.numel() for norm in norms for parameter in norm.parameters()]
    if not sizes:
        raise ValueError(f"{type(block).__name__} has no norm from which its width could be read")
    return sizes[0]


def _map_widths(block: nn.Module) -> tuple[int, int]:
    """Channels of what goes into a block of convolutions, and of what its last norm gives."""
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in block.modules() if _is_norm(module)]
    if not (convolutions and norms):
        raise ValueError(f"{type(block).__name__} has no convolution and norm from which its width could be read")
    return convolutions[0].in_channels, next(norms[-1].parameters()).numel()


def _widths(stage: Sequence[tuple[str, nn.Module]], family: Family) -> list[int]:
    """Channels of a stage's input and of the output of each of its blocks."""
    if family.layout == "channels":
        return [_map_widths(stage[0][1])[0], *(_map_widths(block)[1] for _, block in stage)]
    return [_width(stage[0][1])] * (1 + len(stage))


def find_places(model: nn.Module, *, with_blocks: bool = True) -> list[Place]:
    """Every site of a backbone and the module it sits on, in the order of a pass.

    Names are relative to the trunk (`trunk_of`). With `with_blocks`, sites carry their `FrozenBlock` and
    `BlockWeights` where the family table can fill them.
    """
    family = family_of(model)
    prefix = prefix_tokens(trunk_of(model), family)
    places: list[Place] = []
    for stack in find_stacks(model):
        depth = sum(len(stage) for stage in stack.stages)
        index = 0
        for number, stage in enumerate(stack.stages):
            widths = _widths(stage, family)
            site = Site(
                kind="stage",
                stack=stack.name,
                stage=number,
                index=index,
                depth=depth,
                width=widths[0],
                prefix=prefix,
                causal=stack.causal,
                final_norm=stack.norm is not None,
                head=stack.head,
                spatial=family.grid is not no_grid,
                convolutional=family.layout == "channels",
            )
            parts = [family.frozen_block(block) if with_blocks and family.frozen_block else None for _, block in stage]
            first = replace(site, next_block=parts[0])
            places.append(Place(site=first, name=stage[0][0], module=stage[0][1]))
            for (name, block), width, following in zip(stage, widths[1:], [*parts[1:], None], strict=True):
                weights = family.block_weights(block) if with_blocks and family.block_weights else None
                site = replace(site, kind="block", index=index, width=width, next_block=following, weights=weights)
                places.append(Place(site=site, name=name, module=block))
                index += 1
        if stack.norm is not None:
            end = replace(site, kind="norm", next_block=None, weights=None, norm=stack.norm[1])
            places.append(Place(site=end, name=stack.norm[0], module=stack.norm[1]))
    return places


def prove_replay(model: nn.Module, tokens: int = 5) -> None:
    """Compare every block with what its `FrozenBlock` makes of the same random hidden state.

    On the meta device there is nothing to compare.

    Raises:
        ValueError: if they differ: a method that runs queries through the parts would not run them through the block.
    """
    places = find_places(model)
    for before, place in pairwise(places):
        block = before.site.next_block
        if block is None or (parameter := next(place.module.parameters())).is_meta:
            continue
        shape = (1, tokens, place.site.width)
        hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(parameter)
        with torch.no_grad(), _evaluating(place.module):
            out = place.module(hidden)
            error = (block.replay(hidden) - (out[0] if isinstance(out, tuple) else out)).abs().max().item()
        if error > (1e-4 if parameter.dtype in (torch.float32, torch.float64) else 0.1):
            raise ValueError(
                f"block {place.site.index} ({type(place.module).__name__}) does not equal the sum of the parts that "
                f"sidestep/families.py takes it apart into (they differ by {error:.2g})"
            )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode, each of its parts in its own mode again afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def without_values(model: nn.Module) -> nn.Module:
    """A copy on the meta device: a task can be tried on it, and it takes no memory for weights."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        memo[id(parameter)].__dict__.update(parameter.__dict__)  # transformers' mark of what was loaded
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)


# --- freezing --------------------------------------------------------------------------------------------------


def freeze(model: nn.Module) -> None:
    """Stop every gradient: the one place that does."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def set_noise(trunk: nn.Module, noise: Noise | None) -> None:
    """Put a frozen trunk in eval mode, except for the noise that was asked for.

    Batch norms stay in eval mode in any case: in training mode they would move the frozen model's buffers.
    """
    trunk.eval()
    if noise is None:
        return
    for module in trunk.modules():
        if "BatchNorm" in type(module).__name__:
            continue
        if noise == "all" or _is_drop_path(module) == (noise == "drop_path"):
            module.training = True


def drop_path_rate(trunk: nn.Module) -> float:
    """The highest rate of a trunk's drop paths, which is the last block's; 0 where it has none."""
    rates: list[Any] = [module.drop_prob for module in trunk.modules() if _is_drop_path(module)]
    return max((float(rate or 0) for rate in rates), default=0.0)


def _is_drop_path(module: nn.Module) -> bool:
    kind = type(module).__name__
    return "DropPath" in kind or "StochasticDepth" in kind


def check_noise(noise: str | None) -> None:
    """Raise unless `noise` is None or a known kind."""
    if noise is not None and noise not in get_args(Noise):
        raise ValueError(f"backbone_noise={noise!r}: choose None or one of {', '.join(get_args(Noise))}")


class CheckpointedForward:
    """A block's `forward` that keeps only its inputs and runs again in backward.

    It wraps `forward`, not `__call__`, so hooks stay outside and run once; a cache would be written twice, so none
    is passed on; running statistics of batch norms move the first time only.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output for its arguments."""
        run = type(self.block).forward
        if not torch.is_grad_enabled():
            return run(self.block, *args, **kwargs)
        for name in ("past_key_values", "layer_past"):
            if kwargs.get(name) is not None:
                kwargs[name] = None
        norms = [module for module in self.block.modules() if isinstance(module, _BatchNorm) and module.training]
        if norms:
            kwargs["context_fn"] = lambda: (nullcontext(), _statistics_stay(norms))
        return checkpoint(run, self.block, *args, use_reentrant=False, **kwargs)


@contextmanager
def _statistics_stay(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Batch norms compute as ever, and their running statistics stay as they are."""
    before = [(norm, norm.momentum, norm.get_buffer("num_batches_tracked").clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.get_buffer("num_batches_tracked").copy_(batches)


def checkpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Make each of the blocks recompute itself in backward."""
    for block in blocks:
        block.forward = CheckpointedForward(block)


def uncheckpoint_blocks(blocks: Sequence[nn.Module]) -> None:
    """Undo `checkpoint_blocks`."""
    for block in blocks:
        if isinstance(block.__dict__.get("forward"), CheckpointedForward):
            del block.forward


# --- what was loaded, and its digest ---------------------------------------------------------------------------


def new_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that the checkpoint did not have (random at every load).

    transformers marks what it loads; a model that never went through `from_pretrained` has no marks and counts as
    loaded whole.
    """
    marked = {
        name: bool(getattr(parameter, "_is_hf_initialized", False)) for name, parameter in model.named_parameters()
    }
    return {name for name, loaded in marked.items() if not loaded} if any(marked.values()) else set()


@dataclass(frozen=True)
class Digest:
    """What identifies a backbone's weights.

    Attributes:
        dtype: of the weights ("float32", "bfloat16", ...; several joined by "+").
        exact: SHA-256 over names, shapes, dtypes and bytes.
        rounded: the same digest after rounding floating-point weights to each narrower dtype, so that a copy of the
            same weights in another precision is recognised.
    """

    dtype: str
    exact: str
    rounded: dict[str, str] = field(default_factory=dict)

    def matches(self, other: Digest) -> Literal["same", "dtype", "different"]:
        """How the weights that `other` describes compare to these."""
        if self.exact == other.exact:
            return "same"
        mine, theirs = ({d.dtype: d.exact, **d.rounded} for d in (self, other))
        shared = {self.dtype, other.dtype} & mine.keys() & theirs.keys()
        if self.dtype != other.dtype and any(mine[dtype] == theirs[dtype] for dtype in shared):
            return "dtype"
        return "different"


def pretrained_tensors(
    model: nn.Module,
    originals: Mapping[str, Tensor] | None = None,
    plain_name: Callable[[str], str | None] = str,
) -> Iterator[tuple[str, Tensor]]:
    """Names (relative to the base model, sorted) and values of the pretrained weights that identify a backbone.

    Left out: heads and poolers (a class of model may lack them), tensors that the checkpoint did not have, and the
    second name of a tied tensor. `originals` stand in for tensors (by the model's names) that a method moved;
    `plain_name` gives back the names that they had before a method inserted modules (None: the method's own).
    """
    trunk, missing = trunk_of(model), new_parameters(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    new = {id(tensors[name]) for name in missing}
    before = {id(tensors[name]): value for name, value in (originals or {}).items()}
    skip = new | head_tensors(trunk)
    # Every name of a tied tensor is looked at, so that the one it goes by does not hang on the order of registration.
    named = [*trunk.named_parameters(remove_duplicate=False), *_persistent_buffers(trunk)]
    plain = [(own, tensor) for name, tensor in named if (own := plain_name(name)) is not None]
    for name, tensor in sorted(plain, key=lambda item: item[0]):
        if id(tensor) not in skip and not in_pooler(name):
            skip.add(id(tensor))
            yield name, before.get(id(tensor), tensor).detach()


def in_pooler(name: str) -> bool:
    """Whether a parameter of this name belongs to a pooler (on top of the last hidden state, part of no block)."""
    return "pooler" in name.split(".")


def head_tensors(trunk: Any) -> set[int]:
    """Identities of the weights of an output head inside the trunk, unless they are tied to others."""
    if isinstance(trunk, PreTrainedModel):
        head = trunk.get_output_embeddings()
    else:
        head = trunk.get_classifier() if hasattr(trunk, "get_classifier") else None
    if head is None:
        return set()
    outside = [module for module in trunk.modules() if module not in set(head.modules())]
    shared = {id(p) for module in outside for p in module.parameters(recurse=False)}
    return {id(p) for p in head.parameters()} - shared


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    kept = set(module.state_dict(keep_vars=True))
    return ((name, buffer) for name, buffer in module.named_buffers() if name in kept)


def joined(digests: Sequence[Digest]) -> Digest:
    """One digest that stands for several, in their order."""
    shared = set[str].intersection(*(set(digest.rounded) for digest in digests))
    return Digest(
        dtype="+".join(sorted({dtype for digest in digests for dtype in digest.dtype.split("+")})),
        exact=_hash(digest.exact for digest in digests),
        rounded={dtype: _hash(digest.rounded[dtype] for digest in digests) for dtype in sorted(shared)},
    )


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


_NARROWER = (torch.bfloat16, torch.float16)


def digest_of(named: Iterable[tuple[str, Tensor]]) -> Digest:
    """The digest of tensors with their names."""
    exact, rounded = hashlib.sha256(), {dtype: hashlib.sha256() for dtype in _NARROWER}
    dtypes: set[torch.dtype] = set()
    for name, tensor in named:
        value = tensor.cpu().contiguous()
        exact.update(_record(name, value))
        if value.is_floating_point():
            dtypes.add(value.dtype)
        for dtype, running in rounded.items():
            running.update(_record(name, value.to(dtype) if value.is_floating_point() else value))
    wide = not dtypes & set(_NARROWER)
    return Digest(
        dtype="+".join(sorted(_name(dtype) for dtype in dtypes)),
        exact=exact.hexdigest(),
        rounded={_name(dtype): running.hexdigest() for dtype, running in rounded.items()} if wide else {},
    )


def _record(name: str, value: Tensor) -> bytes:
    head = f"{name} {tuple(value.shape)} {_name(value.dtype)} ".encode()
    return head + value.reshape(-1).view(torch.uint8).numpy().tobytes()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
