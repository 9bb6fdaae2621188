"""What the OpenAPI document says of bodies and of problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sidestep.serve import schemas
from sidestep.serve.bodies import FORM, JSON
from sidestep.serve.cells import FILES, READ
from sidestep.serve.problems import MEDIA_TYPE, SORTS

REF = "#/components/schemas/{model}"
BODIES: tuple[type[BaseModel], ...] = (
    schemas.PredictBody,
    schemas.EmbeddingsBody,
    schemas.ClassifyBody,
    schemas.AddBody,
    schemas.ProblemBody,
)
TEXT: dict[str, Any] = {"type": "string"}
FILE: dict[str, Any] = {"type": "string", "format": "binary"}
PREDICT_FIELDS: dict[str, Any] = {
    "task": TEXT,
    "tasks": {"type": "string", "description": "Names with commas."},
    "probabilities": {"enum": ["all", "one", "none"]},
    "too_long": {"enum": ["cut", "refuse"]},
}
EMBEDDINGS_FIELDS: dict[str, Any] = {"model": TEXT, "encoding_format": {"enum": ["float", "base64"]}}
"""Parts of forms that are no columns of rows."""
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


def takes(model: type[BaseModel], fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The body of an address: JSON, or also a form with these fields beside the columns of rows."""
    content: dict[str, Any] = {JSON: {"schema": {"$ref": REF.format(model=model.__name__)}}}
    if fields is not None:
        columns = {name: FILE if name in FILES else TEXT for name in READ}
        told = "Columns of rows are named as for JSON. A part may stand there once for each row."
        content[FORM] = {"schema": {"type": "object", "properties": {**fields, **columns}, "description": told}}
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
