"""Requests drawn from the OpenAPI document: none is a server error, and each answer is as the document says."""

from __future__ import annotations

import json
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EXAMPLES = 10


def test_no_request_is_a_server_error(server: Any, http: httpx.Client) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for found in document.get_all_operations():

        @settings(max_examples=EXAMPLES, phases=[Phase.explicit, Phase.generate], suppress_health_check=[*HealthCheck])
        @given(case=found.ok().as_strategy())
        def check(case: Any) -> None:
            case.call_and_validate(checks=CHECKS)

        check()


def test_every_problem_is_declared(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            codes = set(about["responses"])
            assert {"401", "403", "500"} <= codes, f"{method} {path}"
            for code, response in about["responses"].items():
                if code >= "4":
                    assert [*response["content"]] == ["application/problem+json"]
    assert "/work" not in json.dumps(document)
