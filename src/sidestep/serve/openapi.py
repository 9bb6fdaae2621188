"""What the OpenAPI document says of bodies and of problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sidestep.serve import schemas
from sidestep.serve.problems import MEDIA_TYPE, SORTS

REF = "#/components/schemas/{model}"
BODIES: tuple[type[BaseModel], ...] = (
    schemas.PredictBody,
    schemas.EmbeddingsBody,
    schemas.ClassifyBody,
    schemas.AddBody,
    schemas.ProblemBody,
)
FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "task": {"type": "string"},
        "tasks": {"type": "string", "description": "Names with commas."},
        "text": {"type": "string"},
        "text2": {"type": "string"},
        "image": {"type": "string", "format": "binary"},
        "audio": {"type": "string", "format": "binary"},
        "probabilities": {"enum": ["all", "one", "none"]},
        "too_long": {"enum": ["cut", "refuse"]},
    },
    "description": "Files and texts of rows. A part may stand there once for each row. Columns may also have the names "
    "that the task was trained with.",
}
KEYED = ("no-key", "not-allowed", "other-host")
"""Problems of every address but those that need no key."""


def problems(*names: str) -> dict[int | str, dict[str, Any]]:
    """The responses of an address that are problems of these names, with those that each address has."""
    found: dict[int | str, list[str]] = {}
    for name in dict.fromkeys((*names, *KEYED, "internal")):
        found.setdefault(SORTS[name].status, []).append(SORTS[name].title)
    schema = {"schema": {"$ref": REF.format(model="ProblemBody")}}
    return {
        status: {"description": ". ".join(titles), "content": {MEDIA_TYPE: schema}}
        for status, titles in sorted(found.items(), key=str)
    }


def takes(bodies: Mapping[str, type[BaseModel] | None]) -> dict[str, Any]:
    """The body of an address, by media type. None: of the form with files of rows."""
    content = {
        media: {"schema": FORM_SCHEMA if model is None else {"$ref": REF.format(model=model.__name__)}}
        for media, model in bodies.items()
    }
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI) -> None:
    """Have an app give the document with all bodies."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            _, schema = models_json_schema([(model, "validation") for model in BODIES], ref_template=REF)
            components = found.setdefault("components", {})
            components.setdefault("schemas", {}).update(schema["$defs"])
            components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"bearer": []}, {}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
