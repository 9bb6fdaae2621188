"""Client and AsyncClient: the tasks of a server from Python. Neither torch nor FastAPI is imported.

Both classes make the same requests, and differ in how they wait. A request is data (`_Call`), so that each is described
once.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar
from urllib.parse import quote

import httpx2

__all__ = ["AsyncClient", "Client", "Predictions", "ServerError"]

Row: TypeAlias = str | Mapping[str, Any]
"""A text, or the columns that the tasks read. The bytes of an image, or the path of its file, go along as base64."""
Answer = TypeVar("Answer")

CONFIG = "sidestep.json"
"""Of a task folder. It names the other files."""
BUSY = {429, 503}
"""Answers after which the same request may succeed."""
SHORTEST = 0.05
"""Seconds between two tries."""


class ServerError(ValueError):
    """What a server refuses, or that it cannot be reached.

    Attributes:
        status: of the answer. 0: there was none.
        problem: the answer's body, as RFC 9457 has it. Empty: it was none.
    """

    def __init__(self, message: str, status: int = 0, problem: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status, self.problem = status, dict(problem or {})


@dataclass(frozen=True)
class Predictions:
    """What tasks say about rows.

    Attributes:
        rows: for each row, by the names of its tasks, "prediction" and (of classes) "probability" and "probabilities".
            A task that could not answer a row has an "error" in their place.
        tokens: how many were read.
        milliseconds: "read" until all rows were read, "wait" of the longest for its batch, "run" of all batches, and
            "total".
    """

    rows: list[dict[str, dict[str, Any]]]
    tokens: int
    milliseconds: dict[str, float]


class Client(AbstractContextManager["Client"]):
    """A server's tasks. Close it, or use it in a `with` statement."""

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 60, patience: float = 60) -> None:
        """Connects at the first call.

        Args:
            url: of the server, such as "http://127.0.0.1:8000".
            key: which the server was given. None: it asks for none.
            timeout: seconds to wait for a connection, and between two parts of an answer.
            patience: seconds a call waits in all while the server is busy (429 and 503). 0: it does not try again.

        Raises:
            ValueError: if `url` names no server.
        """
        self._patience = patience
        self._http = httpx2.Client(base_url=_address(url), headers=_headers(key), timeout=timeout)

    def predict(
        self,
        inputs: Row | Sequence[Row],
        tasks: str | Sequence[str] | None = None,
        *,
        probabilities: Literal["all", "one", "none"] = "one",
        too_long: Literal["cut", "refuse"] = "cut",
    ) -> Predictions:
        """What tasks predict for rows, each row with all tasks.

        Args:
            inputs: one row or several.
            tasks: one name or several. None: each row names its own, as in {"text": "...", "tasks": ["topic"]}.
            probabilities: of each class ("all"), of the predicted one, or none.
            too_long: whether a row that is longer than a task reads is cut or refused.

        Raises:
            ServerError: if the server refuses the call or cannot be reached. A row that it could not read has an
                "error" in the answer, and the others have their answers.
        """
        return self._ask(_predict(inputs, tasks, probabilities, too_long))

    def embeddings(self, inputs: Row | Sequence[Row], model: str) -> list[list[float]]:
        """A vector for each row, of a task of retrieval or of the backbone by its name (`info`).

        Args:
            inputs: one row or several. A row is a text, {"image": ...} or {"video": ...}. The backbone reads texts.
            model: the name.

        Raises:
            ServerError: if the server refuses the call, cannot read a row, or cannot be reached.
        """
        return self._ask(_embeddings(inputs, model))

    def tasks(self) -> list[dict[str, Any]]:
        """The tasks that are there, with their methods, kinds and labels."""
        return self._ask(_TASKS)

    def add(self, name: str, folder: str | Path) -> dict[str, Any]:
        """Sends a task folder to the server, which answers with it from then on.

        Raises:
            ServerError: if there is such a task, it belongs to another backbone, or the key may not change tasks.
        """
        return self._ask(_add(name, folder))

    def remove(self, name: str) -> None:
        """Deletes a task from the server's bank."""
        self._ask(_remove(name))

    def info(self) -> dict[str, Any]:
        """The server's backbone, versions and limits."""
        return self._ask(_INFO)

    def health(self) -> bool:
        """Whether there is a server that works."""
        return self._is("/health")

    def ready(self) -> bool:
        """Whether its tasks are read, so that it answers now."""
        return self._is("/ready")

    def close(self) -> None:
        """Ends the connections."""
        self._http.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _is(self, path: str) -> bool:
        try:
            return self._http.get(path).is_success
        except httpx2.TransportError:
            return False

    def _ask(self, call: _Call[Answer]) -> Answer:
        patience = _Patience(self._patience)
        while True:
            try:
                answer = self._http.request(call.method, call.path, **call.sent)
            except httpx2.HTTPError as error:
                raise _unreachable(self._http, error) from error
            wait = patience.wait(answer)
            if wait is None:
                return call.read(_body(answer))
            time.sleep(wait)


