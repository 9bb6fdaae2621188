"""The live storages of a training step: what is allocated when, when it is freed, and what is alive at the peak."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Phase = Literal["forward", "backward", "optimizer"]


@dataclass(eq=False)
class Block:
    """One storage that was allocated during the step.

    Attributes:
        bytes: as the device's allocator counts them.
        phase, op: the phase and the operation in which it was made.
        born, died: ticks of the ledger's clock. `died` is None while it lives.
        gradient: whether it became a parameter's gradient.
    """

    bytes: int
    phase: Phase
    op: str
    born: int
    died: int | None = None
    gradient: bool = False

    def lives(self, time: int) -> bool:
        """Whether it is there at this tick."""
        return self.born <= time and (self.died is None or self.died > time)


@dataclass(frozen=True, kw_only=True)
class Highest:
    """The moment at which most is alive. The three parts sum to `bytes`.

    Attributes:
        bytes: alive, without what was there before the step.
        phase, op: whose allocation reached it.
        gradient_bytes: of parameters' gradients.
        kept_bytes: made in the forward pass and needed after it, for backward.
        temporary_bytes: the rest.
    """

    bytes: int
    phase: Phase
    op: str
    gradient_bytes: int
    kept_bytes: int
    temporary_bytes: int


class Ledger(TorchDispatchMode):
    """Follows every storage from the operation that makes it until it is collected.

    A storage that is first seen as an argument was there before the step and is not counted. What a kernel allocates
    and frees again within one operation cannot be seen.

    Args:
        multiple: sizes are rounded up to a multiple of so many bytes, as CUDA's caching allocator does (512).

    Attributes:
        blocks: every storage of the step, in order.
        ops: names of the operations that ran.
        op: the last of them.
    """

    def __init__(self, multiple: int = 1) -> None:
        super().__init__()
        self.multiple = multiple
        self.blocks: list[Block] = []
        self.ops: set[str] = set()
        self.op = ""
        self._phase: Phase = "forward"
        self._clock = 0
        self._forward_end = 0
        # a storage's Python object lives exactly as long as the storage, whoever holds it
        self._known: WeakKeyDictionary[torch.UntypedStorage, Block | None] = WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "prim":  # questions for a device or a size
            return func(*args, **kwargs)
        self.op = func.overloadpacket.__name__
        self.ops.add(self.op)
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, None)
        output = func(*args, **kwargs)
        for storage in _storages(output):
            if storage not in self._known:
                self._known[storage] = self._allocate(storage)
        return output

    def _allocate(self, storage: torch.UntypedStorage) -> Block:
        self._clock += 1
        size = -(-storage.nbytes() // self.multiple) * self.multiple
        block = Block(size, self._phase, self.op, self._clock)
        self.blocks.append(block)
        weakref.finalize(storage, self._free, block).atexit = False
        return block

    def _free(self, block: Block) -> None:
        self._clock += 1
        block.died = self._clock

    def end_forward(self) -> None:
        """What is made from here on belongs to the backward pass."""
        self._phase, self._forward_end = "backward", self._clock

    def end_backward(self, parameters: Iterable[Tensor]) -> None:
        """Note the gradients. What is made from here on belongs to the optimizer."""
        self._phase = "optimizer"
        for parameter in parameters:
            block = None if parameter.grad is None else self._known.get(parameter.grad.untyped_storage())
            if block is not None:
                block.gradient = True

    def highest(self) -> Highest:
        """The peak of the step, and what it consists of."""
        changes = [(block.born, block.bytes, block) for block in self.blocks]
        changes += [(block.died, -block.bytes, block) for block in self.blocks if block.died is not None]
        now = most = 0
        last = Block(0, "forward", "", 0)
        for _, change, block in sorted(changes, key=lambda change: change[0]):
            now += change
            if now > most:
                most, last = now, block
        alive = [block for block in self.blocks if block.lives(last.born)]
        gradients = sum(block.bytes for block in alive if block.gradient)
        kept = sum(block.bytes for block in alive if self._is_kept(block))
        return Highest(
            bytes=most,
            phase=last.phase,
            op=last.op,
            gradient_bytes=gradients,
            kept_bytes=kept,
            temporary_bytes=most - gradients - kept,
        )

    def _is_kept(self, block: Block) -> bool:
        return block.phase == "forward" and block.lives(self._forward_end)


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    for value in tree_leaves(values):
        if isinstance(value, Tensor) and value.layout == torch.strided:
            yield value.untyped_storage()
