"""Limits on an HTTP connection before its tenant is known: bytes of headers, time, and the number of connections.

Covers a request up to the end of its headers, and the framing of its body. The gateway limits the body itself.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Of a request's line and headers. A body's framing (trailers, chunk extensions) may be as large.
MAX_HEAD_BYTES = 64 * 2**10

# How long a request's headers may take, from the opening of the connection or from their first byte.
HEAD_SECONDS = 20.0
# How long a client may go on sending a body that is not read, because its request has been answered.
UNREAD_BODY_SECONDS = 60.0
# How long a client may read nothing of a response.
UNREAD_ANSWER_SECONDS = 60.0
# Pipelined requests, sent before the first is answered: each takes a hundred times its bytes while it waits.
MAX_AHEAD = 32

# The share (1 in 4) of this process's open files kept for other uses: checkpoints, journal, database, ranks.
_KEPT_FILES = 4
_FEWEST_CONNECTIONS = 16

# Anybody can send malformed requests, which must not fill the log.
_log = logging.getLogger("twinkle.connections")
_log.setLevel(logging.ERROR)


def most_connections(limit: int | None) -> int:
    """How many connections this process may hold: `limit`, or fewer if it may not open as many files."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return limit or 2**20
    room = files - files // _KEPT_FILES - len(os.listdir("/dev/fd"))
    return max(_FEWEST_CONNECTIONS, room if limit is None else min(room, limit))


class Connections:
    """The open connections. If there are too many, the one that has been without a request for longest is closed, and
    first those that never had one.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: set[GuardedProtocol] = set()
        # Both in order of time, oldest first.
        self._silent: dict[GuardedProtocol, None] = {}
        self._idle: dict[GuardedProtocol, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: GuardedProtocol) -> None:
        """Add a new one; it is closed at once if all others are being answered."""
        self._open.add(connection)
        if len(self._open) > self._most:
            ended = next(iter(self._silent or self._idle), connection)
            self.discard(ended)
            ended.end()
        if connection in self._open:
            self._silent[connection] = None

    def is_busy(self, connection: GuardedProtocol) -> None:
        """One of its requests is being answered."""
        self._silent.pop(connection, None)
        self._idle.pop(connection, None)

    def is_idle(self, connection: GuardedProtocol) -> None:
        """All its requests have been answered."""
        if connection in self._open:
            self._idle[connection] = None

    def discard(self, connection: GuardedProtocol) -> None:
        self._open.discard(connection)
        self.is_busy(connection)


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's connection, with limits on what happens before the application is called."""

    def __init__(self, connections: Connections, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.logger = _log
        self._connections_open = connections
        self._is_in_head = True  # of a request that has begun, or the next
        self._head_bytes = 0
        self._has_begun = False
        self._is_answering = False
        self._bytes_around_body = 0
        self._body_came = False
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def end(self) -> None:
        """Close at once, without a response."""
        self._stop_timers()
        self.transport.abort()

    # ------------------------------------------------------------ called by asyncio

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore
        super().connection_made(transport)
        self._start_timer(HEAD_SECONDS)
        self._connections_open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        self._connections_open.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            data = self._read_head(data) if self._is_in_head else self._read_body(data)

    def _read_head(self, data: bytes) -> bytes:
        """Parse no more than the largest head; return the rest."""
        room = MAX_HEAD_BYTES - self._head_bytes
        piece, rest = (data, b"") if len(data) <= room else (data[:room], data[room:])
        self._head_bytes += len(piece)
        super().data_received(piece)
        if self._is_in_head:
            if self._head_bytes >= MAX_HEAD_BYTES:
                self._refuse()
            elif self._timer is None and (self._head_bytes or self._has_begun):
                self._start_timer(HEAD_SECONDS)
        return rest

    def _read_body(self, data: bytes) -> bytes:
        self._body_came = False
        super().data_received(data)
        self._bytes_around_body = 0 if self._body_came else self._bytes_around_body + len(data)
        if not self._is_in_head and self._bytes_around_body > MAX_HEAD_BYTES:
            self._refuse()
        return b""

    def _refuse(self) -> None:
        if not self._is_answering:
            self.transport.write(
                b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            )
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    # ------------------------------------------------------------ called by the parser

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:  # trailers must not change the headers of a request that is being answered
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._is_in_head = self._has_begun = False
        self._head_bytes = self._bytes_around_body = 0
        self._is_answering = True
        self._connections_open.is_busy(self)
        super().on_headers_complete()
        if len(self.pipeline) > MAX_AHEAD:
            self.end()
            raise ConnectionAbortedError  # stops the parser

    def on_body(self, body: bytes) -> None:
        self._body_came = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_timer()
        self._is_in_head = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # The next request may have been sent before this response.
        self._is_answering = not self.cycle.response_complete
        if not self._is_answering:
            self._connections_open.is_idle(self)
            if not self._is_in_head:
                self._start_timer(UNREAD_BODY_SECONDS)

    # ------------------------------------------------------------ time

    def _watch_reader(self, left: int) -> None:
        """Close the connection if its client reads none of the `left` bytes for UNREAD_ANSWER_SECONDS."""
        self._stop_watching()
        self._writing = self.loop.call_later(UNREAD_ANSWER_SECONDS, self._check_reader, left)

    def _check_reader(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < before:
            self._watch_reader(left)
        else:
            self.end()

    def _stop_watching(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _stop_timers(self) -> None:
        self._stop_timer()
        self._stop_watching()

    def _start_timer(self, seconds: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(seconds, self.end)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
