"""HTTP on the event loop of the process that answers: Ray Serve starts and watches that process, but isn't in between.

Serve's proxy would add a process and two hops to each request, several times the cost of the request itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from twinkle.server.serve.connections import Connections, GuardedProtocol, most_connections

# Between two steps clients keep a connection for longer than uvicorn's 5 s.
_KEEP_ALIVE_SECONDS = 90
_BACKLOG = 2048
_HANDSHAKE_SECONDS = 10.0

# In all responses. There are no CORS headers, so browsers let no other site's pages read the replies.
_HEADERS = [
    ("x-content-type-options", "nosniff"),
    ("cache-control", "no-store"),
    ("referrer-policy", "no-referrer"),
]
_HEADERS_WITH_TLS = [*_HEADERS, ("strict-transport-security", "max-age=31536000")]


class HttpServer:
    """A running HTTP server for an application."""

    def __init__(self, server: uvicorn.Server, serving: asyncio.Task[None]) -> None:
        self._server = server
        self._serving = serving

    @classmethod
    async def start(
        cls,
        app: Starlette,
        host: str,
        port: int,
        tls: tuple[Path, Path] | None = None,
        max_connections: int | None = None,
    ) -> HttpServer:
        """Returns when requests are accepted.

        Several processes may listen on one port: the system distributes connections among them.

        Args:
            tls: files of a certificate and its key; None is plain HTTP.
            max_connections: at once; None: as many as this process may open files, less a reserve.

        Raises:
            OSError: if it can't listen on `host` and `port`.
        """
        certificate, key = tls or (None, None)
        listener = _bind(host, port)
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            server_header=False,
            headers=_HEADERS_WITH_TLS if tls else _HEADERS,
            ws="none",
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        server = uvicorn.Server(config)
        # Without a socket, which uvicorn's own protocol would serve. Ours is added below, for uvicorn to close.
        serving = asyncio.create_task(server.serve(sockets=[]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        if serving.done():
            serving.result()
        server.servers.append(await _listen(listener, config, server, most_connections(max_connections)))
        return cls(server, serving)

    @property
    def is_up(self) -> bool:
        return not self._serving.done()

    async def close(self) -> None:
        """Accept no more requests, and drop those that still wait for a result: their clients retry."""
        self._server.should_exit = self._server.force_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving


async def _listen(
    listener: socket.socket, config: uvicorn.Config, server: uvicorn.Server, most: int
) -> asyncio.Server:
    """Listen with `GuardedProtocol`: uvicorn's own has no limits before the application is called."""
    connections = Connections(most)
    return await asyncio.get_running_loop().create_server(
        lambda: GuardedProtocol(connections, config, server.server_state, {}),
        sock=listener,
        ssl=config.ssl,
        backlog=_BACKLOG,
        ssl_handshake_timeout=_HANDSHAKE_SECONDS if config.ssl else None,
    )


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is given because asyncio sets TCP_NODELAY only on sockets that have one.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener
