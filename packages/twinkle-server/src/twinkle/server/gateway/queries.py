"""Queries over HTTP: made from the fields of path, query string and body, and answered at once."""

from __future__ import annotations

import functools
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from twinkle.protocol import codec
from twinkle.protocol import messages as m
from twinkle.protocol.endpoints import JSON, PREFIX, QUERIES
from twinkle.server.gateway.authentication import Authenticator
from twinkle.server.gateway.downloads import Downloads
from twinkle.server.gateway.hang_ups import while_connected
from twinkle.server.gateway.http import Bodies, check_json
from twinkle.server.gateway.port import ServicePort


class Queries:
    def __init__(
        self, service: ServicePort, authenticator: Authenticator, bodies: Bodies, downloads: Downloads
    ) -> None:
        self._service = service
        self._authenticator = authenticator
        self._bodies = bodies
        self._downloads = downloads

    def routes(self) -> list[Route]:
        return [
            Route(PREFIX + kind.path, functools.partial(self._answer, kind), methods=[kind.method])
            for kind in QUERIES
        ]

    async def _answer(self, kind: type[m.Query[Any]], request: Request) -> Response:
        tenant = await self._authenticator.tenant_of(request)
        query = await self._read(kind, tenant, request)
        if isinstance(query, m.CopyWeightsRequest):
            query = await self._authenticator.with_access(query)
        reply = await self._authenticator.answer(request, query)
        if reply is None:
            scope = await self._authenticator.audit_scope(request, tenant, query)
            asking = self._service.ask(scope, query)
            is_long = isinstance(query, m.RetrieveFuturesRequest)
            reply = await (while_connected(request, asking) if is_long else asking)
        if isinstance(reply, m.ExternalWeightsUrls):
            reply = self._downloads.with_base(reply, request)
        return Response(codec.encode_json(reply), media_type=JSON)

    async def _read(self, kind: type[m.Query[Any]], tenant: str, request: Request) -> m.Query[Any]:
        fields = {**request.query_params, **request.path_params}
        key = request.headers.get("x-idempotency-key")
        if key is not None and "idempotency_key" in kind.model_fields:
            fields["idempotency_key"] = key
        with self._bodies.share(tenant) as share:
            body = await self._bodies.read(request, share)
        check_json(body, kind)
        return codec.decode_query(kind, body, fields)
