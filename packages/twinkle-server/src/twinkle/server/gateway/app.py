"""The HTTP application: one route for each line of the protocol's tables, and a handful beside them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeAlias

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import JSON, OPERATIONS, PREFIX, PROTOBUF, QUERIES, Endpoint, QueryEndpoint
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse
from twinkle.server._version import __version__
from twinkle.server.gateway import errors
from twinkle.server.gateway.bodies import read_body
from twinkle.server.gateway.port import ServicePort
from twinkle.server.gateway.tenants import tenant_of

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

# Clients give up a long poll after 45 s, and ask again at once when it ends without a result.
LONG_POLL_SECONDS = 25.0


def create_app(service: ServicePort, max_request_bytes: int) -> FastAPI:
    """The application in front of `service`."""
    app = FastAPI(title="Twinkle", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    for endpoint in OPERATIONS:
        app.add_api_route(
            PREFIX + endpoint.path, _operation(endpoint, service, max_request_bytes), methods=["POST"]
        )
    for query in QUERIES:
        app.add_api_route(
            PREFIX + query.path, _query(query, service, max_request_bytes), methods=[query.method]
        )
    app.add_api_route(
        PREFIX + "/retrieve_future", _retrieve_future(service, max_request_bytes), methods=["POST"]
    )
    app.add_api_route(PREFIX + "/healthz", _healthz, methods=["GET"])
    app.add_api_route(PREFIX + "/client/config", _client_config, methods=["POST"])
    app.add_api_route(PREFIX + "/client/dynamic_config", _dynamic_config, methods=["POST"])
    app.add_api_route(PREFIX + "/telemetry", _telemetry, methods=["POST"])
    return app


# ---------------------------------------------------------------- operations and queries


def _operation(endpoint: Endpoint, service: ServicePort, max_bytes: int) -> Handler:
    async def handle(request: Request) -> Response:
        body = await read_body(request, max_bytes)
        operation = _decode_operation(endpoint, body)
        promise = await service.submit(tenant_of(request), operation)
        return Response(codec.encode_json(promise), media_type=JSON)

    return handle


def _decode_operation(endpoint: Endpoint, body: bytes) -> m.Operation:
    if endpoint.request is m.ForwardBackwardRequest:
        return codec.decode_forward_backward(body)
    return codec.decode_json(endpoint.request, body)  # pyright: ignore


def _query(endpoint: QueryEndpoint, service: ServicePort, max_bytes: int) -> Handler:
    async def handle(request: Request) -> Response:
        fields = {**request.query_params, **request.path_params}
        query = codec.decode_query(endpoint.request, await read_body(request, max_bytes), fields)
        reply = await service.ask(tenant_of(request), query)
        return Response(codec.encode_json(reply), media_type=JSON)

    return handle


# ---------------------------------------------------------------- results


def _retrieve_future(service: ServicePort, max_bytes: int) -> Handler:
    async def handle(request: Request) -> Response:
        wanted = codec.decode_json(m.RetrieveFutureRequest, await read_body(request, max_bytes))
        outcome = await service.retrieve(tenant_of(request), wanted.request_id, LONG_POLL_SECONDS)
        return _encode_outcome(outcome)

    return handle


def _encode_outcome(outcome: m.Result | m.Failure | m.Pending) -> Response:
    match outcome:
        case ForwardBackwardOutput():
            return Response(codec.encode_forward_backward_output(outcome), media_type=PROTOBUF)
        case SampleResponse():
            return Response(codec.encode_sample(outcome), media_type=PROTOBUF)
        case m.Pending():
            # The SDK takes 408 for "ask again" without a warning in the user's log.
            return Response(codec.encode_json(outcome), 408, media_type=JSON)
        case _:
            return Response(codec.encode_json(outcome), media_type=JSON)


# ---------------------------------------------------------------- beside the tables


async def _healthz(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _client_config(_request: Request) -> Response:
    return Response(codec.encode_json(m.ClientConfig()), media_type=JSON)


async def _dynamic_config(_request: Request) -> Response:
    return Response(codec.encode_json(m.DynamicConfig()), media_type=JSON)


async def _telemetry(_request: Request) -> Response:
    """Accepted and dropped: what users do is theirs."""
    return JSONResponse({"status": "accepted"})
