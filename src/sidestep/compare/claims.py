"""Who runs what of a comparison: one process has the results file alone, or several share its runs.

Claims are locks on files, which the system frees when a process ends.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from sidestep.disk.atomic import OutputError, only_writer

WAIT = 5.0
"""Seconds to wait for another process that opens the same file."""


def places(results: Path) -> tuple[Path, Path, Path]:
    """What a comparison writes: the results file, the present runs' folder, and the lock. Both lie beside the file."""
    beside = Path(os.path.realpath(results))  # another spelling of the path has the same lock
    return results, beside.with_name(f".{beside.name}.run"), beside.with_name(f".{beside.name}.lock")


class Claims:
    """What one process may run.

    Attributes:
        scratch: a folder for the process's present run.
        shared: whether others may run something of the same comparison meanwhile.
    """

    def __init__(self, runs: Path, *, shared: bool) -> None:
        self._runs, self.shared = runs, shared
        self.scratch = runs / secrets.token_hex(8) if shared else runs

    @contextmanager
    def of(self, work: str, *, wait: bool) -> Iterator[bool]:
        """Whether a piece of work, by its name, is this process's meanwhile. `wait`: for the process that has it."""
        if not self.shared:
            yield True
            return
        name = hashlib.sha256(work.encode()).hexdigest()[:16]
        lock = FileLock(self._runs / f"{name}.claim", timeout=-1 if wait else 0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Nobody else adds a line meanwhile."""
        if not self.shared:
            yield
            return
        with FileLock(self._runs / "lines.lock"):
            yield


@contextmanager
def claims(results: Path, *, shared: bool) -> Iterator[Claims]:
    """The claims of this process, while it works on a comparison.

    Raises:
        OutputError: if another process has the file for itself. Also if this one wants that, and others share it.
    """
    _, runs, lock = places(results)
    results.parent.mkdir(parents=True, exist_ok=True)
    if not shared:
        with only_writer(lock, results):
            if _others(runs):
                raise OutputError(f"other processes share the runs of {results}: join them with --share, or wait")
            shutil.rmtree(runs, ignore_errors=True)
            yield Claims(runs, shared=False)
        return
    own = FileLock(runs / f"{secrets.token_hex(8)}.job")
    with _entrance(lock, results):
        runs.mkdir(exist_ok=True)
        own.acquire()
    found = Claims(runs, shared=True)
    try:
        yield found
    finally:
        own.release()
        shutil.rmtree(found.scratch, ignore_errors=True)
        Path(own.lock_file).unlink(missing_ok=True)
        with suppress(OutputError), only_writer(lock, results):
            if not _others(runs):
                shutil.rmtree(runs, ignore_errors=True)


def _others(runs: Path) -> bool:
    """Whether a process that shares the runs is there."""
    for job in runs.glob("*.job"):
        try:
            with FileLock(job, timeout=0):
                pass
        except Timeout:
            return True
    return False


@contextmanager
def _entrance(lock: Path, results: Path) -> Iterator[None]:
    """Others that share the runs hold the lock for a moment. Who has the file alone holds it all the time."""
    try:
        with FileLock(lock, timeout=WAIT):
            yield
    except Timeout as error:
        raise OutputError(
            f"another process is writing {results} and does not share its runs: wait, or start both with --share"
        ) from error
