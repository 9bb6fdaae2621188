"""What a method needs of the model's key-value cache: further layers of its own, and to know who filled it.

The model reorders, selects and crops all layers of its cache alike. So what a method keeps there follows beam search
without a line of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

OWNER = "sidestep_owner"
"""Attribute of a cache: whose keys and values are in it, of how many tokens. A copy of the cache has it too."""
_REMEDY = "start from an empty cache, or from one that the attached model filled"


def claim(cache: Cache, owner: str, past: int | Tensor, tokens: int) -> None:
    """Note that a pass of `owner` adds to a cache, unless others added to it.

    Args:
        cache: the model's.
        owner: names the model whose keys and values alone may be in it.
        past: tokens that are in the cache before this pass.
        tokens: how many this pass adds.

    Raises:
        ValueError: if the bare backbone or another task filled any of it.
    """
    noted, through = getattr(cache, OWNER, (None, 0))
    if noted != owner:
        through = 0
        if isinstance(cache, EncoderDecoderCache) and any(cache.is_updated.values()):
            raise ValueError(f"the cache holds cross-attention that was not made by this task's model: {_REMEDY}")
    elif not isinstance(past, int):
        return  # a static cache counts on its device, and to compare would wait for that
    if past > through:
        raise ValueError(_foreign(past, through))
    setattr(cache, OWNER, (owner, past + tokens))


def _foreign(past: int | Tensor, through: int) -> str:
    return f"the cache holds {past} tokens, of which {through} went through this task's model: {_REMEDY}"


class SideCache:
    """The layers behind those of a stack's blocks, in the cache of one pass (see `sites.SideCache`).

    Args:
        cache: the model's.
        depth: number of blocks in the stack.
        past: tokens that were in the cache before this pass.

    Raises:
        ValueError: if the cache cannot take further layers.
    """

    def __init__(self, cache: Cache, depth: int, past: int) -> None:
        self.both = isinstance(cache, EncoderDecoderCache)
        for part in (cache.self_attention_cache, cache.cross_attention_cache) if self.both else (cache,):
            _check_grows(part)
        self.cache: Any = cache
        self.depth, self.past = depth, past

    def extend(self, number: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `sites.SideCache`."""
        layer = self._layer(self.cache.self_attention_cache if self.both else self.cache, number)
        if layer.get_seq_length() != self.past:
            raise ValueError(_foreign(self.past, layer.get_seq_length()))
        return layer.update(keys, values)

    def once(
        self, number: int, make: Callable[[Tensor], tuple[Tensor, Tensor]], memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `sites.SideCache`."""
        layer, position = self._layer(self.cache.cross_attention_cache, number), self.depth + number
        if self.cache.is_updated.get(position):
            return layer.keys, layer.values
        self.cache.is_updated[position] = True
        return layer.update(*make(memory))

    def _layer(self, cache: DynamicCache, number: int) -> DynamicLayer:
        """The layer of this number behind the blocks' own.

        A cache without a config gets the blocks' layers too.
        """
        while len(cache.layers) <= self.depth + number:
            cache.layers.append(DynamicLayer())
        return cache.layers[self.depth + number]


def _check_grows(cache: Cache) -> None:
    # Subclasses count their tokens in other ways, and a cache that offloads fetches its layers in a ring.
    if type(cache) is not DynamicCache or cache.offloading:
        kind = f"an offloaded {type(cache).__name__}" if cache.offloading else f"a {type(cache).__name__}"
        raise ValueError(
            f"this method keeps keys and values of its own in the model's cache, and {kind} takes no further layers. "
            "Leave out cache_implementation, pass a DynamicCache that is not offloaded, or use_cache=False"
        )
