"""A bank through any changes, refusals, damages and kills: tasks, backbone and folder are what they should be."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from test_bank import BERT, DENSE, STREAM, altered, assert_same_weights, attached, backbone, saved, weights
from torch import Tensor, nn

import sidestep as ss
from sidestep.backbone import facts_of
from sidestep.disk import task_folder
from sidestep.disk.task_folder import CONFIG, WEIGHTS, TaskError
from sidestep.model import saving
from sidestep.tasks.bank_folder import BankFolder, identity_of
from tiny import logits

#: Of every kind: side networks, a diff in the weights, weights that are trained, modules inside the backbone.
METHODS = {name: (STREAM | DENSE)[name] for name in ("read", "sherl", "sparse", "bitfit", "lora")}
NAMES = st.sampled_from(("a", "b", "c"))
SOURCES = st.sampled_from((*METHODS, "relabelled"))


class Killed(BaseException):
    """Stands for the end of a process, which does nothing more."""


#: All by which a bank changes the disk; for those that write a file, which one.
CHANGES: tuple[tuple[Any, str, Callable[..., Any] | None], ...] = (
    *((os, name, None) for name in ("replace", "mkdir", "rmdir", "unlink", "link", "fsync")),
    (shutil, "copyfile", lambda source, target, **_: target),
    (saving, "save_file", lambda tensors, target, **_: target),
    (Path, "write_text", lambda path, *_, **__: path),
)


@contextmanager
def interrupted(after: int, error: BaseException) -> Iterator[None]:
    """One change of the disk fails, in the middle of a file; behind a kill there are no others."""
    count = [0]

    def counted(change: Callable[..., Any], written: Callable[..., Any] | None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] <= after or (count[0] > after + 1 and not isinstance(error, Killed)):
                return change(*args, **kwargs)
            if written is not None and count[0] == after + 1:
                change(*args, **kwargs)
                file = written(*args, **kwargs)
                os.truncate(file, os.path.getsize(file) // 2)
            raise error

        return run

    with pytest.MonkeyPatch.context() as patch:
        for place, name, written in CHANGES:
            patch.setattr(place, name, counted(getattr(place, name), written))
        yield


class Banks(RuleBasedStateMachine):
    """A bank, and what should be in it."""

    sources: Path
    outputs: dict[str, Tensor]
    bare: nn.Module  # copied, with what is known of it: to find that anew takes longer than all else

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(dir=self.sources))
        self.folder = self.place / "bank"
        self.tasks: dict[str, str] = {}  # by name, the sources that they are of
        self.damaged: set[str] = set()  # names of tasks
        self.ruins: set[str] = set()  # names of folders without a file of a task
        self.open(None)

    @rule(keep=st.sampled_from((None, 0, 1)))
    def open(self, keep: int | None) -> None:
        """As a new process does."""
        own = copy.deepcopy(self.bare)
        self.before = weights(own)
        self.bank = ss.TaskBank(own, self.folder, keep=keep)
        self.active: str | None = None
        self.source = ""

    @contextmanager
    def refused(self, match: str) -> Iterator[None]:
        with pytest.raises(TaskError, match=match):
            yield

    # --- changes ---------------------------------------------------------------------------------------------------

    @rule(name=NAMES, source=SOURCES, as_model=st.booleans())
    def add(self, name: str, source: str, as_model: bool) -> None:
        task = self.model(source) if as_model else self.sources / source
        if name in self.tasks:
            with self.refused(f"holds '{name}' already"):
                self.bank.add(name, task)
        elif name in self.ruins:
            with self.refused(f"{name} is there, and is no task"):
                self.bank.add(name, task)
        else:
            self.bank.add(name, task)
            self.tasks[name] = source

    @rule(name=NAMES, source=st.sampled_from(("stranger", "cut", "nowhere")))
    def add_what_is_no_task_of_the_backbone(self, name: str, source: str) -> None:
        with self.refused("already|is there|which is not the|is damaged|is no task folder"):
            self.bank.add(name, self.sources / source)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name == self.active:
            with self.refused("is active"):
                self.bank.remove(name)
        elif name not in self.tasks:
            with self.refused("holds no task"):
                self.bank.remove(name)
        else:
            self.bank.remove(name)
            self.forget(name)

    @rule(name=NAMES)
    def activate(self, name: str) -> None:
        if name not in self.tasks:
            with self.refused("holds no task"):
                self.bank.activate(name)
        elif name in self.damaged and not self.is_at_hand(name):
            with self.refused("remove .* and add it again"):
                self.bank.activate(name)
        else:
            assert self.bank.activate(name) is self.bank.model
            self.active, self.source = name, self.tasks[name]

    @rule()
    def deactivate(self) -> None:
        assert self.bank.deactivate() is self.bank.backbone
        self.active = None

    # --- behind its back -------------------------------------------------------------------------------------------

    @rule(name=NAMES, source=SOURCES)
    def replace(self, name: str, source: str) -> None:
        other = BankFolder(self.folder)
        if name in self.tasks:
            other.remove(name)
        if name not in self.ruins:
            other.add(name, self.sources / source)
            self.keep(name, source)

    @rule(name=NAMES)
    def take_away(self, name: str) -> None:
        if name in self.tasks:
            BankFolder(self.folder).remove(name)
            self.forget(name)

    @rule(name=NAMES, source=SOURCES)
    def overwrite(self, name: str, source: str) -> None:
        if name in self.tasks:
            self.model(source).save_pretrained(self.folder / name, overwrite=True)
            self.keep(name, source)

    @rule(name=NAMES, part=st.sampled_from((CONFIG, WEIGHTS)), lost=st.booleans())
    def damage(self, name: str, part: str, lost: bool) -> None:
        file = self.folder / name / part
        if not file.is_file():
            return
        if lost:
            file.unlink()
        else:
            os.truncate(file, file.stat().st_size // 2)
        self.damaged.add(name)
        if not any((self.folder / name / part).is_file() for part in (CONFIG, WEIGHTS)):
            self.forget(name)
            self.ruins.add(name)

    # --- ends ------------------------------------------------------------------------------------------------------

    @rule(
        name=NAMES,
        source=SOURCES,
        act=st.sampled_from(("add", "remove", "overwrite")),
        after=st.integers(0, 60),
        killed=st.booleans(),
    )
    def interrupt(self, name: str, source: str, act: str, after: int, killed: bool) -> None:
        """Another process is killed, or has no space left."""
        if name in self.ruins or (name in self.tasks) == (act == "add"):
            return
        other = BankFolder(self.folder)
        run: dict[str, Callable[[], None]] = {
            "add": lambda: other.add(name, self.sources / source),
            "remove": lambda: other.remove(name),
            "overwrite": lambda: self.model(source).save_pretrained(self.folder / name, overwrite=True),
        }
        done = False
        try:
            with interrupted(after, Killed() if killed else OSError("no space left")):
                run[act]()
            done = True
        except (Killed, OSError):
            with suppress(Killed), interrupted(after % 5, Killed()):
                BankFolder(self.folder)  # who clears up may be killed too
        if act == "remove":
            if name not in other.names:
                self.forget(name)
            assert not done or name not in self.tasks
        elif done or self.holds(name, source):
            self.keep(name, source)

    # --- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def the_folder_holds_the_tasks_and_nothing_else(self) -> None:
        opened = BankFolder(self.folder)  # which clears up
        assert opened.names == self.bank.names == sorted(self.tasks)
        assert {path.name for path in self.folder.glob("*") if path.name != ".lock"} == {*self.tasks, *self.ruins}
        entries, unreadable = opened.entries()
        assert unreadable.keys() <= self.damaged
        assert sorted([*unreadable, *(entry.name for entry in entries)]) == sorted(self.tasks)
        assert all(self.holds(name, source) for name, source in self.tasks.items() if name not in self.damaged)

    @invariant()
    def the_active_task_is_as_it_is_alone_and_without_one_the_backbone_is_bare(self) -> None:
        assert self.bank.active == self.active
        if self.bank.model is None:
            assert self.active is None
            assert_same_weights(self.bank.backbone, self.before)
        else:
            with torch.no_grad():
                found = logits(self.bank.model(**BERT.inputs()))
            assert torch.equal(found, self.outputs[self.source])

    def teardown(self) -> None:
        self.bank.close()
        assert_same_weights(self.bank.backbone, self.before)
        shutil.rmtree(self.place)

    # --- small parts -----------------------------------------------------------------------------------------------

    def model(self, source: str) -> ss.SideModel:
        return ss.load(self.sources / source, copy.deepcopy(self.bare))

    def keep(self, name: str, source: str) -> None:
        self.forget(name)
        self.tasks[name] = source

    def forget(self, name: str) -> None:
        self.tasks.pop(name, None)
        self.damaged.discard(name)

    def is_at_hand(self, name: str) -> bool:
        """Whether the bank needs no weights of a task, whose config is whole."""
        try:
            identity = identity_of(self.bank.store.config(name))
        except TaskError:
            return False
        resting = self.bank._resting.get(name)
        is_active = name == self.active and identity == self.bank._now[1]
        return is_active or (resting is not None and resting.identity == identity)

    def holds(self, name: str, source: str) -> bool:
        try:
            found, wanted = task_folder.read(self.folder / name).config, task_folder.read(self.sources / source).config
        except TaskError:
            return False
        return {**found, "files": {}} == {**wanted, "files": {}}


def test_a_bank_is_what_it_should_be_after_any_changes(tmp_path: Path) -> None:
    for name, (config, labels) in METHODS.items():
        saved(tmp_path / name, config, labels)
    altered(tmp_path / "read", tmp_path / "relabelled", "head", labels=["x", "y", "z"])
    attached(ss.ReadConfig(rank=4), on=backbone(9)).save_pretrained(tmp_path / "stranger")
    shutil.copytree(tmp_path / "sparse", tmp_path / "cut")
    os.truncate(tmp_path / "cut" / WEIGHTS, 900)
    outputs, bare = {}, backbone()
    facts_of(bare)
    for name in (*METHODS, "relabelled"):
        with torch.no_grad():
            outputs[name] = logits(ss.load(tmp_path / name, copy.deepcopy(bare))(**BERT.inputs()))
    machine = type("Banks", (Banks,), {"sources": tmp_path, "outputs": outputs, "bare": bare})
    how = settings(max_examples=settings().max_examples // 10, stateful_step_count=15)
    run_state_machine_as_test(machine, settings=how)
