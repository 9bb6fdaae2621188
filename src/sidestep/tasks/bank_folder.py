"""A bank's tasks on the disk: one folder each, without an index that could disagree with them."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidestep.backbone import Digest
from sidestep.disk import task_folder
from sidestep.disk.atomic import move, only_writer, refuse_inputs
from sidestep.disk.task_folder import DamagedTask, Task, TaskError
from sidestep.messages import some
from sidestep.model import saving
from sidestep.model.attach import Attached
from sidestep.model.side_model import SideModel
from sidestep.model.two_towers import TwoTowers

LOCK = ".lock"
STAGING = ".moving-"
NAME = re.compile(r"\w[\w.-]*")
LONGEST = 255  # bytes in the name of a folder
#: Either makes a folder a task's, so that a damaged one is seen and removed.
TASK_FILES = (task_folder.CONFIG, task_folder.WEIGHTS)


class BankError(TaskError):
    """A bank cannot do what was asked for. The message says why and what to do."""


class NoSuchTask(BankError):
    """The bank holds no task of a name."""


class NameTaken(BankError):
    """The bank holds something of this name already."""


class BadName(BankError):
    """No folder can have the name."""


class OtherWeights(BankError):
    """A task belongs to other weights than those of the bank, or to the same in another precision."""


class BankBusy(BankError):
    """Another process is writing."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A task of a bank.

    Attributes:
        name: in the bank.
        method: its name.
        outputs: of its head. None: the head is the backbone's own.
        labels: names of classes, where it has them.
        values: how many are stored.
        bytes: of all its files.
        sha256: of its tensors.
    """

    name: str
    method: str
    outputs: int | None
    labels: list[str] | None
    values: int
    bytes: int
    sha256: str


class BankFolder:
    """The tasks of a bank on the disk, without their backbone."""

    def __init__(self, path: str | Path) -> None:
        """Arg is the folder, which is made when the first task is added. What an interrupted change left is removed.

        Raises:
            BankError: if the path is a file.
        """
        self.path = Path(path)
        self._known: dict[str, tuple[Any, str]] = {}
        if self.path.exists() and not self.path.is_dir():
            raise BankError(f"{self.path} is a file: a bank is a folder")
        if any(self.path.glob(f"{STAGING}*")):
            with suppress(BankError, OSError), self._writing():
                pass

    @property
    def names(self) -> list[str]:
        """The tasks that are there now, whoever added them. Damaged ones are included."""
        return sorted({file.parent.name for part in TASK_FILES for file in self.path.glob(f"[!.]*/{part}")})

    def folder(self, name: str) -> Path:
        """The task folder of this name, which `load` takes too.

        Raises:
            BankError: if there is none.
        """
        if not (_is_name(name) and any((self.path / name / part).is_file() for part in TASK_FILES)):
            near = difflib.get_close_matches(name, self.names, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it holds {some(self.names)}"
            raise NoSuchTask(f"{self.path} holds no task {name!r}: {hint}")
        return self.path / name

    def entry(self, name: str) -> Entry:
        """What a task's own files say of it. Its weights are not read.

        Raises:
            TaskError: if there is none, or its files are damaged.
        """
        folder = self.folder(name)
        with _what_to_do(name):
            about = task_folder.inspect_task(folder)
            head = saving.head_of(folder, about)
        return Entry(
            name=name,
            method=about["method"]["name"],
            outputs=None if head is None else head.outputs,
            labels=about.get("labels"),
            values=about["parameters"],
            bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            sha256=about["sha256"],
        )

    def entries(self) -> tuple[list[Entry], dict[str, str]]:
        """What the tasks say of themselves. For those that cannot be read, by their names, what is wrong."""
        entries, unreadable = [], {}
        for name in self.names:
            try:
                entries.append(self.entry(name))
            # a TaskError, a head that this version does not know, or files that another process is just removing
            except (ValueError, TypeError, OSError, RuntimeError) as error:
                if name in self.names:
                    unreadable[name] = str(error)
        return entries, unreadable

    def identity(self, name: str) -> str:
        """What identifies a task as it is now. Its config is read again only if the file is another one.

        Raises:
            TaskError: as `config`.
        """
        with suppress(OSError):
            file = (self.path / name / task_folder.CONFIG).stat() if _is_name(name) else None
            now = None if file is None else (file.st_ino, file.st_size, file.st_mtime_ns)
            known = self._known.get(name)
            if known is not None and known[0] == now:
                return known[1]
            found = identity_of(self.config(name))
            self._known[name] = now, found
            return found
        return identity_of(self.config(name))

    def forget(self, names: Iterable[str]) -> set[str]:
        """Forget what was read of all tasks but these. The identities of those that were read are given."""
        for name in self._known.keys() - set(names):
            self._known.pop(name, None)
        return {identity for _, identity in [*self._known.values()]}

    def config(self, name: str) -> dict[str, Any]:
        """The config of a task.

        Raises:
            TaskError: if there is none, or it is damaged.
        """
        with _what_to_do(name):
            return task_folder.read_config(self.folder(name))

    def read(self, name: str) -> Task:
        """A task, read whole.

        Raises:
            TaskError: if there is none, or its files are damaged.
        """
        with _what_to_do(name):
            return task_folder.read(self.folder(name))

    def digest(self) -> Digest | None:
        """The digest of all tasks' backbone, by the first task that can be read. None if there is no such task."""
        for name in self.names:
            with suppress(TaskError):
                return digest_in(self.config(name))
        return None

    def add(self, name: str, task: str | Path | Attached, check: Callable[[Task], None] | None = None) -> None:
        """Copy a task into the folder. Afterwards it is there whole, or the folder is as before.

        Args:
            name: letters, digits, "_", "-" and ".", at most 255 bytes.
            task: a task folder or an attached model.
            check: raises if the task may not be added.

        Raises:
            NameTaken: if there is a task of this name.
            BadName: if the name cannot be a folder's.
            OtherWeights: if the task belongs to another backbone than those that are there.
            BankBusy: if another process is writing.
            OutputError: if the bank lies in the task.
            TaskError: if the task is damaged, or what `check` raises.
        """
        check_name(name)
        if not isinstance(task, SideModel | TwoTowers):
            task_folder.read(task)  # before anything is copied, so that the message names the folder that was given
            refuse_inputs([self.path / name], [Path(task)])
        with self._writing() as staging:
            if name in self.names:
                raise NameTaken(f"{self.path} holds {name!r} already: choose another name, or remove that task first")
            if (self.path / name).exists():
                raise NameTaken(f"{self.path / name} is there, and is no task: choose another name, or move it away")
            new = staging / name
            if isinstance(task, SideModel | TwoTowers):
                saving.save(task, new)
            else:
                task_folder.copy(task, new)
            found = task_folder.read(new)
            self._check_backbone(found)
            if check is not None:
                check(found)
            move(new, self.path / name)

    def remove(self, name: str) -> None:
        """Delete a task.

        Raises:
            BankError: if there is none of this name, or another process is writing.
        """
        self.folder(name)  # before the lock, for which the bank's folder would be made
        with self._writing() as staging:
            move(self.folder(name), staging / name)

    def _check_backbone(self, task: Task) -> None:
        here, its = self.digest(), digest_in(task.config)
        if here is not None and here.matches(its) != "same":
            raise OtherWeights(
                f"{other_backbone(task, its, here)} of the tasks in {self.path}: a bank has one backbone"
            )

    @contextmanager
    def _writing(self) -> Iterator[Path]:
        """While nobody else writes, a new folder beside the tasks. It is removed with all that is left in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with only_writer(self.path / LOCK, self.path, BankBusy):
            for left in self.path.glob(f"{STAGING}*"):
                shutil.rmtree(left, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=self.path))
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def check_name(name: str) -> None:
    """Refuse a name that no task can have.

    Raises:
        BadName: saying what names are made of.
    """
    if not _is_name(name):
        raise BadName(
            f"{name!r} cannot be a task's name: use letters, digits, '_', '-' and '.', at most {LONGEST} bytes"
        )


def _is_name(name: str) -> bool:
    """Whether a folder can have it."""
    return NAME.fullmatch(name) is not None and len(os.fsencode(name)) <= LONGEST


def identity_of(config: Mapping[str, Any]) -> str:
    """What identifies a task: all of its config, in which the checksum of its tensors is one entry."""
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()


@contextmanager
def _what_to_do(name: str) -> Iterator[None]:
    """Say of a damaged task how a bank's user replaces it."""
    try:
        yield
    except DamagedTask as error:
        raise BankError(f"{error.reason}: remove {name!r} (`sidestep bank remove`) and add it again") from error


def digest_in(config: Mapping[str, Any]) -> Digest:
    """The digest of the backbone in a task's config."""
    return Digest(**config["backbone"]["digest"])


def short(digest: Digest) -> str:
    """A digest in a message."""
    return f"{digest.exact[:16]} ({digest.dtype})"


def other_backbone(task: Task, its: Digest, here: Digest) -> str:
    """The message that a task belongs to another backbone than the bank's."""
    made = task.config["backbone"]["class_name"]
    return f"{task.folder.name} was made on a {made} with digest {short(its)}, which is not the {short(here)}"
