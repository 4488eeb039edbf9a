"""A network between clients and a server that loses, repeats, delays and reorders requests, as it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from concurrent.futures import Future

import h11
import httpx

# What becomes of the next request: which comes next is chance, since several are always under way.
CUT_BEFORE = "connection cut before the request arrived"
CUT_AFTER = "connection cut before the reply arrived"
TWICE = "request sent twice"
TWICE_AT_ONCE = "request sent twice at once"
LATE = "request late, after its successors"
BAD_GATEWAY = "reply replaced by a proxy's 502"
KINDS = (CUT_BEFORE, CUT_AFTER, TWICE, TWICE_AT_ONCE, LATE, BAD_GATEWAY)

LATE_SECONDS = 0.4


class Network:
    """An HTTP proxy on loopback, in a thread of its own. `faults` are used up, one by a request."""

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self.faults: deque[str] = deque()
        self.injected: list[str] = []
        self._port: Future[int] = Future()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(
            target=self._loop.run_until_complete, args=(self._serve(),), daemon=True
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._port.result(10)}"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self._server_url, timeout=90, limits=limits) as client:
            self._client = client
            server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
            self._port.set_result(server.sockets[0].getsockname()[1])
            await self._stop.wait()
            server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request after the other, until either side hangs up."""
        connection = h11.Connection(h11.SERVER)
        with contextlib.suppress(
            ConnectionError, h11.RemoteProtocolError, httpx.TransportError, asyncio.CancelledError
        ):
            while (request := await _read(connection, reader)) is not None:
                reply = await self._pass_on(*request)
                if reply is None:
                    break
                head = h11.Response(status_code=reply.status_code, headers=_headers(reply))
                parts = [head, h11.Data(data=reply.content), h11.EndOfMessage()]
                writer.write(b"".join(connection.send(part) or b"" for part in parts))
                await writer.drain()
                if connection.our_state is h11.MUST_CLOSE:
                    break
                connection.start_next_cycle()
        writer.close()

    async def _pass_on(self, head: h11.Request, body: bytes) -> httpx.Response | None:
        """The reply, or None where the connection is to be cut."""
        fault = self.faults.popleft() if self.faults else None
        if fault is not None:
            self.injected.append(fault)
        if fault == CUT_BEFORE:
            return None
        if fault == LATE:
            await asyncio.sleep(LATE_SECONDS)
        if fault == TWICE_AT_ONCE:
            first, second = await asyncio.gather(self._send(head, body), self._send(head, body))
            return second if second.status_code < 500 else first
        reply = await self._send(head, body)
        if fault == TWICE:
            reply = await self._send(head, body)
        if fault == CUT_AFTER:
            return None
        return httpx.Response(502, text="Bad Gateway") if fault == BAD_GATEWAY else reply

    async def _send(self, head: h11.Request, body: bytes) -> httpx.Response:
        headers = [
            (name, value) for name, value in head.headers if name not in (b"host", b"connection", b"expect")
        ]
        return await self._client.request(
            head.method.decode(), head.target.decode(), headers=headers, content=body
        )


async def _read(connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[h11.Request, bytes] | None:
    """The next request, whole; None at the end of the connection."""
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(2**16))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None, "a request begins with its head"
            return head, bytes(body)
        else:
            return None


def _headers(reply: httpx.Response) -> list[tuple[bytes, bytes]]:
    hop_by_hop = (b"transfer-encoding", b"connection", b"content-encoding", b"content-length")
    kept = [(name, value) for name, value in reply.headers.raw if name.lower() not in hop_by_hop]
    return [*kept, (b"content-length", str(len(reply.content)).encode())]
