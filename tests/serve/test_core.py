"""The core without HTTP: batches, and what fails touches no others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from served import make_bank
from sidestep.disk.task_folder import WEIGHTS
from sidestep.serve import forms
from sidestep.serve.batches import Lanes, Waiting
from sidestep.serve.core import Core
from sidestep.serve.forms import Form, Piece, Reading
from sidestep.serve.problems import Problem
from sidestep.serve.requests import Request
from sidestep.serve.settings import ServeSettings
from sidestep.tasks.bank import TaskBank
from sidestep.tasks.bank_folder import BankFolder
from sidestep.tasks.open_bank import open_bank

NAMES = ("read", "probe", "number", "lora", "tags")


class Fake(Form):
    """Rows that are not run."""

    def __init__(self, key: str, *, writes: bool = False) -> None:
        self.key, self.writes = key, writes

    def read(self, rows: Any) -> Any:
        raise NotImplementedError

    def run(self, *arguments: Any) -> Any:
        raise NotImplementedError


READS, OTHERS, WRITES = Fake("reads"), Fake("others"), Fake("writes", writes=True)


def lanes(now: float = 0.0, **settings: Any) -> Lanes:
    return Lanes(ServeSettings(**settings), clock=lambda: now)


def row(form: Form = READS, length: int = 1, since: float = 0.0, request: Request | None = None) -> Waiting:
    return Waiting(request or Request([], []), 0, form, Piece([], length), ["a"], since)


def lengths(batch: list[Waiting]) -> list[int]:
    return [each.piece.length for each in batch]


def test_a_row_waits_for_others_and_no_longer() -> None:
    assert lanes(now=0.001).take() == []
    waiting = lanes(now=0.001)
    waiting.put([row()])
    assert waiting.take() == []
    assert waiting.until() == pytest.approx(0.001)
    waiting.clock = lambda: 0.002
    assert len(waiting.take()) == 1
    assert waiting.until() is None


def test_a_full_batch_waits_no_longer() -> None:
    waiting = lanes(max_rows=2)
    waiting.put([row(), row(), row()])
    assert len(waiting.take()) == 2
    assert waiting.take() == []
    assert len(waiting.take(hurry=True)) == 1


def test_a_batch_has_tokens_with_padding_and_like_lengths() -> None:
    waiting = lanes(now=1.0, max_tokens=40)
    waiting.put([row(length=length) for length in (10, 40, 3, 11, 9, 12)])
    assert lengths(waiting.take()) == [10, 11, 9]
    assert lengths(waiting.take()) == [40]
    assert lengths(waiting.take()) == [3, 12]


def test_a_row_that_is_too_long_for_a_batch_runs_alone() -> None:
    waiting = lanes(now=1.0, max_tokens=8)
    waiting.put([row(length=20), row(length=2)])
    assert lengths(waiting.take()) == [20]


def test_forms_have_batches_of_their_own_the_oldest_first() -> None:
    waiting = lanes(now=1.0)
    waiting.put([row(OTHERS, since=0.5), row(READS, since=0.2), row(OTHERS, since=0.6)])
    assert [each.form for each in waiting.take()] == [READS]
    assert [each.form for each in waiting.take()] == [OTHERS, OTHERS]


def test_tasks_that_write_take_turns_with_others() -> None:
    waiting = lanes(now=1.0, max_rows=1, writing_rows=1)
    waiting.put([row(WRITES), row(WRITES), row(WRITES), row(), row()])
    found = [waiting.take()[0].form.writes for _ in range(5)]
    assert found == [True, False, True, False, True]


def test_rows_of_a_request_that_is_gone_leave() -> None:
    waiting, gone = lanes(now=1.0), Request([], [])
    waiting.put([row(request=gone), row(length=5)])
    gone.gone = True
    assert len(waiting.drop()) == 1
    assert lengths(waiting.take()) == [5]


# --- on a bank ---


@pytest.fixture(scope="module")
def core(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Core]:
    bank = make_bank(tasks, tmp_path_factory.mktemp("core") / "bank", NAMES)
    found = Core(open_bank(bank, moved_to=str(tasks / "bert"), device="cpu"), ServeSettings(max_wait_ms=20, queue=300))
    found.start()
    yield found
    found.close()


def answers(core: Core, names: list[str], texts: list[str]) -> list[dict[str, Any]]:
    return core.ask(Request([{"text": text} for text in texts], [names] * len(texts))).result(60).results


def test_requests_share_a_batch_and_a_pass(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    run = forms.Rows.run
    monkeypatch.setattr(forms.Rows, "run", lambda *told: seen.append(told[2:4]) or run(*told))
    expected = answers(core, ["read", "number"], ["good", "bad film"])
    seen.clear()
    asked = [
        core.ask(Request([{"text": text}], [names])) for text, names in [("good", ["read"]), ("bad film", ["number"])]
    ]
    found = [future.result(60).results[0] for future in asked]
    ((pieces, its),) = seen
    assert len(pieces) == 2
    assert {name: task.places for name, task in its.items()} == {"read": [0], "number": [1]}  # each runs on its own row
    assert core.bank.together.passes == 1
    assert found[0]["read"]["prediction"] == expected[0]["read"]["prediction"]
    assert found[1]["number"]["prediction"] == pytest.approx(expected[1]["number"]["prediction"], abs=1e-5)


def test_windows_go_to_their_own_tasks_call_by_call(core: Core, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core.change(lambda bank: bank.add("tags_too", tasks / "tags_too")).result(60)
    texts, names = ("good", "a bad film", "bad"), [["tags"], ["tags_too"], ["tags"]]
    expected = core.ask(Request([{"text": text} for text in texts], names)).result(60).results
    form = core.known.learn("tags").form
    assert isinstance(form, forms.Windows)
    monkeypatch.setattr(form, "max_tokens", 1)
    calls: list[Any] = []
    call = TaskBank.__call__
    monkeypatch.setattr(TaskBank, "__call__", lambda *told, **how: calls.append(how["rows"]) or call(*told, **how))
    found = core.ask(Request([{"text": text} for text in texts], names)).result(60).results
    assert sorted(map(str, calls)) == ["{'tags': [0]}", "{'tags': [0]}", "{'tags_too': [0]}"]
    for ours, theirs in zip(found, expected, strict=True):
        assert {name: one["predicted_tags"] for name, one in ours.items()} == {
            name: one["predicted_tags"] for name, one in theirs.items()
        }


def test_reading_threads_and_the_models_thread_share_no_tokenizer(core: Core) -> None:
    """Both cut texts by its settings, and one would see those of the other."""
    read = [form for name in NAMES if isinstance(form := core.task(name).form, Reading)]
    used = [core.bank.activate(name).extras["processor"] for name in NAMES]
    assert len(read) == len(NAMES)
    assert all(form.processor not in used for form in read)


def test_a_failure_touches_its_own_row_and_task_alone(
    core: Core, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["a good film", "a bad film", "a fine film"]
    expected = answers(core, ["read", "number"], texts)
    run = forms.Rows.run

    def failing(form: Any, bank: Any, pieces: Any, tasks: Any, modes: Any) -> Any:
        if "read" in tasks and any(piece.parts[0]["input_ids"][2] == 7 for piece in pieces):  # "bad"
            raise RuntimeError("out of memory")
        return run(form, bank, pieces, tasks, modes)

    monkeypatch.setattr(forms.Rows, "run", failing)
    found = answers(core, ["read", "number"], texts)
    problem = found[1]["read"]
    assert isinstance(problem, Problem)
    assert problem.status == 500
    assert problem.members["failure"] in caplog.text
    assert "out of memory" in caplog.text
    assert "out of memory" not in problem.detail
    for place in (0, 2):
        assert found[place]["read"]["prediction"] == expected[place]["read"]["prediction"]
    for place in range(3):
        assert found[place]["number"]["prediction"] == pytest.approx(expected[place]["number"]["prediction"], abs=1e-5)


def test_outputs_that_are_no_numbers_are_an_error(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    call = type(core.bank).__call__

    def broken(bank: Any, batch: Any, *, tasks: Any, rows: Any) -> Any:
        found = call(bank, batch, tasks=tasks, rows=rows)
        if "read" in found:
            found["read"].logits[0] = torch.nan
        return found

    monkeypatch.setattr(type(core.bank), "__call__", broken)
    found = answers(core, ["read", "number"], ["good"])[0]
    assert found["read"].status == 500
    assert isinstance(found["number"]["prediction"], float)


def test_a_task_that_goes_while_rows_wait_is_an_error_of_its_own(core: Core, tasks: Path) -> None:
    core.change(lambda bank: bank.add("guest", tasks / "read")).result(60)
    answers(core, ["guest"], ["good"])
    begun, go = threading.Event(), threading.Event()
    held = core._on_model(lambda: (begun.set(), go.wait(60)))
    begun.wait(60)
    future = core.ask(Request([{"text": "good"}], [["guest", "read"]]))
    removing = core.change(lambda bank: bank.remove("guest"))
    go.set()
    held.result(60), removing.result(60)
    found = future.result(60).results[0]
    assert found["guest"].name in ("task-removed", "unknown-task")
    assert "prediction" in found["read"]


def test_a_task_that_another_process_removes_in_the_middle_is_an_error_of_its_own(
    core: Core, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.change(lambda bank: bank.add("guest", tasks / "read")).result(60)
    expected = answers(core, ["number", "guest"], ["good"])[0]
    run = forms.Rows.run

    def removing(form: Any, bank: Any, *rest: Any) -> Any:
        if "guest" in bank.names:  # behind the look at which tasks there are
            BankFolder(bank.store.path).remove("guest")
        return run(form, bank, *rest)

    monkeypatch.setattr(forms.Rows, "run", removing)
    found = answers(core, ["number", "guest"], ["good"])[0]
    assert found["guest"].name == "task-removed"
    assert found["number"]["prediction"] == pytest.approx(expected["number"]["prediction"], abs=1e-5)


def test_a_damaged_task_fails_alone(core: Core, tasks: Path) -> None:
    core.change(lambda bank: bank.add("damaged", tasks / "probe")).result(60)
    file = core.bank.store.path / "damaged" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    found = answers(core, ["damaged", "read"], ["good"])[0]
    assert found["damaged"].name == "task-damaged"
    assert "prediction" in found["read"]
    core.change(lambda bank: bank.remove("damaged")).result(60)


def test_a_full_queue_says_when_to_come_back(core: Core) -> None:
    begun, go = threading.Event(), threading.Event()
    held = core._on_model(lambda: (begun.set(), go.wait(60)))
    begun.wait(60)
    waiting = core.ask(Request([{"text": "good"}] * 200, [["read"]] * 200))
    with pytest.raises(Problem, match="200 rows are waiting, and 300 may") as refused:
        core.ask(Request([{"text": "good"}] * 101, [["read"]] * 101))
    assert refused.value.status == 429
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1
    go.set()
    held.result(60)
    assert len(waiting.result(60).results) == 200
    assert core.waiting == 0


def test_a_request_that_is_cancelled_makes_room(core: Core) -> None:
    begun, go = threading.Event(), threading.Event()
    held = core._on_model(lambda: (begun.set(), go.wait(60)))
    begun.wait(60)
    request = Request([{"text": "good"}] * 250, [["read"]] * 250)
    core.ask(request)
    core.cancel(request)
    request.done.result(60)
    other = core.ask(Request([{"text": "good"}] * 100, [["read"]] * 100))
    go.set()
    held.result(60)
    assert len(other.result(60).results) == 100
    assert core.waiting == 0


def test_too_many_tokens_are_refused(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "settings", ServeSettings(request_tokens=8, queue=300))
    with pytest.raises(Problem, match="9 tokens, and a request may have 8"):
        answers(core, ["read"], ["a", "good", "film"])
    assert core.waiting == 0


def test_a_core_that_is_closed_answers_what_waits_and_no_more(tasks: Path, tmp_path: Path) -> None:
    bank = make_bank(tasks, tmp_path / "bank", ["read"])
    found = Core(open_bank(bank, moved_to=str(tasks / "bert"), device="cpu"), ServeSettings(max_wait_ms=60_000))
    found.start()
    found.task("read")
    future = found.ask(Request([{"text": "good"}], [["read"]]))
    found.close()
    assert "prediction" in future.result(0).results[0]["read"]
    with pytest.raises(Problem, match="the server is stopping"):
        found.ask(Request([{"text": "good"}], [["read"]]))


@pytest.mark.parametrize("wrong", [{"max_rows": 0}, {"seconds": -1.0}, {"queue": 10}, {"root": Path("nowhere")}])
def test_settings_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServeSettings(**wrong)
