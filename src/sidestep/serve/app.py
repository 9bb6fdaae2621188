"""The ASGI app: a bank over HTTP. Any ASGI server runs it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Response
from fastapi import Request as Http
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from sidestep.backbone import device_of
from sidestep.serve import schemas
from sidestep.serve.answers import answers
from sidestep.serve.core import Core
from sidestep.serve.guard import Guard, headers_of
from sidestep.serve.keys import Keys
from sidestep.serve.metrics import Metrics
from sidestep.serve.openapi import describe, problems
from sidestep.serve.page import page, page_headers
from sidestep.serve.problems import MEDIA_TYPE, Problem
from sidestep.serve.tasks import tasks
from sidestep.versions import version_of

PACKAGES = ("torch", "transformers", "fastapi", "uvicorn")


def create_app(core: Core, *, keys: Keys | None = None) -> FastAPI:
    """The app on a core, which it starts and closes.

    Args:
        core: that nobody has started. If its `watch` is a `Metrics`, /metrics gives it.
        keys: None: no key is asked for. Then only this machine may call.
    """
    metrics = core.watch if isinstance(core.watch, Metrics) else Metrics()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        core.start()
        yield
        await asyncio.to_thread(core.close)

    app = FastAPI(
        title="Sidestep",
        summary="Many tasks on one backbone",
        version=version_of("sidestep") or "0",
        lifespan=life,
        docs_url=None,  # its pages take scripts from elsewhere
        redoc_url=None,
    )
    app.state.core = core
    app.include_router(answers(core))
    app.include_router(tasks(core))

    @app.get("/health", response_model=schemas.State, responses=problems("not-ready"), summary="Whether it works")
    async def health() -> JSONResponse:
        if not core.alive:
            raise Problem("not-ready", "the thread that runs the model has stopped", "Start the server again")
        return JSONResponse({"status": "ok"})

    @app.get("/ready", response_model=schemas.State, responses=problems("not-ready"), summary="Whether it answers now")
    async def ready() -> JSONResponse:
        if not core.ready:
            raise Problem("not-ready", "the tasks are being read", "Try again soon", retry_after=1)
        return JSONResponse({"status": "ok"})

    @app.get("/info", response_model=schemas.Info, responses=problems(), summary="What is served, and its limits")
    def info() -> JSONResponse:
        return JSONResponse(_info(core, keys))

    @app.get("/metrics", response_class=Response, responses=problems(), summary="Counts, as Prometheus reads them")
    def counts() -> Response:
        metrics.queued(core.waiting)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    def home() -> HTMLResponse:
        return HTMLResponse(page(), headers=page_headers())

    def count(path: str, method: str, status: int) -> None:
        metrics.http.labels(path, method, str(status)).inc()

    app.add_middleware(Guard, settings=core.settings, keys=keys, count=count)
    app.add_exception_handler(Problem, _of_problem)
    app.add_exception_handler(HTTPException, _of_http)
    app.add_exception_handler(RequestValidationError, _of_validation)
    describe(app)
    return app


def _info(core: Core, keys: Keys | None) -> dict[str, Any]:
    bank, entries = core.bank, core.bank.store.entries()[0]
    digest = bank.digest
    return {
        "sidestep": version_of("sidestep") or "0",
        "versions": {name: version_of(name) for name in PACKAGES},
        "backbone": {
            "name": core.known.backbone,
            "class": type(bank.backbone).__name__,
            "digest": digest.exact,
            "dtype": digest.dtype,
        },
        "device": str(device_of(bank.backbone)),
        "methods": sorted({entry.method for entry in entries}),
        "tasks": len(bank.names),
        "limits": {name: value for name, value in asdict(core.settings).items() if name != "root"},
        "keys": keys is not None,
    }


async def _of_problem(http: Http, error: Exception) -> Response:
    assert isinstance(error, Problem)
    body = error.body(getattr(http.state, "request_id", None))
    return JSONResponse(body, error.status, headers_of(error), media_type=MEDIA_TYPE)


async def _of_http(http: Http, error: Exception) -> Response:
    """What the framework itself refuses: addresses and methods that there are not."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        problem = Problem("wrong-method", f"{http.method} is not taken here", "See /openapi.json")
    elif error.status_code == 404:
        problem = Problem("not-found", "there is nothing at this address", "See /openapi.json")
    else:
        problem = Problem("invalid-request", str(error.detail), "See /openapi.json")
    response = await _of_problem(http, problem)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _of_validation(http: Http, error: Exception) -> Response:
    """A path or a query that is not as it is declared."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return await _of_problem(http, Problem("invalid-request", told, "Send what the schema in /openapi.json says"))
