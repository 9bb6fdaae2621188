"""Addresses that answer rows: Sidestep's own, OpenAI's for embeddings, and that of Text Embeddings Inference."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi import Request as Http
from fastapi.responses import JSONResponse

from sidestep.serve import schemas
from sidestep.serve.bodies import FORM, answered, body_of, errors_of, form_of, media_type, refuse_whole, validated
from sidestep.serve.core import Core
from sidestep.serve.embeddings import EMBEDDING
from sidestep.serve.openapi import EMBEDDINGS_FIELDS, PREDICT_FIELDS, problems, takes
from sidestep.serve.problems import Problem
from sidestep.serve.requests import Request

TASKS = "tasks"
"""The member of a row that names its tasks."""


def answers(core: Core) -> APIRouter:
    """The addresses, on a core."""
    router = APIRouter()

    @router.post(
        "/v1/predict",
        response_model=schemas.Predictions,
        responses=problems(*ASKING),
        openapi_extra=takes(schemas.PredictBody, PREDICT_FIELDS),
        summary="Predictions of tasks for rows",
    )
    async def predict(http: Http) -> JSONResponse:
        began = time.monotonic()
        if media_type(http) == FORM:
            body, rows = await _of_form(http)
        else:
            body = await body_of(http, schemas.PredictBody)
            rows = _rows(body.inputs)
        request = Request(*_asked(body, rows), body.probabilities, body.too_long)
        await answered(core, request, http)
        refuse_whole(request)
        results = errors_of(request.results)
        for row, cut in zip(results, request.cut, strict=True):
            for name in cut & row.keys():
                row[name] = {**row[name], "cut": True}
        times = {f"{name}_ms": round(value, 3) for name, value in request.times.items()}
        times["total_ms"] = round(1000 * (time.monotonic() - began), 3)
        usage = {"rows": len(rows), "tokens": request.tokens}
        return JSONResponse({"results": results, "usage": usage, "timings": times})

    @router.post(
        "/v1/embeddings",
        response_model=schemas.Embeddings,
        responses=problems(*ASKING),
        openapi_extra=takes(schemas.EmbeddingsBody, EMBEDDINGS_FIELDS),
        summary="Embeddings of texts, images and videos, as OpenAI gives them",
    )
    async def embeddings(http: Http) -> JSONResponse:
        if media_type(http) == FORM:
            fields, rows = await form_of(http, EMBEDDINGS_FIELDS)
            body = validated({"input": "-", **fields}, schemas.EmbeddingsBody)
        else:
            body = await body_of(http, schemas.EmbeddingsBody)
            rows = _rows(body.input)
        request = Request(rows, [[body.model]] * len(rows), way="embeddings")
        await answered(core, request, http)
        refuse_any(request)
        data = []
        for index, row in enumerate(request.results):
            answer = row[body.model]
            assert isinstance(answer, dict)
            values: Any = answer[EMBEDDING]
            if body.encoding_format == "base64":
                values = base64.b64encode(np.array(values, dtype="<f4").tobytes()).decode()
            data.append({"object": "embedding", "index": index, "embedding": values})
        usage = {"prompt_tokens": request.tokens, "total_tokens": request.tokens}
        return JSONResponse({"object": "list", "data": data, "model": body.model, "usage": usage})

    @router.post(
        "/classify",
        response_model=list[schemas.Score] | list[list[schemas.Score]],
        responses=problems(*ASKING),
        openapi_extra=takes(schemas.ClassifyBody),
        summary="Classes of texts, as Text Embeddings Inference gives them",
    )
    async def classify(http: Http) -> JSONResponse:
        body = await body_of(http, schemas.ClassifyBody)
        several = isinstance(body.inputs, list) and isinstance(body.inputs[0], list)
        given: list[Any] = list(body.inputs) if several else [body.inputs]
        texts = [[each] if isinstance(each, str) else each for each in given]
        name = body.task if body.task is not None else _only(core)
        rows = [dict(zip(("text", "text2"), row, strict=False)) for row in texts]
        request = Request(rows, [[name]] * len(rows), "all", "cut" if body.truncate else "refuse")
        await answered(core, request, http)
        refuse_any(request)
        found = [_scores(name, row[name]) for row in request.results]
        return JSONResponse(found if several else found[0])

    return router


ASKING = (
    *("bad-json", "unknown-task", "stalled", "body-too-large", "wrong-media-type", "invalid-request"),
    *("queue-full", "internal", "stopping", "timeout"),
)


async def _of_form(http: Http) -> tuple[schemas.PredictBody, list[dict[str, Any]]]:
    fields, rows = await form_of(http, PREDICT_FIELDS)
    given = fields.pop(TASKS, [])
    texts = [given] if isinstance(given, str) else given
    names = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    return validated({"inputs": "-", **fields, **({TASKS: names} if names else {})}, schemas.PredictBody), rows


def _rows(given: Any) -> list[dict[str, Any]]:
    return [
        {"text": row} if isinstance(row, str) else {**row} for row in (given if isinstance(given, list) else [given])
    ]


def _asked(body: schemas.PredictBody, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """Rows, and the tasks of each."""
    if body.task is not None and body.tasks is not None:
        raise Problem("invalid-request", "both task and tasks are given", "Give one of them")
    names = [body.task] if body.task is not None else body.tasks or []
    asked = [row.pop(TASKS, names) for row in rows]
    for number, own in enumerate(asked, start=1):
        if isinstance(own, str) or not own:
            raise Problem(
                "invalid-request",
                f"row {number} names no list of tasks",
                'Name the tasks of all rows ("task" or "tasks"), or of each row ("tasks")',
            )
        if len(set(own)) < len(own):
            raise Problem("invalid-request", f"row {number} names a task twice", "Name each task once")
    return rows, asked


def _only(core: Core) -> str:
    names = core.bank.names
    if len(names) != 1:
        raise Problem(
            "invalid-request",
            f"no task is named, and the bank holds {len(names)}",
            'Name one as "task" (GET /v1/tasks)',
        )
    return names[0]


def _scores(name: str, answer: Any) -> list[dict[str, Any]]:
    shares = answer.get("probabilities")
    if not shares:
        raise Problem("wrong-endpoint", f"{name!r} gives no probabilities of classes", "Ask it by /v1/predict")
    ordered = sorted(shares.items(), key=lambda share: -share[1])
    return [{"label": label, "score": score} for label, score in ordered]


def refuse_any(request: Request) -> None:
    """The first problem of a row is that of the request, where the form of the answer has no place for problems.

    Raises:
        Problem: it.
    """
    for number, row in enumerate(request.results):
        for answer in row.values():
            if isinstance(answer, Problem):
                members = {**answer.members, "row": number}
                raise Problem(
                    answer.name, answer.detail, answer.advice, retry_after=answer.retry_after, members=members
                )
