"""The HTTP application: one route for each line of the protocol's tables, and a handful beside them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias, get_args

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import JSON, OPERATIONS, PREFIX, PROTOBUF, QUERIES, Endpoint, QueryEndpoint
from twinkle.protocol.errors import InvalidRequest, TooLarge, TwinkleError
from twinkle.protocol.operations import PATH, Posted
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse
from twinkle.server.config import LimitsSection
from twinkle.server.gateway import downloads, errors, openapi, operations
from twinkle.server.gateway.bodies import MAX_PLAIN_BYTES, read_body
from twinkle.server.gateway.hang_ups import while_connected
from twinkle.server.gateway.headers import SecurityHeaders
from twinkle.server.gateway.port import ServicePort
from twinkle.server.gateway.tenants import Doorkeeper
from twinkle.server.keys import KeyRing
from twinkle.server.scheduling.limits import RateLimit
from twinkle.server.tokens import Signer

# Requests that carry tokens, tensors or graphs; the others are small.
_LARGE = (m.ForwardBackwardRequest, m.SampleRequest, m.CreateCustomLossRequest)

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

# Clients give up a long poll after 45 s, and ask again at once when it ends without a result.
LONG_POLL_SECONDS = 25.0
# For so long at its beginning nobody looks whether its client has hung up.
_UNWATCHED_SECONDS = 1.0

# Results larger than this are announced first to clients that ask for it: they fetch them when they have room.
INLINE_BYTES = 2**20

# How many seconds' worth of requests a tenant may send at once, after a pause: a batch of samples, each with its poll.
_BURST = 10.0


def create_app(
    service: ServicePort,
    limits: LimitsSection,
    signer: Signer,
    public_url: str | None = None,
    keys: KeyRing | None = None,
    tls: bool = False,
) -> Starlette:
    """The application in front of `service`.

    Args:
        signer: the server's; tokens that it made are read here.
        public_url: what addresses for downloads begin with; where the request was sent to if None.
        keys: those that are let in; any if None (open mode).
        tls: whether clients reach it by https.
    """
    doorkeeper = Doorkeeper(signer, _rate_of_requests(limits), keys)
    max_request_bytes = limits.max_request_bytes
    singly = [
        _post(endpoint.path, _operation(endpoint, service, doorkeeper, max_request_bytes))
        for endpoint in OPERATIONS
    ]
    queries = [
        Route(
            PREFIX + query.path,
            _query(query, service, doorkeeper, max_request_bytes, public_url),
            methods=[query.method],
        )
        for query in QUERIES
    ]
    together = operations.handler(
        doorkeeper,
        max_request_bytes,
        lambda tenant, posted: _submit(service, doorkeeper, tenant, posted),
        lambda tenant, request_id: _result(service, tenant, request_id),
    )
    # Routes are tried in order: what a training loop asks for comes first.
    routes = [
        _post(PATH, together),
        _post("/retrieve_future", _retrieve_future(service, doorkeeper, max_request_bytes)),
        *singly,
        *queries,
        *downloads.routes(service, doorkeeper, signer, public_url),
        _post("/auth/token", _auth_token(doorkeeper)),
        Route(PREFIX + "/healthz", _healthz, methods=["GET"]),
        _post("/client/config", _client_config),
        _post("/client/dynamic_config", _dynamic_config),
        _post("/telemetry", _telemetry),
        Route("/openapi.json", _openapi, methods=["GET"]),
    ]
    app = Starlette(routes=routes, exception_handlers=errors.HANDLERS)
    # Not as Starlette's `middleware`: that would lie inside of what answers to unexpected errors.
    app.middleware_stack = SecurityHeaders(app.build_middleware_stack(), tls)
    return app


def _rate_of_requests(limits: LimitsSection) -> RateLimit:
    return RateLimit(
        "max_requests_per_second",
        limits.max_requests_per_second_per_tenant,
        limits.max_requests_per_second,
        1.0,
        time.monotonic,
        _BURST,
    )


def _post(path: str, handler: Handler) -> Route:
    return Route(PREFIX + path, handler, methods=["POST"])


# ---------------------------------------------------------------- operations and queries


def _operation(endpoint: Endpoint, service: ServicePort, doorkeeper: Doorkeeper, max_bytes: int) -> Handler:
    limit = max_bytes if endpoint.request in _LARGE else min(max_bytes, MAX_PLAIN_BYTES)

    async def handle(request: Request) -> Response:
        tenant = await doorkeeper.tenant_of(request)
        promise = await _submit(
            service, doorkeeper, tenant, Posted(endpoint, await read_body(request, limit))
        )
        return Response(codec.encode_json(promise), media_type=JSON)

    return handle


async def _submit(service: ServicePort, doorkeeper: Doorkeeper, tenant: str, posted: Posted) -> m.Promise:
    if posted.endpoint.request not in _LARGE and len(posted.body) > MAX_PLAIN_BYTES:
        raise TooLarge(
            f"{posted.endpoint.path}: a body of {len(posted.body)} bytes; at most {MAX_PLAIN_BYTES}"
        )
    try:
        operation = _decode_operation(posted.endpoint, posted.body)
    except InvalidRequest:
        await _take_place(posted.endpoint, service, tenant, posted.body)
        raise
    return await service.submit(tenant, await doorkeeper.with_access(operation))


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
        tenant = await doorkeeper.tenant_of(request)
        fields = {**request.query_params, **request.path_params}
        if takes_key and "x-idempotency-key" in request.headers:
            fields["idempotency_key"] = request.headers["x-idempotency-key"]
        query = codec.decode_query(endpoint.request, await read_body(request, limit), fields)
        query = await doorkeeper.with_access(query)
        reply = await doorkeeper.answer(request, query)
        if reply is None:
            asking = service.ask(await doorkeeper.asked_of(request, tenant, query), query)
            is_long = isinstance(query, m.RetrieveFuturesRequest)
            reply = await (while_connected(request, asking) if is_long else asking)
        if isinstance(reply, m.ExternalWeightsUrls):
            reply = downloads.with_base(reply, request, public_url)
        return Response(codec.encode_json(reply), media_type=JSON)

    return handle


# ---------------------------------------------------------------- results


def _retrieve_future(service: ServicePort, doorkeeper: Doorkeeper, max_bytes: int) -> Handler:
    async def handle(request: Request) -> Response:
        tenant = await doorkeeper.tenant_of(request)
        body = await read_body(request, min(max_bytes, MAX_PLAIN_BYTES))
        wanted = codec.decode_json(m.RetrieveFutureRequest, body)
        response = await _result(service, tenant, wanted.request_id, request)
        if wanted.allow_metadata_only and len(response.body) > INLINE_BYTES:
            size = m.CompleteMetadata(response_payload_size=len(response.body))
            return Response(codec.encode_json(size), media_type=JSON)
        return response

    return handle


async def _result(
    service: ServicePort, tenant: str, request_id: str, request: Request | None = None
) -> Response:
    """
    Args:
        request: that waits, and ends with its connection; what is there soon costs nothing for that.
    """
    if request is None:
        return _encode_outcome(await service.retrieve(tenant, request_id, LONG_POLL_SECONDS))
    outcome = await service.retrieve(tenant, request_id, _UNWATCHED_SECONDS)
    if isinstance(outcome, m.Pending):
        longer = service.retrieve(tenant, request_id, LONG_POLL_SECONDS - _UNWATCHED_SECONDS)
        outcome = await while_connected(request, longer)
    return _encode_outcome(outcome)


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
        token = m.AuthTokenResponse(jwt=await doorkeeper.exchange(request))
        return Response(codec.encode_json(token), media_type=JSON)

    return handle


async def _telemetry(_request: Request) -> Response:
    """Accepted and dropped: what users do is theirs."""
    return JSONResponse({"status": "accepted"})


async def _openapi(_request: Request) -> Response:
    return JSONResponse(openapi.document())
