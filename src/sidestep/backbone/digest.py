"""What was loaded of a backbone, and the digest that names it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sidestep.backbone.quantised import identity_of
from sidestep.backbone.shards import whole
from sidestep.backbone.trunk import trunk_of
from sidestep.interface.offload import offloaded_tensors, retie, values_in


def new_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that the checkpoint did not have (random at every load).

    transformers marks what it loads. A model that never went through `from_pretrained` has no marks and counts as
    loaded whole. An offloaded parameter comes from a file, though accelerate drops its mark.
    """
    marked = {
        name: bool(getattr(parameter, "_is_hf_initialized", False)) for name, parameter in model.named_parameters()
    }
    if not any(marked.values()):
        return set()
    elsewhere = offloaded_tensors(model)
    return {name for name, p in model.named_parameters() if not marked[name] and id(p) not in elsewhere}


@dataclass(frozen=True)
class Digest:
    """What identifies a backbone's weights.

    Attributes:
        dtype: of the weights ("float32", "bfloat16", ..., or several joined by "+").
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

    Left out are heads and poolers (a class of model may lack them) and tensors that the checkpoint did not have. The
    second name of a tied tensor is left out too. A quantised weight is given as its codes and scales, under names of
    their own, and never unpacked. An offloaded tensor is read when it is its turn. `originals` stand in for tensors (by
    the model's names) that a method moved. `plain_name` gives back the names that tensors had before a method inserted
    modules, or None for the method's own.
    """
    retie(model)
    trunk, missing, value_of = trunk_of(model), new_parameters(model), values_in(model)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    new = {id(tensors[name]) for name in missing}
    before = {id(tensors[name]): value for name, value in (originals or {}).items()}
    skip = new | head_tensors(trunk)
    # Every name of a tied tensor is looked at, so that the one it goes by does not depend on the order of registration.
    named = [*trunk.named_parameters(remove_duplicate=False), *_persistent_buffers(trunk)]
    plain = [(own, path, tensor) for path, tensor in named if (own := plain_name(path)) is not None]
    for name, path, tensor in sorted(plain, key=lambda item: item[0]):
        if id(tensor) not in skip and not in_pooler(name):
            skip.add(id(tensor))
            owner = trunk.get_submodule(path.rpartition(".")[0])
            yield from identity_of(name, before.get(id(tensor), value_of(tensor)), owner)


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
    # timm's distilled models have two
    inside = {part for one in (head if isinstance(head, tuple) else (head,)) for part in one.modules()}
    outside = [module for module in trunk.modules() if module not in inside]
    shared = {id(p) for module in outside for p in module.parameters(recurse=False)}
    return {id(p) for module in inside for p in module.parameters(recurse=False)} - shared


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that a checkpoint has, without a call of `state_dict`, which unpacks what bitsandbytes has packed."""
    for path, part in module.named_modules(remove_duplicate=False):
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), buffer


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
    """The digest of tensors with their names. Shards are gathered one tensor at a time."""
    exact, rounded = hashlib.sha256(), {dtype: hashlib.sha256() for dtype in _NARROWER}
    dtypes: set[torch.dtype] = set()
    for name, tensor in named:
        value = whole(tensor).cpu().contiguous()
        _add(exact, name, value)
        if value.is_floating_point():
            dtypes.add(value.dtype)
        for dtype, running in rounded.items():
            _add(running, name, value.to(dtype) if value.is_floating_point() else value)
    wide = not dtypes & set(_NARROWER)
    return Digest(
        dtype="+".join(sorted(_name(dtype) for dtype in dtypes)),
        exact=exact.hexdigest(),
        rounded={_name(dtype): running.hexdigest() for dtype, running in rounded.items()} if wide else {},
    )


def _add(running: Any, name: str, value: Tensor) -> None:
    """Add a tensor to a running hash. Its bytes are read where they are: a table of tokens may be large."""
    running.update(f"{name} {tuple(value.shape)} {_name(value.dtype)} ".encode())
    running.update(value.reshape(-1).view(torch.uint8).numpy())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
