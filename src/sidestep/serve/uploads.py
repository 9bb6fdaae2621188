"""Tasks that come from outside: archives, unpacked with care, and paths within a root."""

from __future__ import annotations

import stat
import tarfile
import zipfile
from collections.abc import Generator
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn, TypeAlias

from sidestep.disk.task_folder import CONFIG
from sidestep.serve.problems import Problem
from sidestep.serve.settings import ServeSettings

Contents: TypeAlias = Generator[tuple[str, IO[bytes]], None, None]
"""Names and contents of the files in an archive."""
ZIP = b"PK\x03\x04"
CHUNK = 1024**2
DEEPEST = 8
"""Folders within each other in an archive."""


def unpack(archive: Path, target: Path, settings: ServeSettings) -> Path:
    """The task folder that an archive holds, at its top or in its only folder.

    Args:
        archive: zip, tar or tar.gz, by its content.
        target: an empty folder to unpack to.
        settings: with limits of what may be unpacked.

    Raises:
        Problem: if the archive is none, is damaged, or holds no task. If it has links, devices or names that lead out
            of it, or is larger than the limits.
    """
    try:
        if _begins(archive, ZIP):
            with zipfile.ZipFile(archive) as packed:
                _write(_zipped(packed), target, settings)
        else:
            with archive.open("rb") as file, tarfile.open(fileobj=_opened(file, settings), mode="r|") as unzipped:
                _write(_tarred(unzipped), target, settings)
    except Problem:
        raise
    except Exception as error:  # of a damaged archive, zlib, struct and others raise errors of many types
        _refuse(f"the archive cannot be read ({type(error).__name__})")
    return task_in(target)


def task_in(folder: Path) -> Path:
    """The task folder at the top of a folder, or in its only folder.

    Raises:
        Problem: if there is none.
    """
    inner = [path for path in folder.iterdir() if path.is_dir()]
    for place in (folder, *(inner if len(inner) == 1 else ())):
        if (place / CONFIG).is_file():
            return place
    _refuse(f"there is no {CONFIG} in it")


def task_at(path: str, root: Path) -> Path:
    """The task folder at a path within a root.

    Raises:
        Problem: if it lies outside, also by a link, or is no task folder.
    """
    try:
        home, found = root.resolve(), (root / path).resolve()
        inside = found.is_relative_to(home) and found != home
    except (OSError, ValueError, RuntimeError):  # null bytes, names that are too long, links in a circle
        inside = False
    if not inside:
        raise Problem(
            "outside-root", "the path does not lie in the folder that tasks are added from", "Upload the task instead"
        )
    if not (found / CONFIG).is_file():
        _refuse(f"there is no {CONFIG} at this path")
    return found


def _begins(archive: Path, with_: bytes) -> bool:
    """Whether a file begins so. A tar file may end as a zip file does, where its last file is one."""
    with archive.open("rb") as file:
        return file.read(len(with_)) == with_


def _zipped(packed: zipfile.ZipFile) -> Contents:
    """Names and contents of the files in a zip archive."""
    for info in packed.infolist():
        if info.flag_bits & 1:
            _refuse("the archive is encrypted")
        mode = info.external_attr >> 16
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            _refuse("the archive holds a link or a device")
        if info.is_dir():
            continue
        with packed.open(info) as content:
            yield info.filename, content


def _tarred(packed: tarfile.TarFile) -> Contents:
    """Names and contents of the files in a tar archive."""
    for info in packed:
        if info.isdir():
            continue
        if not info.isreg() or info.issparse():
            _refuse("the archive holds a link, a device or a file with holes")
        content = packed.extractfile(info)
        assert content is not None
        yield info.name, content


def _write(files: Contents, target: Path, settings: ServeSettings) -> None:
    """Write files below a folder, counted as they come: what an archive says of its sizes is not believed."""
    room = settings.upload_bytes
    with closing(files):  # a zip archive's file stays open as long as one of its contents does
        for number, (name, content) in enumerate(files, start=1):
            if number > settings.upload_files:
                _refuse(f"the archive holds more than {settings.upload_files} files")
            path = target.joinpath(*_parts(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:  # a name that stands there twice is an error
                while chunk := content.read(CHUNK):
                    room -= len(chunk)
                    if room < 0:
                        _refuse(f"the archive is larger than {settings.upload_bytes} bytes when it is unpacked")
                    file.write(chunk)


def _parts(name: str) -> tuple[str, ...]:
    path = PurePosixPath(name)
    parts = tuple(part for part in path.parts if part != ".")
    odd = path.is_absolute() or ".." in parts or any(character in name for character in "\\\0:")
    if odd or not 0 < len(parts) <= DEEPEST:
        _refuse("the archive holds a name that leads out of it")
    return parts


class _Bounded:
    """A file that refuses to give too much, all together or at once. Headers of tar files can be of any size."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self.file, self.left = file, most

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        if not 0 <= size <= 16 * CHUNK:
            _refuse("the archive has a header that is too large")
        found = self.file.read(size)
        self.left -= len(found)
        if self.left < 0:
            _refuse("the archive is too large when it is unpacked")
        return found


def _opened(file: IO[bytes], settings: ServeSettings) -> IO[bytes]:
    """A tar file's bytes, unzipped where it is zipped."""
    import gzip

    zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    # headers and padding take room beside the files
    most = settings.upload_bytes + (settings.upload_files + 20) * 4 * tarfile.RECORDSIZE
    plain: IO[bytes] = gzip.GzipFile(fileobj=file) if zipped else file  # type: ignore[assignment]
    return _Bounded(plain, most)  # type: ignore[return-value]


def _refuse(told: str) -> NoReturn:
    advice = "Pack the folder that `sidestep train` or `save_pretrained` wrote as zip, tar or tar.gz"
    raise Problem("bad-upload", told, advice)
