"""Connections to the server, one for each request that is in flight."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import httpx

from twinkle.protocol.errors import ConnectionFailed
from twinkle.verbs.proxies import through
from twinkle_client._version import __version__
from twinkle_client.settings import Settings

# Longer than a long poll, which the server ends after 25 s, and than it takes to send a large body.
TIMEOUT = httpx.Timeout(60.0, connect=10.0)

# An unused connection is kept for so long: proxies and load balancers may drop it unseen.
MAX_IDLE_SECONDS = 5.0


class HttpClients:
    """Clients of httpx with one connection each.

    The pool of a single client looks at all of its connections for each of them, at every request: with 32 requests in
    flight that takes as long as everything else about a request.

    Single-threaded: used on one event loop.
    """

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            ConnectionFailed: if the environment's proxy, or the address, can't be used.
        """
        self._settings = settings
        self._ssl = httpx.create_ssl_context()  # for all of them: reading certificates takes long
        # With the time since when each has been idle, the longest first. The latest one is taken first.
        self._idle: deque[tuple[httpx.AsyncClient, float]] = deque()
        self._all: set[httpx.AsyncClient] = set()
        self._idle.append((self._new(), time.monotonic()))

    async def request(self, method: str, url: httpx.URL | str, **parts: Any) -> httpx.Response:
        """A request's whole response.

        Args:
            parts: see `httpx.AsyncClient.request`.

        Raises:
            httpx.TransportError: if there is none.
        """
        client = self._idle.pop()[0] if self._idle else self._new()
        try:
            return await client.request(method, url, **parts)
        finally:
            now = time.monotonic()
            self._idle.append((client, now))
            if self._idle[0][1] < now - MAX_IDLE_SECONDS:  # one at a time, so that no request waits for many
                unused, _ = self._idle.popleft()
                self._all.discard(unused)
                await unused.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        self._idle.clear()
        while self._all:
            await self._all.pop().aclose()

    def _new(self) -> httpx.AsyncClient:
        settings = self._settings
        headers = {"User-Agent": f"twinkle-client/{__version__}"}
        if settings.api_key:
            headers["X-API-Key"] = settings.api_key
        try:
            client = httpx.AsyncClient(
                base_url=settings.base_url, headers=headers, timeout=TIMEOUT, verify=self._ssl
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ConnectionFailed(
                f"the server at {settings.base_url} can't be asked{through(settings.base_url)}: {error}; mend the "
                "variable, or name the server's host in NO_PROXY (a SOCKS proxy needs: pip install 'httpx[socks]')"
            ) from error
        self._all.add(client)
        return client