class AsyncClient(AbstractAsyncContextManager["AsyncClient"]):
    """`Client` with methods to await. Close it, or use it in an `async with` statement."""

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 60, patience: float = 60) -> None:
        """As `Client`."""
        self._patience = patience
        self._http = httpx2.AsyncClient(base_url=_address(url), headers=_headers(key), timeout=timeout)

    async def predict(
        self,
        inputs: Row | Sequence[Row],
        tasks: str | Sequence[str] | None = None,
        *,
        probabilities: Literal["all", "one", "none"] = "one",
        too_long: Literal["cut", "refuse"] = "cut",
    ) -> Predictions:
        """As `Client.predict`."""
        return await self._ask(_predict(inputs, tasks, probabilities, too_long))

    async def embeddings(self, inputs: Row | Sequence[Row], model: str) -> list[list[float]]:
        """As `Client.embeddings`."""
        return await self._ask(_embeddings(inputs, model))

    async def tasks(self) -> list[dict[str, Any]]:
        """As `Client.tasks`."""
        return await self._ask(_TASKS)

    async def add(self, name: str, folder: str | Path) -> dict[str, Any]:
        """As `Client.add`."""
        return await self._ask(await asyncio.to_thread(_add, name, folder))

    async def remove(self, name: str) -> None:
        """As `Client.remove`."""
        await self._ask(_remove(name))

    async def info(self) -> dict[str, Any]:
        """As `Client.info`."""
        return await self._ask(_INFO)

    async def health(self) -> bool:
        """As `Client.health`."""
        return await self._is("/health")

    async def ready(self) -> bool:
        """As `Client.ready`."""
        return await self._is("/ready")

    async def close(self) -> None:
        """Ends the connections."""
        await self._http.aclose()

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _is(self, path: str) -> bool:
        try:
            return (await self._http.get(path)).is_success
        except httpx2.TransportError:
            return False

    async def _ask(self, call: _Call[Answer]) -> Answer:
        patience = _Patience(self._patience)
        while True:
            try:
                answer = await self._http.request(call.method, call.path, **call.sent)
            except httpx2.HTTPError as error:
                raise _unreachable(self._http, error) from error
            wait = patience.wait(answer)
            if wait is None:
                return call.read(_body(answer))
            await asyncio.sleep(wait)


# --- what both ask ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call(Generic[Answer]):
    """A request.

    Attributes:
        read: makes the answer of its body.
        sent: what httpx2 is given besides.
    """

    method: str
    path: str
    read: Callable[[Any], Answer]
    sent: dict[str, Any] = field(default_factory=dict)


def _predict(
    inputs: Row | Sequence[Row], tasks: str | Sequence[str] | None, probabilities: str, too_long: str
) -> _Call[Predictions]:
    body: dict[str, Any] = {"inputs": _rows(inputs)}
    if tasks is not None:
        body["tasks"] = [tasks] if isinstance(tasks, str) else list(tasks)
    body |= {"probabilities": probabilities, "too_long": too_long}
    return _Call("POST", "/v1/predict", _predictions, {"json": body})


def _embeddings(inputs: Row | Sequence[Row], model: str) -> _Call[list[list[float]]]:
    body = {"model": model, "input": _rows(inputs)}
    return _Call("POST", "/v1/embeddings", lambda found: [one["embedding"] for one in found["data"]], {"json": body})


