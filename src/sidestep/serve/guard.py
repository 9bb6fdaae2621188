"""What stands before each request: its id, its host, its key, the size of its body, and one line of log."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sidestep.serve.keys import Keys
from sidestep.serve.problems import MEDIA_TYPE, Problem
from sidestep.serve.running import failure
from sidestep.serve.settings import ServeSettings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("sidestep.serve")
ID = re.compile(r"[\w-]{1,64}")
OPEN = frozenset(("/", "/health", "/ready", "/openapi.json"))
"""Addresses that need no key."""
HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]", "testserver"))
"""By which a server without keys may be called, so that a web page elsewhere cannot call it by a name of its own."""


class Guard:
    """ASGI middleware.

    Args:
        app: that answers.
        settings: with the limits of bodies.
        keys: None: no key is asked for.
        count: is told address, method and status of each answer.
    """

    def __init__(
        self, app: App, settings: ServeSettings, keys: Keys | None, count: Callable[[str, str, int], None]
    ) -> None:
        self.app, self.settings, self.keys, self.count = app, settings, keys, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, headers = time.monotonic(), _headers(scope)
        given = headers.get("x-request-id", "")
        number = given if ID.fullmatch(given) else secrets.token_hex(16)
        scope.setdefault("state", {})["request_id"] = number
        status = 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", number.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        try:
            self._check(scope, headers)
            await self.app(scope, self._bounded(scope, headers, receive), tell)
        except Problem as problem:
            await _refuse(problem, number, tell)
        except Exception as error:  # callers see no traceback
            if status:
                raise
            await _refuse(failure(error), number, tell)
        finally:
            path = _template(scope)
            self.count(path, scope["method"], status)
            log.info("%s %s %s %s %.0f ms", number, scope["method"], path, status, 1000 * (time.monotonic() - began))

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        if self.keys is not None:
            if scope["path"] not in OPEN:
                self.keys.check(headers.get("authorization"), change=scope["method"] in ("PUT", "DELETE", "PATCH"))
            return
        host = headers.get("host", "localhost")
        if re.sub(r":\d*$", "", host) not in HOSTS:
            raise Problem(
                "other-host",
                "this server has no keys, and is for programs on its own machine alone",
                "Call it as localhost or 127.0.0.1, or start it with keys (--keys)",
            )

    def _bounded(self, scope: Scope, headers: dict[str, str], receive: Receive) -> Receive:
        """Gives a body no larger than is allowed, in time."""
        upload = scope["method"] == "PUT"
        most = self.settings.upload_bytes if upload else self.settings.body_bytes
        told = headers.get("content-length", "0")
        if not told.isdecimal() or int(told) > most:
            raise _too_large(most)
        until, read, ended = time.monotonic() + self.settings.seconds * (10 if upload else 1), 0, False

        async def bounded() -> Message:
            nonlocal read, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except TimeoutError as error:
                raise Problem("stalled", f"{read} bytes came in time", "Send the body faster") from error
            ended = not message.get("more_body", False)
            read += len(message.get("body", b""))
            if read > most:
                raise _too_large(most)
            return message

        return bounded


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _template(scope: Scope) -> str:
    """The address as it was declared, so that logs and counts hold no names of a caller's making."""
    return getattr(scope.get("route"), "path", "other")


def _too_large(most: int) -> Problem:
    return Problem("body-too-large", f"the body is larger than {most} bytes", "Send less at once")


async def _refuse(problem: Problem, number: str, send: Send) -> None:
    body = json.dumps(problem.body(number)).encode()
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in headers_of(problem).items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def headers_of(problem: Problem) -> dict[str, str]:
    """The headers that go with a problem."""
    found = {} if problem.retry_after is None else {"Retry-After": str(problem.retry_after)}
    if problem.status == 401:
        found["WWW-Authenticate"] = "Bearer"
    if problem.name in ("body-too-large", "stalled"):
        found["Connection"] = "close"  # the rest of the body is not read
    return found
