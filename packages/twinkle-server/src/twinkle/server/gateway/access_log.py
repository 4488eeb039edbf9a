"""What the log says of HTTP: each request, if asked for, and refusals, though not each one of a flood."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twinkle.server.logs import about

log = logging.getLogger("twinkle.gateway")

# Of a tenant's refusals with the same status, at most one line within this.
REFUSAL_SECONDS = 10.0
# Of tenants and clients without a key; more than this at once are forgotten, and may be told of again.
_MOST_KNOWN = 4096


class AccessLog:
    """ASGI: a line for each request once it has been answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        began = time.perf_counter()

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            request = Request(scope)
            seconds = round(time.perf_counter() - began, 4)
            log.info(
                "%s %s",
                request.method,
                loggable_path(request),
                extra=_about(request, status, seconds=seconds),
            )


class Refusals:
    """Logs what is refused. Single-threaded."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[tuple[str, int], tuple[float, int]] = {}

    def add(self, request: Request, status: int, sentence: str) -> None:
        """
        Args:
            sentence: why, as the client is told.
        """
        now = self._clock()
        tenant, address = _who(request)
        key = tenant or address or "", status
        last, unsaid = self._known.get(key, (now - REFUSAL_SECONDS, 0))
        if now - last < REFUSAL_SECONDS:
            self._known[key] = last, unsaid + 1
            return
        if len(self._known) >= _MOST_KNOWN:
            self._known.clear()
        self._known[key] = now, 0
        more = f" (and {unsaid} more of this kind before it)" if unsaid else ""
        log.info(
            "refused %s %s: %s%s",
            request.method,
            loggable_path(request),
            sentence,
            more,
            extra=_about(request, status),
        )


def _about(request: Request, status: int, seconds: float | None = None) -> dict[str, object]:
    tenant, address = _who(request)
    return about(tenant=tenant, address=address, status=status, seconds=seconds)


def _who(request: Request) -> tuple[str | None, str | None]:
    """The tenant, if its key has been accepted, or else the client's address."""
    tenant = getattr(request.state, "tenant", None)
    return tenant, None if tenant is not None or request.client is None else request.client.host


def loggable_path(request: Request) -> str:
    """The path without a download's token, which would let a reader of the log fetch the file."""
    token = str(request.path_params.get("token", ""))
    return request.url.path.replace(token, "...") if token else request.url.path
