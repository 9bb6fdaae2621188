"""Addresses of the bank's tasks: which there are, and how they are added and removed while others answer."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi import Path as InPath
from fastapi import Request as Http
from fastapi.responses import JSONResponse

from sidestep.disk.task_folder import TaskError, read_config
from sidestep.methods import UnsupportedBackbone
from sidestep.serve import schemas
from sidestep.serve.bodies import JSON, body_of, media_type
from sidestep.serve.core import Core
from sidestep.serve.openapi import REF, problems
from sidestep.serve.problems import Problem
from sidestep.serve.uploads import task_at, unpack
from sidestep.tasks.bank import TaskBank
from sidestep.tasks.bank_folder import (
    BadName,
    BankBusy,
    Entry,
    NameTaken,
    NoSuchTask,
    OtherWeights,
    check_name,
    identity_of,
)

ARCHIVES = ("application/zip", "application/x-tar", "application/gzip", "application/octet-stream")
ARCHIVE_SCHEMA = {"schema": {"type": "string", "format": "binary"}}
CHANGING = ("bad-name", "bank-busy", "stopping", "timeout")
Name = Annotated[str, InPath(min_length=1, max_length=255, description="Of the task in the bank.")]


def tasks(core: Core) -> APIRouter:
    """The addresses, on a core."""
    router = APIRouter()

    @router.get("/v1/tasks", response_model=schemas.TasksBody, responses=problems(), summary="The bank's tasks")
    def all_tasks() -> JSONResponse:
        entries, unreadable = core.bank.store.entries()
        found = []
        for entry in entries:
            try:
                found.append(_about(core, entry))
            except (TaskError, OSError) as error:
                unreadable[entry.name] = str(error)
        bad = [{"name": name, "reason": _plain(core, reason)} for name, reason in unreadable.items()]
        return JSONResponse({"tasks": found, "unreadable": bad})

    @router.get(
        "/v1/tasks/{name}",
        response_model=schemas.TaskBody,
        responses=problems("unknown-task", "invalid-request"),
        summary="One task",
    )
    def one_task(name: Name) -> JSONResponse:
        with _told(core, name):
            return JSONResponse(_about(core, core.bank.store.entry(name)))

    @router.put(
        "/v1/tasks/{name}",
        response_model=schemas.TaskBody,
        status_code=201,
        responses={
            200: {"model": schemas.TaskBody, "description": "The same task was there already"},
            **problems(
                *("bad-json", "outside-root", "stalled", "task-exists", "body-too-large", "wrong-media-type"),
                *("bad-upload", "invalid-request", *CHANGING),
            ),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    JSON: {"schema": {"$ref": REF.format(model="AddBody")}},
                    **dict.fromkeys(ARCHIVES, ARCHIVE_SCHEMA),
                },
            }
        },
        summary="Add a task: an archive of its folder, or its path",
    )
    async def add(name: Name, http: Http) -> JSONResponse:
        with _told(core, name):
            check_name(name)
        if media_type(http) == JSON:
            body = await body_of(http, schemas.AddBody)
            root = core.settings.root or core.bank.store.path
            folder = await asyncio.to_thread(task_at, body.path, root)
            return await _add(core, name, folder)
        if media_type(http) not in ARCHIVES:
            told = f"the body is {media_type(http) or 'of no type'}"
            raise Problem("wrong-media-type", told, f"Send an archive ({', '.join(ARCHIVES)}), or {JSON} with a path")
        with tempfile.TemporaryDirectory(prefix="sidestep-upload-") as place:
            archive, target = Path(place) / "archive", Path(place) / "task"
            target.mkdir()
            with archive.open("wb") as file:
                async for chunk in http.stream():
                    await asyncio.to_thread(file.write, chunk)
            folder = await asyncio.to_thread(unpack, archive, target, core.settings)
            return await _add(core, name, folder)

    @router.delete(
        "/v1/tasks/{name}",
        status_code=204,
        response_class=Response,
        responses=problems("unknown-task", "invalid-request", *CHANGING),
        summary="Remove a task",
    )
    async def remove(name: Name) -> Response:
        with _told(core, name):
            await _changed(core, lambda bank: bank.remove(name))
        return Response(status_code=204)

    return router


async def _add(core: Core, name: str, folder: Path) -> JSONResponse:
    """The task, stored under a name. A call that is sent again finds it there."""

    def work(bank: TaskBank) -> bool:
        try:
            bank.add(name, folder)
            return True
        except NameTaken:
            if name in bank.names and identity_of(read_config(folder)) == bank.store.identity(name):
                return False
            raise

    with _told(core, name, folder):
        new = await _changed(core, work)
        about = await asyncio.to_thread(lambda: _about(core, core.bank.store.entry(name)))
    return JSONResponse(about, status_code=201 if new else 200)


async def _changed(core: Core, work: Callable[[TaskBank], Any]) -> Any:
    """What a change gives. One that has begun goes on to its end, whoever waits for it."""
    try:
        return await asyncio.wait_for(asyncio.wrap_future(core.change(work)), core.settings.seconds)
    except TimeoutError as error:
        told = f"the bank was not changed within {core.settings.seconds:g} s"
        raise Problem("timeout", told, "See GET /v1/tasks, and try again", retry_after=5) from error


@contextmanager
def _told(core: Core, name: str, folder: Path | None = None) -> Iterator[None]:
    """Errors of a bank as problems, without places of the server's disk."""
    try:
        yield
    except NoSuchTask as error:
        raise core.unknown(name) from error
    except BadName as error:
        raise Problem("bad-name", str(error), "Choose another name") from error
    except NameTaken as error:
        told = f"the bank holds {name!r} already, and it is another task"
        raise Problem("task-exists", told, "Choose another name, or remove that task first") from error
    except BankBusy as error:
        told = "another process is changing the bank"
        raise Problem("bank-busy", told, "Try again when it is done", retry_after=1) from error
    except OtherWeights as error:
        told = _plain(core, str(error), folder)
        raise Problem("other-backbone", told, "Train the task on the backbone of GET /info") from error
    except (TaskError, UnsupportedBackbone, ValueError, OSError) as error:
        told = _plain(core, str(error), folder) if not isinstance(error, OSError) else "files cannot be read or written"
        sort = "bad-upload" if folder is not None else "task-damaged"
        raise Problem(sort, told, "Add a task folder that `sidestep inspect` can read") from error


def _about(core: Core, entry: Entry) -> dict[str, Any]:
    """What is told of a task."""
    stored = core.bank.store.config(entry.name)["preprocessing"] or {}
    fields = stored.get("fields")
    reads = None if fields is None else {name: column for name, column in fields.items() if column and name != "label"}
    told = {"kind": stored.get("problem"), "reads": reads, "max_length": stored.get("max_length")}
    known = {key: value for key, value in asdict(entry).items() if key != "outputs"}
    return {**known, **told}


def _plain(core: Core, text: str, folder: Path | None = None) -> str:
    """A message without places of the server's disk."""
    for place in (folder, core.bank.store.path):
        if place is not None:
            text = text.replace(f"{place}/", "").replace(str(place), "the task" if place == folder else "the bank")
    return text
