"""What a step keeps for backward and by whom, and how far its memory rises.

There are two measurements. `saved_bytes` counts what autograd stores during a forward pass, exactly and on any device.
A side network is built to lower this number. `peak_memory` is what the step needs on the machine.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

__all__ = ["Kept", "Peak", "SavedBytes", "format_bytes", "mib", "peak_memory", "saved_bytes"]

PINNED_SHARE = 0.5  # a storage of which less than this share is saved is reported as pinned
TABLE_ROWS = 20
SAMPLE_SECONDS = 0.005


def mib(size: int) -> float:
    """Bytes as MiB (2**20 bytes)."""
    return size / 2**20


def format_bytes(size: int) -> str:
    """Bytes as a short text with a binary unit: "512 B", "1.5 KiB", "222.0 MiB"."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB"]
    while abs(value) >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{size} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """One tensor that autograd keeps for backward. A tensor saved several times is one row.

    Attributes:
        module: dotted name, within the model, of the innermost module that was running when the tensor was
            first saved. "" is the model itself or code outside it.
        shape: of the tensor.
        dtype: of the tensor.
        bytes: of the tensor's elements, as if it were contiguous.
        storage_bytes: of the whole storage that it keeps alive.
        counted: what the row adds to the total: `storage_bytes` in the first row of a storage, 0 in the rows
            of its other views.
        saves: how many times it was saved.
        pinned: True if less than half of its storage is saved by anybody.
    """

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    storage_bytes: int
    counted: int
    saves: int
    pinned: bool


@dataclass
class _View:
    """A distinct view of a storage, and who saved it first."""

    module: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    touched: int  # bytes of the distinct elements: an expanded dimension counts once
    saves: int = 1


