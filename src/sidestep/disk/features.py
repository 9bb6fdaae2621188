"""A store of hidden states: rows of tensors under the names of places, in a folder or in memory.

A folder holds entries, one for each key, which says all that the states depend on besides the row. An entry holds
shards in safetensors format, each with some rows. A shard is written whole or not at all, is never changed, and carries
a checksum. So several processes may write and read at once, and whatever is damaged is found and computed again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sidestep.disk.atomic import OutputError, check_folder, whole
from sidestep.disk.shards import COUNTS, FORMAT, ROWS, Shard, checksum, read_shard

MARK = "sidestep-features.json"
KEY = "key.json"
WAIT = 1.0
"""Seconds to wait for another process that opens a store."""
ABANDONED = 3600
"""Seconds after which a file that was not finished is nobody's any more."""

_log = logging.getLogger("sidestep")


class FeatureError(OutputError):
    """A store cannot be used, and the message says why and what to do."""


class OverLimit(FeatureError):
    """There is no room for a shard by the store's limit."""


class DiskFull(FeatureError):
    """There is no room for a shard on the disk."""


@dataclass
class Entry:
    """The states of rows under one key.

    Attributes:
        key: all that they depend on besides the row.
        store: whose entry it is.
        folder: None: the entry is in memory.
    """

    key: Mapping[str, Any]
    store: FeatureStore
    folder: Path | None = None
    _found: dict[bytes, list[tuple[Shard, int]]] = field(default_factory=dict)
    _files: set[str] = field(default_factory=set)

    def refresh(self) -> None:
        """Read the shards that others have added since. Those that are damaged are removed."""
        if self.folder is None:
            return
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self._files:
                self._files.add(path.name)
                shard = read_shard(path, self.name)
                if shard is not None:
                    self._add(shard)

    @property
    def name(self) -> str:
        """The entry's: a hash of the key."""
        return name_of(self.key)

    def lacking(self, ids: Sequence[bytes], places: Iterable[str]) -> list[int]:
        """The numbers of the rows of which something is not there, each row once."""
        wanted, seen, found = list(places), set[bytes](), []
        for number, row in enumerate(ids):
            if row not in seen and not all(self._shard(row, place) for place in wanted):
                found.append(number)
            seen.add(row)
        return found

    def state(self, row: bytes, place: str) -> Tensor:
        """(tokens, width) of a row, as a view of what is stored."""
        found = self._shard(row, place)
        if found is None:
            raise KeyError(f"{place} of row {row.hex()}")
        shard, number = found
        return shard.row(number, place)

    def seconds(self, ids: Iterable[bytes], places: Sequence[str]) -> float:
        """Seconds that these states of rows took to compute, as they were measured then."""
        total = 0.0
        for row in set(ids):
            shards = {id(found[0]): found[0] for place in places if (found := self._shard(row, place)) is not None}
            total += sum(shard.seconds / len(shard.rows) for shard in shards.values())
        return total

    def add(self, ids: Sequence[bytes], states: Mapping[str, Sequence[Tensor]], seconds: float) -> None:
        """Store the states (tokens, width) of rows.

        Raises:
            OverLimit: if the limit does not allow it.
            DiskFull: if there is no room on the disk.
        """
        counts = {place: [len(state) for state in rows] for place, rows in states.items()}
        joined = {place: torch.cat(list(rows)).contiguous().cpu() for place, rows in states.items()}
        shard = Shard.of(ids, joined, counts, seconds)
        if self.folder is None:
            self.store.spend(sum(_bytes(state) for state in joined.values()))
            self._add(shard)
            return
        tensors = {ROWS: torch.frombuffer(bytearray(b"".join(ids)), dtype=torch.uint8).view(len(ids), -1), **joined}
        tensors |= {f"{place}{COUNTS}": torch.tensor(each) for place, each in counts.items()}
        self.store.make_room(sum(_bytes(tensor) for tensor in tensors.values()), but=self.name)
        about = {"format": str(FORMAT), "entry": self.name, "sum": checksum(tensors), "seconds": repr(seconds)}
        path = self.folder / f"{secrets.token_hex(8)}.safetensors"
        try:
            self._describe()
            with whole(path) as new:
                save_file(tensors, new, metadata=about)
        except (OSError, SafetensorError) as error:
            raise _failed(error, self.folder.parent) from error
        self.refresh()

    @contextmanager
    def claimed(self, part: str, *, wait: bool) -> Iterator[bool]:
        """Whether a part of the rows is this process's meanwhile, with what others have stored of it until now.

        The system frees a part when the process ends that has it.

        Args:
            part: its name.
            wait: for the process that has it.

        Raises:
            FeatureError: if the folder cannot be written to.
        """
        if self.folder is None:
            yield True
            return
        try:
            self._describe()
            lock = FileLock(self.folder / f".{part}.lock", timeout=-1 if wait else 0)
            lock.acquire()
        except Timeout:
            yield False
            return
        except OSError as error:
            raise _failed(error, self.folder.parent) from error
        try:
            self.refresh()
            yield True
        finally:
            lock.release()

    def drop(self) -> None:
        """Forget all states, in the folder too."""
        held = {id(shard): shard for found in self._found.values() for shard, _ in found}
        self._found.clear()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self.store.spend(-sum(_bytes(state) for shard in held.values() for state in shard.states.values()))

    def _describe(self) -> None:
        assert self.folder is not None
        path = self.folder / KEY
        if not path.exists():
            with whole(path) as new:
                new.write_text(json.dumps(dict(self.key), indent=1, sort_keys=True), encoding="utf-8")

    def _add(self, shard: Shard) -> None:
        for row, number in shard.rows.items():
            self._found.setdefault(row, []).append((shard, number))

    def _shard(self, row: bytes, place: str) -> tuple[Shard, int] | None:
        return next((found for found in self._found.get(row, ()) if place in found[0].states), None)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What is told of an entry.

    Attributes:
        name: of its folder.
        key: None if it cannot be read.
        rows: of its shards. A row that is in several counts as often.
        size: bytes.
        used: when it was used last, in seconds as `time.time` gives them.
    """

    name: str
    key: Mapping[str, Any] | None
    rows: int
    size: int
    used: float


class FeatureStore:
    """Entries of states.

    Args:
        folder: where they are. It is made if it is not there. None: in memory.
        limit: bytes that all entries together may have. Those that were not used for longest make room.

    Raises:
        FeatureError: if the folder is something else or of a newer format, cannot be written to, or is being cleared.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._entries: dict[str, Entry] = {}
        self._in_memory = 0
        if folder is None:
            return
        check_store(folder)
        try:
            check_folder(folder)
            if not (folder / MARK).exists():
                with whole(folder / MARK) as new:
                    new.write_text(json.dumps({"format": FORMAT}), encoding="utf-8")
        except OutputError as error:
            raise FeatureError(str(error)) from error
        except OSError as error:
            raise _failed(error, folder) from error
        try:
            # others that open the store hold it for a moment too
            with FileLock(folder / "clearing.lock", timeout=WAIT):
                pass
        except Timeout as error:
            raise FeatureError(
                f"another process is clearing the features in {folder}: try again when it is done"
            ) from error
        for path in folder.glob("*/.*.new"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()

    def entry(self, key: Mapping[str, Any]) -> Entry:
        """The entry of a key, with all that is stored under it."""
        name = name_of(key)
        if name not in self._entries:
            folder = None if self.folder is None else self.folder / name
            self._entries[name] = Entry(key, self, folder)
        entry = self._entries[name]
        if entry.folder is not None:
            with suppress(FileNotFoundError):  # not there yet, or another process has made room
                os.utime(entry.folder / KEY)
        entry.refresh()
        return entry

    def spend(self, size: int) -> None:
        """Take memory for a shard.

        Raises:
            OverLimit: if the limit does not allow it.
        """
        if self._in_memory + size > self.limit:
            raise OverLimit(f"features in memory would take more than the limit of {_told(self.limit)}")
        self._in_memory += size

    def make_room(self, size: int, *, but: str) -> None:
        """Remove the entries that were not used for longest until there is room.

        Args:
            size: bytes that are to be written.
            but: the entry that stays.

        Raises:
            OverLimit: if there is no room without that entry.
        """
        assert self.folder is not None
        stored = sorted(self.stored(), key=lambda entry: entry.used)
        total = sum(entry.size for entry in stored)
        others = [entry for entry in stored if entry.name != but and entry.name not in self._entries]
        if total - sum(entry.size for entry in others) + size > self.limit:
            raise OverLimit(
                f"features would take more than the limit of {_told(self.limit)}: allow more (--features-limit), or "
                "clear others (sidestep features clear)"
            )
        for entry in others:
            if total + size <= self.limit:
                return
            _log.info("features of %s were not used for longest, and are removed", entry.name)
            shutil.rmtree(self.folder / entry.name, ignore_errors=True)
            total -= entry.size

    def stored(self) -> Iterator[Stored]:
        """What is in the folder."""
        assert self.folder is not None
        for path in sorted(self.folder.iterdir()) if self.folder.exists() else ():
            if path.is_dir():
                with suppress(FileNotFoundError):  # another process has removed it meanwhile
                    yield _stored(path)

    def clear(self, names: Iterable[str] | None = None) -> int:
        """Remove entries, all if none are named. Returns how many bytes they had.

        Raises:
            FeatureError: if another process is clearing too.
        """
        assert self.folder is not None
        try:
            with FileLock(self.folder / "clearing.lock", timeout=0):
                entries = [entry for entry in self.stored() if names is None or entry.name in set(names)]
                for entry in entries:
                    shutil.rmtree(self.folder / entry.name, ignore_errors=True)
                return sum(entry.size for entry in entries)
        except Timeout as error:
            raise FeatureError(f"another process is clearing the features in {self.folder}") from error


def name_of(key: Mapping[str, Any]) -> str:
    """The name of a key's entry."""
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:32]


