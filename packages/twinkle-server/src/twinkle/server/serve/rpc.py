"""Calls from one process to another over a socket of their own: a method's name and arguments there, its result back.

Ray starts the processes, watches and ends them; calls between them go this way because one costs a twentieth of a call
to a Ray actor. On one machine the socket is a file in a directory that only this user can read, which goes as soon as
it is connected; between machines it is TCP. Either way the caller first says a secret that it was told by way of Ray,
and nothing is unpickled for one who doesn't know it.

    frame: number of the call (8 bytes), size (8 bytes), pickled (method, arguments) or (has succeeded, value)
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import pickle
import secrets
import shutil
import struct
import tempfile
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

_HEADER = struct.Struct("<qq")
_SECRET_BYTES = 32
# Rows of a tick are some hundred kilobytes: a reader that is paused less often is woken less often.
_BUFFER_BYTES = 4 * 2**20

# Servers that wait for their caller: an event loop may hold them by weak references only.
_listening: set[asyncio.Server] = set()


class LineBroken(ConnectionError):
    """The other process has ended, or can't be reached any more."""


@dataclass(frozen=True)
class Address:
    """Where a process takes calls.

    Attributes:
        socket: of a file, on this machine; None between machines.
        secret: to be said first.
    """

    socket: str | None
    host: str
    port: int
    secret: bytes


@dataclass(frozen=True)
class Call:
    """A method's name and arguments; pickled once, to however many processes it goes."""

    method: str
    args: tuple[Any, ...] = ()

    @cached_property
    def body(self) -> bytes:
        return pickle.dumps((self.method, self.args), pickle.HIGHEST_PROTOCOL)


# ---------------------------------------------------------------- the side that is called


async def listen(target: object, host: str | None) -> Address:
    """Take calls of `target`'s async methods from one caller, on the running loop, until it hangs up.

    Args:
        host: this machine's address, for a caller on another one; None for a caller on this machine.
    """
    secret = secrets.token_bytes(_SECRET_BYTES)
    directory = tempfile.mkdtemp(prefix="twinkle-") if host is None else None

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = await reader.read(_SECRET_BYTES)
        if not hmac.compare_digest(said, secret):
            writer.close()
            return
        _listening.discard(server)
        server.close()  # there is one caller
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
        await _answer_calls(target, reader, writer)

    if directory is not None:
        path = str(Path(directory) / "calls")
        server = await asyncio.start_unix_server(connected, path, limit=_BUFFER_BYTES)
        address = Address(path, "", 0, secret)
    else:
        server = await asyncio.start_server(connected, host, 0, limit=_BUFFER_BYTES)
        address = Address(None, str(host), server.sockets[0].getsockname()[1], secret)
    _listening.add(server)
    return address


async def _answer_calls(target: object, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    answering: set[asyncio.Task[None]] = set()
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            number, body = await _read_frame(reader)
            task = asyncio.create_task(_answer(target, number, body, writer))
            answering.add(task)
            task.add_done_callback(answering.discard)
    writer.close()


async def _answer(target: object, number: int, body: bytes, writer: asyncio.StreamWriter) -> None:
    try:
        method, args = pickle.loads(body)
        work: Callable[..., Awaitable[Any]] = getattr(target, method)
        reply = pickle.dumps((True, await work(*args)), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        reply = _dump_error(error)
    _write_frame(writer, number, reply)


def _dump_error(error: BaseException) -> bytes:
    """With what is known of the place where it was raised as a note, for the log of the caller."""
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    try:
        reply = pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)
        pickle.loads(reply)  # some exceptions can be written and not read
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.add_note(error.__notes__[-1])
        reply = pickle.dumps((False, told), pickle.HIGHEST_PROTOCOL)
    return reply


# ---------------------------------------------------------------- the side that calls


class Line:
    """A connection to a process that takes calls. Single-threaded: used on one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._calls = 0
        self._is_broken = False
        self._reading = asyncio.create_task(self._read(reader))

    @classmethod
    async def connect(cls, address: Address) -> Line:
        """
        Raises:
            OSError: if nobody listens there.
        """
        if address.socket is not None:
            streams = await asyncio.open_unix_connection(address.socket, limit=_BUFFER_BYTES)
        else:
            streams = await asyncio.open_connection(address.host, address.port, limit=_BUFFER_BYTES)
        streams[1].write(address.secret)
        return cls(*streams)

    async def call(self, call: Call) -> Any:
        """What the method returned.

        Raises:
            LineBroken: if the process ends before it has answered.
            Exception: what the method raised.
        """
        if self._is_broken:
            raise LineBroken
        self._calls += 1
        number = self._calls
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            _write_frame(self._writer, number, call.body)
            succeeded, value = pickle.loads(await waiting)
        finally:
            self._waiting.pop(number, None)
        if not succeeded:
            raise value
        return value

    async def broken(self) -> None:
        """Until the process has ended, or hung up."""
        await asyncio.shield(self._reading)

    def close(self) -> None:
        self._reading.cancel()
        self._break()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                number, body = await _read_frame(reader)
                waiting = self._waiting.get(number)
                if waiting is not None and not waiting.done():
                    waiting.set_result(body)
        self._break()

    def _break(self) -> None:
        self._is_broken = True
        self._writer.close()
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(LineBroken())


# ---------------------------------------------------------------- both


def _write_frame(writer: asyncio.StreamWriter, number: int, body: bytes) -> None:
    writer.write(_HEADER.pack(number, len(body)))
    writer.write(body)


async def _read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    number, size = _HEADER.unpack(await reader.readexactly(_HEADER.size))
    return number, await reader.readexactly(size)
