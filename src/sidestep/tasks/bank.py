"""TaskBank: many tasks on one backbone, which is held once. Switched in place, added while others are in use.

A bank's folder holds a task folder for each task, and those being added in a hidden folder. A single rename adds or
removes a task. So a process that is killed leaves the old state or the new one. Writers hold a lock, and readers none.
"""

from __future__ import annotations

import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sidestep.backbone import CompiledBlocks, Digest, device_of, joined, without_values
from sidestep.disk.task_folder import Task, TaskError
from sidestep.fold import FoldError
from sidestep.fold.forms import free_memory
from sidestep.fold.turns import Turn
from sidestep.measure.memory import format_bytes
from sidestep.model.attach import Attached, detach, digests_of
from sidestep.model.build import check_attachable
from sidestep.model.side_model import SideModel
from sidestep.tasks import load as loading
from sidestep.tasks.asked import check_batch, check_names, own_rows
from sidestep.tasks.bank_folder import (
    BankError,
    BankFolder,
    Entry,
    NoSuchTask,
    OtherWeights,
    digest_in,
    identity_of,
    other_backbone,
    short,
)
from sidestep.tasks.resting import Resting, is_on
from sidestep.tasks.together import Together

if TYPE_CHECKING:
    from sidestep.data import Fields
    from sidestep.disk.feature_options import FeatureOptions
    from sidestep.tasks.predict_together import Answers

WAIT = "take turns, with a lock of your own from `activate` to the answer"
BUSY = f"this bank is in the middle of another call, in another thread or within it: {WAIT}"
NONE = (None, "", None)


