"""The processes of one run: which one this is, what the first does alone, what all must agree on, how they end.

`torchrun` or `accelerate launch` starts them. The collectives are torch.distributed's. Alone, every function here does
what one process would do.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from sidestep.messages import duration_of, flat

TIMEOUT = "SIDESTEP_TIMEOUT"
"""Environment variable: how long a process waits for the others, such as 90s or 10m."""
WAIT = "30m"
LOST = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "timed out", "Socket closed", "Socket Timeout")
"""What torch.distributed says where another process is gone, or does not come."""

T = TypeVar("T")
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)
_RUNS = itertools.count()
_NOTE: ContextVar[str | None] = ContextVar("note", default=None)
"""Where in the launcher's store the end of a process is noted. None outside of `together`."""


class RankEnded(RuntimeError):
    """Another process of the run has ended, and the message says which and why."""


class RanksDiffer(ValueError):
    """The processes of a run do not do the same. The message says who differs in what."""


def launched() -> int:
    """How many processes a launcher has started for this run. 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def begin() -> None:
    """Join the other processes, where a launcher has started several and nobody has joined them yet.

    Raises:
        ValueError: if `TIMEOUT` is no time.
    """
    if launched() == 1 or dist.is_initialized():
        return
    wait = timedelta(seconds=duration_of(os.environ.get(TIMEOUT, WAIT)))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(timeout=wait)  # gloo for what is on the CPU, and the devices' own


def end() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    """How many processes there are."""
    return 1 if _ALONE.get() else started()


def started() -> int:
    """The same, also within `alone`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this one, from 0."""
    return dist.get_rank() if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the one that owns folders and prints."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process counts as the only one, and waits for nobody."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


# --- what is shared out -----------------------------------------------------------------------------------------------


def share(total: int) -> int:
    """The largest share of so many rows that one process gets."""
    return -(-total // count())


def own(things: Sequence[T]) -> Sequence[T]:
    """This process's share: every so-manieth thing."""
    return things[rank() :: count()]


def woven(shares: Sequence[Sequence[T]]) -> list[T]:
    """The things in order, of the shares of all processes."""
    found: list[Any] = [None] * sum(map(len, shares))
    for number, part in enumerate(shares):
        found[number :: len(shares)] = part
    return found


# --- what is done together --------------------------------------------------------------------------------------------


def each(call: Callable[[], T]) -> list[T]:
    """What a call gives on each process, in their order, on all. An error of any of them is raised on all."""
    if count() == 1:
        return [call()]
    value, error = _tried(call)
    every: list[Any] = [None] * count()
    dist.all_gather_object(every, (value, error))
    _raise([error for _, error in every])
    return [value for value, _ in every]


def first(call: Callable[[], T]) -> T:
    """What a call gives on the first process, which alone makes it, on all. An error of it is raised on all."""
    if count() == 1:
        return call()
    found: list[Any] = [None]
    if is_first():
        with alone():
            found = [_tried(call)]
    dist.broadcast_object_list(found, src=0)
    value, error = found[0]
    _raise([error])
    return value


def from_one(sender: int, value: T) -> T:
    """What one process gives, on all."""
    found: list[Any] = [value]
    if count() > 1:
        dist.broadcast_object_list(found, src=sender)
    return found[0]


def total(tensor: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def of_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the first process's tensors, on all."""
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    for tensor in copies.values() if count() > 1 else ():
        dist.broadcast(tensor, src=0)
    return copies


def gathered(tensor: Tensor) -> Tensor:
    """The rows of a tensor of all processes, those of the first in front.

    What each process computes of them is the same. Its gradient reaches this process's own rows alone. It is multiplied
    by the number of processes, because DistributedDataParallel takes the mean over them.
    """
    if count() == 1:
        return tensor
    sizes = each(lambda: len(tensor))
    values = tensor.detach()
    padded = torch.cat([values, values.new_zeros(max(sizes) - len(values), *values.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    rows = [part[:size] for part, size in zip(parts, sizes, strict=True)]
    rows[rank()] = values + count() * (tensor - values)
    return torch.cat(rows)


def _tried(call: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return call(), None
    except Exception as error:  # whatever it is, the others have to hear of it
        return None, error


def _raise(errors: Sequence[Exception | None]) -> None:
    """Raise this process's own error, or the first one that there is."""
    found = errors[rank()] if len(errors) > 1 else None
    if (error := found or next(filter(None, errors), None)) is not None:
        raise error


# --- agreement --------------------------------------------------------------------------------------------------------


def agree(said: Mapping[str, Any]) -> None:
    """Compare what the processes say of the run.

    Args:
        said: plain values by name, which may be mappings.

    Raises:
        RanksDiffer: on all of them, if they differ. It names who differs from the first, and in what.
    """
    every = each(lambda: flat(said))
    firsts, differing = every[0], []
    for number, theirs in enumerate(every[1:], start=1):
        told = [
            f"{name} is {_short(theirs.get(name))} (rank 0: {_short(firsts.get(name))})"
            for name in sorted(firsts.keys() | theirs)
            if theirs.get(name) != firsts.get(name)
        ]
        if told:
            differing.append(f"on rank {number} {', '.join(told)}")
    if differing:
        raise RanksDiffer(
            f"the {count()} processes of this run differ: {'; '.join(differing)}. Start all of them with the same "
            "arguments, data, backbone and versions"
        )


def check_seen(folder: Path) -> None:
    """Let the first process write a file, and look whether all see it.

    Raises:
        RanksDiffer: naming those that do not.
    """
    if count() == 1:
        return

    def written() -> str:
        folder.mkdir(parents=True, exist_ok=True)
        name = f".{secrets.token_hex(8)}.rank"
        (folder / name).touch()
        return name

    place = folder / first(written)
    blind = [f"rank {number}" for number, sees in enumerate(each(place.is_file)) if not sees]
    first(lambda: place.unlink(missing_ok=True))
    if blind:
        raise RanksDiffer(
            f"{folder} is another folder for {', '.join(blind)} than for rank 0: name one on a disk that all machines "
            "share, by the same path"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- the end of one is the end of all ---------------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[None]:
    """Join the others. Within it an error of a process is noted, and those that wait for that process name it.

    Raises:
        RankEnded: where this process failed because another one has ended.
    """
    begin()
    if count() == 1 or _NOTE.get() is not None:
        yield
        return
    token = _NOTE.set(f"sidestep/ended/{next(_RUNS)}")
    try:
        yield
    except Exception as error:  # raised again, once it is noted
        if (why := _other_end(error)) is not None:
            raise RankEnded(why) from error
        raise
    finally:
        _NOTE.reset(token)


def _other_end(error: Exception) -> str | None:
    """Which other process has ended, if that is why this one fails. Else this one's error is noted for the others."""
    note, lost = str(_NOTE.get()), any(text in str(error) for text in LOST)
    with suppress(RuntimeError):  # the launcher's store may be gone too
        store = dist.distributed_c10d._get_default_store()
        if not lost:
            store.set(note, f"rank {rank()} of {count()} ended: {type(error).__name__}: {error}")
        elif store.check([note]):
            return str(store.get(note).decode())
    if not lost:
        return None
    who = f"rank {1 - rank()}" if count() == 2 else "another rank"
    return (
        f"{who} of {count()} ended without a word, as if it was killed, or kept the others waiting for longer than "
        f"{os.environ.get(TIMEOUT, WAIT)} ({TIMEOUT}). {str(error).splitlines()[0]}"
    )
