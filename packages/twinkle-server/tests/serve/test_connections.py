"""What strangers send before a key is asked for: bounded in bytes and in number, whatever else is under way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TypeAlias

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from twinkle.server.gateway.http import REPLY_PART_BYTES, BytesReply
from twinkle.server.serve import connections
from twinkle.server.serve.connections import MAX_AHEAD, MAX_HEAD_BYTES
from twinkle.server.serve.http import HttpServer

Connection: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def _echo(request: Request) -> Response:
    body = await request.body()
    headers = ",".join(sorted(name for name in request.headers if name.startswith("x-")))
    return PlainTextResponse(f"{len(body)} {headers}")


async def _unread(_request: Request) -> Response:
    return PlainTextResponse("unread")


async def _large(_request: Request) -> Response:
    return PlainTextResponse("l" * LARGE)


async def _bytes(_request: Request) -> Response:
    return BytesReply(BODY)


LARGE = 2**25
BODY = b"l" * LARGE
APP = Starlette(
    routes=[
        Route("/echo", _echo, methods=["GET", "POST"]),
        Route("/unread", _unread, methods=["POST"]),
        Route("/large", _large),
        Route("/bytes", _bytes),
    ]
)


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server, port = await start()
    yield port
    await server.close()


async def start(most: int | None = None) -> tuple[HttpServer, int]:
    server = await HttpServer.start(APP, "127.0.0.1", 0, max_connections=most)
    [listening] = server._server.servers  # pyright: ignore[reportPrivateUsage]
    return server, listening.sockets[0].getsockname()[1]


async def connect(port: int) -> Connection:
    return await asyncio.open_connection("127.0.0.1", port)


async def ask(connection: Connection, request: bytes) -> bytes:
    """The head and body of the next reply; empty if the connection was ended."""
    reader, writer = connection
    writer.write(request)
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    return head + await reader.readexactly(length)


GET = b"GET /echo HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: a\r\n"


async def flood(connection: Connection, beginning: bytes, part: bytes) -> tuple[int, bytes]:
    """How many bytes of `beginning` and parts without end are taken, and what is answered."""
    reader, writer = connection
    answer = asyncio.create_task(reader.read())
    sent = 0
    try:
        writer.write(beginning)
        while not answer.done() and sent < 64 * MAX_HEAD_BYTES:
            writer.write(part)
            sent += len(part)
            await writer.drain()
            await asyncio.sleep(0)
    except ConnectionError:
        pass
    try:
        return sent, await asyncio.wait_for(answer, 10)
    except ConnectionError:
        return sent, b""
    except TimeoutError:
        return sent, b"still open"


@pytest.mark.parametrize("part", [b"a" * 65_536, b"a" * 1000], ids=["large parts", "small parts"])
@pytest.mark.parametrize(
    "beginning",
    [b"GET /echo HTTP/1.1\r\nX-Long: ", b"GET /", b"GET /echo HTTP/1.1\r\n", b"GET /echo HTTP/1.1\r\nX"],
    ids=["value", "url", "no name", "name"],
)
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "second"])
async def test_a_head_without_end_is_ended(port: int, beginning: bytes, part: bytes, is_first: bool):
    connection = await connect(port)
    if not is_first:
        assert b"200 OK" in await ask(connection, GET)
    # What lies in the buffers of both sides is not read any more, but has been sent.
    taken, answer = await flood(connection, beginning, part)
    assert taken < 64 * MAX_HEAD_BYTES and b"still open" not in answer
    assert b"200" not in answer


async def test_many_headers_without_end_are_ended(port: int):
    taken, answer = await flood(await connect(port), b"GET /echo HTTP/1.1\r\n", b"a: b\r\n" * 100)
    assert taken < 64 * MAX_HEAD_BYTES and b"still open" not in answer


async def test_headers_up_to_the_limit_are_read_however_they_are_cut(port: int):
    request = b"GET /echo HTTP/1.1\r\nX-Long: " + b"a" * (MAX_HEAD_BYTES - 100) + b"\r\n\r\n"
    for size in (len(request), 777):
        connection = await connect(port)
        for start in range(0, len(request) - size, size):
            connection[1].write(request[start : start + size])
            await asyncio.sleep(0)
        rest = len(request) - (len(request) - 1) // size * size
        assert b"200 OK" in await ask(connection, request[-rest:])
        assert b"200 OK" in await ask(connection, GET)


async def test_a_large_body_in_one_piece_with_its_head_is_read(port: int):
    body = b"b" * 3_000_000
    request = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    connection = await connect(port)
    for _ in range(2):
        assert (await ask(connection, request)).endswith(b"3000000 ")


@pytest.mark.parametrize(
    ("beginning", "part"),
    [(b"0\r\nX-Trailer: ", b"t" * 4096), (b"5;x=", b"e" * 4096), (b"0\r\n", b"a: b\r\n" * 500)],
    ids=["trailer", "extension", "trailers"],
)
async def test_what_stands_around_a_body_is_bounded_too(port: int, beginning: bytes, part: bytes):
    head = POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    taken, answer = await flood(await connect(port), head + beginning, part)
    assert taken < 64 * MAX_HEAD_BYTES and b"still open" not in answer


async def test_a_trailer_is_no_header(port: int):
    connection = await connect(port)
    request = POST + b"X-Mine: 1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"
    connection[1].write(request)
    await asyncio.sleep(0.01)
    answer = await ask(connection, b"0\r\nX-Api-Key: stolen\r\n\r\n")
    assert answer.endswith(b"5 x-mine")


async def test_silence_is_ended_by_a_timer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.05)
    monkeypatch.setattr(connections, "UNREAD_BODY_SECONDS", 0.05)
    server, port = await start()
    silent, slow, second, unread = [await connect(port) for _ in range(4)]
    slow[1].write(GET[:-2])
    assert b"200 OK" in await ask(second, GET)
    second[1].write(b"GET /ec")
    assert b"unread" in await ask(unread, b"POST /unread HTTP/1.1\r\nContent-Length: 5\r\n\r\n123")
    for reader, _ in (silent, slow, second, unread):
        assert await reader.read() == b""
    await server.close()


async def test_who_reads_nothing_of_an_answer_is_ended_and_who_reads_slowly_is_not(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(connections, "UNREAD_ANSWER_SECONDS", 0.3)
    server, port = await start()
    deaf, slow = [await asyncio.open_connection("127.0.0.1", port, limit=2**12) for _ in range(2)]
    for _, writer in (deaf, slow):
        writer.write(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
    got = 0
    while got < LARGE // 2:
        got += len(await slow[0].read(2**18))
        await asyncio.sleep(0.005)
    while len(server._server.server_state.connections) > 1:  # pyright: ignore[reportPrivateUsage]
        if got < LARGE:
            got += len(await slow[0].read(2**16))
        await asyncio.sleep(0.005)
    while got < LARGE:
        got += len(await slow[0].read(2**20))
    deaf[1].close()
    await server.close()


async def test_requests_sent_ahead_of_their_answers_are_few(port: int):
    connection = await connect(port)
    few = MAX_AHEAD
    connection[1].write(GET * few)
    for _ in range(few):
        assert b"200 OK" in await ask(connection, b"")
    reader, writer = await connect(port)
    writer.write(POST + b"Content-Length: 5\r\n\r\nhello" + GET * 10 * MAX_AHEAD)
    with contextlib.suppress(ConnectionError):
        assert (await reader.read()).count(b"200 OK") <= 1 + MAX_AHEAD


async def test_of_an_answer_that_many_ask_for_and_nobody_reads_there_is_one_copy():
    server, port = await start()
    deaf = [await asyncio.open_connection("127.0.0.1", port, limit=2**12) for _ in range(8)]
    for _, writer in deaf:
        writer.write(b"GET /bytes HTTP/1.1\r\nHost: a\r\n\r\n")
    held = list[int]()
    while len(held) < 8 or min(held) == 0:
        await asyncio.sleep(0.005)
        held = bytes_held(server)
    await asyncio.sleep(0.05)
    assert max(bytes_held(server)) <= 2 * REPLY_PART_BYTES
    for reader, writer in deaf[:2]:
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-length: %d\r\n" % LARGE in head
        assert await reader.readexactly(LARGE) == b"l" * LARGE
        assert b"200 OK" in await ask((reader, writer), GET)
    for _, writer in deaf:
        writer.close()
    await server.close()


def bytes_held(server: HttpServer) -> list[int]:
    """For each connection, what its client has not read yet."""
    connections = server._server.server_state.connections  # pyright: ignore
    return [each.transport.get_write_buffer_size() for each in connections]


async def test_the_longest_silent_gives_way_and_none_that_is_being_answered():
    server, port = await start(most=16)
    busy = await connect(port)
    busy[1].write(POST + b"Content-Length: 5\r\n\r\n123")
    known = await connect(port)
    assert b"200 OK" in await ask(known, GET)
    silent = [await connect(port) for _ in range(40)]
    another = await connect(port)
    assert b"200 OK" in await ask(another, GET)
    assert b"200 OK" in await ask(known, GET)  # a stranger's silence weighs less
    assert (await ask(busy, b"45")).endswith(b"5 ")
    assert await silent[0][0].read() == b""
    assert await ask(silent[-1], GET)
    await server.close()


async def test_where_all_are_being_answered_the_new_one_is_refused():
    server, port = await start(most=16)
    busy = [await connect(port) for _ in range(16)]
    for _, writer in busy:
        writer.write(POST + b"Content-Length: 5\r\n\r\n123")
    await asyncio.sleep(0.05)
    assert await ask(await connect(port), GET) == b""
    for connection in busy:
        assert (await ask(connection, b"45")).endswith(b"5 ")
    assert b"200 OK" in await ask(await connect(port), GET)
    await server.close()


async def test_nonsense_leaves_no_line_in_the_log(port: int, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        for nonsense in (b"\x16\x03\x01\r\n\r\n", b"GET  / HTTP/9\r\n\r\n", GET[:-2] + b"Upgrade: h2c\r\n"):
            reader, writer = await connect(port)
            writer.write(nonsense + b"Connection: upgrade\r\n\r\n")
            await asyncio.wait({asyncio.create_task(reader.read(10))}, timeout=1)
            writer.close()
    # Threads of the SDK, left by other tests of the process, may warn that their servers are gone.
    ours = [record for record in caplog.records if not record.name.startswith("tinker")]
    assert [record for record in ours if record.levelno >= logging.WARNING] == []
