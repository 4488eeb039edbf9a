"""RPC between two ends in one process: results, errors, order, back-pressure, and what happens when an end goes."""

from __future__ import annotations

import asyncio
import gc
import struct
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle.protocol.errors import InvalidRequest, ServerFault
from twinkle.server.serve import rpc
from twinkle.server.serve.rpc import Address, Call, Connection, ConnectionLost, Server


class Unreadable(Exception):
    """Can be pickled, and not read again."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Target:
    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.order: list[int] = []

    async def echo(self, *args: Any) -> Any:
        return args

    async def note(self, number: int) -> None:
        self.order.append(number)

    async def wait(self) -> str:
        await self.gate.wait()
        return "done"

    async def fail(self, kind: str) -> None:
        errors = {"user": InvalidRequest("rank: 0"), "odd": Unreadable(1, 2)}
        raise errors[kind]

    async def cancelled(self) -> None:
        raise asyncio.CancelledError

    async def large(self) -> bytes:
        return bytes(20_000_000)


@pytest.fixture
def target() -> Target:
    return Target()


@pytest.fixture(params=[None, "127.0.0.1"], ids=["file", "tcp"])
async def address(request: pytest.FixtureRequest, target: Target) -> AsyncIterator[Address]:
    ready = asyncio.get_running_loop().create_future()
    ready.set_result(target)
    server = Server(ready)
    yield await server.listen(request.param)
    server.close()
    await asyncio.sleep(0.01)  # it sees that callers have hung up, and closes its end


async def connect(address: Address, heartbeat_seconds: float = 60) -> Connection:
    return await Connection.connect(address, heartbeat_seconds)


async def test_results_come_back_and_leave_nothing_in_the_file_system(address: Address):
    connection = await connect(address)
    arrays = [np.arange(5), np.ones((2, 3), np.float32)]
    [back, text] = await connection.call(Call("echo", (arrays, "text")))
    assert text == "text"
    for mine, theirs in zip(back, arrays, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert address.socket is None or not Path(address.socket).parent.exists()
    connection.close()


async def test_arguments_may_be_named_and_results_left_behind(address: Address):
    connection = await connect(address)
    await connection.call(Call("note", kwargs={"number": 1}))
    assert await connection.call(Call("echo", (1,)), wants_result=False) is None
    connection.close()


async def test_calls_begin_in_order_and_one_that_waits_holds_up_no_other(address: Address, target: Target):
    connection = await connect(address)
    waiting = connection.call(Call("wait"))
    await asyncio.gather(*(connection.call(Call("note", (i,))) for i in range(50)))
    assert target.order == list(range(50))
    assert not waiting.done()
    waiting.cancel()
    assert await connection.call(Call("echo")) == ()
    connection.close()


async def test_large_values_arrive_whole(address: Address):
    connection = await connect(address)
    large = np.random.default_rng(0).bytes(20_000_000)
    assert await connection.call(Call("echo", (large,))) == (large,)
    connection.close()


async def test_errors_are_raised_as_they_were_with_the_place_they_came_from(address: Address):
    connection = await connect(address)
    with pytest.raises(InvalidRequest, match="rank: 0") as raised:
        await connection.call(Call("fail", ("user",)))
    assert "in fail" in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Unreadable: 1 and 2"):
        await connection.call(Call("fail", ("odd",)))
    with pytest.raises(AttributeError, match="nothing"):
        await connection.call(Call("nothing"))
    with pytest.raises(ServerFault, match="the sample was cancelled"):
        await asyncio.wait_for(connection.call(Call("cancelled")), 10)
    connection.close()


async def test_an_error_that_nobody_looks_at_is_not_logged(
    address: Address, caplog: pytest.LogCaptureFixture
):
    connection = await connect(address)
    connection.call(Call("fail", ("user",)))
    waiting = connection.call(Call("wait"))
    await connection.call(Call("echo"))
    connection.close()
    connection.call(Call("echo"))
    assert waiting.done()
    del waiting
    gc.collect()
    # Other libraries' threads may log in the same process; asyncio is who tells of errors that nobody looked at.
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def test_one_who_gives_up_on_a_call_disturbs_no_other(address: Address, target: Target):
    connection = await connect(address)
    given_up, waiting = connection.call(Call("wait")), connection.call(Call("wait"))
    given_up.cancel()
    target.gate.set()
    assert await waiting == "done"
    with pytest.raises(AttributeError, match="pickle"):
        connection.call(Call("echo", (lambda: None,)))
    assert await connection.call(Call("echo", (1,))) == (1,)
    connection.close()


async def test_calls_wait_for_what_is_called_and_raise_what_it_fails_with():
    for error in (None, InvalidRequest("model: not found")):
        ready = asyncio.get_running_loop().create_future()
        connection = await connect(await Server(ready).listen(None))
        call = connection.call(Call("echo", (1,)))
        await asyncio.sleep(0.02)
        assert not call.done()
        if error is None:
            ready.set_result(Target())
            assert await call == (1,)
        else:
            ready.set_exception(error)
            with pytest.raises(InvalidRequest, match="not found"):
                await call
        connection.close()


async def test_one_who_does_not_know_the_secret_is_hung_up_on(address: Address):
    connection = await connect(replace(address, secret=b"x" * 32))
    with pytest.raises(ConnectionLost):
        await asyncio.wait_for(connection.call(Call("echo")), 10)
    await check_answered(address)


async def check_answered(address: Address) -> None:
    """A caller that knows the secret still is."""
    connection = await connect(address)
    assert await connection.call(Call("echo", (1,))) == (1,)
    connection.close()


async def streams_to(address: Address) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.socket is not None:
        return await asyncio.open_unix_connection(address.socket)
    return await asyncio.open_connection(address.host, address.port)


async def test_one_who_says_nothing_is_hung_up_on(address: Address, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rpc, "_SECRET_SECONDS", 0.05)
    for said in (b"", address.secret[:-1]):
        reader, writer = await streams_to(address)
        writer.write(said)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
    monkeypatch.undo()
    await check_answered(address)


async def test_the_secret_may_arrive_in_parts(address: Address):
    reader, writer = await streams_to(address)
    for part in (address.secret[:7], address.secret[7:]):
        writer.write(part)
        await asyncio.sleep(0.02)
    connection = Connection(reader, writer, 60)
    assert await connection.call(Call("echo", (1,))) == (1,)
    connection.close()


async def test_one_who_reads_no_replies_has_no_further_calls_taken(address: Address, target: Target):
    reader, writer = await streams_to(address)
    calls = [Call("large"), Call("note", (1,))]
    writer.write(address.secret)
    for number, call in enumerate(calls, start=1):
        writer.write(struct.pack("<q?q", number, True, len(call.body)) + call.body)
        await asyncio.sleep(0.1)
    assert target.order == []
    numbers: list[int] = []
    while len(numbers) < len(calls):
        number, _, size = struct.unpack("<q?q", await reader.readexactly(17))
        numbers.append(number)
        await reader.readexactly(size)
    assert target.order == [1] and numbers == [1, 2]
    writer.close()


async def test_one_who_answers_no_heartbeats_is_lost():
    received = bytearray()

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while part := await reader.read(1000):
            received.extend(part)
        writer.close()

    server = await asyncio.start_server(deaf, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    connection = await connect(Address(None, host, port, b"secret"), 0.3)
    call = connection.call(Call("echo"))
    with pytest.raises(ConnectionLost, match=r"no heartbeat for 0\.3 s"):
        await asyncio.wait_for(call, 10)
    assert str(await connection.lost()) == "no heartbeat for 0.3 s"
    assert received.startswith(b"secret") and received.count(struct.pack("<q?q", 0, False, 0)) == 6
    server.close()


async def test_a_call_may_take_longer_than_heartbeats_do(address: Address, target: Target):
    connection = await connect(address, 0.1)
    call = connection.call(Call("wait"))
    await asyncio.sleep(0.5)
    target.gate.set()
    assert await call == "done"
    connection.close()


async def test_when_the_other_end_goes_whoever_waits_is_told(address: Address):
    connection = await connect(address)
    waiting = connection.call(Call("wait"))
    await connection.call(Call("echo"))
    connection._writer.transport.abort()
    with pytest.raises(ConnectionLost, match="its process ended, or the connection to it broke"):
        await asyncio.wait_for(waiting, 10)
    await asyncio.wait_for(connection.lost(), 10)
    with pytest.raises(ConnectionLost):
        await connection.call(Call("echo"))
