"""What the sweep found: one JSON line a type, made in a child process that may crash or hang alone."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import transformers

import sidestep as ss
from sidestep.backbone import facts_of
from sweep.catalogue import ModelType
from sweep.checks import outcome
from sweep.limits import TooLong, time_limit
from sweep.methods import NEED_HEAD
from sweep.subject import Subject

Record = dict[str, Any]
BUILDING, TRYING, ALL = 60, 30, 300
"""CPU seconds for a model and its batches, and for a method on it. Real seconds for a type."""
MEMORY = 12 * 2**30
"""Bytes of addresses that a type may have."""
OWN = "/own"
"""Behind a method's name: with the model's own head, which writes text."""


def tried(kind: ModelType, names: Sequence[str]) -> Iterator[Record]:
    """Parts of the record of a type, each as soon as it is known."""
    try:
        with time_limit(BUILDING):
            subject = Subject(kind)
    except (Exception, TooLong) as error:
        yield {"unbuildable": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
        return
    size = sum(parameter.numel() for parameter in subject.model.parameters())
    yield {"model": type(subject.model).__name__, "parameters": size}
    yield {"laws": {OWN if use.own else "": list(use.laws) for use in subject.uses}}
    for name in names:
        for number, use in enumerate(subject.uses):
            if use.own and name in NEED_HEAD:
                continue
            with time_limit(TRYING):
                found = outcome(subject, subject.uses[number], name)
            yield {"methods": {name + OWN * use.own: found.to_dict()}}
            if name == names[0] and not use.own and found.verdict != "refused":
                yield {"facts": facts_of(subject.model).source}
            if found.verdict in ("fails", "wrong"):  # who knows what is left of it
                subject = Subject(kind)


def in_child(kind: ModelType, names: Sequence[str]) -> Record:
    """The record of a type, tried in a child process. Its seconds are those on the CPU."""
    record: Record = {"type": kind.name, "group": kind.group, "auto": kind.auto, "methods": {}}
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        _work(kind, names, write)
    os.close(write)
    for line in _lines(read, child):
        record = merged(record, json.loads(line))
    _, status, used = os.wait4(child, 0)
    if status:
        why = f"the process ended with status {status}"
        cut_off = {name: {"verdict": "fails", "why": why} for name in names if name not in record["methods"]}
        record = merged(record, {"methods": cut_off} if "model" in record else {"unbuildable": why})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "timm": timm.__version__}
    date = time.strftime("%Y-%m-%d")
    return {
        **record,
        "seconds": round(used.ru_utime + used.ru_stime, 1),
        "date": date,
        **versions,
        "sidestep": ss.__version__,
    }


def _work(kind: ModelType, names: Sequence[str], write: int) -> None:
    """Try a type in this process, which ends here. Its parts go into a pipe, and whatever models print goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    most = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    status = 1
    try:
        with os.fdopen(write, "w") as pipe:
            for part in tried(kind, names):
                pipe.write(json.dumps(part) + "\n")
                pipe.flush()
        status = 0
    finally:
        os._exit(status)


def _address_space() -> int:
    """Bytes that this process has mapped, where Linux tells. A child of a long test run begins with many."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") if told.exists() else 0


def _lines(read: int, child: int) -> Iterator[str]:
    """What a child says, until it ends or its time is over."""
    try:
        with time_limit(ALL, "real"), os.fdopen(read) as pipe:
            yield from pipe
    except TooLong:
        os.kill(child, signal.SIGKILL)


def merged(old: Record, new: Record) -> Record:
    """A record with what was found later."""
    old = {name: value for name, value in old.items() if name != "unbuildable"}
    return {**old, **new, "methods": {**old.get("methods", {}), **new.get("methods", {})}}


class Results:
    """A resumable sweep.

    Attributes:
        records: by the names of their types. Where a type has several lines, later ones add to those before.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.records = path, dict[str, Record]()
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            record = json.loads(line)
            self.records[record["type"]] = merged(self.records.get(record["type"], {}), record)

    def missing(self, name: str, methods: Sequence[str]) -> list[str]:
        """The methods that a type was not yet tried with."""
        known = self.records.get(name)
        if known is None:
            return list(methods)
        return [] if "unbuildable" in known else [method for method in methods if method not in known["methods"]]

    def add(self, record: Record) -> None:
        """Write a line."""
        self.records[record["type"]] = merged(self.records.get(record["type"], {}), record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