def _add(name: str, folder: str | Path) -> _Call[dict[str, Any]]:
    sent = {"content": _archive(Path(folder)), "headers": {"content-type": "application/x-tar"}}
    return _Call("PUT", f"/v1/tasks/{quote(name, safe='')}", dict, sent)


def _remove(name: str) -> _Call[object]:
    return _Call("DELETE", f"/v1/tasks/{quote(name, safe='')}", lambda found: None)


_TASKS: _Call[list[dict[str, Any]]] = _Call("GET", "/v1/tasks", lambda found: list(found["tasks"]))
_INFO: _Call[dict[str, Any]] = _Call("GET", "/info", dict)


def _rows(inputs: Row | Sequence[Row]) -> list[Row]:
    rows = [inputs] if isinstance(inputs, str | Mapping) else inputs
    return [row if isinstance(row, str) else {name: _value(value) for name, value in row.items()} for row in rows]


def _value(value: Any) -> Any:
    """A column's value as JSON has it."""
    if isinstance(value, Path):
        value = value.read_bytes()
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _archive(folder: Path) -> bytes:
    """A task as a tar file, without the checkpoints and logs that a training leaves beside it.

    Raises:
        ValueError: if the folder holds no task.
        OSError: if a file of it cannot be read.
    """
    try:
        files = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["files"]
        parts = [CONFIG, *(files[part] for part in ("weights", "processor") if files.get(part))]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder} is no folder with a task: name one that `sidestep train` or `save_pretrained` made"
        ) from error
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", dereference=True) as archive:
        for part in parts:
            archive.add(folder / part, part)
    return held.getvalue()


def _predictions(found: Any) -> Predictions:
    times = {name.removesuffix("_ms"): value for name, value in found["timings"].items()}
    return Predictions(found["results"], found["usage"]["tokens"], times)


# --- what comes back -------------------------------------------------------------------------------------------------


def _address(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url={url!r}: give a server's address, such as http://127.0.0.1:8000")
    return url.rstrip("/")


def _headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"authorization": f"Bearer {key}"}


class _Patience:
    """How long a call still waits for a busy server."""

    def __init__(self, seconds: float) -> None:
        self._left, self._next = seconds, 0.5

    def wait(self, answer: httpx2.Response) -> float | None:
        """Seconds until the call is made again. None: it is not."""
        seconds = _retry_after(answer)
        if answer.status_code not in BUSY and not (answer.status_code == 409 and seconds is not None):
            return None  # 409 with a time: another process is changing the bank
        if seconds is None:
            seconds, self._next = self._next, 2 * self._next
        if seconds > self._left:
            return None
        self._left -= max(seconds, SHORTEST)
        return max(seconds, SHORTEST)


def _retry_after(answer: httpx2.Response) -> float | None:
    """Seconds, which the header gives as a number or as a date."""
    told = answer.headers.get("retry-after", "")
    if told.isdecimal():
        return float(told)
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except ValueError:
        return None


def _body(answer: httpx2.Response) -> Any:
    """The JSON of an answer, None if it has no body.

    Raises:
        ServerError: if it is a refusal, or not of a Sidestep server.
    """
    try:
        found = answer.json() if answer.content else None
    except ValueError:
        found = answer.text
    if answer.is_success and not isinstance(found, str):
        return found
    if answer.is_success:
        raise ServerError(f"{answer.url} answered with {answer.headers.get('content-type')}: is it a Sidestep server?")
    problem = found if isinstance(found, Mapping) else {}
    raise ServerError(f"{told(problem, answer.reason_phrase)} ({answer.status_code})", answer.status_code, problem)


def told(problem: Mapping[str, Any], otherwise: str = "no answer") -> str:
    """What a problem says: what happened, and what to do."""
    return ". ".join(problem[part] for part in ("detail", "advice") if problem.get(part)) or otherwise


def _unreachable(http: httpx2.Client | httpx2.AsyncClient, error: httpx2.HTTPError) -> ServerError:
    why = str(error) or type(error).__name__
    return ServerError(f"no answer from {http.base_url}: {why}. Is the server running (`sidestep serve`)?")
