"""The client against a server that is told what to answer: requests, retries, errors."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import tarfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import sidestep as ss

Told = tuple[int, dict[str, str], Any]
BUSY: Told = (429, {"retry-after": "0"}, {"title": "Too many rows are waiting", "detail": "the queue is full"})
ANSWER = {"results": [{"mood": {"prediction": "good"}}], "usage": {"tokens": 4}, "timings": {"run_ms": 1.5}}
FINE: Told = (200, {}, ANSWER)


class Stub(ThreadingHTTPServer):
    """Gives answers in their order, the last one again and again, and notes what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Told] = []
        self.asked: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *told: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        asked = self.server.asked
        asked.append((f"{self.command} {self.path}", {key.lower(): value for key, value in self.headers.items()}, body))
        status, headers, content = self.server.answers[min(len(asked), len(self.server.answers)) - 1]
        sent = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"content-length": str(len(sent))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)

    do_GET = do_POST = do_PUT = do_DELETE = answer


@pytest.fixture
def server() -> Iterator[Stub]:
    with Stub() as stub:
        thread = threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield stub
        stub.shutdown()
        thread.join()


def both(server: Stub, call: Callable[[Any], Any], **how: Any) -> list[Any]:
    """What a call gives with the client, and with the one that is awaited. They send the same."""

    async def awaited() -> Any:
        async with ss.AsyncClient(server.url, **how) as client:
            found = call(client)
            assert isinstance(found, Awaitable)
            return await found

    server.asked.clear()
    with ss.Client(server.url, **how) as client:
        found = [call(client)]
    first, server.asked[:] = [*server.asked], []
    found.append(asyncio.run(awaited()))
    assert [(line, body) for line, _, body in server.asked] == [(line, body) for line, _, body in first]
    return found


def test_rows_go_out_and_answers_come_back(server: Stub, tmp_path: Path) -> None:
    server.answers = [FINE]
    (tmp_path / "dot.png").write_bytes(b"\x89PNG")
    rows = ["a text", {"text": "b", "image": b"raw"}, {"image": tmp_path / "dot.png"}]
    for found in both(server, lambda client: client.predict(rows, ["mood"], probabilities="all"), key="sesame"):
        assert found.rows == ANSWER["results"]
        assert (found.tokens, found.milliseconds) == (4, {"run": 1.5})
    line, headers, body = server.asked[-1]
    assert (line, headers["authorization"]) == ("POST /v1/predict", "Bearer sesame")
    inputs = json.loads(body)["inputs"]
    assert inputs[0] == "a text"
    assert [base64.b64decode(row["image"]) for row in inputs[1:]] == [b"raw", b"\x89PNG"]


def test_rows_may_name_their_own_tasks(server: Stub) -> None:
    server.answers = [FINE]
    both(server, lambda client: client.predict({"text": "a", "tasks": ["mood"]}))
    body = json.loads(server.asked[-1][2])
    assert body["inputs"] == [{"text": "a", "tasks": ["mood"]}]
    assert "tasks" not in body


@pytest.mark.parametrize("when", ["0", formatdate(0, usegmt=True)], ids=["seconds", "date"])
def test_a_busy_server_is_asked_again(server: Stub, when: str) -> None:
    server.answers = [(503, {"retry-after": when}, {}), BUSY, FINE]
    with ss.Client(server.url) as client:
        assert client.predict("a", "mood").tokens == 4
    assert len(server.asked) == 3


def test_patience_ends(server: Stub) -> None:
    server.answers = [(429, {"retry-after": "3600"}, BUSY[2])]
    for patience in (0, 60):
        with ss.Client(server.url, patience=patience) as client, pytest.raises(ss.ServerError, match="queue is full"):
            client.predict("a", "mood")
    assert len(server.asked) == 2, "no wait of an hour"
    server.answers = [BUSY]
    with ss.Client(server.url, patience=0.12) as client, pytest.raises(ss.ServerError, match="429"):
        client.predict("a", "mood")
    assert 3 <= len(server.asked) - 2 <= 4


def test_a_refusal_is_an_error_with_its_text(server: Stub) -> None:
    problem = {
        "title": "No such task",
        "detail": "there is no task 'mod'",
        "advice": "The nearest is mood",
        "status": 404,
    }
    server.answers = [(404, {"content-type": "application/problem+json"}, problem)]
    with ss.Client(server.url) as client, pytest.raises(ss.ServerError) as refused:
        client.predict("a", "mod")
    assert str(refused.value) == "there is no task 'mod'. The nearest is mood (404)"
    assert (refused.value.status, refused.value.problem) == (404, problem)


def test_what_is_no_server_of_sidestep_is_told(server: Stub) -> None:
    server.answers = [(200, {"content-type": "text/html"}, b"<html>")]
    with ss.Client(server.url) as client, pytest.raises(ss.ServerError, match="is it a Sidestep server"):
        client.info()
    with pytest.raises(ValueError, match="give a server's address"):
        ss.Client("127.0.0.1:8000")
    with ss.Client("http://127.0.0.1:9") as client:
        assert not client.health()
        with pytest.raises(ss.ServerError, match="Is the server running") as unreachable:
            client.tasks()
    assert unreachable.value.status == 0


def test_a_task_goes_as_an_archive_without_what_lies_beside_it(server: Stub, tmp_path: Path) -> None:
    task = tmp_path / "task"
    for folder in ("processor", "checkpoints"):
        (task / folder).mkdir(parents=True)
        (task / folder / "vocab.txt").write_text("a\n")
    (task / "w.safetensors").write_bytes(b"w")
    (task / "sidestep.json").write_text(json.dumps({"files": {"weights": "w.safetensors", "processor": "processor"}}))
    server.answers = [(201, {}, {"name": "mood"})]
    both(server, lambda client: client.add("mo od", task))
    line, _, body = server.asked[-1]
    assert line == "PUT /v1/tasks/mo%20od"
    with tarfile.open(fileobj=io.BytesIO(body)) as archive:
        assert archive.getnames() == ["sidestep.json", "w.safetensors", "processor", "processor/vocab.txt"]
    with ss.Client(server.url) as client, pytest.raises(ValueError, match="no folder with a task"):
        client.add("mood", tmp_path / "nothing")


def test_the_other_calls(server: Stub) -> None:
    server.answers = [(200, {}, {"tasks": [{"name": "mood"}]})]
    assert both(server, lambda client: client.tasks()) == [[{"name": "mood"}]] * 2
    server.answers = [(204, {}, b"")]
    assert both(server, lambda client: client.remove("mood")) == [None, None]
    assert both(server, lambda client: client.health()) == [True, True]
    server.answers = [(200, {}, {"data": [{"embedding": [0.5, 1.0]}]})]
    assert both(server, lambda client: client.embeddings(["a", {"image": b"b"}], "mood")) == [[[0.5, 1.0]]] * 2
    assert json.loads(server.asked[-1][2]) == {"model": "mood", "input": ["a", {"image": "Yg=="}]}


def test_it_needs_neither_torch_nor_a_web_framework() -> None:
    code = "import sys, sidestep as ss; ss.Client('http://a'); print({'torch', 'fastapi', 'datasets'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
