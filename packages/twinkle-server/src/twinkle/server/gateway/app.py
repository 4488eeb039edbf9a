"""The HTTP application: one route for each line of the protocol's tables, and a handful beside them."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from twinkle.protocol import codec, results
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import JSON, OPERATIONS, PREFIX, PROTOBUF, QUERIES, Endpoint
from twinkle.protocol.errors import InvalidRequest
from twinkle.protocol.operations import PATH
from twinkle.protocol.results import Encoded
from twinkle.protocol.types import ForwardBackwardOutput, SampleResponse
from twinkle.server.config import LimitsSection
from twinkle.server.gateway import downloads, errors, openapi, operations
from twinkle.server.gateway.bodies import Bodies, check_json
from twinkle.server.gateway.hang_ups import while_connected
from twinkle.server.gateway.headers import SecurityHeaders
from twinkle.server.gateway.intake import Intake
from twinkle.server.gateway.port import ServicePort
from twinkle.server.gateway.replies import BytesReply
from twinkle.server.gateway.tenants import Doorkeeper
from twinkle.server.keys import KeyRing
from twinkle.server.scheduling.limits import RateLimit
from twinkle.server.tokens import Signer

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]

# Clients give up a long poll after 45 s, and ask again at once when it ends without a result.
LONG_POLL_SECONDS = 25.0
# For so long at its beginning nobody looks whether its client has hung up.
_UNWATCHED_SECONDS = 1.0

# Results larger than this are announced first to clients that ask for it: they fetch them when they have room.
INLINE_BYTES = 2**20

# Results larger than this, in protobuf, are not written as JSON: Python makes thirty times as much of them on the way.
MAX_JSON_BYTES = 8 * 2**20

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
    bodies = Bodies(limits)
    intake = Intake(service, doorkeeper, bodies)
    singly = [_post(endpoint.path, _operation(endpoint, doorkeeper, intake)) for endpoint in OPERATIONS]
    queries = [
        Route(
            PREFIX + query.path,
            _query(query, service, doorkeeper, bodies, public_url),
            methods=[query.method],
        )
        for query in QUERIES
    ]
    together = operations.handler(
        doorkeeper,
        bodies,
        intake.submit,
        lambda tenant, request_id: _result(service, tenant, request_id),
    )
    # Routes are tried in order: what a training loop asks for comes first.
    routes = [
        _post(PATH, together),
        _post("/retrieve_future", _retrieve_future(service, doorkeeper, bodies)),
        *singly,
        *queries,
        *downloads.routes(service, doorkeeper, signer, public_url),
        _post("/auth/token", _auth_token(doorkeeper)),
        Route(PREFIX + "/healthz", _healthz, methods=["GET"]),
        Route(PREFIX + "/readyz", _readyz(service), methods=["GET"]),
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


def _operation(endpoint: Endpoint, doorkeeper: Doorkeeper, intake: Intake) -> Handler:
    async def handle(request: Request) -> Response:
        promise = await intake.post(request, endpoint, await doorkeeper.tenant_of(request))
        return Response(codec.encode_json(promise), media_type=JSON)

    return handle


def _query(
    kind: type[m.Query[Any]],
    service: ServicePort,
    doorkeeper: Doorkeeper,
    bodies: Bodies,
    public_url: str | None,
) -> Handler:
    takes_key = "idempotency_key" in kind.model_fields

    async def handle(request: Request) -> Response:
        tenant = await doorkeeper.tenant_of(request)
        fields = {**request.query_params, **request.path_params}
        if takes_key and "x-idempotency-key" in request.headers:
            fields["idempotency_key"] = request.headers["x-idempotency-key"]
        with bodies.share(tenant) as share:
            body = await bodies.read(request, share)
        check_json(body, kind)
        query = codec.decode_query(kind, body, fields)
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


def _retrieve_future(service: ServicePort, doorkeeper: Doorkeeper, bodies: Bodies) -> Handler:
    async def handle(request: Request) -> Response:
        tenant = await doorkeeper.tenant_of(request)
        with bodies.share(tenant) as share:
            body = await bodies.read(request, share)
        check_json(body, m.RetrieveFutureRequest)
        wanted = codec.decode_json(m.RetrieveFutureRequest, body)
        most = INLINE_BYTES if wanted.allow_metadata_only else None
        outcome = await _fetch(service, tenant, wanted.request_id, request, most)
        if isinstance(outcome, Encoded) and _wants_json(request):
            return BytesReply(await _in_json(bodies, tenant, outcome), media_type=JSON)
        return _encode_outcome(outcome)

    return handle


async def _in_json(bodies: Bodies, tenant: str, result: Encoded) -> bytes:
    """
    Raises:
        InvalidRequest: for a result that would take too much memory on its way into JSON.
    """
    if len(result.body) > MAX_JSON_BYTES:
        raise InvalidRequest(
            f"Accept: this result is {len(result.body)} bytes in {PROTOBUF}, and no more than {MAX_JSON_BYTES} are "
            f"written as JSON; ask for {PROTOBUF}"
        )
    return await bodies.do(tenant, len(result.body), functools.partial(results.result_as_json, result))


def _wants_json(request: Request) -> bool:
    """Whether the client reads JSON and no protobuf; one that says nothing of either reads both."""
    accepted = request.headers.get("accept", "")
    return JSON in accepted and PROTOBUF not in accepted and "*/*" not in accepted


async def _fetch(
    service: ServicePort, tenant: str, request_id: str, request: Request, most_bytes: int | None
) -> Encoded | m.Result | m.Failure | m.Pending | m.CompleteMetadata:
    """As `ServicePort.fetch`, for as long as the client of `request` waits.

    Whether it still does is looked at for what is not there soon alone: that costs a task.
    """
    outcome = await service.fetch(tenant, request_id, _UNWATCHED_SECONDS, most_bytes)
    if isinstance(outcome, m.Pending):
        longer = service.fetch(tenant, request_id, LONG_POLL_SECONDS - _UNWATCHED_SECONDS, most_bytes)
        outcome = await while_connected(request, longer)
    return outcome


async def _result(service: ServicePort, tenant: str, request_id: str) -> Response:
    return _encode_outcome(await service.fetch(tenant, request_id, LONG_POLL_SECONDS))


def _encode_outcome(outcome: Encoded | m.Result | m.Failure | m.Pending | m.CompleteMetadata) -> Response:
    match outcome:
        case Encoded():
            return BytesReply(outcome.body, media_type=PROTOBUF)
        case ForwardBackwardOutput() | SampleResponse():
            return BytesReply(results.encode_result(outcome).body, media_type=PROTOBUF)
        case m.Pending():
            # The SDK takes 408 for "ask again" without a warning in the user's log.
            return Response(codec.encode_json(outcome), 408, media_type=JSON)
        case _:
            return Response(codec.encode_json(outcome), media_type=JSON)


# ---------------------------------------------------------------- beside the tables


async def _healthz(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def _readyz(service: ServicePort) -> Handler:
    async def handle(_request: Request) -> Response:
        await service.ready()
        return JSONResponse({"status": "ready"})

    return handle


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