class _Storage:
    """A storage that autograd keeps, and the views through which it does."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.views: dict[tuple[object, ...], _View] = {}

    def save(self, tensor: Tensor, module: str) -> None:
        key = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if key in self.views:
            self.views[key].saves += 1
            return
        distinct = prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
        size = tensor.element_size()
        self.views[key] = _View(module, tuple(tensor.shape), tensor.dtype, tensor.numel() * size, distinct * size)

    @property
    def pinned(self) -> bool:
        return sum(view.touched for view in self.views.values()) < PINNED_SHARE * self.nbytes

    def rows(self) -> list[Kept]:
        return [
            Kept(
                module=view.module,
                shape=view.shape,
                dtype=view.dtype,
                bytes=view.bytes,
                storage_bytes=self.nbytes,
                counted=0 if index else self.nbytes,
                saves=view.saves,
                pinned=self.pinned,
            )
            for index, view in enumerate(self.views.values())
        ]


class SavedBytes:
    """The bytes that autograd keeps for backward while a `with` block runs. Made by `saved_bytes`.

    Storages are told apart by identity, not by address. A freed storage whose address is used again is another one. The
    record holds no storage alive.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []
        self._storages: list[_Storage] = []
        # A storage's Python object lives exactly as long as the storage, whoever holds it. (StorageWeakRef
        # identifies it too, but holds the C++ object, which fragments the heap once the data is freed.)
        self._known: WeakKeyDictionary[torch.UntypedStorage, _Storage] = WeakKeyDictionary()
        self._own: WeakSet[torch.UntypedStorage] = WeakSet()
        self._unseen: list[str] = []
        self._exit: ExitStack | None = None

    def __enter__(self) -> "SavedBytes":
        if self._exit is not None:
            raise RuntimeError("this record has been used: call saved_bytes(model) again for another block")
        for tensor in [*self._model.parameters(), *self._model.buffers()]:
            if tensor.layout == torch.strided:
                self._own.add(tensor.untyped_storage())
        with ExitStack() as stack:
            for module in self._names:
                # First in and last out, so that what other hooks save counts for the module they sit on.
                stack.callback(module.register_forward_pre_hook(self._enter_module, prepend=True).remove)
                stack.callback(module.register_forward_hook(self._leave_module, always_call=True).remove)
            stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._exit is not None:
            self._exit.close()
        self._known.clear()
        self._own.clear()
        self._running.clear()

    def _enter_module(self, module: nn.Module, args: object) -> None:
        self._running.append(module)

    def _leave_module(self, module: nn.Module, args: object, output: object) -> None:
        # a hook that raises before ours was reached leaves nothing of this module to take off
        if self._running and self._running[-1] is module:
            self._running.pop()

    def _pack(self, tensor: Tensor) -> Tensor:
        # detached, because an operation that saves its own result would otherwise hold itself alive for ever
        module = self._names[self._running[-1]] if self._running else ""
        if tensor.layout != torch.strided:
            self._unseen.append(f"{_where(module)} keeps a {tensor.layout} tensor, which is not counted")
            return tensor.detach()
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage not in self._own:
            if storage not in self._known:
                self._known[storage] = _Storage(storage.nbytes())
                self._storages.append(self._known[storage])
            self._known[storage].save(tensor, module)
        return tensor.detach()

    @property
    def total(self) -> int:
        """Bytes kept. Every distinct storage counts once, whole. The model's parameters and buffers are left out."""
        return sum(storage.nbytes for storage in self._storages)

    @property
    def rows(self) -> list[Kept]:
        """What is kept, largest first (by storage, then by tensor)."""
        rows = [row for storage in self._storages for row in storage.rows()]
        return sorted(rows, key=lambda row: (-row.storage_bytes, -row.bytes))

    @property
    def warnings(self) -> list[str]:
        """One line per slice that keeps a much larger storage alive, the most wasteful first."""
        pinned = [row for row in self.rows if row.pinned]
        pinned.sort(key=lambda row: row.bytes - row.storage_bytes)
        return [_pinned_text(row) for row in pinned] + list(dict.fromkeys(self._unseen))

    def by_module(self, depth: int | None = None) -> dict[str, int]:
        """Bytes kept by each module, largest first. They sum to `total`.

        A storage counts for the module that saved it first.

        Args:
            depth: how many parts of the dotted name to keep. None keeps the whole name, 0 gives one sum.

        Raises:
            ValueError: if depth is negative.
        """
        if depth is not None and depth < 0:
            raise ValueError(f"depth={depth}: give 0 or more parts of the module's name, or None for all")
        sums: dict[str, int] = {}
        for row in self.rows:
            if row.counted:
                name = ".".join(row.module.split(".")[:depth])
                sums[name] = sums.get(name, 0) + row.counted
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    def __str__(self) -> str:
        rows = self.rows
        lines: list[tuple[str, ...]] = [("kept", "of storage", "dtype", "shape", "module")]
        lines += [_cells(row) for row in rows[:TABLE_ROWS]]
        widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
        text = ["  ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        if len(rows) > TABLE_ROWS:
            text.append(f"... and {len(rows) - TABLE_ROWS} smaller ones")
        text.append(f"total {format_bytes(self.total)} in {len(self._storages)} storages")
        return "\n".join(text + [f"warning: {line}" for line in self.warnings])


def by_kind_of_module(sums: Mapping[str, int]) -> dict[str, int]:
    """Bytes by module with the numbers of blocks as "*", so that one row stands for all blocks. Largest first."""
    kinds: dict[str, int] = {}
    for name, size in sums.items():
        kind = ".".join("*" if part.isdigit() else part for part in name.split(".")) or "(model)"
        kinds[kind] = kinds.get(kind, 0) + size
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def saved_bytes(model: nn.Module) -> SavedBytes:
    """A record of every tensor that autograd keeps for backward during a `with` block.

    ```python
    with ss.saved_bytes(model) as kept:
        loss = model(**batch).loss
    print(kept.total)  # bytes
    print(kept)  # a table
    ```
    Put the forward pass into the block and the backward pass after it. Everything saved in the block counts,
    also what is freed before the block ends. So two forward passes count twice. A block under gradient
    checkpointing counts with its inputs only. What it recomputes in backward is not kept.

    Some tensors are not seen: those that a custom `autograd.Function` sets on its `ctx` without giving them to
    `save_for_backward`, and those that other threads save. Nor is what is saved inside other saved-tensor hooks,
    such as `save_on_cpu`. Within the block autograd does not check that saved tensors stay unchanged in place.
    Hooks sit on every module meanwhile, so measure the model before it is compiled.

    Args:
        model: names the modules. Its parameters and buffers are not counted.

    Returns:
        A record to be entered once, readable within the block and after it.
    """
    return SavedBytes(model)


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


def _where(module: str) -> str:
    return module or "the model itself"


def _pinned_text(row: Kept) -> str:
    return (
        f"{_where(row.module)}: a slice ({format_bytes(row.bytes)}) of shape {row.shape} pins its storage "
        f"of {mib(row.storage_bytes):.2f} MiB: copy the row"
    )


def _cells(row: Kept) -> tuple[str, ...]:
    storage = format_bytes(row.storage_bytes) if row.counted else "(counted above)"
    dtype = str(row.dtype).removeprefix("torch.")
    return format_bytes(row.bytes), storage, dtype, str(row.shape), row.module or "(model)"


@dataclass(frozen=True)
class Peak:
    """How far memory rose while a step ran, in bytes.

    Attributes:
        allocated: what PyTorch's allocator handed out, at its highest.
        resident: rise of the process's resident set, at its highest. None on CUDA.
        device: the device that was measured.
    """

    allocated: int
    resident: int | None
    device: str


def peak_memory(step: Callable[[], object], device: torch.device | str = "cpu") -> Peak:
    """Bytes that a step needs above what was allocated when it began.

    Let the step begin as it ends, with gradients set to None and the optimizer's state in place (one step
    before the measured one). Then the peak is what the step needs beside the model and the optimizer.

    On CUDA `allocated` is `max_memory_allocated` less what was allocated at the start, synchronised. What the
    caching allocator reserves beyond that, and what CUDA libraries allocate for themselves, is not in it.

    On the CPU `allocated` is exact: the most that the step's own allocations took at one time. It comes from the
    profiler's record of every allocation and release (a BERT step takes a few per cent longer under it).
    Freeing memory from before the step does not lower `allocated`. It leaves out what other threads allocate (data
    loaders) and what libraries take from the system themselves (oneDNN, NumPy). `resident` sees all of
    these, but is sampled every 5 ms, and is lower where the step fills memory that the process already held.

    Args:
        step: called once. What it returns is dropped.
        device: "cpu" or a CUDA device.

    Raises:
        ValueError: if the device is neither.
        RuntimeError: if CUDA is not available, or a profiler is running already.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _peak_on_cpu(step)
    if device.type == "cuda":
        return _peak_on_cuda(step, device)
    raise ValueError(f"device={str(device)!r}: peak memory can be measured on 'cpu' and 'cuda'")


def _peak_on_cuda(step: Callable[[], object], device: torch.device) -> Peak:
    if not torch.cuda.is_available():
        raise RuntimeError(f"device={str(device)!r}, but CUDA is not available: measure on 'cpu'")
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return Peak(torch.cuda.max_memory_allocated(device) - start, None, str(device))


def _peak_on_cpu(step: Callable[[], object]) -> Peak:
    with (
        _quiet_profiler(),
        _Resident() as resident,
        profile(use_kineto=True, profile_memory=True, use_device=None) as profiled,
    ):
        step()
    result: Any = profiled.kineto_results
    return Peak(_most_allocated(result.experimental_event_tree()), resident.rise, "cpu")


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's log off the user's screen. It complains of a missing GPU, among others."""
    name = "KINETO_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def _most_allocated(events: list[Any]) -> int:
    """The highest sum of the allocations that a tree of profiler events holds at one time, in bytes."""
    # Releases are matched to allocations by address. The profiler's own running sum also subtracts blocks
    # from before the step, but only those that some earlier profile has seen.
    live: dict[int, int] = {}
    now = most = 0
    for event in sorted(_allocations(events), key=lambda event: event.start_time_ns):
        block = event.extra_fields
        now -= live.pop(block.ptr, 0)
        if block.alloc_size > 0:
            live[block.ptr] = block.alloc_size
            now += block.alloc_size
            most = max(most, now)
    return most


def _allocations(events: list[Any]) -> Iterator[Any]:
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag.name == "Allocation" and event.extra_fields.device.type == "cpu":
            yield event


class _Resident:
    """Samples the process's resident set in a thread. `rise` is its highest above the start, in bytes."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="sidestep-resident", daemon=True)
        self.rise = 0

    def __enter__(self) -> "_Resident":
        self._start = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        last = False
        while not last:
            last = self._done.wait(SAMPLE_SECONDS)
            self.rise = max(self.rise, self._process.memory_info().rss - self._start)
