"""Calls over a socket, between two ends in one process: results, errors, order, and what happens when an end goes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twinkle.protocol.errors import InvalidRequest
from twinkle.server.serve.rpc import Address, Call, Line, LineBroken, listen


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


@pytest.fixture(params=[None, "127.0.0.1"], ids=["file", "tcp"])
async def address(request: pytest.FixtureRequest) -> Address:
    return await listen(Target(), request.param)


async def test_results_come_back_and_leave_nothing_in_the_file_system(address: Address):
    line = await Line.connect(address)
    arrays = [np.arange(5), np.ones((2, 3), np.float32)]
    [back, text] = await line.call(Call("echo", (arrays, "text")))
    assert text == "text"
    for mine, theirs in zip(back, arrays, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert address.socket is None or not Path(address.socket).parent.exists()
    line.close()


async def test_calls_begin_in_order_and_one_that_waits_holds_up_no_other(address: Address):
    line = await Line.connect(address)
    waiting = asyncio.create_task(line.call(Call("wait")))
    await asyncio.gather(*(line.call(Call("note", (i,))) for i in range(50)))
    assert not waiting.done()
    waiting.cancel()
    assert await line.call(Call("echo")) == ()
    line.close()


async def test_large_values_arrive_whole(address: Address):
    line = await Line.connect(address)
    large = np.random.default_rng(0).bytes(20_000_000)
    assert await line.call(Call("echo", (large,))) == (large,)
    line.close()


async def test_errors_are_raised_as_they_were_with_the_place_they_came_from(address: Address):
    line = await Line.connect(address)
    with pytest.raises(InvalidRequest, match="rank: 0") as raised:
        await line.call(Call("fail", ("user",)))
    assert "in fail" in raised.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Unreadable: 1 and 2"):
        await line.call(Call("fail", ("odd",)))
    with pytest.raises(AttributeError, match="nothing"):
        await line.call(Call("nothing"))
    line.close()


async def test_one_who_does_not_know_the_secret_is_hung_up_on(address: Address):
    line = await Line.connect(replace(address, secret=b"x" * 32))
    with pytest.raises(LineBroken):
        await asyncio.wait_for(line.call(Call("echo")), 10)
    known = await Line.connect(address)  # who does is still answered
    assert await known.call(Call("echo", (1,))) == (1,)
    known.close()


async def test_when_the_other_end_goes_whoever_waits_is_told(address: Address):
    line = await Line.connect(address)
    waiting = asyncio.create_task(line.call(Call("wait")))
    await line.call(Call("echo"))
    line._writer.transport.abort()
    with pytest.raises(LineBroken):
        await asyncio.wait_for(waiting, 10)
    await asyncio.wait_for(line.broken(), 10)
    with pytest.raises(LineBroken):
        await line.call(Call("echo"))
