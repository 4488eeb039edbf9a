"""The HTTP application: its list of routes."""

from __future__ import annotations

import time

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import JSON, PREFIX
from twinkle.server.config import LimitsSection
from twinkle.server.gateway import errors, openapi
from twinkle.server.gateway.access_log import AccessLog
from twinkle.server.gateway.authentication import Authenticator
from twinkle.server.gateway.downloads import Downloads
from twinkle.server.gateway.http import Bodies
from twinkle.server.gateway.operations import Operations
from twinkle.server.gateway.port import ServicePort
from twinkle.server.gateway.queries import Queries
from twinkle.server.keys import KeyRing
from twinkle.server.scheduling.limits import RateLimit
from twinkle.server.tokens import Signer

# How many seconds' worth of requests a tenant may send in one burst: a batch of samples, each with its poll.
_BURST = 10.0


def create_app(
    service: ServicePort,
    limits: LimitsSection,
    signer: Signer,
    public_url: str | None = None,
    keys: KeyRing | None = None,
    logs_access: bool = False,
) -> Starlette:
    """The application in front of `service`.

    Args:
        signer: the server's; reads the tokens that it made.
        public_url: prefix of download URLs; default: where the request was sent.
        keys: the valid ones; None is open mode, in which any key is accepted.
        logs_access: log each request.
    """
    authenticator = Authenticator(signer, _rate_of_requests(limits), keys)
    bodies = Bodies(limits)
    downloads = Downloads(service, authenticator, signer, public_url)
    queries = Queries(service, authenticator, bodies, downloads)

    async def ready(_request: Request) -> Response:
        await service.ready()
        return JSONResponse({"status": "ready"})

    async def metrics(request: Request) -> Response:
        await authenticator.check_operator(request)
        return Response(await service.metrics(), media_type=CONTENT_TYPE_LATEST)

    async def token(request: Request) -> Response:
        return _json(m.AuthTokenResponse(jwt=await authenticator.exchange(request)))

    routes = [
        *Operations(service, authenticator, bodies).routes(),
        *queries.routes(),
        *downloads.routes(),
        Route(PREFIX + "/auth/token", token, methods=["POST"]),
        Route(PREFIX + "/healthz", _healthz, methods=["GET"]),
        Route(PREFIX + "/readyz", ready, methods=["GET"]),
        Route(PREFIX + "/client/config", _client_config, methods=["POST"]),
        Route(PREFIX + "/client/dynamic_config", _dynamic_config, methods=["POST"]),
        Route(PREFIX + "/telemetry", _telemetry, methods=["POST"]),
        # Where Prometheus and Kubernetes look for these by themselves.
        Route("/metrics", metrics, methods=["GET"]),
        Route("/livez", _healthz, methods=["GET"]),
        Route("/readyz", ready, methods=["GET"]),
        Route("/openapi.json", _openapi, methods=["GET"]),
    ]
    middleware = [Middleware(AccessLog)] if logs_access else []
    return Starlette(routes=routes, exception_handlers=errors.handlers(), middleware=middleware)


def _rate_of_requests(limits: LimitsSection) -> RateLimit:
    return RateLimit(
        "max_requests_per_second",
        limits.max_requests_per_second_per_tenant,
        limits.max_requests_per_second,
        1.0,
        time.monotonic,
        _BURST,
    )


def _json(message: m.AuthTokenResponse | m.ClientConfig | m.DynamicConfig) -> Response:
    return Response(codec.encode_json(message), media_type=JSON)


async def _healthz(_request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def _client_config(_request: Request) -> Response:
    return _json(m.ClientConfig())


async def _dynamic_config(_request: Request) -> Response:
    return _json(m.DynamicConfig())


async def _telemetry(_request: Request) -> Response:
    """Accepted and dropped: what users do is their own business."""
    return JSONResponse({"status": "accepted"})


async def _openapi(_request: Request) -> Response:
    return JSONResponse(openapi.document())
