"""Headers that every response has, errors included."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ALWAYS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)
_WITH_TLS = ((b"strict-transport-security", b"max-age=31536000"),)


class SecurityHeaders:
    """An ASGI application around another.

    There is nothing about other origins: a browser lets no page of another site read what is answered here.
    """

    def __init__(self, app: ASGIApp, tls: bool) -> None:
        self._app = app
        self._headers = (*_ALWAYS, *_WITH_TLS) if tls else _ALWAYS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        await self._app(scope, receive, send_with)
