"""The document is whole, valid, and true: what it describes is what the application serves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from fake_service import MODEL, make_service

from twinkle.protocol.endpoints import OPERATIONS, PREFIX, PROTOBUF, QUERIES
from twinkle.server.config import LimitsSection
from twinkle.server.gateway import openapi
from twinkle.server.gateway.app import create_app
from twinkle.server.tokens import Signer


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return openapi.document()


def operation(document: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    return document["paths"][PREFIX + path][method]


def walk(value: object) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from walk(item)


async def test_the_application_serves_it_and_what_it_describes(document: dict[str, Any], tmp_path: Path):
    app = create_app(make_service(tmp_path), LimitsSection(max_request_bytes=1024), Signer("secret"))
    routes = {
        (method.lower(), path)
        for route in app.routes
        if (path := getattr(route, "path", "")).startswith(PREFIX)
        for method in (getattr(route, "methods", None) or set()) - {"HEAD"}
    }
    described = {(method, path) for path, methods in document["paths"].items() for method in methods}
    assert described == routes
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        response = await http.get("/openapi.json")
    assert response.status_code == 200
    assert response.json() == document


def test_every_reference_leads_somewhere_and_every_name_is_used_once(document: dict[str, Any]):
    for node in walk(document):
        if isinstance(reference := node.get("$ref"), str):
            target: Any = document
            for part in reference.removeprefix("#/").split("/"):
                target = target[part]
    ids = [op["operationId"] for methods in document["paths"].values() for op in methods.values()]
    assert len(set(ids)) == len(ids) == len(OPERATIONS) + len(QUERIES) + 10


def test_every_schema_is_a_json_schema(document: dict[str, Any]):
    for node in walk(document):
        if isinstance(node.get("schema"), dict):
            jsonschema_rs.meta.validate(node["schema"])
    for schema in document["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)


def test_each_placeholder_of_a_path_is_a_parameter(document: dict[str, Any]):
    for path, methods in document["paths"].items():
        for described in methods.values():
            named = {p["name"] for p in described.get("parameters", []) if p["in"] == "path"}
            assert named == {part.strip("{}") for part in path.split("/") if part.startswith("{")}


@pytest.mark.parametrize(
    ("method", "path", "body", "is_valid"),
    [
        ("post", "/create_session", {"tags": ["a"], "user_metadata": {"n": 1}}, True),
        ("post", "/create_session", {"tags": "a"}, False),
        ("post", "/create_model", {"session_id": "s", "model_seq_id": 0, "base_model": MODEL}, True),
        ("post", "/create_model", {"session_id": "s", "model_seq_id": -1, "base_model": MODEL}, False),
        ("post", "/create_model", {"session_id": "s"}, False),
        (
            "post",
            "/asample",
            {
                "sampling_session_id": "s",
                "seq_id": 0,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
            },
            True,
        ),
        (
            "post",
            "/asample",
            {
                "sampling_session_id": "s",
                "seq_id": 0,
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": ["a"]}]},
            },
            False,
        ),
        ("put", "/sessions/{session_id}/project", {"project_id": "p"}, True),
        ("put", "/sessions/{session_id}/project", {}, False),
    ],
)
def test_bodies_are_told_right_from_wrong(
    document: dict[str, Any], method: str, path: str, body: dict[str, Any], is_valid: bool
):
    schema = operation(document, method, path)["requestBody"]["content"]["application/json"]["schema"]
    validator = jsonschema_rs.validator_for({**schema, "components": document["components"]})
    assert validator.is_valid(body) == is_valid


def test_fields_travel_where_the_tables_say(document: dict[str, Any]):
    listed = operation(document, "get", "/training_runs")
    assert {p["name"]: p["in"] for p in listed["parameters"]} == {
        "limit": "query",
        "offset": "query",
        "access_scope": "query",
        "project_id": "query",
    }
    created = operation(document, "post", "/create_session")
    assert [(p["name"], p["in"]) for p in created["parameters"]] == [("X-Idempotency-Key", "header")]
    body = created["requestBody"]["content"]["application/json"]["schema"]
    assert "idempotency_key" not in body["properties"]
    ttl = operation(document, "put", "/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl")
    body = ttl["requestBody"]["content"]["application/json"]["schema"]
    assert list(body["properties"]) == ["ttl_seconds"]


def test_training_passes_travel_as_bytes(document: dict[str, Any]):
    described = operation(document, "post", "/forward_backward")
    assert list(described["requestBody"]["content"]) == [PROTOBUF]
    assert PROTOBUF in operation(document, "post", "/retrieve_future")["responses"]["200"]["content"]


def test_every_error_has_the_one_form(document: dict[str, Any]):
    for methods in document["paths"].values():
        for described in methods.values():
            assert described["responses"]["default"] == {"$ref": "#/components/responses/Error"}
    assert set(document["components"]["schemas"]["Failure"]["properties"]) == {"error", "category"}
