from __future__ import annotations

import asyncio
import socket

import httpx
import pytest

from twinkle.protocol.errors import ConnectionFailed
from twinkle_client import http_clients
from twinkle_client.http_clients import HttpClients
from twinkle_client.settings import Settings


class Counting:
    """A server that says hello once `together` requests are there, and counts its connections."""

    def __init__(self, together: int) -> None:
        self.begun = 0
        self.open = 0
        self._barrier = asyncio.Barrier(together)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.begun += 1
        self.open += 1
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await self._barrier.wait()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")
        except asyncio.IncompleteReadError:
            self.open -= 1
        finally:
            writer.close()


async def in_flight(clients: HttpClients, count: int) -> None:
    replies = await asyncio.gather(*(clients.request("GET", "/") for _ in range(count)))
    assert [reply.text for reply in replies] == ["hello"] * count


def test_each_request_in_flight_has_a_connection_which_the_next_one_takes_over() -> None:
    async def check() -> None:
        counting = Counting(together=8)
        server = await asyncio.start_server(counting.connected, "127.0.0.1", 0)
        clients = HttpClients(Settings(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None))
        for _ in range(3):
            await in_flight(clients, 8)
        assert (counting.begun, counting.open) == (8, 8)
        await clients.aclose()
        async with asyncio.timeout(10):
            while counting.open:
                await asyncio.sleep(0.01)
        server.close()

    asyncio.run(check())


def test_what_is_unused_for_long_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        counting = Counting(together=1)
        server = await asyncio.start_server(counting.connected, "127.0.0.1", 0)
        clients = HttpClients(Settings(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None))
        await in_flight(clients, 4)
        assert counting.begun == 4
        monkeypatch.setattr(http_clients, "MAX_IDLE_SECONDS", 0.0)
        for _ in range(3):  # each closes one of those that it didn't need
            await in_flight(clients, 1)
        async with asyncio.timeout(10):
            while counting.open > 1:
                await asyncio.sleep(0.01)
        assert counting.begun == 4
        await clients.aclose()
        server.close()

    asyncio.run(check())


def test_a_cancelled_request_leaves_a_client_that_can_be_used() -> None:
    async def check() -> None:
        counting = Counting(together=2)
        server = await asyncio.start_server(counting.connected, "127.0.0.1", 0)
        clients = HttpClients(Settings(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", None))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(clients.request("GET", "/"), 0.5)  # alone: there is no answer
        await in_flight(clients, 1)  # with the one that the server still has
        await clients.aclose()
        server.close()

    asyncio.run(check())


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    async def check() -> None:
        clients = HttpClients(Settings(f"http://127.0.0.1:{port}", None))
        for _ in range(2):
            with pytest.raises(httpx.TransportError):
                await clients.request("GET", "/")
        await clients.aclose()

    asyncio.run(check())


def test_a_proxy_that_can_not_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://proxy:1")
    with pytest.raises(ConnectionFailed, match="mend the variable"):
        HttpClients(Settings("http://example.invalid", None))
