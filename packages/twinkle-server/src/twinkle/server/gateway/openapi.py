"""The OpenAPI 3.1 document of the HTTP interface, made from the protocol's tables and the models they name.

Describes the tables to other tools; which paths there are, and what they do, is up to the tables. The few routes that
are in none are listed here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import JSON, OPERATIONS, PREFIX, PROTOBUF, QUERIES, Endpoint
from twinkle.protocol.operations import ENDPOINTS, MAX_OPERATIONS, PATH
from twinkle.server._version import __version__

Json: TypeAlias = dict[str, Any]
Defs: TypeAlias = dict[str, Json]
Mode: TypeAlias = Literal["validation", "serialization"]

_REF = "#/components/schemas/"
_BINARY: Json = {}  # in OpenAPI 3.1 a body without a schema is bytes
_ERROR: Json = {"$ref": "#/components/responses/Error"}
_KEY_HEADER = "X-Idempotency-Key"
_ZSTD: Json = {
    "name": "Content-Encoding",
    "in": "header",
    "description": "How the body is compressed, if it is.",
    "schema": {"type": "string", "enum": ["zstd", "identity"]},
}


def document() -> Json:
    defs = _all_schemas()
    paths: dict[str, Json] = {}
    for endpoint in OPERATIONS:
        paths.setdefault(PREFIX + endpoint.path, {})["post"] = _operation(endpoint)
    for query in QUERIES:
        paths.setdefault(PREFIX + query.path, {})[query.method.lower()] = _query(query, defs)
    for path, method, description in _beside_the_tables():
        paths.setdefault(PREFIX + path, {})[method] = description
    return {
        "openapi": "3.1.0",
        "info": {"title": "Twinkle", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": defs,
            "responses": {
                "Error": _reply("What was wrong, and who can do something about it.", _ref(m.Failure))
            },
            "securitySchemes": {
                "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "token": {"type": "http", "scheme": "bearer"},
            },
        },
        "security": [{}, {"key": []}, {"token": []}],
    }


# ---------------------------------------------------------------- models


def _all_schemas() -> Defs:
    """The models' JSON schemas by name; a model's schemas for reading and writing are the same, or have two names."""
    requests = [*(endpoint.request for endpoint in OPERATIONS), *QUERIES]
    replies = [query.reply_type() for query in QUERIES]
    results = get_args(m.Result)
    beside = (m.RetrieveFutureRequest, m.Promise, m.CompleteMetadata, m.TryAgain, m.Failure)
    configs = (m.ClientConfigRequest, m.ClientConfig, m.DynamicConfig, m.AuthTokenResponse)
    modes: dict[tuple[type[BaseModel], Mode], None] = {}
    for model in (*requests, *replies, *results, *beside, *configs):
        if issubclass(model, BaseModel):
            modes[model, "validation"] = None
    _, schema = models_json_schema(list(modes), ref_template=_REF + "{model}")
    return schema["$defs"]


def _ref(model: type[BaseModel]) -> Json:
    return {"$ref": _REF + model.__name__}


# ---------------------------------------------------------------- operations and queries


def _operation(endpoint: Endpoint) -> Json:
    request = endpoint.request
    content: Json = {PROTOBUF: _BINARY}
    if endpoint.body == "json":
        assert issubclass(request, BaseModel), "what travels as JSON is a model"
        content = {JSON: {"schema": _ref(request)}}
    return {
        **_heading(endpoint.path, "post", request),
        "parameters": [_ZSTD],
        "requestBody": {"required": True, "content": content},
        "responses": {
            "200": _reply("Accepted: the result is fetched with retrieve_future.", _ref(m.Promise)),
            "default": _ERROR,
        },
    }


def _query(query: type[m.Query[Any]], defs: Defs) -> Json:
    """Fields travel in the path, a header, the query string, or the body: see `messages.Query`."""
    schema = defs[query.__name__]
    fields: Mapping[str, Json] = schema.get("properties", {})
    required = set[str](schema.get("required", []))
    in_path = re.findall(r"{(\w+)}", query.path)
    parameters = [_parameter(name, "path", fields[name], required=True) for name in in_path]
    elsewhere = {*in_path, "idempotency_key"}
    if "idempotency_key" in fields:
        parameters.append(_parameter(_KEY_HEADER, "header", fields["idempotency_key"], required=False))
    rest = {name: field for name, field in fields.items() if name not in elsewhere}
    described = {**_heading(query.path, query.method.lower(), query), "parameters": parameters}
    if query.method in ("POST", "PUT"):
        body = {**schema, "properties": rest, "required": sorted(required & rest.keys())}
        described["requestBody"] = {"required": bool(body["required"]), "content": {JSON: {"schema": body}}}
    else:
        parameters += [_parameter(name, "query", rest[name], required=name in required) for name in rest]
    described["responses"] = {"200": _reply("The answer.", _ref(query.reply_type())), "default": _ERROR}
    return described


def _parameter(name: str, place: str, schema: Json, *, required: bool) -> Json:
    # Such a parameter is never null: it is there or not.
    choices = [choice for choice in schema.get("anyOf", []) if choice != {"type": "null"}]
    if choices:
        schema = (
            {"title": schema.get("title", name), **choices[0]} if len(choices) == 1 else {"anyOf": choices}
        )
    return {
        "name": name,
        "in": place,
        "required": required,
        "schema": {k: v for k, v in schema.items() if k != "default" or v is not None},
    }


def _heading(path: str, method: str, request: type[object] | None) -> Json:
    name = re.sub(r"\W+", "_", f"{method}{path}").strip("_")
    written = request.__doc__ if request is not None and request.__doc__ else ""
    # A dataclass without a docstring gets its signature as one.
    summary = " ".join(written.strip().partition("\n\n")[0].split())
    return {"operationId": name, **({"summary": summary} if summary else {})}


def _reply(description: str, *schemas: Json) -> Json:
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": list(schemas)}
    return {"description": description, "content": {JSON: {"schema": schema}}}


# ---------------------------------------------------------------- not in the tables


def _beside_the_tables() -> Iterable[tuple[str, str, Json]]:
    """(path, method, description) of each."""
    yield "/retrieve_future", "post", _retrieve_future()
    yield PATH, "post", _together()
    yield "/auth/token", "post", _plain("/auth/token", "post", _ref(m.AuthTokenResponse))
    yield "/healthz", "get", _plain("/healthz", "get", {"type": "object"})
    ready = _plain("/readyz", "get", {"type": "object"})
    ready["responses"]["503"] = _reply("Not yet, or not just now: requests would wait.", _ref(m.Failure))
    yield "/readyz", "get", ready
    config = _plain("/client/config", "post", _ref(m.ClientConfig))
    config["requestBody"] = {"content": {JSON: {"schema": _ref(m.ClientConfigRequest)}}}
    yield "/client/config", "post", config
    yield "/client/dynamic_config", "post", _plain("/client/dynamic_config", "post", _ref(m.DynamicConfig))
    yield "/telemetry", "post", _plain("/telemetry", "post", {"type": "object"})
    yield "/download/{token}/{name}", "get", _download("/download/{token}/{name}", "200")
    yield m.CHECKPOINT + "/archive", "get", _download(m.CHECKPOINT + "/archive", "302")


def _plain(path: str, method: str, reply: Json) -> Json:
    return {
        **_heading(path, method, None),
        "responses": {"200": _reply("The answer.", reply), "default": _ERROR},
    }


def _download(path: str, status: str) -> Json:
    words = {"200": "The file.", "302": "To the address of a tar with the files."}[status]
    content: Json = {"content": {"application/octet-stream": _BINARY}} if status == "200" else {}
    names: list[str] = re.findall(r"{(\w+)}", path)
    return {
        **_heading(path, "get", None),
        "parameters": [_parameter(name, "path", {"type": "string"}, required=True) for name in names],
        "responses": {status: {"description": words, **content}, "default": _ERROR},
    }


def _together() -> Json:
    return {
        **_heading(PATH, "post", None),
        "parameters": [_ZSTD],
        "requestBody": {
            "required": True,
            "description": f"At most {MAX_OPERATIONS} bodies, each with its path: {', '.join(ENDPOINTS)}.",
            "content": {PROTOBUF: _BINARY},
        },
        "responses": {
            "200": {
                "description": "A reply to each operation, in order: its result, why it was refused or has failed, or "
                "408 if there is no result in time, and retrieve_future has it later.",
                "content": {PROTOBUF: _BINARY},
            },
            "default": _ERROR,
        },
    }


def _retrieve_future() -> Json:
    results = [_ref(result) for result in get_args(m.Result) if issubclass(result, BaseModel)]
    done = _reply(
        "The result; of a training pass or a sample as protobuf.",
        *results,
        _ref(m.CompleteMetadata),
        _ref(m.Failure),
    )
    done["content"][PROTOBUF] = _BINARY
    return {
        **_heading("/retrieve_future", "post", m.RetrieveFutureRequest),
        "requestBody": {"required": True, "content": {JSON: {"schema": _ref(m.RetrieveFutureRequest)}}},
        "responses": {
            "200": done,
            "408": _reply("Not done yet: ask again.", _ref(m.TryAgain)),
            "default": _ERROR,
        },
    }