def has_features(folder: Path) -> bool:
    """Whether a store was made in a folder. Errors as of `check_store`, and if the folder may not be looked at."""
    try:
        check_store(folder)
        return (folder / MARK).exists()
    except OSError as error:
        raise _failed(error, folder) from error


def check_store(folder: Path) -> None:
    """Refuse a folder that holds something else, or features of a newer format.

    Raises:
        FeatureError: saying which.
    """
    # another process that makes the store now writes its mark beside, under such a name
    if not folder.is_dir() or all(path.name.startswith(".") and path.suffix == ".new" for path in folder.iterdir()):
        return
    try:
        told = json.loads((folder / MARK).read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FeatureError(f"{folder} holds other files, and no features: name another folder") from error
    if not isinstance(told, int) or told > FORMAT:
        raise FeatureError(
            f"{folder} holds features of format {told}, and this version knows {FORMAT}: name another folder, or "
            "update sidestep"
        )


def _stored(path: Path) -> Stored:
    size, rows, used = 0, 0, path.stat().st_mtime
    for file in path.iterdir():
        with suppress(FileNotFoundError):  # renamed or removed meanwhile
            size += file.stat().st_size
        if file.suffix == ".safetensors":
            with suppress(OSError, SafetensorError), safe_open(file, "pt") as shard:
                rows += shard.get_slice(ROWS).get_shape()[0]
    key = None
    with suppress(OSError, ValueError):
        used = (path / KEY).stat().st_mtime
        key = json.loads((path / KEY).read_text(encoding="utf-8"))
    return Stored(name=path.name, key=key, rows=rows, size=size, used=used)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left" in str(error) or "quota" in str(error).lower()


def _failed(error: BaseException, folder: Path) -> FeatureError:
    """What is said where nothing can be written."""
    if _is_full(error):
        return DiskFull(f"the disk of {folder} is full")
    return FeatureError(f"features cannot be written to {folder} ({error})")


def _told(size: int) -> str:
    # as --features-limit is read: in powers of 1024
    power = min((max(size, 1).bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.4g} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
