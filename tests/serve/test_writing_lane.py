"""Tasks that write are slow. They hold up others for one batch at most, and take no room of theirs."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import sidestep as ss
from served import LABELS, SINGLE, listened, make_bank, save_task
from sidestep.backbone.load import load_backbone
from sidestep.backbone.processors import load_processor
from sidestep.serve import forms
from sidestep.serve.core import Core
from sidestep.serve.problems import Problem
from sidestep.serve.requests import Request
from sidestep.serve.settings import ServeSettings
from sidestep.tasks.bank_folder import BankFolder
from sidestep.tasks.open_bank import open_bank
from written_tasks import llama_backbone

QUEUE = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank with a task that writes and one that reads."""
    folder = tmp_path_factory.mktemp("lanes")
    llama_backbone(folder / "llama")
    how: Any = {"processor": load_processor(folder / "llama")}
    for name, head, kind, names in (("writes", None, "lm", ()), ("reads", SINGLE, "single", LABELS)):
        backbone = load_backbone(folder / "llama", writes="lm")
        generation = {"generation": {"max_new_tokens": 2, "num_beams": 1}} if head is None else {}
        columns = {"text": "text"}
        save_task(
            folder / name, backbone, ss.ReadConfig(rank=4), head, kind, names, columns, seed=1, **how, **generation
        )
    make_bank(folder, folder / "bank", ["writes", "reads"])
    return folder


class Slow:
    """Holds the first batch that is written until `go`, and notes the tasks and rows of each batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        self.ran: list[tuple[str, int]] = []
        for form in (forms.Alone, forms.Rows):
            monkeypatch.setattr(form, "run", self.noting(form.run))

    def noting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(form: Any, bank: Any, pieces: Any, tasks: Any, modes: Any) -> Any:
            self.ran += [(name, len(pieces)) for name in tasks]
            if "writes" in tasks:
                self.begun.set()
                assert self.go.wait(60)
            return run(form, bank, pieces, tasks, modes)

        return noted


@pytest.fixture
def core(place: Path) -> Iterator[Core]:
    settings = ServeSettings(writing_rows=1, queue=QUEUE, request_rows=QUEUE, max_wait_ms=0)
    core = Core(open_bank(BankFolder(place / "bank"), device="cpu"), settings)
    yield core
    core.close()


def ask(core: Core, name: str, rows: int) -> Request:
    request = Request([{"text": "a good film"}] * rows, [[name]] * rows)
    core.ask(request)
    return request


def until(core: Core, true: Callable[[], bool]) -> None:
    """Waits until something is true of a core, which tells of its changes."""
    with core._change:
        assert core._change.wait_for(true, 60)


def test_a_slow_task_holds_up_others_for_one_batch(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    core.start()
    core.task("writes")
    slow = Slow(monkeypatch)
    writing = ask(core, "writes", 3)
    assert slow.begun.wait(60)
    reading = ask(core, "reads", 2)
    until(core, lambda: len(core._lanes) == 4)
    slow.go.set()
    reading.done.result(60), writing.done.result(60)
    assert slow.ran == [("writes", 1), ("reads", 2), ("writes", 1), ("writes", 1)]


def test_a_full_lane_leaves_the_other_its_room(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    core.start()
    core.task("writes")
    slow = Slow(monkeypatch)
    writing = ask(core, "writes", QUEUE)
    with pytest.raises(Problem, match=f"{QUEUE} rows are waiting, and {QUEUE} may"):
        ask(core, "writes", 1)
    reading = ask(core, "reads", QUEUE)
    with pytest.raises(Problem, match=f"{QUEUE} rows are waiting, and {QUEUE} may"):
        ask(core, "reads", 1)
    assert core.waiting == 2 * QUEUE
    slow.go.set()
    reading.done.result(60), writing.done.result(60)
    assert core.waiting == 0


def test_a_caller_that_leaves_takes_its_rows_along(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    with listened(core) as url:
        core.task("writes")
        slow = Slow(monkeypatch)
        first = ask(core, "writes", 1)
        assert slow.begun.wait(60)
        body = json.dumps({"task": "writes", "inputs": ["a film"] * 3}).encode()
        sent = {"host": "localhost", "content-type": "application/json", "content-length": len(body)}
        head = "\r\n".join(["POST /v1/predict HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items())])
        with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port)) as caller:
            caller.sendall(f"{head}\r\n\r\n".encode() + body)
            until(core, lambda: len(core._lanes) == 3)
        until(core, lambda: core.waiting == 1)  # the caller has gone
        slow.go.set()
        first.done.result(60)
    assert slow.ran == [("writes", 1)]