class TaskBank(AbstractContextManager["TaskBank"]):
    """Tasks of every kind on one backbone, of which one at a time is active.

    A switch writes a diff's entries into the backbone's weights, or their own values back, and moves hooks. Nothing is
    computed by subtraction. So the backbone is the same bit for bit after any switches, and no task changes another.

    Any thread may use a bank, one at a time. A thread gets an error if another one switches, adds, or calls the active
    model meanwhile. Nothing changes then. A lock of the caller's own makes threads wait for each other.

    Tasks whose processors (tokenizers and their like) have the same files share one, so change none in place.

    Attributes:
        backbone: held once. Between `deactivate` and `activate` it is bare, and other models may be attached.
        store: the tasks on the disk.
        seconds: how long the last switch to each task took.
        switches: how many there were.
        together: runs several tasks on a batch. `passes` and `alone` say how many passes the last call took, and why.
    """

    def __init__(self, backbone: nn.Module, folder: str | Path | None = None, *, keep: int | None = None) -> None:
        """Open a bank. Its folder may hold tasks already.

        Args:
            backbone: a Hugging Face or timm model with nothing attached, where it will stay and in its final precision.
            folder: the bank's. None: a temporary folder, which `close` deletes.
            keep: how many inactive tasks stay in memory, ready for a switch without reading files. None: all that were
                used. LoRA and its like are always read.

        Raises:
            BankError: if the tasks in the folder belong to another backbone.
            ValueError: if something is attached to the backbone, it is compiled, or `keep` is below 0.
        """
        check_attachable(backbone)
        if keep is not None and keep < 0:
            raise ValueError(f"keep={keep}, but it must be None or a number of tasks from 0")
        self.backbone, self._keep = backbone, keep
        self._digests, self._blank = digests_of(backbone), without_values(backbone)
        self._temporary = None
        if folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="sidestep-bank-")
            folder = self._temporary.name
        self.store = BankFolder(folder)
        self._resting: dict[str, Resting] = {}
        # a tokenizer takes more memory than most tasks, and tasks of one backbone have mostly the same
        self._processors: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self._checked: set[str] = set()
        self._turn, self._asked = Turn(BankError(BUSY)), threading.local()
        # name, identity and model: one value, so that another thread sees no mixture of two tasks
        self._now: tuple[str | None, str, Attached | None] = NONE
        self.seconds: dict[str, float] = {}
        self.switches = 0
        self.together = Together(self._switch)
        self._compiled: CompiledBlocks | None = None
        its = self.store.digest()
        if its is not None and self.digest.matches(its) != "same":
            raise BankError(
                f"the tasks in {self.store.path} belong to weights with digest {short(its)}, and this "
                f"{type(backbone).__name__} has {short(self.digest)}: load their own backbone, in its precision"
            )

    @property
    def digest(self) -> Digest:
        """The digest of the backbone."""
        return self._digests[0] if len(self._digests) == 1 else joined(self._digests)

    @property
    def names(self) -> list[str]:
        """The tasks that are there now, including those that other processes added."""
        return self.store.names

    @property
    def active(self) -> str | None:
        """Name of the active task, or None."""
        return self._now[0]

    @property
    def model(self) -> Attached | None:
        """The active task's model, or None.

        Raises:
            BankError: if this thread has activated a task, and another one has switched since.
        """
        active, _, model = self._now
        asked = getattr(self._asked, "name", active)
        if asked != active:
            raise BankError(
                f"this thread has activated {asked!r}, and another one has switched to {active or 'none'} since: {WAIT}"
            )
        return model

    def entries(self) -> list[Entry]:
        """The tasks that are there now and can be read. A warning says what is wrong with each of the others."""
        entries, unreadable = self.store.entries()
        for reason in unreadable.values():
            warnings.warn(reason, stacklevel=2)
        return entries

    def add(self, name: str, task: str | Path | Attached) -> None:
        """Store a task in the bank, whatever is active. It is checked before anything changes.

        Args:
            name: letters, digits, "_", "-" and ".", at most 255 bytes.
            task: a task folder, or an attached model (on this backbone or on another copy of it).

        Raises:
            BankError: as `BankFolder.add`, or if the task belongs to other weights, or the same in another precision.
            TaskError: if it is damaged, or does not fit the backbone's class.
            UnsupportedBackbone: if the method cannot work on the backbone.
        """
        with self._turn:
            self.store.add(name, task, self._check)

    def remove(self, name: str) -> None:
        """Delete a task from the bank.

        Raises:
            BankError: if it is active, there is none of this name, or another process is writing.
        """
        with self._turn:
            if name == self.active:
                raise BankError(f"{name!r} is active: activate another task, or deactivate() it, before it is removed")
            self.store.remove(name)
            self._resting.pop(name, None)

    def tidy(self) -> None:
        """Forget what is in memory of tasks that are no longer in the folder, such as those that others removed.

        Raises:
            BankError: if another thread is using the bank or the active model.
        """
        with self._turn:
            names = self.names
            if self.active is not None and self.active not in names:
                self._leave()
            for part in (self._resting, self.seconds):
                for name in part.keys() - set(names):
                    del part[name]
            there = self.store.forget(names)
            self._checked &= there
            self.together.forget(there)

    def activate(self, name: str) -> Attached:
        """Switch to a task: its model, in eval mode when it is first used, then as it was left.

        The models of other tasks cannot be called meanwhile. `seconds[name]` says how long the switch took.

        Raises:
            BankError: if there is none of this name, or another thread is using the bank or the active model.
            TaskError: if its files are damaged. The bank is as before.
        """
        with self._turn:
            model, self._asked.name = self._switch(name), name
            return model

    def deactivate(self) -> nn.Module:
        """Leave the active task. The bare backbone is bit for bit as it was given.

        Raises:
            BankError: if another thread is using the bank or the active model.
        """
        with self._turn:
            self._leave()
            vars(self._asked).clear()  # of this thread
        return self.backbone

    def run(self, name: str, batch: Mapping[str, Any]) -> Any:
        """A task's output for a batch of the backbone's inputs, without gradients. Errors as of `activate`."""
        with self._turn, torch.no_grad():
            model, self._asked.name = self._switch(name), name
            return model(**batch)

    def __call__(
        self,
        batch: Mapping[str, Any],
        *,
        tasks: Sequence[str],
        rows: Mapping[str, Sequence[int]] | None = None,
    ) -> dict[str, Any]:
        """The outputs of several tasks for one batch, without gradients, from as few passes as they allow.

        Tasks with a Sidestep head that only read the backbone share one pass. Those that write in front of late blocks
        go on from there, so that the blocks before run once. Tasks that change the backbone's weights, or have its own
        head, run alone. `together.passes` says how many whole passes there were. What was active is so afterwards.

        Args:
            batch: the backbone's inputs, without labels and without a cache.
            tasks: their names, each once.
            rows: numbers of rows by task. Such a task costs what these rows cost. One that is not named runs on all.

        Returns:
            What each task's model gives for its rows, by its name, in the order of `tasks`.

        Raises:
            BankError: if a name is not in the bank or stands there twice, or there is none. If there is no memory for
                all of them, or the batch has labels, a cache, inputs of another kind or no such rows. Nothing is run
                then.
            TaskError: if a task's files are damaged.
        """
        names = check_names(tasks, self.store)
        check_batch(batch, self.backbone)
        own = own_rows(rows or {}, names, batch, self.backbone)
        with self._turn, torch.no_grad():
            before = self.active
            try:
                self._leave()
                self._check_room(names)
                return self.together.run({name: self._ready(name) for name in names}, batch, own)
            finally:
                if before != self.active:
                    self._leave()
                    if before is not None:
                        with suppress(NoSuchTask):  # another process has removed it
                            self._switch(before)

    def predict(
        self,
        asked: Iterable[tuple[str | Sequence[str], Mapping[str, Any]]],
        *,
        columns: Fields | None = None,
        batch_size: int = 64,
        features: FeatureOptions | None = None,
    ) -> Answers:
        """What tasks predict for rows, each row with the task or the tasks that are asked.

        See `predict_together.predict_together`, with its arguments and errors.
        """
        from sidestep.tasks.predict_together import predict_together  # datasets and numpy are for rows alone

        pairs = [([tasks] if isinstance(tasks, str) else list(tasks), row) for tasks, row in asked]
        rows = [dict(row) for _, row in pairs]
        how: dict[str, Any] = {"columns": columns, "batch_size": batch_size, "features": features}
        return predict_together(self, rows, [tasks for tasks, _ in pairs], **how)

    def damaged(self, names: Iterable[str]) -> dict[str, str]:
        """Why tasks cannot be read, by name. Those that can be are in memory afterwards, if they can rest there.

        Raises:
            BankError: if the bank holds no task of such a name. Nothing is read then.
        """
        for name in (asked := list(names)):
            self.store.folder(name)
        found: dict[str, str] = {}
        with self._turn:
            for name in asked:
                try:
                    if name != self.active:
                        self._ready(name)
                except TaskError as error:
                    found[name] = str(error)
        return found

    def compile(self, **options: Any) -> None:
        """Have each block of the backbone compiled at its next call, until the bank is closed.

        Hooks of tasks stay outside of what is compiled. So any mix of tasks runs without compiling again. LoRA and its
        like put modules into the blocks, and run uncompiled.

        Args:
            options: of `torch.compile`, such as `dynamic=True` for texts of changing length.

        Raises:
            BankError: if it is compiled already, or another thread is using the bank or the active model.
            ValueError: if another library runs the blocks, as accelerate does on a dispatched backbone.
        """
        with self._turn:
            if self._compiled is not None:
                raise BankError("this bank's backbone is compiled already: close() it first, and open it again")
            self._leave()
            self._compiled = CompiledBlocks(self.backbone, **options)

    def close(self) -> None:
        """Leave the bare backbone. The tasks stay on the disk, unless the folder is temporary."""
        with self._turn:
            self._leave()
            self._resting.clear()
            if self._compiled is not None:
                self._compiled.undo()
                self._compiled = None
            if self._temporary is not None:
                self._temporary.cleanup()

    def __exit__(self, *error: object) -> None:
        self.close()

    # --- several tasks -----------------------------------------------------------------------------------------------

    def _ready(self, name: str) -> Resting | None:
        """A task in memory that is not on the backbone. None if it cannot rest there, and has to be read each time."""
        identity = self.store.identity(name)
        known = self._resting.get(name)
        if known is None or known.identity != identity:
            task = self._read(name)
            if not loading.can_rest(task):
                return None
            self._leave()
            model = self._put(task)
            assert isinstance(model, SideModel)
            known = self._resting[name] = Resting(model, model.attachment.rest(), identity)
        return known

    def _check_room(self, names: Sequence[str]) -> None:
        """Refuse more tasks than there is memory for."""
        sizes = {name: self.store.entry(name).bytes for name in names if name not in self._resting}
        free = free_memory(device_of(self.backbone))
        if sum(sizes.values()) > free:
            fit = sum(total <= free for total in accumulate(sorted(sizes.values())))
            raise BankError(
                f"{len(sizes)} tasks have {format_bytes(sum(sizes.values()))} and {format_bytes(free)} of memory are "
                f"free: call with fewer tasks ({fit} fit)"
            )

    # --- switching -------------------------------------------------------------------------------------------------

    def _switch(self, name: str) -> Attached:
        started, (before, its, active) = time.perf_counter(), self._now
        identity = self.store.identity(name)
        if (name, identity) == (before, its) and active is not None and is_on(active):
            return active
        # all that may well fail comes before the active task is left
        ready: Resting | Task | None = self._resting.pop(name, None)
        if not isinstance(ready, Resting) or ready.identity != identity:
            ready = self._read(name)  # not used yet, or another process has put another task in its place
        try:
            self._leave()
            model = ready.resume() if isinstance(ready, Resting) else self._put(ready)
        except BaseException:
            if isinstance(ready, Resting):
                self._resting[name] = ready
            if before is not None and self._now is NONE:  # it was left
                with suppress(Exception):  # what went wrong first is what is raised
                    self._switch(before)
            raise
        self._now = (name, identity, model)
        if self._compiled is not None:
            self._compiled.paused = not all(part.attachment.can_rest for part in model.parts)
        self.seconds[name] = time.perf_counter() - started
        self.switches += 1
        return model

    def _leave(self) -> None:
        name, identity, model = self._now
        if name is not None and model is not None and is_on(model):
            try:
                if isinstance(model, SideModel) and model.attachment.can_rest:
                    self._resting[name] = Resting(model, model.attachment.rest(), identity)
                detach(model)
            except FoldError as error:
                raise BankError(f"{name!r} is in the middle of a call, and cannot be left: {WAIT}") from error
        while self._keep is not None and len(self._resting) > self._keep:
            del self._resting[next(iter(self._resting))]
        self._now = NONE
        if self._compiled is not None:
            self._compiled.paused = False

    # --- small parts -----------------------------------------------------------------------------------------------

    def _check(self, task: Task) -> None:
        """Raise unless this task can be put on the backbone. Each task is checked once."""
        identity = identity_of(task.config)
        if identity not in self._checked:
            self._check_fit(task)
            self._checked.add(identity)

    def _check_fit(self, task: Task) -> None:
        with torch.random.fork_rng(devices=[]):
            loading.check_fit(task, self._blank)
        its = digest_in(task.config)
        match = self.digest.matches(its)
        if match == "same":
            return
        what = f"{other_backbone(task, its, self.digest)} of this {type(self.backbone).__name__}"
        if match == "dtype":
            raise OtherWeights(
                f"{what}, the same in another precision. Load the backbone in {its.dtype}, or put the task on this one "
                "with ss.load(..., allow_mismatch=True), look at its scores, and add that model"
            )
        raise OtherWeights(f"{what}: load the task's own backbone, with its embeddings not resized")

    def _read(self, name: str) -> Task:
        task = self.store.read(name)
        self._check(task)
        return task

    def _put(self, task: Task) -> Attached:
        # a side network begins at random: a switch leaves the caller's random numbers alone
        # and what is made under inference_mode could not be trained later
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            return loading.put(task, self.backbone, digests=self._digests, processors=self._processors)
