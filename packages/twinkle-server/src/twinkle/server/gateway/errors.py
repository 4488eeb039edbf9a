"""Errors as replies: `{"error": SENTENCE, "category": "user" or "server", by who can fix it}`."""

import logging
import re
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from twinkle.protocol.errors import Conflict, InvalidRequest, TryLater, TwinkleError, Unauthorized
from twinkle.protocol.uris import KINDS
from twinkle.server.gateway.access_log import Refusals, loggable_path
from twinkle.server.store import retry

log = logging.getLogger("twinkle.gateway")

# A run's checkpoint by its bare name.
_BARE_NAME = re.compile(
    r"/training_runs/[^/]+/checkpoints/[^/]+(/(publish|ttl|archive|external_weights_urls))?/?$"
)
_BARE_NAME_MESSAGE = (
    "checkpoint_id: a checkpoint of a run is KIND/NAME, with KIND one of " + ", ".join(KINDS) + ", such as "
    "weights/step-100: see what list_checkpoints shows as checkpoint_id"
)


def twinkle_error(error: TwinkleError) -> Response:
    headers: dict[str, str] | None = None
    if isinstance(error, TryLater):
        headers = {"Retry-After": f"{error.retry_after:g}"}
    elif isinstance(error, Conflict):  # otherwise the SDK would retry
        headers = {"X-Should-Retry": "false"}
    elif isinstance(error, Unauthorized):  # makes the SDK get a new token and retry
        headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
    return _reply(error.status, error.message, error.category, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code in (404, 405) and _BARE_NAME.search(request.url.path):
        return twinkle_error(InvalidRequest(_BARE_NAME_MESSAGE))
    if error.status_code in (404, 405):
        message = f"{request.method} {request.url.path[:200]} is not offered by this server"
    return _reply(error.status_code, message, "user", error.headers)


async def _hung_up(_request: Request, _error: Exception) -> Response:
    """For the access log: the client has disconnected, which is not the server's fault."""
    return Response(status_code=499)


async def _unexpected(request: Request, error: Exception) -> Response:
    if retry.is_transient(error):
        return twinkle_error(retry.unavailable(error))
    error_id = uuid.uuid4().hex[:12]
    log.error("%s %s failed, error id %s", request.method, loggable_path(request), error_id, exc_info=error)
    return _reply(
        500, f"the server failed on this request; its log has the cause under error id {error_id}", "server"
    )


def _reply(status: int, message: str, category: str, headers: object = None) -> Response:
    return JSONResponse(
        {"error": message, "category": category},
        status,
        dict(headers) if headers else None,  # pyright: ignore
    )


def handlers() -> dict[Any, Callable[[Request, Exception], Awaitable[Response]]]:
    """For `Starlette(exception_handlers=...)`: all errors are answered in one form, and logged."""
    refusals = Refusals()

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, TwinkleError)
        refusals.add(request, error.status, error.message)
        return twinkle_error(error)

    return {
        TwinkleError: refuse,
        HTTPException: _http_error,
        ClientDisconnect: _hung_up,
        Exception: _unexpected,
    }
