"""The HTTP application: one route for each line of the protocol's tables, and a handful beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TypeAlias, get_args

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import JSON, OPERATIONS, PREFIX, PROTOBUF, QUERIES, Endpoint, QueryEndpoint
from twinkle.protocol.errors import InvalidRequest, TwinkleError
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse
from twinkle.server._version import __version__
from twinkle.server.gateway import downloads, errors, openapi
from twinkle.server.gateway.bodies import MAX_PLAIN_BYTES, read_body
from twinkle.server.gateway.port import ServicePort
from twinkle.server.gateway.tenants import Doorkeeper
from twinkle.server.tokens import Signer

# Requests that carry tokens, tensors or graphs; the others are small.
_LARGE = (m.ForwardBackwardRequest, m.SampleRequest, m.CreateCustomLossRequest)

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

# Clients give up a long poll after 45 s, and ask again at once when it ends without a result.
LONG_POLL_SECONDS = 25.0

# Results larger than this are announced first to clients that ask for it: they fetch them when they have room.
INLINE_BYTES = 2**20


def create_app(
    service: ServicePort, max_request_bytes: int, signer: Signer, public_url: str | None = None
) -> FastAPI:
    """The application in front of `service`.

    Args:
        signer: the server's; tokens that it made are read here.
        public_url: what addresses for downloads begin with; where the request was sent to if None.
    """
    doorkeeper = Doorkeeper(signer)
    app = FastAPI(title="Twinkle", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    app.openapi = openapi.document
    for endpoint in OPERATIONS:
        app.add_api_route(
            PREFIX + endpoint.path,
            _operation(endpoint, service, doorkeeper, max_request_bytes),
            methods=["POST"],
        )
    for query in QUERIES:
        app.add_api_route(
            PREFIX + query.path,
            _query(query, service, doorkeeper, max_request_bytes, public_url),
            methods=[query.method],
        )
    app.add_api_route(
        PREFIX + "/retrieve_future",
        _retrieve_future(service, doorkeeper, max_request_bytes),
        methods=["POST"],
    )
    downloads.add_routes(app, service, doorkeeper, signer, public_url)
    app.add_api_route(PREFIX + "/auth/token", _auth_token(doorkeeper), methods=["POST"])
    app.add_api_route(PREFIX + "/healthz", _healthz, methods=["GET"])
    app.add_api_route(PREFIX + "/client/config", _client_config, methods=["POST"])
    app.add_api_route(PREFIX + "/client/dynamic_config", _dynamic_config, methods=["POST"])
    app.add_api_route(PREFIX + "/telemetry", _telemetry, methods=["POST"])
    return app


# ---------------------------------------------------------------- operations and queries


def _operation(endpoint: Endpoint, service: ServicePort, doorkeeper: Doorkeeper, max_bytes: int) -> Handler:
    limit = max_bytes if endpoint.request in _LARGE else min(max_bytes, MAX_PLAIN_BYTES)

    async def handle(request: Request) -> Response:
        tenant = doorkeeper.tenant_of(request)
        body = await read_body(request, limit)
        try:
            operation = _decode_operation(endpoint, body)
        except InvalidRequest:
            await _take_place(endpoint, service, tenant, body)
            raise
        promise = await service.submit(tenant, operation)
        return Response(codec.encode_json(promise), media_type=JSON)

    return handle


def _decode_operation(endpoint: Endpoint, body: bytes) -> m.Operation:
    if endpoint.request is m.ForwardBackwardRequest:
        return codec.decode_forward_backward(body)
    return codec.decode_json(endpoint.request, body)  # pyright: ignore


async def _take_place(endpoint: Endpoint, service: ServicePort, tenant: str, body: bytes) -> None:
    """An unreadable request on a run still takes its place in the run's order: its client goes on to the next
    `seq_id`, which would wait for this one for ever.
    """
    if endpoint.request not in get_args(m.Ordered):
        return
    is_pass = endpoint.request is m.ForwardBackwardRequest
    place = codec.place_of_forward_backward(body) if is_pass else codec.place_of_json(body)
    if place is not None:
        # A pass without datums is always refused, and its id consumed.
        with contextlib.suppress(TwinkleError):
            await service.submit(tenant, m.ForwardBackwardRequest(place.model_id, place.seq_id, [], ""))


def _query(
    endpoint: QueryEndpoint,
    service: ServicePort,
    doorkeeper: Doorkeeper,
    max_bytes: int,
    public_url: str | None,
) -> Handler:
    takes_key = "idempotency_key" in endpoint.request.model_fields
    limit = min(max_bytes, MAX_PLAIN_BYTES)

    async def handle(request: Request) -> Response:
        tenant = doorkeeper.tenant_of(request)
        fields = {**request.query_params, **request.path_params}
        if takes_key and "x-idempotency-key" in request.headers:
            fields["idempotency_key"] = request.headers["x-idempotency-key"]
        query = codec.decode_query(endpoint.request, await read_body(request, limit), fields)
        reply = await service.ask(tenant, query)
        if isinstance(reply, m.ExternalWeightsUrls):
            reply = downloads.with_base(reply, request, public_url)
        return Response(codec.encode_json(reply), media_type=JSON)

    return handle


# ---------------------------------------------------------------- results


def _retrieve_future(service: ServicePort, doorkeeper: Doorkeeper, max_bytes: int) -> Handler:
    async def handle(request: Request) -> Response:
        tenant = doorkeeper.tenant_of(request)
        body = await read_body(request, min(max_bytes, MAX_PLAIN_BYTES))
        wanted = codec.decode_json(m.RetrieveFutureRequest, body)
        outcome = await service.retrieve(tenant, wanted.request_id, LONG_POLL_SECONDS)
        response = _encode_outcome(outcome)
        if wanted.allow_metadata_only and len(response.body) > INLINE_BYTES:
            size = m.CompleteMetadata(response_payload_size=len(response.body))
            return Response(codec.encode_json(size), media_type=JSON)
        return response

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


def _auth_token(doorkeeper: Doorkeeper) -> Handler:
    async def handle(request: Request) -> Response:
        return Response(
            codec.encode_json(m.AuthTokenResponse(jwt=doorkeeper.exchange(request))), media_type=JSON
        )

    return handle


async def _telemetry(_request: Request) -> Response:
    """Accepted and dropped: what users do is theirs."""
    return JSONResponse({"status": "accepted"})
