"""Bodies of requests as values, and waiting for the core's answers without holding up others."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from fastapi import Request as Http
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from sidestep.serve.core import Core
from sidestep.serve.problems import Problem
from sidestep.serve.requests import Request

Model = TypeVar("Model", bound=BaseModel)
JSON, FORM = "application/json", "multipart/form-data"
SHOWN = 5
"""How many errors of a body are told."""


async def body_of(http: Http, model: type[Model]) -> Model:
    """A JSON body as a model.

    Raises:
        Problem: if it is of another type, is no JSON, holds a number that is none, or is not as the schema says.
    """
    if media_type(http) != JSON:
        raise Problem("wrong-media-type", f"the body is {media_type(http) or 'of no type'}", f"Send {JSON}")
    try:
        given = json.loads(await http.body(), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        # a message of json names a place and no content
        told = str(error) if isinstance(error, json.JSONDecodeError | _NoNumber) else type(error).__name__
        raise Problem("bad-json", f"the body cannot be read: {told}", "Send JSON in UTF-8") from error
    return validated(given, model)


def validated(given: Any, model: type[Model]) -> Model:
    """Values as a model.

    Raises:
        Problem: if they are not as the schema says.
    """
    try:
        return model.model_validate(given)
    except ValidationError as error:
        # without what was given, which the caller knows
        told = error.errors(include_url=False, include_context=False, include_input=False)
        places = [{"place": ".".join(map(str, each["loc"])), "message": each["msg"]} for each in told[:SHOWN]]
        first = f"{places[0]['place']}: {places[0]['message']}" if places[0]["place"] else places[0]["message"]
        raise Problem(
            "invalid-request", first, "Send what the schema in /openapi.json says", members={"errors": places}
        ) from error


async def form_of(http: Http, named: Collection[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fields of a multipart body, and its rows: the first part of each column is the first row's.

    Args:
        http: the request.
        named: parts that are fields. All others are columns. A field that comes several times has a list.

    Raises:
        Problem: if it cannot be read, or columns have different numbers of rows.
    """
    try:
        form = await http.form(max_files=1000, max_fields=2000, max_part_size=2**20)
    except Problem:
        raise
    except Exception as error:  # of a broken form the parser raises errors of many types
        raise Problem("invalid-request", "the form cannot be read", "Send multipart/form-data") from error
    fields: dict[str, list[str]] = {}
    columns: dict[str, list[Any]] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            columns.setdefault(name, []).append(await value.read())
        else:
            (fields if name in named else columns).setdefault(name, []).append(value)
    await form.close()
    counts = {len(cells) for cells in columns.values()}
    if len(counts) != 1:
        told = ", ".join(f"{len(cells)} of {name}" for name, cells in columns.items()) or "none"
        raise Problem("invalid-request", f"the parts of rows are: {told}", "Send as many of each, one a row")
    rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}, rows


def media_type(http: Http) -> str:
    """The type of a body, without its parameters."""
    return http.headers.get("content-type", "").partition(";")[0].strip().lower()


async def answered(core: Core, request: Request, http: Http) -> Request:
    """The request with all its answers. If its caller goes, it leaves the queue.

    Raises:
        Problem: as `Core.ask`, of the whole request, or if it takes too long.
    """
    waiting = asyncio.wrap_future(core.ask(request))
    leaving = asyncio.ensure_future(_left(http))
    try:
        await asyncio.wait((waiting, leaving), timeout=core.settings.seconds, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            return waiting.result()
        if leaving.done():
            raise Problem("timeout", "the caller has gone", "Stay until the answer comes")
        raise Problem(
            "timeout",
            f"there was no answer within {core.settings.seconds:g} s",
            "Send fewer rows at once, or try again later",
            retry_after=5,
        )
    finally:
        leaving.cancel()
        if not waiting.done():
            core.cancel(request)
            waiting.cancel()


async def _left(http: Http) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def refuse_whole(request: Request) -> None:
    """If no row of a request has any answer, its first problem is that of the request.

    Raises:
        Problem: with the problems of all rows as "results".
    """
    found = [answer for row in request.results for answer in row.values()]
    problems = [answer for answer in found if isinstance(answer, Problem)]
    if not found or len(problems) < len(found):
        return
    first = problems[0]
    members = {**first.members, "results": errors_of(request.results)} if len(found) > 1 else first.members
    raise Problem(first.name, first.detail, first.advice, retry_after=first.retry_after, members=members)


def errors_of(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers by row and task, with problems as errors."""
    return [
        {name: {"error": each.body()} if isinstance(each, Problem) else each for name, each in row.items()}
        for row in results
    ]


class _NoNumber(ValueError):
    """What JSON of Python's own takes, and JSON does not."""


def _no_constant(text: str) -> NoReturn:
    raise _NoNumber(f"{text} is no number in JSON")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise _NoNumber("a number is too large")
    return number
