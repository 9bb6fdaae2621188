"""Files and folders that Sidestep writes: never an input, at a place that can be written, whole or not at all.

Nothing here imports torch, so that a report is built without it.
"""

from __future__ import annotations

import os
import secrets
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


class OutputError(ValueError):
    """A command cannot write where it was told to, and the message says why and what to do."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place at the end, or leaves no trace if that fails.

    A reader sees the old file or the new one, also when the disk is full or the process ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # a short name, as `path` may have the longest one that there can be
    beside = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        yield beside
        sync_path(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync_path(path: Path) -> None:
    """Bring one file or folder to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, and bring that to the disk."""
    os.replace(source, target)
    for folder in {source.parent, target.parent}:
        sync_path(folder)


@contextmanager
def only_writer(lock: Path, what: Path, kind: type[Exception] = OutputError) -> Iterator[None]:
    """Nobody else is here with the same lock file meanwhile.

    The system frees the file when a process ends.

    Raises:
        kind: if another process is here. The message says what that process writes.
    """
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout as error:
        raise kind(f"another process is writing {what}: try again when it is done") from error


def check_file(path: Path) -> None:
    """Refuses a file that could not be written, before anything is computed.

    Raises:
        OutputError: if it is a folder or a device, its folder cannot be made or written to, or it has no name.
    """
    mode = _mode(path)
    if mode is not None and stat.S_ISDIR(mode):
        raise OutputError(f"{path} is a folder: name a file, such as {path / f'results{path.suffix}'}")
    if mode is not None and not stat.S_ISREG(mode):
        raise OutputError(f"{path} is no plain file: name one that may be written or replaced")
    if mode is not None and not os.access(path, os.W_OK):
        raise OutputError(f"{path} is write-protected: choose another file, or change its permissions")
    _check_place(path, path.parent)


def check_folder(path: Path) -> None:
    """Refuses a folder in which no file could be written, before anything is computed.

    Raises:
        OutputError: if it is a file, or cannot be made or written to.
    """
    mode = _mode(path)
    if mode is not None and not stat.S_ISDIR(mode):
        raise OutputError(f"{path} is a file: choose a folder")
    _check_place(path, path)


def refuse_inputs(written: Iterable[Path], read: Iterable[Path]) -> None:
    """Refuses to write what is read: an input, something in an input folder, or a folder that holds an input.

    Paths are compared as files, so that another spelling, a link or another case is seen where it names the same file.

    Args:
        written: files and folders that are written, replaced or deleted.
        read: files and folders. Those that are not there are passed over.

    Raises:
        OutputError: naming both.
    """
    inputs = [path for path in read if os.path.exists(path)]
    for place in written:
        for path in inputs:
            if same_file(place, path):
                raise OutputError(f"{place} is read as an input, which the output would replace: choose another place")
            if lies_in(place, path):
                raise OutputError(f"{place} lies in {path}, which is read as an input: choose a place outside")
            if lies_in(path, place):
                raise OutputError(f"{place} would be replaced, and the input {path} lies in it: choose another place")


def lies_in(inner: Path, outer: Path) -> bool:
    """Whether a path lies in a folder, however deep, or, for a link, whether the link or its target does."""
    above = Path(os.path.realpath(inner.parent))
    return any(same_file(parent, outer) for parent in (above, *above.parents, *Path(os.path.realpath(inner)).parents))


def same_file(one: Path, other: Path) -> bool:
    """Whether two paths name one file, however they are spelled.

    A file that is not there is known by its place.
    """
    try:
        return os.path.samefile(one, other)
    except (OSError, ValueError):
        return os.path.realpath(one) == os.path.realpath(other)


def _mode(path: Path) -> int | None:
    """What a path is, as `os.stat` says it, or None if nothing is there.

    Raises:
        OutputError: if the path cannot be one, or may not be looked at.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise OutputError(f"{_short(path)} cannot be used ({_reason(error)}): choose another path") from error


def _check_place(path: Path, folder: Path) -> None:
    """Refuses a path if a folder that it needs cannot be made, or no file can be put there."""
    nearest = next(parent for parent in (folder, *folder.parents) if _mode(parent) is not None)
    if not nearest.is_dir():
        raise OutputError(f"{nearest} is a file, so {path} cannot lie in it: choose another path")
    for name in path.relative_to(nearest).parts:
        _mode(nearest / name)  # which a name that is too long does not pass, wherever it is
    try:
        # not by asking for permissions, which say too little of a read-only disk or of a network's
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({_reason(error)}): choose another place, or change its permissions"
        ) from error


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 100 else f"{text[:97]}..."
