"""The results file while a comparison runs: what is there already is not run again, what is new is written at once."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sidestep.compare import records
from sidestep.compare.claims import Claims, claims
from sidestep.compare.records import Kind, Record, Status

Tell = Callable[[str], None]


class Ledger:
    """The results file: what is there already, and where new results go.

    Attributes:
        claims: what this process may run, where several share the runs.
        touched: by key, the results that were asked for.
        ran: how many of them are new.
        broken: lines that could not be read.
    """

    def __init__(self, path: Path, tell: Tell, claims: Claims) -> None:
        found, self.broken = records.read(path)
        if self.broken:
            tell(f"{path}: {self.broken} broken lines are passed over (a writer was killed); their runs are run again")
        self.path, self.tell, self.claims = path, tell, claims
        self.known = records.latest(found)
        self.touched: dict[str, Record] = {}
        self.ran = 0
        self._size = _size(path)
        self._news: set[str] = set()

    @classmethod
    @contextmanager
    def opened(cls, path: Path, tell: Tell, *, shared: bool = False) -> Iterator[Ledger]:
        """The ledger, while nobody else has it, or `shared` with others that have it so.

        Raises:
            OutputError: if another process writes to the file, and both do not share it.
        """
        with claims(path, shared=shared) as own:
            yield cls(path, tell, own)

    def once(
        self, kind: Kind, settings: Mapping[str, Any], work: Callable[[], Mapping[str, Any]], *, wait: bool = True
    ) -> Record | None:
        """The result of these settings: the one in the file, or else what `work` measures now.

        A result that failed is tried again. If it fails once more, that is written down and the comparison goes on.

        Args:
            kind, settings: which result.
            work: measures it.
            wait: whether to wait where another process measures it now. Then its result is taken, also a failure.

        Returns:
            None: another process measures it.
        """
        if (found := self.find(kind, settings)) is not None:
            return found
        with self.claims.of(key := records.key_of(kind, settings), wait=wait) as ours:
            if not ours:
                return None
            self.refresh()
            if key in self._news:
                self.touched[key] = self.known[key]
                return self.known[key]
            return self._attempt(kind, settings, work)

    def refresh(self) -> None:
        """Read what other processes have added since."""
        if not self.claims.shared or _size(self.path) == self._size:
            return
        self._size = _size(self.path)
        found, _ = records.read(self.path)
        self._news |= {one.key for one in found if one.key not in self.known or self.known[one.key].date != one.date}
        self.known = records.latest(found)

    def without(self, kind: Kind, settings: Mapping[str, Any], status: Status, reason: str) -> None:
        """Write down that there is no result and why, unless that stands there already."""
        known = self.known.get(records.key_of(kind, settings))
        if known is not None and (known.status, known.reason) == (status, reason):
            self.touched[known.key] = known
        else:
            self.add(kind, settings, status=status, reason=reason)

    def find(self, kind: Kind, settings: Mapping[str, Any]) -> Record | None:
        """The result of these settings, if it is there and did not fail."""
        found = self.known.get(records.key_of(kind, settings))
        if found is None or found.status != "ok":
            return None
        self.touched[found.key] = found
        return found

    def add(
        self,
        kind: Kind,
        settings: Mapping[str, Any],
        *,
        measured: Mapping[str, Any] | None = None,
        status: Status = "ok",
        reason: str | None = None,
        seconds: float = 0.0,
    ) -> Record:
        """Write down a result."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        record = Record.of(
            kind,
            settings,
            measured=measured,
            status=status,
            reason=reason,
            seconds=seconds,
            threads=torch.get_num_threads(),
            gpu=gpu,
        )
        with self.claims.writing():
            records.append(self.path, record)
        self.known[record.key] = self.touched[record.key] = record
        self.ran += 1
        return record

    def _attempt(self, kind: Kind, settings: Mapping[str, Any], work: Callable[[], Mapping[str, Any]]) -> Record:
        begin, reason, measured = time.perf_counter(), None, None
        try:
            measured = work()
        # whatever breaks one run is no reason to lose the others
        except Exception as error:
            reason = str(error) if isinstance(error, ValueError | RuntimeError) else f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(self.claims.scratch, ignore_errors=True)
        gc.collect()  # the Trainer and its model refer to each other
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        status: Status = "ok" if measured is not None else "failed"
        spent = time.perf_counter() - begin
        return self.add(kind, settings, measured=measured, status=status, reason=reason, seconds=spent)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
